"""bf16 weights in 12 bits, without loss: signs and mantissas as they are, exponents as one of 15 neighbours.

The weights of a row differ in size, but hardly one lies 2^15 below the largest. Of the 8 bits of an exponent 4 are
kept, which count down from the row's `highest`; code 15 is the exponent 0 (zeros and subnormals). The few weights
whose exponents are none of these are rare, and told apart, with all of their exponent. (ZipNN and DFloat11 code the
same bits by entropy, in about 11; these have one length, so that a row is decoded in registers and a slot has one
size.)

    codes  uint8 [n, 192 * ceil(k / 128)]   of every 128 columns: 128 bytes, the sign and 7 bits of mantissa of each
                                            weight, then 64 bytes of 2 exponents; padded with zeros
    words  int32 [n, 1 + R]                 highest + 256 * number of rare weights; then of each of these, by column,
                                            its exponent + 256 * its column
    table  int32 [A]                        where a slab has one: of rows with more than R rare weights these, from the
                                            place on that their second word says; without it there are at most R

In 64 bytes of signs and mantissas the weight 32 h + 8 l + i (h < 2, l < 4, i < 8) is byte 16 l + 8 h + i, so that what
interleaves bytes within 16 of them brings neighbours together. Byte j of the exponents has in its low half the one of
byte j, in its high half that of byte 64 + j.
"""

# mypy: allow-untyped-calls

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK, BLOCK_BYTES = 128, 192
_NEIGHBOURS, _ZERO = 15, 15
_PLACES = torch.arange(64).view(2, 4, 8).transpose(0, 1).flatten()  # the weight that each byte of 64 is of


class ShortFloats(NamedTuple):
    codes: Tensor  # uint8 [n, bytes_of_row(k)]
    words: Tensor  # int32 [n, 1 + R]


def bytes_of_row(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK_BYTES


def most_rare(w: Tensor) -> int:
    """How many weights of a row are rare, at least, in the row that has most. w: bf16 [n, k]. Costs 1 KiB a row."""
    exponent = _exponents(_bits(w))
    return int(_num_rare(exponent, _best_highest(exponent)).max())


def encode_bf12(w: Tensor, rare: int) -> ShortFloats:
    """w: bf16 [n, k], of any bits; R = rare. A row's `highest` is its own, unless more than R are rare then.

    Of a row that has more in any case the first word says how many, and the others the first R.
    """
    bits = _bits(w)
    exponent = _exponents(bits)
    own = exponent.amax(1)
    highest = torch.where(_num_rare(exponent, own) <= rare, own, _best_highest(exponent))
    is_rare = _is_rare(exponent, highest)
    below = highest[:, None] - exponent
    code = torch.where(is_rare | (exponent == 0), _ZERO, below)
    words = torch.zeros(len(w), 1 + rare, dtype=torch.int32)
    words[:, 0] = highest + 256 * is_rare.sum(1)
    row, column = is_rare.nonzero(as_tuple=True)
    place = (is_rare.cumsum(1) - 1)[row, column]
    row, column, place = (t[place < rare] for t in (row, column, place))
    words[row, 1 + place] = exponent[row, column] + 256 * column.int()
    kept = bits >> 8 & 0x80 | bits & 0x7F
    more = -w.shape[1] % BLOCK
    kept, code = (F.pad(t, (0, more), value=value).view(len(w), -1, 2, 64) for t, value in ((kept, 0), (code, _ZERO)))
    kept, code = kept[..., _PLACES].byte(), code[..., _PLACES].byte()
    block = torch.cat((kept.flatten(2), code[:, :, 0] | code[:, :, 1] << 4), dim=2)
    return ShortFloats(block.flatten(1), words)


def rare_words(w: Tensor, highest: int) -> Tensor:
    """Of every rare weight of a row its exponent + 256 * its column, by column: int32 [number]. w: bf16 [k]."""
    exponent = _exponents(_bits(w))
    column = _is_rare(exponent[None], torch.tensor([highest]))[0].nonzero()[:, 0]
    return exponent[column] + 256 * column.int()


def decode_bf12(codes: Tensor, words: Tensor, columns: int, table: Tensor | None = None) -> Tensor:
    """What `encode_bf12` was given, bit for bit: bf16 [n, columns]. table: int32 [A], as the module says."""
    block = codes.view(len(codes), -1, BLOCK_BYTES)
    halves = block[..., BLOCK:]
    code = torch.stack((halves & 15, halves >> 4), dim=2).int()
    kept = block[..., :BLOCK].unflatten(2, (2, 64)).int()
    exponent = torch.where(code == _ZERO, 0, (words[:, 0] & 255).view(-1, 1, 1, 1) - code)
    bits = (kept & 0x80) << 8 | (exponent & 255) << 7 | kept & 0x7F
    natural = torch.empty_like(_PLACES)
    natural[_PLACES] = torch.arange(64)
    bits = bits[..., natural.to(codes.device)].flatten(1)[:, :columns].contiguous()
    num, room = words[:, :1] >> 8, words.shape[1] - 1
    is_meant = torch.arange(room, device=words.device) < torch.where(num > room, 0 if table is not None else room, num)
    row, of = is_meant.nonzero(as_tuple=True)
    _set_exponents(bits, row, words[row, 1 + of])
    if table is not None:
        for over in (num[:, 0] > room).nonzero()[:, 0]:
            told = table[words[over, 1] :][: int(num[over])]
            _set_exponents(bits, over.expand(len(told)), told)
    decoded: Tensor = bits.to(torch.int16).view(torch.bfloat16)
    return decoded


def _set_exponents(bits: Tensor, row: Tensor, words: Tensor) -> None:
    is_there = (words >= 0) & (words >> 8 < bits.shape[1])  # a file may say anything
    row, column, words = row[is_there], (words >> 8).long()[is_there], words[is_there]
    bits[row, column] = bits[row, column] & 0x807F | (words & 255) << 7


def _bits(w: Tensor) -> Tensor:
    return w.contiguous().view(torch.int16).int() & 0xFFFF


def _exponents(bits: Tensor) -> Tensor:
    return bits >> 7 & 255


def _is_rare(exponent: Tensor, highest: Tensor) -> Tensor:
    below = highest[:, None] - exponent
    return (exponent > 0) & ((below < 0) | (below >= _NEIGHBOURS))


def _num_rare(exponent: Tensor, highest: Tensor) -> Tensor:
    return _is_rare(exponent, highest).sum(1)


def _best_highest(exponent: Tensor) -> Tensor:
    """Of each row the highest of the 15 neighbours that most weights have, of several the highest: int32 [n]."""
    counts = torch.zeros(len(exponent), 256, dtype=torch.int32)
    counts.scatter_add_(1, exponent.long(), torch.ones_like(exponent))
    counts[:, 0] = 0
    upto = F.pad(counts.cumsum(1, dtype=torch.int32), (1, 0))
    inside = upto[:, _NEIGHBOURS:] - upto[:, :-_NEIGHBOURS]
    last = (inside.flip(1) == inside.amax(1, keepdim=True)).int().argmax(1)
    return (255 - last).int()
