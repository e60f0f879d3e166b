"""A weight matrix of all slots as one argument of a kernel, and its tiles, decoded in registers.

The formats are those of `formats.py`; their twin is its `decode`. How a kernel reads a matrix depends on what is exact:

    float    as stored, no scale; of bf12 the bfloat16 that it stands for
    row      one scale a row: codes become activations' numbers, which hold them exactly; the sum is scaled at its end
    blocks   a scale for a block of columns: the sum over each block is scaled, in float32
    exact    code times scale is a number of the activations' dtype (FP4 with power-of-two or E4M3 scales): no rounding
    wide     decoded in float32 as the twin does it: tables, columns that are grouped freely, blocks of odd sizes,
             nested precision. With bfloat16 activations multiplied in three parts of bfloat16, which is exact; else in
             float32, without matrix instructions
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any, Literal, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.formats import NIBBLE_CODES, Coding, Residual
from moe.kernels.intrinsics import cast, device_function, dot, same_dtype
from moe.kernels.tile_codes import (
    FEW_RARE,
    code_values,
    in_block,
    nested_values,
    scale_values,
    scales_of_tile,
    short_floats,
    short_start,
    zero_points,
)
from moe.kernels.weights import ExpertWeights

Reading = Literal["float", "row", "blocks", "exact", "wide"]


class Planes(NamedTuple):
    """What refines a matrix in nested precision beyond two bits: each slot's level, then codes and scales by plane.

    Those of planes that no slot holds are None.
    """

    bits: Any
    codes3: Any
    scale3: Any
    codes4: Any
    scale4: Any
    codes8: Any
    scale8: Any
    stride_bits: Any  # of slots
    stride_codes3: Any
    stride_scale3: Any
    stride_codes4: Any
    stride_scale4: Any
    stride_codes8: Any
    stride_scale8: Any
    stride_row3: Any
    stride_row4: Any
    stride_row8: Any


class Matrix(NamedTuple):
    """Gate, up or down of every slot. To Triton a tuple: pointers and strides are arguments, the rest constants."""

    codes: Any  # pointer or TMA descriptor over [S, n, bytes of a row]
    bias: Any
    scale: Any  # one byte scales as bytes; of bf12 the rows' words
    zero: Any
    factor: Any
    table: Any
    group_of: Any
    planes: Any  # `Planes`; None but of nested precision
    stride_slot: Any
    stride_row: Any
    stride_bias: Any  # of slots
    step_bias: Any  # between neighbouring columns
    stride_scale: Any  # of slots, as all that follow
    stride_zero: Any
    stride_factor: Any
    stride_table: Any
    stride_group: Any
    stride_words: Any  # of rows of bf12: 1 + R
    CODE: Any  # "float" or a code; "e4m3 bits" where the chip has no such numbers
    READ: Any  # `Reading`
    SCALE: Any  # "float", "e8m0" or "e4m3"
    SCALE_N: Any  # rows and columns that share a scale, groups of a row; 1 without scales
    SCALE_K: Any
    GROUPS: Any
    NIBBLES: Any
    TMA: Any
    RARE: Any  # weights that a row of bf12 may have: "none", "few" or "many"


class Part(NamedTuple):
    """One matrix of [S, n, k] on the host, before it becomes an argument."""

    codes: Tensor
    bias: Tensor | None
    coding: Coding | None
    number: int  # which part of the coding
    columns: int
    rows: slice  # of the matrix that it is a part of

    def reading(self, dtype: torch.dtype) -> Reading:
        return reading(self.coding, self.columns, dtype)


def reading(coding: Coding | None, columns: int, dtype: torch.dtype) -> Reading:
    """How a matrix of so many columns is read for activations of `dtype`; see the top of this file."""
    if coding is None or coding.code == "bf12":
        return "float"
    group = coding.block[1]
    if coding.code in ("lut4", "nested") or coding.group_of is not None:
        return "wide"
    if group >= columns:
        return "row"
    if group % 16:
        return "wide"
    if coding.code == "e2m1" and coding.zero is None and group & (group - 1) == 0:
        scale = coding.scale.dtype
        if scale == torch.float8_e4m3fn or (scale == torch.float8_e8m0fnu and dtype != torch.float16):
            return "exact"
    return "blocks"


def parts_of(weights: ExpertWeights) -> tuple[Part, Part, Part]:
    """Views of gate, up and down; gate is up where there is no gate."""
    act, first, bias, coding = weights.activation, weights.gate_up, weights.gate_up_bias, weights.gate_up_coding
    half = first.shape[1] // 2
    if not act.gated:
        rows = [slice(None), slice(None)]
    elif act.interleaved:
        rows = [slice(0, None, 2), slice(1, None, 2)]
    else:
        rows = [slice(None, half), slice(half, None)]
    gate, up = (
        Part(first[:, r], None if bias is None else bias[:, r], coding, p if act.gated else 0, weights.hidden_size, r)
        for p, r in enumerate(rows)
    )
    inter = weights.intermediate_size
    return gate, up, Part(weights.down, weights.down_bias, weights.down_coding, 0, inter, slice(None))


def argument(part: Part, dtype: torch.dtype, *, tma_box: tuple[int, int] | None, has_e4m3: bool) -> Matrix:
    """`part` for activations of `dtype`. tma_box: rows and columns of a tile that comes by TMA, None: by pointers."""
    codes, bias, coding = part.codes, part.bias, part.coding
    is_nibbles = coding is not None and coding.code in NIBBLE_CODES
    code: str = "float" if coding is None else coding.code
    if code == "e4m3" and not has_e4m3:
        code, codes = "e4m3 bits", codes.view(torch.uint8)
    if code == "bf12":
        codes = codes.view(torch.int32)  # four codes a word; every piece of a slot begins on a cache line
    strides = codes.stride(0), codes.stride(1)
    source: Any = codes
    if tma_box is not None:
        source = TensorDescriptor.from_tensor(codes, [1, tma_box[0], tma_box[1] // (2 if is_nibbles else 1)])
    scale = zero = factor = table = group_of = None
    kind, block, groups, rare = "float", (1, 1), 1, 0
    if coding is not None:
        scale, zero, factor, table, group_of = (
            None if t is None else t[:, part.number]
            for t in (coding.scale, coding.zero, coding.factor, coding.table, coding.group_of)
        )
        assert scale is not None
        groups, block = scale.shape[-1], coding.block
        if code == "bf12":
            assert table is None, "rare weights beside the rows' words are not read here"
            groups, rare = 1, groups - 1
        if scale.dtype.itemsize == 1:
            kind = "e8m0" if scale.dtype == torch.float8_e8m0fnu else "e4m3"
            scale = scale.view(torch.uint8)
    steps = [0 if t is None else t.stride(0) for t in (bias, scale, zero, factor, table, group_of)]
    steps.append(1 + rare)
    many = "none" if not rare else "few" if rare <= FEW_RARE.value else "many"
    constants = (code, part.reading(dtype), kind, *block, groups, is_nibbles, tma_box is not None, many)
    return Matrix(
        source,
        bias,
        scale,
        zero,
        factor,
        table,
        group_of,
        None if coding is None or coding.residual is None else _planes(coding.residual, part),
        *strides,
        steps[0],
        1 if bias is None else bias.stride(1),
        *steps[1:],
        *map(tl.constexpr, constants),
    )


def _planes(residual: Residual, part: Part) -> Planes:
    bits, *planes = residual
    own = [None if t is None else t[:, part.number] if t.dim() == 4 else t[:, part.rows] for t in planes]
    slots = [0 if t is None else t.stride(0) for t in (bits, *own)]
    return Planes(bits, *own, *slots, *(0 if codes is None else codes.stride(1) for codes in own[::2]))


@device_function
def tile_pointers(m, slot, cols, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of the first tile: [BLOCK_K, BLOCK_N], of nibbles [BLOCK_N, BLOCK_K / 2]; of bf12 what `short_start` says."""
    if m.TMA:
        return 0  # triton 3.6 returns no None from a function
    elif m.CODE == "bf12":
        return short_start(m, slot, cols, N, BLOCK_K)
    else:
        rows = m.codes + slot.to(tl.int64) * m.stride_slot + cols.to(tl.int64) * m.stride_row
        if m.NIBBLES:
            return rows[:, None] + tl.arange(0, BLOCK_K // 2)[None, :]
        else:
            return rows[None, :] + tl.arange(0, BLOCK_K)[:, None]


@device_function
def multiply(
    acc, x, m, ptrs, slot, n0, k0, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + x @ columns k0 … of the matrix, scaled but for what waits for `finish`. x is 0 beyond column K."""
    cols = n0 + tl.arange(0, BLOCK_N)
    codes = _codes(m, ptrs, slot, n0, k0, cols, N, K, BLOCK_N, BLOCK_K)
    if m.READ == "float":
        a, b = same_dtype(x, codes)
        return dot(a, b, acc)
    elif m.READ == "row":
        zero = zero_points(m, slot, cols, 0, cols < N)
        return dot(x, cast(code_values(m, codes, zero, slot), x.dtype), acc)
    elif m.READ == "blocks":
        group = k0 // m.SCALE_K
        zero = zero_points(m, slot, cols, group, cols < N)
        scale = scale_values(m, in_block(m, m.scale, m.stride_scale, slot, cols, group, cols < N))
        part = dot(x, cast(code_values(m, codes, zero, slot), x.dtype), tl.zeros_like(acc))
        return acc + part * scale
    elif m.READ == "exact":
        scale = scales_of_tile(m, slot, cols, k0, N, K, BLOCK_N, BLOCK_K)
        return dot(x, cast(code_values(m, codes, 0, slot) * scale, x.dtype), acc)
    else:
        ks = k0 + tl.arange(0, BLOCK_K)
        if m.group_of is None:
            group = ks // m.SCALE_K
        else:
            group = tl.load(m.group_of + slot.to(tl.int64) * m.stride_group + ks, mask=ks < K, other=0)
            group = tl.minimum(group.to(tl.uint32), m.GROUPS - 1).to(tl.int32)  # a file may say anything
        there = (ks < K)[:, None] & (cols < N)[None, :]
        if m.CODE == "nested":
            return _dot_wide(x, nested_values(m, slot, cols, k0, there, N, K, BLOCK_K), acc)
        else:
            zero = zero_points(m, slot, cols[None, :], group[:, None], there)
            scale = scale_values(m, in_block(m, m.scale, m.stride_scale, slot, cols[None, :], group[:, None], there))
            if m.factor is not None:
                scale = scale * tl.load(m.factor + slot.to(tl.int64) * m.stride_factor)
            return _dot_wide(x, code_values(m, codes, zero, slot) * scale, acc)


@device_function
def finish(acc, m, slot, n0, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum over all columns, times the scale of its row or matrix, plus the bias; float32."""
    cols = n0 + tl.arange(0, BLOCK_N)
    if m.READ == "row":
        acc = acc * scale_values(m, in_block(m, m.scale, m.stride_scale, slot, cols, 0, cols < N))
    if m.factor is not None and m.READ != "wide":
        acc = acc * tl.load(m.factor + slot.to(tl.int64) * m.stride_factor)
    if m.bias is not None:
        offsets = slot.to(tl.int64) * m.stride_bias + cols * m.step_bias
        acc = acc + tl.load(m.bias + offsets, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@device_function
def _codes(m, ptrs, slot, n0, k0, cols, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_K, BLOCK_N], a code each
    WHOLE: tl.constexpr = K % BLOCK_K == 0 and N % BLOCK_N == 0
    if m.CODE == "nested":
        return 0  # `nested_values` loads them
    elif m.CODE == "bf12":
        return short_floats(m, ptrs, slot, k0, cols, N, BLOCK_N, BLOCK_K)
    elif m.NIBBLES:
        if m.TMA:
            pairs = tl.reshape(m.codes.load([slot, n0, k0 // 2]), (BLOCK_N, BLOCK_K // 2))
        elif WHOLE:
            pairs = tl.load(ptrs + k0 // 2)
        else:
            there = (cols < N)[:, None] & (k0 + 2 * tl.arange(0, BLOCK_K // 2) < K)[None, :]
            pairs = tl.load(ptrs + k0 // 2, mask=there, other=0)
        return tl.trans(tl.reshape(tl.join(pairs & 15, pairs >> 4), (BLOCK_N, BLOCK_K)))
    else:
        if m.TMA:
            return tl.reshape(m.codes.load([slot, n0, k0]), (BLOCK_N, BLOCK_K)).T
        elif WHOLE:
            return tl.load(ptrs + k0)
        else:
            there = (k0 + tl.arange(0, BLOCK_K) < K)[:, None] & (cols < N)[None, :]
            return tl.load(ptrs + k0, mask=there, other=0.0)


@device_function
def _dot_wide(x, w, acc):
    # acc + x @ w of float32 weights; a float32 is the sum of three bfloat16
    if x.dtype == tl.bfloat16:
        high = cast(w, tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = cast(rest, tl.bfloat16)
        low = cast(rest - middle.to(tl.float32), tl.bfloat16)
        return dot(x, low, dot(x, middle, dot(x, high, acc)))
    else:
        return dot(x.to(tl.float32), w, acc)
