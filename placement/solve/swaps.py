"""Best swap after best swap in one layer: the table of all E^2 changes comes from two matrix products.

A token's experts are a hyperedge that costs the ranks it touches; load above a cap costs more than any swap can save.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import NEVER, Deadline
from moe.placement.solve.program import Floats, Ints

Single = NDArray[np.float32]
SAMPLE = 768  # tokens
PER_TABLE = 16  # experts for each swap that is applied per table, four swaps at least
FULL = 50.0  # rank visits that a token above the load cap costs: more than a swap can ever save by it
SOFT = (0.1, 0.5, FULL, FULL)  # first penalty of a descent: half of them come from outside the cap


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyOptions:
    """How to search. slack: the busiest rank may carry this factor of the EPLB-style greedy's busiest (on the fit).
    coherent: attention follows the heaviest expert, so each layer is pinned to the one before; else homes are fixed
    and unknown. node_weight: extra cost of each node that a token touches, relative to a rank. rounds: perturbations
    per layer; the same seed and rounds give the same plan where `seconds`, a limit on the whole search, is not reached.
    """

    slack: float = 1.0
    coherent: bool = False
    node_weight: float = 0.0
    nodes: tuple[int, ...] | None = None
    seconds: float | Deadline = NEVER
    rounds: int | None = 100
    seed: int = 0


class Touched(NamedTuple):
    """The swap table's ingredients for one layer: hits [N, E] K-hot, pins [N, G] (0/1) of ranks paid already."""

    hits: Single
    pins: Single | None


class LayerSearch:
    """Swap search in one layer; the assignment [E] of ranks with counts per rank kept."""

    def __init__(self, touched: Touched, load: Floats, cap: float, num_ranks: int, options: CopyOptions) -> None:
        self.hits, self.pins, self.load = np.asfortranarray(touched.hits), touched.pins, load  # experts contiguous
        self.cap, self.ranks, self.options = cap, num_ranks, options
        self.penalty = FULL * float(self.hits.sum()) / max(float(load.sum()), 1e-12)

    def run(self, start: Ints, rng: np.random.Generator, deadline: Deadline) -> Ints:
        """Descend from `start` and from shuffles of the best, until all rounds are done or the deadline."""
        if len(self.hits) > 2 * SAMPLE:  # most of the way is found on fewer tokens, at their share of the cost
            few = rng.choice(len(self.hits), SAMPLE, replace=False)
            pins = None if self.pins is None else self.pins[few]
            sample = LayerSearch(Touched(self.hits[few], pins), self.load, self.cap, self.ranks, self.options)
            start = sample.descend(start.copy(), deadline)
        best = self.descend(start.copy(), deadline)
        best_cost = self.cost(best)
        rounds = np.inf if self.options.rounds is None else self.options.rounds
        while not deadline.is_over() and rounds > 0:
            rounds -= 1
            trial = best.copy()
            among = rng.choice(len(trial), int(rng.integers(2, max(3, len(trial) // 3) + 1)), replace=False)
            trial[among] = rng.permutation(trial[among])
            soft = float(rng.choice(SOFT))
            trial = self.settle(trial, soft, deadline) if soft < FULL else self.descend(trial, deadline)
            cost = self.cost(trial)
            if cost < best_cost:
                best, best_cost = trial, cost
        return best

    def settle(self, ranks: Ints, soft: float, deadline: Deadline) -> Ints:
        """Descend with a penalty of `soft` visits per overloading token, then twice, ... up to the full penalty."""
        full = self.penalty
        self.penalty = full * soft / FULL
        while self.penalty < full and not deadline.is_over():
            ranks = self.descend(ranks, deadline)
            if np.bincount(ranks, weights=self.load, minlength=self.ranks).max() <= self.cap:
                break
            self.penalty = max(2 * self.penalty, full * 0.1 / FULL)
        self.penalty = full
        return self.descend(ranks, deadline)

    def cost(self, ranks: Ints) -> float:
        over = float(self.overload(np.bincount(ranks, weights=self.load, minlength=self.ranks)).sum())
        total = float((self.counts(ranks) > 0).sum())
        if self.options.node_weight and self.options.nodes is not None:
            nodes = np.array(self.options.nodes)[ranks]
            total += self.options.node_weight * float((self.node_counts(nodes) > 0).sum())
        return float(total + self.penalty * over)

    def counts(self, ranks: Ints) -> Single:
        counts = self.hits @ np.eye(self.ranks, dtype=np.float32)[ranks]
        return counts if self.pins is None else counts + self.pins

    def node_counts(self, nodes: Ints) -> Single:
        assert self.options.nodes is not None
        groups = np.eye(max(self.options.nodes) + 1, dtype=np.float32)
        counts = self.hits @ groups[nodes]
        return counts if self.pins is None else counts + self.pins @ groups[np.array(self.options.nodes)]

    def descend(self, ranks: Ints, deadline: Deadline = NEVER, expert: Ints | None = None) -> Ints:
        """Best swap after best swap until none helps (or the deadline). expert: items with equal ones stay apart."""
        before: float | None = None
        while not deadline.is_over():
            table = swap_changes(self.hits, self.counts(ranks), ranks)
            if self.options.node_weight and self.options.nodes is not None:
                nodes = np.array(self.options.nodes)[ranks]
                change = swap_changes(self.hits, self.node_counts(nodes), nodes)
                table += self.options.node_weight * np.where(nodes[:, None] == nodes[None, :], 0, change)
            table += self.penalty * self.overload_changes(ranks)
            table[ranks[:, None] == ranks[None, :]] = 0
            if expert is not None:
                there = np.zeros((len(ranks), self.ranks), bool)
                np.logical_or.at(there, (expert, ranks), True)
                blocked = there[expert][:, ranks]  # item e may not go where a twin is
                table[blocked | blocked.T] = 0
            swaps = best_swaps(table, 1 if expert is not None else max(4, len(ranks) // PER_TABLE))
            if not swaps:
                break
            trial = swapped(ranks, swaps)
            if len(swaps) > 1:  # swaps of different experts only nearly add up: keep them if they beat the best alone
                before = self.cost(ranks) if before is None else before
                alone, after = before + float(table[swaps[0]]), self.cost(trial)
                if after >= alone:
                    trial, after = swapped(ranks, swaps[:1]), alone
                before = after
            ranks = trial
        return ranks

    def overload(self, load: NDArray[Any]) -> Floats:
        """Load above the cap; summed over ranks rather than the busiest alone, so that every step towards it counts."""
        return np.maximum(load - self.cap, 0.0)

    def overload_changes(self, ranks: Ints) -> Floats:
        """Change of the total overload by every swap: [E, E]."""
        load = np.bincount(ranks, weights=self.load, minlength=self.ranks)
        change = self.load[None, :] - self.load[:, None]
        now = self.overload(load)[ranks]
        here, there = load[ranks][:, None] + change, load[ranks][None, :] - change
        return np.asarray(self.overload(here) + self.overload(there) - now[:, None] - now[None, :])


def best_swaps(table: Floats, limit: int) -> list[tuple[int, int]]:
    """The best improving swaps that share no expert, best first."""
    flat = table.reshape(-1)
    few = np.argpartition(flat, min(8 * limit, flat.size - 1))[: 8 * limit]
    chosen: list[tuple[int, int]] = []
    taken: set[int] = set()
    for index in few[np.argsort(flat[few], kind="stable")]:
        e, f = divmod(int(index), len(table))
        if flat[index] > -1e-3 or len(chosen) == limit:  # float32 counts are exact far beyond any trace length
            break
        if not {e, f} & taken:
            chosen.append((e, f))
            taken |= {e, f}
    return chosen


def swapped(ranks: Ints, swaps: list[tuple[int, int]]) -> Ints:
    out = ranks.copy()
    for e, f in swaps:
        out[[e, f]] = ranks[[f, e]]
    return out


def swap_changes(hits: Single, counts: Single, ranks: Ints) -> Floats:
    """How many more rank visits every swap of two experts' ranks makes: [E, E], exact for pairs on different ranks.

    hits: [N, E]; counts: [N, G] experts (and pins) of each token on each rank.
    """
    alone = np.ascontiguousarray((counts == 1).T, np.float32)  # [G, N]
    sole = hits.T * alone[ranks]  # [E, N]: the token visits this expert's rank only for it
    arrive = hits.T @ (counts == 0).astype(np.float32)  # [E, G]
    leave = sole.sum(axis=1)
    both = sole @ hits
    table = arrive[:, ranks] - leave[:, None]
    return np.asarray(table + table.T + both + both.T, np.float64)
