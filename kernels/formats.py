"""How weights lie in a slot when they are not floats: codes, and what makes a number of a code.

Plain data that every expert kernel and every checkpoint format agrees on. The many formats of published checkpoints
(offload/formats) are rearranged into these few without losing a bit:

    code    one element        value of a code                      holds
    e4m3    float8_e4m3fn      as torch widens it                   FP8: block, channel, tensor scales
    int8    int8               itself                               int8; GPTQ 8 bits and packed int8, less 128
    int4    nibble, offset 8   nibble - 8                           GPTQ, AWQ, compressed-tensors int4
    e2m1    nibble             E2M1[nibble]                         MXFP4, NVFP4, FP4 of DeepSeek-V4
    lut4    nibble             table[nibble], 16 fp32 of the matrix NF4
    nested  planes of bits     kernels/nested.py                    2, 3, 4 or 8 bits, as the slot says
    bf12    12 bits            kernels/bf12.py                      bf16, without loss

A matrix [n, k] lies row by row with k contiguous; of nibbles, element 2j is in the low half of byte j, 2j + 1 in the
high half, and a row takes ceil(k / 2) bytes: the last half byte of an odd row means nothing. In fp32:

    W[r, c] = (value(code[r, c]) - zero[b]) * (scale[b] * factor)      b = (r // rows, c // columns), or (r // rows,
                                                                       group_of[c]) where columns are grouped freely

`code_values` and `decode` are the twin of every kernel that decodes in registers.
"""

# mypy: allow-untyped-calls

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe.kernels.bf12 import bytes_of_row, decode_bf12
from moe.kernels.nested import nested_values, plane_bytes

CodeName = Literal["e4m3", "int8", "int4", "e2m1", "lut4", "nested", "bf12"]
NIBBLE_CODES: frozenset[CodeName] = frozenset({"int4", "e2m1", "lut4"})
CODE_DTYPES: dict[CodeName, torch.dtype] = {
    "e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
    "e2m1": torch.uint8,
    "lut4": torch.uint8,
    "nested": torch.uint8,
    "bf12": torch.uint8,
}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.float8_e4m3fn)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Residual(NamedTuple):
    """What refines the base of a nested matrix [n, k], in slots that hold at most `most` bits of it (nested.py).

    bits: int32 [S, 1], how many of a slot mean anything; codes: uint8 [S, P * n, bytes of the plane], scales of 3 and 4
    bits uint8 [S, P, n, G], of 8 bits float16.
    """

    bits: Tensor
    codes3: Tensor | None = None
    scale3: Tensor | None = None
    codes4: Tensor | None = None
    scale4: Tensor | None = None
    codes8: Tensor | None = None
    scale8: Tensor | None = None

    @property
    def most(self) -> int:
        return 8 if self.codes8 is not None else 4 if self.codes4 is not None else 3 if self.codes3 is not None else 2


class Coding(NamedTuple):
    """What turns the codes of one matrix [n, k] into weights, in every slot of a slab of S.

    P parts: 2 where the matrix is gate and up, which are matrices of n rows each however their rows are stored, else
    1. One slot's part of every tensor is contiguous; the slot stride is larger. G = ceil(k / columns), or the number
    of groups.
    """

    code: CodeName
    block: tuple[int, int]  # rows and columns that share a scale; either may exceed the matrix
    scale: Tensor  # [S, P, ceil(n / rows), G], one of SCALE_DTYPES; of bf12 the rows' words, int32 [S, P, n, 1 + R]
    zero: Tensor | None = None  # int8 [S, P, ceil(n / rows), G]; of int8 and int4 only
    factor: Tensor | None = None  # fp32 [S, P], multiplies the scales (NVFP4)
    table: Tensor | None = None  # of lut4 fp32 [S, P, 16]; of bf12 absent, or int32 [1, A] of all slots (bf12.py)
    group_of: Tensor | None = None  # int32 [S, P, k], the group of each column (GPTQ with act-order)
    residual: Residual | None = None  # of nested only, whose codes and scales are those of the base

    @property
    def name(self) -> str:
        """All that a kernel is compiled for: "int4 1x128 float16 zeros"."""
        if self.code == "bf12":
            return "bf12"
        more = ((self.zero, "zeros"), (self.factor, "factors"), (self.group_of, "groups"))
        rows, columns = self.block
        code = self.code if self.residual is None else f"{self.code}{self.residual.most}"
        words = [code, f"{rows}x{columns}", str(self.scale.dtype)[6:], *(w for t, w in more if t is not None)]
        return " ".join(words)


def bytes_per_row(code: CodeName, columns: int) -> int:
    if code == "nested":
        return plane_bytes(2, columns)
    if code == "bf12":
        return bytes_of_row(columns)
    return (columns + 1) // 2 if code in NIBBLE_CODES else columns


def code_values(codes: Tensor, code: CodeName, columns: int, table: Tensor | None = None) -> Tensor:
    """The codes' values in fp32. codes: [..., bytes_per_row]; table: [16] of lut4. Returns [..., columns]."""
    if code not in NIBBLE_CODES:
        return codes.float()
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)[..., :columns]
    if code == "int4":
        return nibbles.float() - 8
    values = torch.tensor(E2M1, device=codes.device) if table is None else table
    return values[nibbles.int()]


def decode(codes: Tensor, coding: Coding, columns: int, slot: int, *, interleaved: bool = False) -> Tensor:
    """One slot's matrix in fp32. codes: of that slot, [P * n, bytes_per_row]. Returns [P * n, columns].

    interleaved: rows are those of part 0 and part 1 in turn, as a gated activation may ask for it.
    """
    parts = coding.scale.shape[1]

    def apart(rows: Tensor) -> Tensor:
        each: Tensor = rows.unflatten(0, (-1, parts) if interleaved else (parts, -1))
        return each.transpose(0, 1) if interleaved else each

    if coding.residual is None:
        decoded = [_decode_part(part, coding, columns, slot, p) for p, part in enumerate(apart(codes))]
    else:
        bits, *more = coding.residual
        own = (None if t is None else t[slot] if t.dim() == 4 else apart(t[slot]) for t in more)
        decoded = list(
            nested_values((apart(codes), coding.scale[slot], *own), int(bits[slot, 0]), columns, coding.block[1])
        )
    if parts == 1:
        return decoded[0]
    return torch.stack(decoded, 1).flatten(0, 1) if interleaved else torch.cat(decoded)


def _decode_part(codes: Tensor, coding: Coding, columns: int, slot: int, part: int) -> Tensor:
    """codes: [n, bytes_per_row]. Returns [n, columns] in fp32."""
    if coding.code == "bf12":
        table = None if coding.table is None else coding.table[0]
        return decode_bf12(codes, coding.scale[slot, part], columns, table).float()
    values = code_values(codes, coding.code, columns, None if coding.table is None else coding.table[slot, part])
    scale = coding.scale[slot, part].float()
    if coding.factor is not None:
        scale = scale * coding.factor[slot, part]
    row = torch.arange(len(codes), device=codes.device) // coding.block[0]
    if coding.group_of is None:
        column = torch.arange(columns, device=codes.device) // coding.block[1]
    else:
        column = coding.group_of[slot, part].long()
    if coding.zero is not None:
        values.sub_(coding.zero[slot, part].float()[row][:, column])
    return values.mul_(scale[row][:, column])
