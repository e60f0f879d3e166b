"""The two matrix tiles of an expert, shared by the grouped path and the single launch, and their sizes.

Matrices come as `matrix.Matrix`; gate and up are separate views, so that interleaved and stacked layouts are the same
to the kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math
from typing import NamedTuple

import torch
import triton.language as tl
from triton.runtime import driver

from moe.kernels.intrinsics import activate, cast, device_function, is_interpreted
from moe.kernels.matrix import Matrix, Part, argument, finish, multiply, parts_of, tile_pointers
from moe.kernels.weights import ExpertWeights


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


def tiles_for(config: TileConfig, weights: ExpertWeights, dtype: torch.dtype) -> TileConfig:
    """`config` as the formats of `weights` need it: k steps inside a block of scales, registers left to decode.

    A pipeline is no longer than the loop, and a loop that short has eight warps to hold its tiles: ahead of time, other
    choices spill in it with some triton (sm_90, 3.6 to 3.9).
    """
    parts = parts_of(weights)
    readings = {part.reading(dtype) for part in parts}
    if "nested" in weights.formats:  # up to eight loads for a weight: ahead of time, triton 3.6 spills with more
        config = config._replace(block_n1=32, block_n2=32, block_k=32, num_warps=8)
    elif "wide" in readings:  # three tiles of each: ahead of time, more spills on sm_100 and does not fit gfx942
        n1, n2, k = (min(size, most) for size, most in zip(config[1:4], (64, 64, 32)))
        config = config._replace(block_n1=n1, block_n2=n2, block_k=k)
    if "bf12" in weights.formats or (config.block_m >= 64 and is_decoded(weights, dtype)):  # ahead of time: else spills
        config = config._replace(block_n1=min(config.block_n1, 64), block_n2=min(config.block_n2, 64))
    block_k = config.block_k
    for part in parts:
        while part.coding is not None and part.reading(dtype) == "blocks" and part.coding.block[1] % block_k:
            block_k //= 2
    steps = max(math.ceil(part.columns / block_k) for part in parts)
    if steps < config.num_stages:
        config = config._replace(num_stages=steps, num_warps=8)
    return config._replace(block_k=block_k)


def is_decoded(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether some matrix costs registers beside its sum: more than a conversion, or scales inside a row."""
    readings = {part.reading(dtype) for part in parts_of(weights)}
    return "bf12" in weights.formats or not readings.isdisjoint(("blocks", "exact", "wide"))


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


class Matrices(NamedTuple):
    """An `ExpertWeights` as kernel arguments."""

    gate: Matrix
    up: Matrix
    down: Matrix


def matrices(weights: ExpertWeights, dtype: torch.dtype, config: TileConfig, capability: int, *, tma: bool) -> Matrices:
    """Views (or TMA descriptors) of gate, up and down for activations of `dtype`; `can_use_tma` decides about `tma`."""
    has_e4m3 = capability == 0 or capability >= 89 or torch.version.hip is not None
    boxes = [(n, config.block_k) if tma else None for n in (config.block_n1, config.block_n1, config.block_n2)]
    parts = parts_of(weights)
    return Matrices(*(argument(p, dtype, tma_box=box, has_e4m3=has_e4m3) for p, box in zip(parts, boxes)))


def can_use_tma(weights: ExpertWeights, dtype: torch.dtype, capability: int, block_k: int) -> bool:
    """sm_90 or later; weights of the activations' dtype or codes; every base, stride and row of a tile on 16 bytes."""
    return capability >= 90 and all(_fits_tma(part, dtype, block_k) for part in parts_of(weights))


def _fits_tma(part: Part, dtype: torch.dtype, block_k: int) -> bool:
    codes = part.codes
    if part.coding is None and codes.dtype != dtype:
        return False
    if part.coding is not None and part.coding.code in ("nested", "bf12"):  # planes of several strides; blocks of three
        return False
    row = block_k * codes.itemsize // (2 if codes.dtype == torch.uint8 else 1)
    steps = (codes.data_ptr(), codes.stride(0) * codes.itemsize, codes.stride(1) * codes.itemsize, row)
    return all(step % 16 == 0 for step in steps)


@device_function
def gate_up_tile(
    rows,  # pointers [BLOCK_M] to the activations' rows
    row_ok,
    gate,
    up,
    slot,
    n0,
    alpha,
    limit,
    H: tl.constexpr,
    I: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
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
    gate_ptrs = tile_pointers(gate, slot, cols, I, BLOCK_K)
    up_ptrs = tile_pointers(up, slot, cols, I, BLOCK_K)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x_mask = row_ok[:, None]
        else:
            x_mask = row_ok[:, None] & (ks < H - k0)[None, :]
        x = tl.load(x_ptrs + k0, mask=x_mask, other=0.0)
        if GATED:
            acc_gate = multiply(acc_gate, x, gate, gate_ptrs, slot, n0, k0, I, H, BLOCK_N, BLOCK_K)
        acc_up = multiply(acc_up, x, up, up_ptrs, slot, n0, k0, I, H, BLOCK_N, BLOCK_K)
    if GATED:
        acc_gate = finish(acc_gate, gate, slot, n0, I, BLOCK_N)
    acc_up = finish(acc_up, up, slot, n0, I, BLOCK_N)
    rounded_gate = cast(acc_gate, DTYPE).to(tl.float32)
    rounded_up = cast(acc_up, DTYPE).to(tl.float32)
    return activate(rounded_gate, rounded_up, KIND, GATED, alpha, limit)


@device_function
def down_tile(
    rows,
    row_ok,
    down,
    slot,
    n0,
    H: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """rows @ down.T + bias in float32, [BLOCK_M, BLOCK_N]."""
    cols = n0 + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    h_ptrs = rows[:, None] + ks[None, :]
    ptrs = tile_pointers(down, slot, cols, H, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, I, BLOCK_K):
        if I % BLOCK_K == 0:
            h_mask = row_ok[:, None]
        else:
            h_mask = row_ok[:, None] & (ks < I - k0)[None, :]
        h = tl.load(h_ptrs + k0, mask=h_mask, other=0.0)
        acc = multiply(acc, h, down, ptrs, slot, n0, k0, H, I, BLOCK_N, BLOCK_K)
    return finish(acc, down, slot, n0, H, BLOCK_N)
