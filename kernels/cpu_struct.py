"""What the compiled helper reads of a matrix: addresses, strides and codings as the structs of cpu_experts.h."""

from struct import Struct

import torch
from torch import Tensor

from moe.kernels.formats import Coding

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALE_KINDS = {**KINDS, torch.float8_e8m0fnu: 3, torch.float8_e4m3fn: 4, torch.int32: 6}
_CODES = {"e4m3": 0, "int8": 1, "int4": 2, "e2m1": 3, "lut4": 4, "nested": 5, "bf12": 6}
MOST_COLUMNS = 65536  # of a matrix of codes: scratch memory is sized for it
MATRIX = Struct("=42q")  # struct matrix: 9 and whether it is coded, then the 32 of struct coding
BLOCK = Struct(f"={5 * MATRIX.size}s18q3f4x")  # struct block: five matrices, 7 pointers, 11 integers, 3 floats
STEP = Struct("=18q")  # struct step
STAGE = Struct("=4q")  # struct stage
CHOICE = Struct("=10q")  # struct choice
_NO_CODING = (0,) * 33
_NO_RESIDUAL = (None,) * 7


def pack_matrix(
    weight: Tensor, bias: Tensor | None, coding: Coding | None, columns: int, *, interleaved: bool = False
) -> bytes:
    """struct matrix of slots of weights. weight: [S, N, K], or codes of K = `columns`; bias: [S, N]."""
    bias_at, bias_slot, bias_kind = 0, 0, 0
    if bias is not None:
        bias_at, bias_slot, bias_kind = bias.data_ptr(), bias.stride(0) * bias.itemsize, KINDS[bias.dtype]
    strides = weight.stride(0) * weight.itemsize, weight.stride(1) * weight.itemsize
    kind = KINDS[weight.dtype] if coding is None else 0
    own = weight.data_ptr(), bias_at, *strides, bias_slot, weight.shape[1], columns, kind, bias_kind
    return MATRIX.pack(*own, *(_NO_CODING if coding is None else _pack_coding(coding, interleaved)))


def _pack_coding(coding: Coding, interleaved: bool) -> tuple[int, ...]:
    addresses, slots = _places(coding.scale, coding.zero, coding.factor, coding.table, coding.group_of)
    residual = _places(*(coding.residual or _NO_RESIDUAL))
    parts, row_blocks, groups = coding.scale.shape[1:]
    scale_kind, (rows, columns) = _SCALE_KINDS[coding.scale.dtype], coding.block
    kinds = _CODES[coding.code], scale_kind
    sizes = rows, columns, groups, row_blocks, parts, int(interleaved)
    return (1, *addresses, *slots, *kinds, *sizes, *residual[0], *residual[1])


def _places(*pieces: Tensor | None) -> tuple[list[int], list[int]]:
    """Address in slot 0 and bytes from slot to slot of each; 0 where it is absent."""
    addresses = [0 if piece is None else piece.data_ptr() for piece in pieces]
    return addresses, [0 if piece is None else piece.stride(0) * piece.itemsize for piece in pieces]
