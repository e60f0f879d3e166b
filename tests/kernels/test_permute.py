"""Sorting rows by expert: the one-launch kernel, the torch path, and a plain Python twin agree exactly."""

import pytest
import torch
from kernels_experts import random_ids

from moe.kernels.permute import (
    dense_routing,
    expert_offsets,
    max_tiles,
    small_dense_routing,
    small_routing,
    sort_rows,
    tile_table,
)


def python_tiles(ids, block_m):
    """(id, first row, rows) of every tile, from a dictionary."""
    tiles, row = [], 0
    for expert in sorted(set(ids)):
        left = ids.count(expert)
        while left:
            tiles.append((expert, row, min(left, block_m)))
            row, left = row + tiles[-1][2], left - tiles[-1][2]
    return tiles


CASES = [(1, 1, 1, "none"), (1, 8, 8, "none"), (63, 2, 5, "holes"), (20, 3, 64, "none"), (63, 3, 4, "one")]


@pytest.mark.parametrize(("num_tokens", "top_k", "num_ids", "skew"), CASES)
@pytest.mark.parametrize("block_m", [4, 16])
def test_all_three_agree(num_tokens, top_k, num_ids, skew, block_m):
    ids = random_ids(num_tokens, top_k, num_ids, skew=skew)
    rows = sort_rows(ids)
    tiles = tile_table(rows.ids, num_ids, block_m)
    small = small_routing(ids, num_ids, block_m, with_offsets=True)
    count = int(tiles.num_tiles)
    flat = ids.flatten().tolist()
    assert rows.order.tolist() == sorted(range(len(flat)), key=lambda r: flat[r])  # Python's sort is stable
    assert [tuple(t) for t in tiles.table[:, :count].T.tolist()] == python_tiles(flat, block_m)
    assert expert_offsets(rows.ids, num_ids).tolist() == [sum(i < e for i in flat) for e in range(num_ids + 1)]
    assert torch.equal(small.rows.order, rows.order)
    assert torch.equal(small.rows.ids, rows.ids)
    assert torch.equal(small.tiles.num_tiles, tiles.num_tiles)
    assert torch.equal(small.tiles.table[:, :count], tiles.table[:, :count])
    assert torch.equal(small.offsets, expert_offsets(rows.ids, num_ids))
    assert count <= max_tiles(len(flat), num_ids, block_m)


def test_nobody_and_everybody():
    for ids in (torch.full((5, 2), -1, dtype=torch.int32), torch.full((5, 2), 3, dtype=torch.int32)):
        small, rows = small_routing(ids, 4, 4, with_offsets=True), sort_rows(ids)
        assert [tuple(t) for t in small.tiles.table[:, :3].T.tolist()] == python_tiles(ids.flatten().tolist(), 4)
        assert torch.equal(small.offsets, expert_offsets(rows.ids, 4))


@pytest.mark.parametrize(("num_tokens", "top_k", "num_slots", "skew"), CASES)
def test_slots_in_use_are_numbered(num_tokens, top_k, num_slots, skew):
    ids = random_ids(num_tokens, top_k, num_slots, skew=skew)
    slot_ids = torch.where(ids >= 0, 1000 - 7 * ids, -1)  # far apart in a large slab
    flat = slot_ids.flatten().tolist()
    used = sorted({slot for slot in flat if slot >= 0})
    capacity = num_slots + 3
    for dense in (dense_routing(slot_ids, capacity), small_dense_routing(slot_ids, capacity)):
        assert dense.order.tolist() == sorted(range(len(flat)), key=lambda r: flat[r])
        assert dense.ids.tolist() == [used.index(slot) if slot >= 0 else -1 for slot in flat]
        assert dense.slots.tolist() == used + [-1] * (capacity - len(used))
        begins = [sum(other < slot for other in flat) for slot in used]
        assert dense.offsets.tolist() == begins + [len(flat)] * (capacity + 1 - len(used))
