"""bf16 to bf12 through the compiled helper, about as fast as memory is read; kernels/bf12.py is its twin."""

import torch
from torch import Tensor

from moe.kernels.bf12 import bytes_of_row, encode_bf12, most_rare
from moe.kernels.cpu import load_helper


def shorten(w: Tensor, codes: Tensor, words: Tensor, *, interleaved: bool = False, isa: int = 0) -> int:
    """Makes bf12 of w, bf16 [P * n, k]. codes: uint8 [P * n, bytes of a row]; words: int32 [P, n, 1 + R]; contiguous.

    interleaved: rows of w are those of each part in turn. Returns how many rows have more than R rare weights: of these
    `rare_words` are to be told elsewhere.
    """
    parts, _, width = words.shape
    room, helper = width - 1, load_helper()
    if codes.shape != (len(w), bytes_of_row(w.shape[1])) or words.shape[:2].numel() != len(w):
        raise ValueError(f"{list(codes.shape)} codes and {list(words.shape)} words are not of {list(w.shape)}")
    if not (w.is_contiguous() and codes.is_contiguous() and words.is_contiguous()):
        raise ValueError("weights, codes and words must be contiguous")
    if helper is None:
        made = encode_bf12(w, room)
        codes.copy_(made.codes)
        words.copy_(made.words.view(-1, parts, width).transpose(0, 1) if interleaved else made.words.view(words.shape))
        return int((words[..., 0] >> 8 > room).sum())
    woven = parts if interleaved else 1
    return int(
        helper.moe_cpu_shorten(w.data_ptr(), len(w), w.shape[1], woven, room, codes.data_ptr(), words.data_ptr(), isa)
    )


def most_rare_of(w: Tensor) -> int:
    """As `most_rare`."""
    if load_helper() is None:
        return most_rare(w)
    codes = torch.empty(len(w), bytes_of_row(w.shape[1]), dtype=torch.uint8)
    words = torch.empty(1, len(w), 1, dtype=torch.int32)
    shorten(w, codes, words)
    return int(words.max()) >> 8
