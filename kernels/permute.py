"""Rows sorted by expert, and the list of row tiles that a grouped GEMM walks.

`sort_rows` and `tile_table` are plain torch without a host sync, right for any size; `small_routing` is one kernel that
gives the same integers for up to `SMALL_ROWS` rows, where a dozen launches would cost more than the experts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import device_function, launch_options

SMALL_ROWS = 1024
COMPARED = 8192  # pairs that the small kernel compares at a time: 32 registers per thread


class SortedRows(NamedTuple):
    """order: int32 [R], row numbers t * K + k sorted stably by id; ids: int32 [R], their ids, ascending, -1 first."""

    order: Tensor
    ids: Tensor


class Tiles(NamedTuple):
    """table: int32 [3, max_tiles]: id, first sorted row, number of rows; num_tiles: int32 [1], on the device."""

    table: Tensor
    num_tiles: Tensor
    max_tiles: int


def max_tiles(num_rows: int, num_ids: int, block_m: int) -> int:
    """No routing of `num_rows` rows over `num_ids` ids (and "none") has more tiles of `block_m` rows."""
    return num_rows // block_m + min(num_ids + 1, num_rows)


def sort_rows(ids: Tensor) -> SortedRows:
    """Sort all rows by id, stably. ids: int32 [T, K], -1 = none."""
    sorted_ids, order = torch.sort(ids.reshape(-1), stable=True)
    return SortedRows(order.to(torch.int32), sorted_ids)


def expert_offsets(sorted_ids: Tensor, num_ids: int) -> Tensor:
    """int32 [num_ids + 1]: where each id's rows begin among the sorted rows, and the end."""
    wanted = torch.arange(num_ids + 1, dtype=torch.int32, device=sorted_ids.device)
    return torch.searchsorted(sorted_ids, wanted, out_int32=True)


def tile_table(sorted_ids: Tensor, num_ids: int, block_m: int) -> Tiles:
    """Cut every id's rows into tiles of at most `block_m`. sorted_ids: int32 [R] ascending."""
    num_rows = len(sorted_ids)
    capacity = max_tiles(num_rows, num_ids, block_m)
    row = torch.arange(num_rows, device=sorted_ids.device)
    is_first = torch.ones_like(row, dtype=torch.bool)
    is_first[1:] = sorted_ids[1:] != sorted_ids[:-1]
    within = row - torch.cummax(torch.where(is_first, row, 0), 0).values
    is_start = within % block_m == 0
    tile = torch.cumsum(is_start, 0) - 1
    table = torch.zeros(3, capacity + 1, dtype=torch.int32, device=sorted_ids.device)  # the last column is thrown away
    column = torch.where(is_start, tile, capacity)
    table[0].scatter_(0, column, sorted_ids)
    table[1].scatter_(0, column, row.to(torch.int32))
    table[2].scatter_add_(0, tile, torch.ones_like(sorted_ids))
    return Tiles(table[:, :capacity].contiguous(), is_start.sum(dtype=torch.int32).reshape(1), capacity)


def rows_block(num_rows: int) -> int:
    """Rows that the small kernels are compiled for: three sizes, so that serving meets three kernels."""
    return next(block for block in (64, 256, SMALL_ROWS) if num_rows <= block)


class SmallRouting(NamedTuple):
    rows: SortedRows
    tiles: Tiles
    offsets: Tensor  # int32 [num_ids + 1]; empty unless asked for


def small_routing(ids: Tensor, num_ids: int, block_m: int, *, with_offsets: bool = False) -> SmallRouting:
    """`sort_rows`, `tile_table` and `expert_offsets` in one launch of one program, for 1 to `SMALL_ROWS` rows.

    ids: int32 [T, K], -1 = none, below `num_ids` < 2^20.
    """
    num_rows = ids.numel()
    assert 0 < num_rows <= SMALL_ROWS, num_rows
    capacity = max_tiles(num_rows, num_ids, block_m)
    order, sorted_ids, begin = (torch.empty(num_rows, dtype=torch.int32, device=ids.device) for _ in range(3))
    table = torch.empty(3, capacity, dtype=torch.int32, device=ids.device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(num_ids + 1 if with_offsets else 0, dtype=torch.int32, device=ids.device)
    block = rows_block(num_rows)
    _small_routing_kernel[(1,)](
        ids.contiguous(),
        order,
        sorted_ids,
        table,
        num_tiles,
        offsets,
        begin,
        num_rows,
        num_ids,
        capacity,
        WITH_OFFSETS=with_offsets,
        BLOCK_M=block_m,
        BLOCK=block,
        BLOCK_ROWS=min(block, COMPARED // block),
        BLOCK_IDS=min(triton.next_power_of_2(num_ids + 1), COMPARED // block),
        **launch_options(4 if block <= 256 else 8, 1),
    )
    return SmallRouting(SortedRows(order, sorted_ids), Tiles(table, num_tiles, capacity), offsets)


@device_function
def _sort_by_comparing(ids_ptr, order_ptr, sorted_ptr, num_rows, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Write the stable order of ids and the sorted ids; every thread sees them afterwards."""
    row = tl.arange(0, BLOCK)
    ok = row < num_rows
    ids = tl.load(ids_ptr + row, mask=ok, other=0)
    # A key that is unique keeps the sort stable, and a row's place is the number of smaller keys: at most 2^20
    # comparisons by one program, with nothing to exchange. num_ids < 2^20 and BLOCK <= 2^10 fit an int32.
    key = tl.where(ok, (ids + 1) * BLOCK + row, 0x7FFFFFFF)
    start = 0
    while start < num_rows:
        mine = start + tl.arange(0, BLOCK_ROWS)
        mine_ok = mine < num_rows
        my_id = tl.load(ids_ptr + mine, mask=mine_ok, other=0)
        my_key = (my_id + 1) * BLOCK + mine
        place = tl.sum((key[None, :] < my_key[:, None]).to(tl.int32), 1)
        tl.store(order_ptr + place, mine, mask=mine_ok)
        tl.store(sorted_ptr + place, my_id, mask=mine_ok)
        start += BLOCK_ROWS
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_rows", "num_ids", "capacity"])
def _small_routing_kernel(
    ids_ptr,
    order_ptr,
    sorted_ptr,
    table_ptr,
    num_tiles_ptr,
    offsets_ptr,
    begin_ptr,  # scratch: where each run of equal ids begins
    num_rows,
    num_ids,
    capacity,
    WITH_OFFSETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    _sort_by_comparing(ids_ptr, order_ptr, sorted_ptr, num_rows, BLOCK, BLOCK_ROWS)
    row = tl.arange(0, BLOCK)
    ok = row < num_rows
    sorted_ids = tl.load(sorted_ptr + row, mask=ok, other=0)
    before = tl.load(sorted_ptr + row - 1, mask=ok & (row > 0), other=-2)
    is_first = ok & (before != sorted_ids)
    segment = tl.cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(begin_ptr + segment, row, mask=is_first)
    tl.debug_barrier()
    begin = tl.load(begin_ptr + segment, mask=ok, other=0)
    last = tl.sum(is_first.to(tl.int32), 0) - 1
    end = tl.load(begin_ptr + segment + 1, mask=ok & (segment < last), other=0)
    end = tl.where(segment == last, num_rows, end)
    is_start = ok & ((row - begin) % BLOCK_M == 0)
    tile = tl.cumsum(is_start.to(tl.int32), 0) - 1
    tl.store(table_ptr + tile, sorted_ids, mask=is_start)
    tl.store(table_ptr + capacity + tile, row, mask=is_start)
    tl.store(table_ptr + 2 * capacity + tile, tl.minimum(end - row, BLOCK_M), mask=is_start)
    tl.store(num_tiles_ptr, tl.sum(is_start.to(tl.int32), 0))
    if WITH_OFFSETS:
        first = 0
        while first <= num_ids:
            wanted = first + tl.arange(0, BLOCK_IDS)
            smaller = ((sorted_ids[:, None] < wanted[None, :]) & ok[:, None]).to(tl.int32)
            tl.store(offsets_ptr + wanted, tl.sum(smaller, 0), mask=wanted <= num_ids)
            first += BLOCK_IDS


class DenseRouting(NamedTuple):
    """A slab of any size as seen by one step: its slots in use, numbered 0, 1, … in ascending order.

    order: int32 [R], rows sorted by slot, "none" first; ids: int32 [R], for each row (not sorted) the number of its
    slot, -1 = none; slots: int32 [C], the slots by number, -1 beyond the last; offsets: int32 [C + 1], where each one's
    sorted rows begin.
    """

    order: Tensor
    ids: Tensor
    slots: Tensor
    offsets: Tensor


def dense_routing(slot_ids: Tensor, capacity: int) -> DenseRouting:
    """Number the slots in use, without a host sync. slot_ids: int32 [T, K], of at most `capacity` distinct slots."""
    rows, num_rows, device = sort_rows(slot_ids), slot_ids.numel(), slot_ids.device
    is_first = torch.ones(num_rows, dtype=torch.bool, device=device)
    is_first[1:] = rows.ids[1:] != rows.ids[:-1]
    number = torch.cumsum(is_first & (rows.ids >= 0), 0) - 1  # -1 for "none", which comes first
    ids = torch.empty_like(rows.order)
    ids[rows.order.long()] = number.to(torch.int32)
    place = torch.where(is_first & (rows.ids >= 0), number, capacity)  # the last place is thrown away
    slots = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device).scatter_(0, place, rows.ids)
    begin = torch.arange(num_rows, dtype=torch.int32, device=device)
    offsets = torch.full((capacity + 1,), num_rows, dtype=torch.int32, device=device).scatter_(0, place, begin)
    offsets[capacity] = num_rows
    return DenseRouting(rows.order, ids, slots[:capacity], offsets)


def small_dense_routing(slot_ids: Tensor, capacity: int) -> DenseRouting:
    """`dense_routing` in one launch of one program, for 1 to `SMALL_ROWS` rows."""
    num_rows = slot_ids.numel()
    assert 0 < num_rows <= SMALL_ROWS, num_rows
    block = rows_block(num_rows)
    order, sorted_ids, ids = (torch.empty(num_rows, dtype=torch.int32, device=slot_ids.device) for _ in range(3))
    slots, offsets = (torch.empty(capacity + 1, dtype=torch.int32, device=slot_ids.device) for _ in range(2))
    _small_dense_routing_kernel[(1,)](
        slot_ids.contiguous(),
        order,
        sorted_ids,
        ids,
        slots,
        offsets,
        num_rows,
        capacity,
        BLOCK=block,
        BLOCK_ROWS=min(block, COMPARED // block),
        **launch_options(4 if block <= 256 else 8, 1),
    )
    return DenseRouting(order, ids, slots[:capacity], offsets)


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def _small_dense_routing_kernel(
    ids_ptr,
    order_ptr,
    sorted_ptr,
    dense_ptr,
    slots_ptr,
    offsets_ptr,
    num_rows,
    capacity,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    _sort_by_comparing(ids_ptr, order_ptr, sorted_ptr, num_rows, BLOCK, BLOCK_ROWS)
    row = tl.arange(0, BLOCK)
    ok = row < num_rows
    i = 0
    while i <= capacity:
        tl.store(slots_ptr + i + row, tl.full((BLOCK,), -1, tl.int32), mask=i + row <= capacity)
        tl.store(offsets_ptr + i + row, tl.zeros((BLOCK,), tl.int32) + num_rows, mask=i + row <= capacity)
        i += BLOCK
    tl.debug_barrier()
    sorted_ids = tl.load(sorted_ptr + row, mask=ok, other=-1)
    before = tl.load(sorted_ptr + row - 1, mask=ok & (row > 0), other=-1)
    is_first = ok & (sorted_ids >= 0) & (before != sorted_ids)
    number = tl.cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(dense_ptr + tl.load(order_ptr + row, mask=ok, other=0), number, mask=ok)
    tl.store(slots_ptr + number, sorted_ids, mask=is_first)
    tl.store(offsets_ptr + number, row, mask=is_first)
