"""Experts over weight slots by two persistent grouped GEMMs: the ordinary path, and the reference of the single launch.

Wins for many tokens. Rows are sorted by slot and never copied: the first GEMM gathers them while loading, the second
scatters its result; weights are read in their slots. The number of tiles stays on the device, so nothing syncs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from moe.kernels.intrinsics import cast, check_device, device_function, is_interpreted, launch_options, tl_dtype
from moe.kernels.permute import SMALL_ROWS, SortedRows, Tiles, small_routing, sort_rows, tile_table
from moe.kernels.reference import check_expert_input, check_expert_weights
from moe.kernels.tiles import (
    TileConfig,
    can_use_tma,
    device_capability,
    down_tile,
    gate_up_tile,
    matrices,
    pick_tiles,
    tiles_for,
)
from moe.kernels.weights import ExpertWeights

GROUP_M = 8  # row tiles that share a weight tile in L2


def grouped_experts(
    x: Tensor,
    slot_ids: Tensor,
    weights: ExpertWeights,
    *,
    num_experts: int | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """y[t, k] = expert(slot_ids[t, k])(x[t]), 0 where the id is -1; the same maths as `experts_reference`.

    x: [T, H] float32, bfloat16 or float16; slot_ids: int [T, K], -1 = no expert; T may be 0. Returns [T, K, H]
    in x's dtype.
    num_experts: experts that the rows are spread over (None: all slots); it only chooses the tile sizes.
    Slot numbers are not checked (that would cost a sync). Costs at most 1024 rows: 3 launches; beyond: a sort more.
    """
    check_device(x)
    check_expert_input(x, slot_ids, weights)
    check_expert_weights(weights)
    if weights.activation.kind == "custom":
        raise ValueError("a custom activation function runs only in the torch reference; use experts_reference")
    (num_tokens, top_k), hidden = slot_ids.shape, x.shape[1]
    num_rows, inter = num_tokens * top_k, weights.intermediate_size
    y = torch.empty(num_tokens, top_k, hidden, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    capability = device_capability(x.device)
    num_slots = len(weights.down)
    config, tma = _tiles(x, weights, num_rows / min(num_rows, num_experts or num_slots), capability, config)
    rows, tiles = route_rows(slot_ids.to(torch.int32), num_slots, config.block_m)
    h = torch.empty(num_rows, inter, dtype=x.dtype, device=x.device)
    gate, up, down = matrices(weights, x.dtype, config, capability, tma=tma)
    act = weights.activation
    options = launch_options(config.num_warps, config.num_stages)
    x = x if x.stride(1) == 1 else x.contiguous()
    programs = num_programs(x.device)
    grid = (min(programs, tiles.max_tiles * triton.cdiv(inter, config.block_n1)),)
    _gate_up_kernel[grid](
        x,
        x.stride(0),
        h,
        rows.order,
        tiles.table,
        tiles.num_tiles,
        tiles.max_tiles,
        gate,
        up,
        act.alpha,
        act.limit,
        TOP_K=top_k,
        H=hidden,
        I=inter,
        KIND=act.kind,
        GATED=act.gated,
        DTYPE=tl_dtype(x.dtype),
        GROUP_M=GROUP_M,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n1,
        BLOCK_K=config.block_k,
        **options,
    )
    grid = (min(programs, tiles.max_tiles * triton.cdiv(hidden, config.block_n2)),)
    _down_kernel[grid](
        h,
        y,
        rows.order,
        tiles.table,
        tiles.num_tiles,
        tiles.max_tiles,
        down,
        H=hidden,
        I=inter,
        Y_DTYPE=tl_dtype(x.dtype),
        GROUP_M=GROUP_M,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n2,
        BLOCK_K=config.block_k,
        **options,
    )
    return y


def _tiles(
    x: Tensor, weights: ExpertWeights, rows_per_expert: float, capability: int, config: TileConfig | None
) -> tuple[TileConfig, bool]:
    """Sizes, and whether weights come by TMA."""
    if config is None:
        plain = tiles_for(pick_tiles(rows_per_expert, x.dtype, capability), weights, x.dtype)
        tma = can_use_tma(weights, x.dtype, capability, plain.block_k)
        config = pick_tiles(rows_per_expert, x.dtype, capability, tma=tma)
    config = tiles_for(config, weights, x.dtype)
    return config, can_use_tma(weights, x.dtype, capability, config.block_k)


def route_rows(slot_ids: Tensor, num_slots: int, block_m: int) -> tuple[SortedRows, Tiles]:
    """Sorted rows and their tiles: one launch up to `SMALL_ROWS` rows, torch's sort beyond. slot_ids: int32 [T, K]."""
    if slot_ids.numel() <= SMALL_ROWS:
        routing = small_routing(slot_ids, num_slots, block_m)
        return routing.rows, routing.tiles
    rows = sort_rows(slot_ids)
    return rows, tile_table(rows.ids, num_slots, block_m)


def num_programs(device: torch.device) -> int:
    """Programs of a persistent launch: two per multiprocessor, two in the interpreter (it runs them one by one)."""
    if is_interpreted():
        return 2
    if device.type != "cuda":  # the compile gate's
        return 2 * int(driver.active.utils.get_device_properties(0)["multiprocessor_count"])
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@device_function
def _tile_of(u, num_tiles, N_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    # Row tiles are fastest inside a group, so that programs side by side share a weight tile.
    group = u // (GROUP_M * N_TILES)
    first = group * GROUP_M
    size = tl.minimum(num_tiles - first, GROUP_M)
    inside = u - group * GROUP_M * N_TILES
    return first + inside % size, inside // size


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_kernel(
    x_ptr,  # [T, H]
    stride_x,
    h_ptr,  # [R, I], rows in sorted order
    order_ptr,
    table_ptr,
    num_tiles_ptr,
    max_tiles,
    gate,  # `Matrix`
    up,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    u = tl.program_id(0)
    while u < num_tiles * N_TILES:
        tile, n = _tile_of(u, num_tiles, N_TILES, GROUP_M)
        slot = tl.load(table_ptr + tile)
        first = tl.load(table_ptr + max_tiles + tile)
        size = tl.load(table_ptr + 2 * max_tiles + tile)
        if slot >= 0:
            m = tl.arange(0, BLOCK_M)
            ok = m < size
            token = tl.load(order_ptr + first + m, mask=ok, other=0) // TOP_K
            h = gate_up_tile(
                x_ptr + token.to(tl.int64) * stride_x,
                ok,
                gate,
                up,
                slot,
                n * BLOCK_N,
                alpha,
                limit,
                H,
                I,
                KIND,
                GATED,
                DTYPE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
            h_ptrs = h_ptr + (first + m).to(tl.int64)[:, None] * I + cols[None, :]
            tl.store(h_ptrs, cast(h, DTYPE), mask=ok[:, None] & (cols < I)[None, :])
        u += tl.num_programs(0)


@triton.jit(do_not_specialize=["max_tiles"])
def _down_kernel(
    h_ptr,  # [R, I], rows in sorted order
    y_ptr,  # [T * K, H]
    order_ptr,
    table_ptr,
    num_tiles_ptr,
    max_tiles,
    down,  # `Matrix`
    H: tl.constexpr,
    I: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    u = tl.program_id(0)
    while u < num_tiles * N_TILES:
        tile, n = _tile_of(u, num_tiles, N_TILES, GROUP_M)
        slot = tl.load(table_ptr + tile)
        first = tl.load(table_ptr + max_tiles + tile)
        size = tl.load(table_ptr + 2 * max_tiles + tile)
        m = tl.arange(0, BLOCK_M)
        ok = m < size
        row = tl.load(order_ptr + first + m, mask=ok, other=0)
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        y_ptrs = y_ptr + row.to(tl.int64)[:, None] * H + cols[None, :]
        mask = ok[:, None] & (cols < H)[None, :]
        if slot >= 0:
            y = down_tile(
                h_ptr + (first + m).to(tl.int64) * I,
                ok,
                down,
                slot,
                n * BLOCK_N,
                H,
                I,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            tl.store(y_ptrs, cast(y, Y_DTYPE), mask=mask)
        else:
            tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_N), Y_DTYPE), mask=mask)
        u += tl.num_programs(0)
