"""One slab for experts of several sizes: who gets how many slots, and that no two slots share a byte."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.offload.slab import Slab
from moe.offload.slot_runs import slab_bytes, slot_runs

LAYERS = st.lists(st.tuples(st.sampled_from([64, 128, 192, 832]), st.integers(1, 9)), min_size=1, max_size=6)


def some_slots(draw_from, share):
    sizes, counts = [list(of) for of in zip(*draw_from)]
    return sizes, counts, max(1, round(sum(counts) * share))


@given(LAYERS, st.floats(0, 1))
def test_shares(layers, share):
    sizes, counts, num_slots = some_slots(layers, share)
    runs = slot_runs(sizes, counts, num_slots)
    assert sum(run.num_slots for run in runs) == num_slots
    assert sorted(layer for run in runs for layer in run.layers) == list(range(len(sizes)))
    assert [run.nbytes for run in runs] == sorted({run.nbytes for run in runs}, reverse=True)
    for run in runs:
        assert 1 <= run.num_slots <= (own := sum(counts[n] for n in run.layers))
        assert run.nbytes == max(sizes[n] for n in run.layers)
        assert abs(run.num_slots - own * num_slots / sum(counts)) < 1
    assert slab_bytes(sizes, counts, num_slots) <= num_slots * max(sizes)


@given(LAYERS)
def test_all_experts_waste_nothing(layers):
    sizes, counts, num_slots = some_slots(layers, 1)
    assert slab_bytes(sizes, counts, num_slots) == sum(size * count for size, count in layers)


def test_a_size_without_a_slot_joins_its_neighbour():
    assert [run.layers for run in slot_runs([100, 10, 1], [8, 8, 8], 1)] == [(0, 1, 2)]
    assert [(run.nbytes, run.layers) for run in slot_runs([100, 10, 1], [9, 3, 9], 5)] == [(100, (0, 1)), (1, (2,))]
    assert [(run.nbytes, run.layers) for run in slot_runs([10, 100], [20, 1], 6)] == [(100, (1, 0))]


@given(LAYERS, st.floats(0, 1))
def test_no_two_slots_share_a_byte(layers, share):
    """Every byte of the slab belongs to one slot: each is written once, and nothing else is."""
    sizes, counts, num_slots = some_slots(layers, share)
    runs = slot_runs(sizes, counts, num_slots)
    rooms = [run.num_slots + n % 2 for n, run in enumerate(runs)]
    slab = Slab(runs, rooms, torch.zeros(Slab.nbytes(runs, rooms), dtype=torch.uint8))
    first = 0
    for run, room in zip(runs, rooms):
        for layer in run.layers[:1]:
            blobs = slab.of_layer(layer)
            assert blobs.shape == (first + room, run.nbytes)
            blobs[first:] += 1
        assert all(slab.of_layer(n).data_ptr() == blobs.data_ptr() for n in run.layers)
        first += room
    assert bool((slab.memory == 1).all())


def test_experts_may_be_more_than_the_memory_of_the_machine():
    """There are addresses for all of them, and pages for what is written."""
    size = -(-8 * total_memory() // 256 // 4096) * 4096
    slab = Slab.made([size] * 4, [64] * 4, [64] * 4, 3, torch.device("cpu"))
    assert (slab.slots_of_run, slab.rooms) == ([3], [256])
    slab.of_layer(0)[[0, 255], 0] = 1
    assert slab.of_layer(3)[:, 0].tolist() == [1, *[0] * 254, 1]
    slab.give_back([3])
    assert int(slab.of_layer(0)[:, 0].sum()) == 1


def test_limited_addresses_are_room_for_the_slots_alone():
    now = next(int(line.split()[1]) << 10 for line in status() if line.startswith("VmSize:"))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20), limits[1]))  # as `ulimit -v` does
    try:
        slab = Slab.made([4 << 20] * 2, [64] * 2, [64] * 2, 3, torch.device("cpu"))
        with pytest.raises(OSError, match=r"addresses for 512.0 MiB; raise `ulimit -v`"):
            Slab.made([4 << 20] * 2, [64] * 2, [64] * 2, 128, torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert slab.rooms == slab.slots_of_run == [3]


def status() -> list[str]:
    return Path("/proc/self/status").read_text().splitlines()


def total_memory() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1]) << 10
