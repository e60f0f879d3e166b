"""Named baselines beside contiguous, round-robin and random (`Plan`): EPLB-style greedy replication and packing."""

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan, check_capacity


def eplb_greedy(load: NDArray[np.float64], num_ranks: int, slots_per_rank: int | None = None) -> Plan:
    """Balance the load as DeepSeek's EPLB does: give each spare slot to the hottest copy, pack longest first.

    load: [L, E]. slots_per_rank: copies that a rank holds per layer; None = ceil(E / G), no replicas if it divides.
    Copies share their expert's load equally; each goes to the least loaded rank that has a slot and not yet this
    expert; a copy that fits nowhere trades places with one that does. Own implementation of the published idea.
    """
    num_layers, num_experts = load.shape
    slots = -(-num_experts // num_ranks) if slots_per_rank is None else slots_per_rank
    check_capacity(num_experts, num_ranks, slots)
    spare = num_ranks * slots - num_experts if slots_per_rank is not None else 0
    hosted = np.zeros((num_layers, num_experts, num_ranks), bool)
    for layer in range(num_layers):
        hosted[layer] = _pack(load[layer], replicate_hottest(load[layer], spare, num_ranks), num_ranks, slots)
    return Plan.from_hosted(hosted, solver="eplb")


def replicate_hottest(load: NDArray[np.float64], spare: int, num_ranks: int) -> NDArray[np.int64]:
    """Copies per expert, [E]: each of `spare` extra copies goes to the expert with the greatest load per copy."""
    copies = np.ones(len(load), np.int64)
    for _ in range(min(spare, len(load) * (num_ranks - 1))):
        share = np.where(copies < num_ranks, load / copies, -1.0)
        copies[int(share.argmax())] += 1
    return copies


def _pack(load: NDArray[np.float64], copies: NDArray[np.int64], num_ranks: int, slots: int) -> NDArray[np.bool_]:
    hosted = np.zeros((len(load), num_ranks), bool)
    total, free = np.zeros(num_ranks), np.full(num_ranks, slots)
    items = np.repeat(np.arange(len(load)), copies)
    for expert in items[np.argsort(-(load / copies)[items], kind="stable")]:
        open_ranks = (free > 0) & ~hosted[expert]
        if not open_ranks.any():
            _make_room(hosted, free, total, load / copies, int(expert))
            continue
        rank = int(np.where(open_ranks, total, np.inf).argmin())
        hosted[expert, rank] = True
        total[rank] += load[expert] / copies[expert]
        free[rank] -= 1
    return hosted


def _make_room(
    hosted: NDArray[np.bool_],
    free: NDArray[np.int64],
    total: NDArray[np.float64],
    share: NDArray[np.float64],
    expert: int,
) -> None:
    """Every rank with a free slot already holds `expert`: move another expert there and take its place."""
    for empty in np.flatnonzero(free > 0):
        for rank in np.argsort(total, kind="stable"):
            movable = hosted[:, rank] & ~hosted[:, empty]
            if hosted[expert, rank] or not movable.any():
                continue
            other = int(np.flatnonzero(movable)[share[movable].argmin()])
            hosted[other, rank], hosted[other, empty], hosted[expert, rank] = False, True, True
            total[empty] += share[other]
            total[rank] += share[expert] - share[other]
            free[empty] -= 1
            return
    raise AssertionError(f"no rank can take a copy of expert {expert}")
