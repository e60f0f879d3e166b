"""Our own bf16 in 12 bits (kernels/bf12.py), as `moe pack --dense bf12` writes linear layers: nothing is lost.

X.weight_bf12 U8 [N, bytes], X.weight_words I32 [N, 1 + R], X.weight_shape I64 [N, K]
"""

import torch

from moe.kernels.bf12 import bytes_of_row
from moe.offload.formats.slot import BF12
from moe.offload.formats.stored import Group, Quantisation, Source, StoredMatrix


def bf12(group: Group, said: Quantisation) -> StoredMatrix | None:
    codes, words, shape = (group.tensors.get(role) for role in ("bf12", "words", "shape"))
    if codes is None:
        return None
    if words is None or shape is None:
        raise ValueError(f"{group.keys['bf12']} has not both of weight_words and weight_shape beside it")
    group.elements("bf12", (torch.uint8,))
    group.elements("words", (torch.int32,))
    n = codes.shape[0] if codes.shape else 0
    k = group.columns(n, codes.shape, words.shape)
    if codes.shape != (n, bytes_of_row(k)) or words.shape[:-1] != (n,) or words.shape[1] < 1:
        raise ValueError(f"{group.name}: {list(codes.shape)} bytes and {list(words.shape)} words are not of {[n, k]}")
    layout = BF12._replace(rare=words.shape[1] - 1)
    return group.matrix("bf12, lossless", (n, k), layout, {"": Source((codes,)), ".scale": Source((words,))})
