"""How few ranks tokens can touch, where all groups of experts that a rank may hold can be listed.

A placement without replicas takes G groups of c experts that hold every expert once, and costs the tokens that touch
each. Its linear relaxation, every group taken by any share, knows a group's cost exactly, which co-location of pairs
does not: 64 experts on 16 ranks have 635 376 groups of four. Solved by column generation over the list. Any prices y of
experts prove sum(y) + G x the least of (tokens that touch a group - its prices), so that the bound holds whenever time
ends.
"""

import math
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline
from moe.placement.solve.highs import quiet_highs
from moe.placement.solve.program import Floats, Ints

MOST_GROUPS = 1_000_000
COLUMNS = 500  # that one round of column generation adds at most
TIGHT = 1e-4  # of the bound, between it and the relaxation's value


def can_list(num_experts: int, num_ranks: int) -> bool:
    """Whether the groups are few enough."""
    places = -(-num_experts // num_ranks)
    return math.comb(num_ranks * places, places) <= MOST_GROUPS


def groups_bound(
    expert_ids: NDArray[np.integer[Any]],
    num_experts: int,
    num_ranks: int,
    deadline: Deadline,
    start: Ints | None = None,
    *,
    most_pairs: float = np.inf,
) -> float:
    """Lower bound on the mean ranks touched per token: expert_ids [N, K], -1 = none, for ceil(E / G) experts a rank.

    start: ranks [E] of a good placement, whose groups come first. most_pairs: that a group may serve, at least what the
    fullest of `start` does (ValueError). 0 where time is too short for any. Costs
    O(groups N / 64) for the list and a linear program of E rows for each of some tens of rounds.
    """
    places = -(-num_experts // num_ranks)
    experts = num_ranks * places  # silent ones fill the empty places
    bits = _token_sets(expert_ids, experts)
    try:
        groups, touched = listed(bits, places, deadline)
    except TimeoutError:
        return 0.0
    owner = np.arange(experts) % num_ranks if start is None else _filled(start, num_ranks, places)
    pairs = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    if most_pairs < np.inf:
        if start is None or np.bincount(owner, weights=pairs).max() > most_pairs:
            raise ValueError(f"{most_pairs} pairs a rank need a placement that keeps them, whose groups come first")
        able = pairs[groups].sum(axis=1) <= most_pairs
        groups, touched = groups[able], touched[able]
    own = np.sort(np.argsort(owner, kind="stable").reshape(num_ranks, places), axis=1)
    chosen = _places_of(own, groups, experts)
    best, prices = 0.0, touched[chosen].sum() / experts * np.ones(experts)
    highs = quiet_highs(deadline)
    for _ in range(experts):
        highs.addRow(1.0, 1.0, 0, np.zeros(0, np.int32), np.zeros(0))
    while True:
        _add(highs, groups[chosen], touched[chosen])
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return best / max(len(expert_ids), 1)
        found = np.array(highs.getSolution().row_dual)
        for trial in (0.5 * prices + 0.5 * found, found):  # smoothed prices leap less
            reduced = touched - trial[groups].sum(axis=1)
            bound = float(trial.sum() + num_ranks * reduced.min())
            if bound > best:
                best, prices = bound, trial
            new = np.argpartition(reduced, min(COLUMNS, len(reduced) - 1))[:COLUMNS]
            chosen = new[(touched - found[groups].sum(axis=1))[new] < -1e-7]
            if len(chosen):
                break
        value = highs.getInfo().objective_function_value
        if not len(chosen) or value - best < TIGHT * value or deadline.is_over():
            return (best - 1e-6) / max(len(expert_ids), 1)


def listed(bits: NDArray[np.uint64], size: int, deadline: Deadline) -> tuple[NDArray[np.int16], Floats]:
    """All groups [n, size] in order, and how many tokens touch each, [n]. bits: [E, words]. Raises TimeoutError."""
    experts = len(bits)
    groups: list[NDArray[np.int16]] = []
    touched: list[NDArray[np.int64]] = []

    def extend(chosen: tuple[int, ...], union: NDArray[np.uint64], left: int) -> None:
        first = chosen[-1] + 1 if chosen else 0
        if left == 1:
            if deadline.is_over():
                raise TimeoutError(f"time ended while groups of {size} experts were listed")
            last = np.arange(first, experts, dtype=np.int16)
            groups.append(np.column_stack([np.tile(np.array(chosen, np.int16), (len(last), 1)), last]))
            touched.append(np.bitwise_count(bits[first:] | union).sum(axis=1, dtype=np.int64))
            return
        for expert in range(first, experts - left + 1):
            extend((*chosen, expert), union | bits[expert], left - 1)

    extend((), np.zeros(bits.shape[1], np.uint64), size)
    return np.concatenate(groups), np.concatenate(touched).astype(np.float64)


def _token_sets(expert_ids: NDArray[np.integer[Any]], experts: int) -> NDArray[np.uint64]:
    """Tokens of each expert as bits: [E, ceil(N / 64)]."""
    tokens = len(expert_ids)
    hit = np.zeros((experts + 1, -(-tokens // 64) * 64), bool)
    hit[expert_ids.T, np.arange(tokens)] = True  # -1: the last row, dropped
    return np.packbits(hit[:experts], axis=1).view(np.uint64)


def _filled(start: Ints, num_ranks: int, places: int) -> Ints:
    """Ranks of all places, silent experts where ranks have room."""
    free = places - np.bincount(start, minlength=num_ranks)
    return np.concatenate([start, np.repeat(np.arange(num_ranks), free)])


def _places_of(own: Ints, groups: NDArray[np.int16], experts: int) -> Ints:
    """Where these groups stand in the list."""
    weight = experts ** np.arange(own.shape[1] - 1, -1, -1, dtype=np.int64)
    return np.asarray(np.searchsorted(groups.astype(np.int64) @ weight, own @ weight), np.int64)


def _add(highs: highspy.Highs, groups: NDArray[np.int16], cost: Floats) -> None:
    count, size = groups.shape
    starts, ones = np.arange(0, count * size, size, dtype=np.int32), np.ones(count * size)
    highs.addCols(
        count, cost, np.zeros(count), np.full(count, np.inf), count * size, starts,
        groups.reshape(-1).astype(np.int32), ones,
    )  # fmt: skip
