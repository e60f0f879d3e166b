"""How many slots each size of expert gets, where experts differ in size. Plain numbers: settings are read with them.

    [ slots of the largest | of the next smaller | … ]      numbered through: 0 1 2 … | k k+1 … | …

Formats that are mixed by layer make experts of several sizes; in slots of the largest the others would waste the rest.
A size gets the share of the slots that its experts have of all, so that every layer has the same part of its experts in
memory; one that would get less than a slot shares those of its neighbour.
"""

from collections.abc import Sequence
from typing import NamedTuple


class SlotRun(NamedTuple):
    """Slots of one size, and the layers whose experts lie in them."""

    nbytes: int  # of a slot: that of its largest expert
    layers: tuple[int, ...]
    num_slots: int


def slot_runs(sizes: Sequence[int], counts: Sequence[int], num_slots: int) -> list[SlotRun]:
    """How `num_slots` are shared, largest size first. sizes: bytes of an expert by layer; counts: experts by layer.

    Every run has a slot at least; with as many slots as experts, each expert has one of its own size.
    """
    total = sum(counts)
    assert 1 <= num_slots <= total, (num_slots, total)
    runs = [
        SlotRun(size, tuple(n for n, of in enumerate(sizes) if of == size), 0)
        for size in sorted(set(sizes), reverse=True)
    ]
    while len(runs) > 1:
        poor = [i for i, run in enumerate(runs) if _num_experts(run, counts) * num_slots < total]
        if not poor:
            break
        i = max(1, poor[-1])  # joins its larger neighbour; the largest is joined by the next
        a, b = runs[i - 1], runs[i]
        runs[i - 1 : i + 1] = [SlotRun(a.nbytes, (*a.layers, *b.layers), 0)]
    return [run._replace(num_slots=own) for run, own in zip(runs, slot_shares(runs, counts, num_slots))]


def slot_shares(runs: Sequence[SlotRun], counts: Sequence[int], num_slots: int) -> list[int]:
    """Slots of each run: as its experts' share of all, rounded so that the sum is `num_slots`."""
    total = sum(counts)
    shares = [divmod(_num_experts(run, counts) * num_slots, total) for run in runs]
    left = num_slots - sum(whole for whole, _ in shares)
    most_left = sorted(range(len(runs)), key=lambda i: (-shares[i][1], -i))[:left]  # ties to the smaller size
    return [whole + (i in most_left) for i, (whole, _) in enumerate(shares)]


def slab_bytes(sizes: Sequence[int], counts: Sequence[int], num_slots: int) -> int:
    """Of the slab with so many slots."""
    return sum(run.nbytes * run.num_slots for run in slot_runs(sizes, counts, num_slots))


def _num_experts(run: SlotRun, counts: Sequence[int]) -> int:
    return sum(counts[layer] for layer in run.layers)
