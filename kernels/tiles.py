"""The two matrix tiles of an expert, shared by the grouped path and the single launch, and their sizes.

A weight operand is either a pointer with strides or a TMA descriptor over [S, rows, columns]; gate and up are passed as
separate views, so that interleaved and stacked layouts are the same to the kernel.

Weights of 8 bits are widened in registers to the dtype of the activations, which holds every fp8 (e4m3) and int8 value
exactly; their products are summed in float32 over one block of columns and then multiplied by the block's scale.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels.intrinsics import activate, cast, device_function, dot, is_interpreted, same_dtype
from moe.kernels.weights import ExpertWeights

_CODES = ("e4m3", "int8")
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


class TileConfig(NamedTuple):
    """Tile sizes of the two GEMMs and how they are compiled."""

    block_m: int
    block_n1: int  # columns of the first GEMM; gate and up each
    block_n2: int
    block_k: int
    num_warps: int
    num_stages: int


def pick_tiles(rows_per_expert: float, dtype: torch.dtype, capability: int, *, tma: bool = False) -> TileConfig:
    """Sizes by rows per expert, from ahead-of-time register and shared-memory reports; not yet tuned on a GPU.

    capability: 10 * major + minor of the GPU, 0 for the interpreter (which pays per operation: few, larger tiles).
    tma: weights come by descriptors, which leaves the registers of their addresses to a wider second tile.
    """
    if capability == 0:
        return TileConfig(16 if rows_per_expert <= 16 else 64, 128, 128, 128, 4, 1)
    if dtype == torch.float32:
        return TileConfig(16 if rows_per_expert <= 16 else 64, 64, 64, 32, 4, 2)
    if rows_per_expert <= 16:
        return TileConfig(16, 64, 128, 128, 4, 3)
    if rows_per_expert <= 64 or capability < 90:
        return TileConfig(64, 64, 128, 64, 4, 3)
    return TileConfig(128, 128, 256 if tma and capability < 100 else 128, 64, 8, 3)


def tiles_in_blocks(config: TileConfig, block: tuple[int, int] | None, hidden: int, inter: int) -> TileConfig:
    """`config` where each `block` of weights has a scale: k steps inside a block, registers left for its sum.

    One scale per row changes nothing. Raises ValueError for blocks whose number of columns is no multiple of 16.
    """
    if block is None or block[1] >= max(hidden, inter):
        return config
    block_k = config.block_k
    while block[1] % block_k:
        block_k //= 2
    if block_k < 16:
        raise ValueError(
            f"blocks of scales have {block[1]} columns; the grouped kernel takes multiples of 16, or at least "
            f"{max(hidden, inter)}: one block a row"
        )
    if config.block_m >= 128:  # ahead of time: 14 to 150 spills inside the matrix loop with more
        config = config._replace(block_n1=min(config.block_n1, 64), block_n2=min(config.block_n2, 64))
    return config._replace(block_k=block_k)


def scales_in_blocks(weights: ExpertWeights) -> bool:
    """Whether a row of some weight matrix has more than one scale."""
    block = scale_block(weights)
    return block is not None and block[1] < max(weights.hidden_size, weights.intermediate_size)


def scale_block(weights: ExpertWeights) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None for float weights. Raises ValueError for other codings."""
    first, second = weights.gate_up_coding, weights.down_coding
    if first is None and second is None:
        return None
    if first is None or second is None or first.code != second.code or first.block != second.block:
        raise ValueError("the Triton kernels take both matrices of an expert in one format")
    reads = first.code in _CODES and first.scale.dtype in _SCALES and first.zero is None and first.group_of is None
    if not reads:
        raise ValueError(f"the Triton kernels do not read experts stored as {first.code} with {first.scale.dtype}")
    return first.block


def device_capability(device: torch.device) -> int:
    """10 * major + minor, 0 under the interpreter; AMD's tiles are those of 80, shared memory is as small."""
    if is_interpreted():
        return 0
    if device.type != "cuda":  # the compile gate's
        return int(driver.active.get_current_target().arch)
    if torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_chip(weights: ExpertWeights, capability: int) -> None:
    """`ValueError` for weights that this NVIDIA chip cannot widen."""
    if weights.down.dtype == torch.float8_e4m3fn and 0 < capability < 89 and torch.version.hip is None:
        raise ValueError(
            f"experts in float8_e4m3fn need sm_89 or later, this GPU is sm_{capability}; store them as int8"
        )


class WeightOperands(NamedTuple):
    """An `ExpertWeights` as kernel arguments."""

    gate: Any
    up: Any
    down: Any
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    strides: tuple[int, int, int, int, int, int]  # first: slot, row; second: slot, row; biases: slot, slot
    bias_step: int  # between neighbouring columns of the first bias
    tma: bool
    gate_scale: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None
    scale_strides: tuple[int, int]  # slots of gate's and up's, of down's
    scale_block: tuple[int, int]  # (0, 0) without scales


def weight_operands(weights: ExpertWeights, config: TileConfig, *, tma: bool) -> WeightOperands:
    """Views (or TMA descriptors) of gate, up and down.

    TMA needs bases and strides on 16 bytes and weights in the dtype of the activations; the caller decides by
    `can_use_tma`.
    """
    act = weights.activation
    first, bias = weights.gate_up, weights.gate_up_bias
    half = first.shape[1] // 2
    if not act.gated:
        gate, up, gate_bias, up_bias = first, first, bias, bias
    elif act.interleaved:
        gate, up = first[:, 0::2], first[:, 1::2]
        gate_bias, up_bias = (None, None) if bias is None else (bias[:, 0::2], bias[:, 1::2])
    else:
        gate, up = first[:, :half], first[:, half:]
        gate_bias, up_bias = (None, None) if bias is None else (bias[:, :half], bias[:, half:])
    down, down_bias = weights.down, weights.down_bias
    strides = (
        up.stride(0),
        up.stride(1),
        down.stride(0),
        down.stride(1),
        0 if up_bias is None else up_bias.stride(0),
        0 if down_bias is None else down_bias.stride(0),
    )
    operands: tuple[Any, Any, Any] = (gate, up, down)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(gate, [1, config.block_n1, config.block_k]),
            TensorDescriptor.from_tensor(up, [1, config.block_n1, config.block_k]),
            TensorDescriptor.from_tensor(down, [1, config.block_n2, config.block_k]),
        )
    step = 1 if up_bias is None else up_bias.stride(1)
    scaling: tuple[Any, ...] = (None, None, None, (0, 0), (0, 0))
    block = scale_block(weights)
    if block is not None and weights.gate_up_coding is not None and weights.down_coding is not None:
        first_scale, down_scale = weights.gate_up_coding.scale, weights.down_coding.scale
        pair = first_scale[:, 0], first_scale[:, -1]
        scaling = (*pair, down_scale, (first_scale.stride(0), down_scale.stride(0)), block)
    return WeightOperands(*operands, gate_bias, up_bias, down_bias, strides, step, tma, *scaling)


def can_use_tma(weights: ExpertWeights, dtype: torch.dtype, capability: int) -> bool:
    """sm_90 or later, weights of the activations' dtype or of 8 bits, every base and stride on 16 bytes."""
    if capability < 90 or weights.gate_up.dtype not in (dtype, torch.float8_e4m3fn, torch.int8):
        return False
    operands = weight_operands(weights, TileConfig(16, 16, 16, 16, 4, 1), tma=False)
    itemsize = weights.gate_up.dtype.itemsize
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * itemsize % 16 == 0 and t.stride(1) * itemsize % 16 == 0
        for t in (operands.gate, operands.up, operands.down)
    )


@device_function
def _weight_tile(ptrs, desc, slot, n0, k0, mask, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_K, BLOCK_N]
    if TMA:
        return tl.reshape(desc.load([slot, n0, k0]), (BLOCK_N, BLOCK_K)).T
    else:
        if mask is None:
            return tl.load(ptrs + k0)
        else:
            return tl.load(ptrs + k0, mask=mask, other=0.0)


@device_function
def _multiply(x, w, acc, scale_ptrs, k0, col_ok, SCALE_K: tl.constexpr, K: tl.constexpr):
    # acc + x @ w, times the scales of this block of columns; those of whole rows wait for the end of the loop
    a, b = same_dtype(x, w)
    if SCALE_K == 0 or SCALE_K >= K:
        return dot(a, b, acc)
    else:
        scale = tl.load(scale_ptrs + k0 // SCALE_K, mask=col_ok, other=0.0).to(tl.float32)
        return acc + dot(a, b, tl.zeros_like(acc)) * scale[None, :]


@device_function
def _scale_rows(acc, scale_ptrs, col_ok, SCALE_K: tl.constexpr, K: tl.constexpr):
    if SCALE_K >= K:
        return acc * tl.load(scale_ptrs, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    else:
        return acc


@device_function
def gate_up_tile(
    rows,  # pointers [BLOCK_M] to the activations' rows
    row_ok,
    gate,
    up,
    gate_bias,
    up_bias,
    slot,
    n0,
    stride_slot,
    stride_row,
    stride_bias,
    bias_step,
    gate_scale,
    up_scale,
    stride_scale,
    alpha,
    limit,
    H: tl.constexpr,
    I: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    TMA: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """activation(rows @ gate.T, rows @ up.T) in float32, [BLOCK_M, BLOCK_N]; the two products share the row tile.

    The products are rounded to DTYPE before the activation, as `reference.py` specifies.
    """
    cols = n0 + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = rows[:, None] + ks[None, :]
    if TMA:
        gate_ptrs = None
        up_ptrs = None
    else:
        offsets = slot.to(tl.int64) * stride_slot + cols.to(tl.int64)[None, :] * stride_row + ks[:, None]
        gate_ptrs = gate + offsets
        up_ptrs = up + offsets
    if SCALE_K > 0:
        block = slot.to(tl.int64) * stride_scale + cols // SCALE_N * ((H + SCALE_K - 1) // SCALE_K)
        gate_scales = gate_scale + block
        up_scales = up_scale + block
    else:
        gate_scales = None
        up_scales = None
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x_mask = row_ok[:, None]
        else:
            x_mask = row_ok[:, None] & (ks < H - k0)[None, :]
        if H % BLOCK_K == 0 and I % BLOCK_N == 0:
            w_mask = None
        else:
            w_mask = (ks < H - k0)[:, None] & (cols < I)[None, :]
        x = tl.load(x_ptrs + k0, mask=x_mask, other=0.0)
        if GATED:
            w = _weight_tile(gate_ptrs, gate, slot, n0, k0, w_mask, TMA, BLOCK_N, BLOCK_K)
            acc_gate = _multiply(x, w, acc_gate, gate_scales, k0, cols < I, SCALE_K, H)
        w = _weight_tile(up_ptrs, up, slot, n0, k0, w_mask, TMA, BLOCK_N, BLOCK_K)
        acc_up = _multiply(x, w, acc_up, up_scales, k0, cols < I, SCALE_K, H)
    if GATED:
        acc_gate = _scale_rows(acc_gate, gate_scales, cols < I, SCALE_K, H)
    acc_up = _scale_rows(acc_up, up_scales, cols < I, SCALE_K, H)
    if HAS_BIAS:
        offsets = slot.to(tl.int64) * stride_bias + cols * bias_step
        if GATED:
            acc_gate += tl.load(gate_bias + offsets, mask=cols < I, other=0.0).to(tl.float32)[None, :]
        acc_up += tl.load(up_bias + offsets, mask=cols < I, other=0.0).to(tl.float32)[None, :]
    rounded_gate = cast(acc_gate, DTYPE).to(tl.float32)
    rounded_up = cast(acc_up, DTYPE).to(tl.float32)
    return activate(rounded_gate, rounded_up, KIND, GATED, alpha, limit)


@device_function
def down_tile(
    rows,
    row_ok,
    down,
    down_bias,
    slot,
    n0,
    stride_slot,
    stride_row,
    stride_bias,
    down_scale,
    stride_scale,
    H: tl.constexpr,
    I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rows @ down.T + bias in float32, [BLOCK_M, BLOCK_N]."""
    cols = n0 + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    h_ptrs = rows[:, None] + ks[None, :]
    if TMA:
        w_ptrs = None
    else:
        w_ptrs = down + (slot.to(tl.int64) * stride_slot + cols.to(tl.int64)[None, :] * stride_row + ks[:, None])
    if SCALE_K > 0:
        scales = down_scale + slot.to(tl.int64) * stride_scale + cols // SCALE_N * ((I + SCALE_K - 1) // SCALE_K)
    else:
        scales = None
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, I, BLOCK_K):
        if I % BLOCK_K == 0:
            h_mask = row_ok[:, None]
        else:
            h_mask = row_ok[:, None] & (ks < I - k0)[None, :]
        if I % BLOCK_K == 0 and H % BLOCK_N == 0:
            w_mask = None
        else:
            w_mask = (ks < I - k0)[:, None] & (cols < H)[None, :]
        h = tl.load(h_ptrs + k0, mask=h_mask, other=0.0)
        w = _weight_tile(w_ptrs, down, slot, n0, k0, w_mask, TMA, BLOCK_N, BLOCK_K)
        acc = _multiply(h, w, acc, scales, k0, cols < H, SCALE_K, I)
    acc = _scale_rows(acc, scales, cols < H, SCALE_K, I)
    if HAS_BIAS:
        acc += tl.load(down_bias + slot.to(tl.int64) * stride_bias + cols, mask=cols < H, other=0.0).to(tl.float32)[
            None, :
        ]
    return acc
