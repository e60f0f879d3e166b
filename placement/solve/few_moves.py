"""A better plan near the present one: the moves that gain most by what is served, and few of them.

A move swaps two copies of different ranks, or overwrites a copy of an expert that has others by another expert, so that
every rank keeps its number of experts. Tables of all swaps (best_swaps.c, or numpy) and of all overwritings, with the
tokens' split over copies held fixed, name candidates; the best are served by the engine's own rule
(placement/replicas.py), and the layers compete for the moves. Greedy: nothing is proven.
"""

import heapq
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.helper import BEST_SWAPS, MOST_RANKS, load_helper
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.solve.program import Floats, Ints
from moe.placement.solve.swaps import swap_changes

SQUARES = 4
NORM = 2**SQUARES  # of the ranks' loads: nearly the busiest, but the next busiest counts as well
CANDIDATES = 1  # moves of a layer that are served, of each kind
LEAST_GAIN = 1e-3  # of the layer's cost, for each expert that moves: less is noise of the window
FREE = 0.5  # a move for nothing ranks as one of so many copies

Hosted = NDArray[np.bool_]  # [E, G]: where copies are


class Rates(NamedTuple):
    """What a layer costs: seconds of a pair on the busiest rank, of a byte that a rank sends, and of an expert that is
    not in fast memory.

    row, result: bytes of a row out and of one back. is_exact: a result per pair served away from home, and a copy at
    home serves first; else a result per rank visited. slots: copies of the layer per rank in fast memory, those that
    are used in most steps of `step_tokens`; None = all.
    """

    pair: float
    byte: float
    row: int
    result: int
    is_exact: bool = True
    miss: float = 0.0
    slots: int | None = None
    step_tokens: int = 32


class Cost(NamedTuple):
    """One layer's tokens: seconds by `Rates`; bytes sent; the busiest rank's pairs over the mean; uses of experts
    outside fast memory, of all ranks."""

    seconds: float
    num_bytes: int
    imbalance: float
    misses: int = 0


class LayerWindow:
    """One layer of a window of routing, which serves and costs placements. ids: [N, K], -1 = none; home: [N]."""

    def __init__(self, ids: NDArray[np.int16], home: Ints, rates: Rates) -> None:
        self.ids, self.home, self.rates = np.ascontiguousarray(ids, np.int64), home, rates
        self.is_pair = self.ids >= 0
        self._token = np.arange(len(ids))
        self._step = np.broadcast_to(self._token[:, None] // rates.step_tokens, self.ids.shape)

    def served(self, hosted: Hosted) -> Ints:
        """The rank that serves each pair: [N, K], G where there is none."""
        experts, ranks = hosted.shape
        if (hosted.sum(axis=1) == 1).all():
            return np.asarray(np.where(self.is_pair, hosted.argmax(axis=1)[self.ids], ranks), np.int64)
        physical = np.where(hosted, np.arange(experts * ranks, dtype=np.int32).reshape(experts, ranks), np.int32(-1))
        bits = np.uint64(1) << np.arange(min(ranks, MOST_RANKS), dtype=np.uint64)
        masks = hosted @ bits if ranks <= MOST_RANKS else None
        chosen = choose_replicas(
            self.ids, self.home, ServingTable.made(physical, masks), home_first=self.rates.is_exact
        )
        rank_of = np.append(np.tile(np.arange(ranks), experts), ranks)  # the last: -1, none
        return np.asarray(rank_of[chosen], np.int64)

    def cost(self, served: Ints, ranks: int) -> Cost:
        busy = np.bincount(served.ravel(), minlength=ranks + 1)[:-1]
        visits, first = np.zeros(len(served) * (ranks + 1), np.bool_), self._token * (ranks + 1)
        visits[first[:, None] + served] = True
        visits[first + self.home] = visits[first + ranks] = False
        rows = results = int(np.count_nonzero(visits))
        if self.rates.is_exact:
            results = int(np.count_nonzero((served != self.home[:, None]) & self.is_pair))
        num_bytes = rows * self.rates.row + results * self.rates.result
        seconds = self.rates.pair * float(smooth_max(busy)) + self.rates.byte * num_bytes / ranks
        missed = np.zeros(ranks, np.int64)
        if self.rates.slots is not None:
            uses = -np.sort(-self.uses(served, ranks), axis=0)
            missed = uses[self.rates.slots :].sum(axis=0)
            seconds += self.rates.miss * float(smooth_max(missed))
        return Cost(seconds, num_bytes, float(busy.max() / max(float(busy.mean()), 1e-12)), int(missed.sum()))

    def uses(self, served: Ints, ranks: int) -> Ints:
        """Steps in which each expert is used on each rank: [E', G], E' = 1 + the greatest id."""
        step, expert, rank = self._step[self.is_pair], self.ids[self.is_pair], served[self.is_pair]
        width = int(expert.max(initial=0)) + 1
        code = np.unique((step * width + expert) * ranks + rank) % (width * ranks)
        return np.bincount(code, minlength=width * ranks).reshape(width, ranks)


class Found(NamedTuple):
    """A move of one layer: seconds it saves, by how many more copies the placement then differs from the first, the
    placement after it and who then serves what."""

    gain: float
    size: int
    hosted: Hosted
    served: Ints
    cost: Cost

    @property
    def gain_per_copy(self) -> float:
        return self.gain / max(self.size, FREE)


class Swap(NamedTuple):
    """Of copies i and j. size: by how many more copies the placement then differs from the first, 0 for less; cost:
    seconds, but for the bytes that were sent before it."""

    i: int
    j: int
    size: int
    cost: float


def few_moves(windows: list[LayerWindow], hosted: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Copies [L, E, G] of which at most `most` are new, at a cost on the windows that is no higher.

    Best gain per new copy first, over all layers; a copy that has moved may move again, or back, for nothing. Costs
    O(C² N) per move for C copies and N tokens of a layer.
    """
    layers = [_Layer(window, own) for window, own in zip(windows, hosted, strict=True)]
    queue: list[tuple[float, int, Found]] = []

    def offer(number: int) -> None:
        found = layers[number].best()
        if found is not None:
            heapq.heappush(queue, (-found.gain_per_copy, number, found))

    for number in range(len(layers)):
        offer(number)
    while queue:
        _, number, found = heapq.heappop(queue)
        if found.size <= most:
            most -= found.size
            layers[number].take(found.hosted, found.served, found.cost)
            offer(number)
    return np.stack([layer.hosted for layer in layers])


def smooth_max(busy: NDArray[np.number]) -> Floats:
    """Of the last axis: the mean norm of order `NORM`, at most the maximum and at least `G ** (-1 / NORM)` of it."""
    most = np.maximum(busy.max(axis=-1, keepdims=True), 1e-12)
    return np.asarray(most[..., 0] * _to_the_norm(busy / most).mean(axis=-1) ** (1 / NORM))


def _after_swaps(now: NDArray[np.number], rank: Ints, here: NDArray[np.number]) -> Floats:
    """`smooth_max` of the ranks' figures [G] after every swap of two copies: [C, C].

    rank: [C] of each copy; here: [C, C], what the rank of copy i then has.
    """
    most = max(float(here.max(initial=0)), float(now.max()), 1e-12)
    before, after = _to_the_norm(now / most), _to_the_norm(here / most)
    powers = before.sum() - before[rank][:, None] - before[rank] + after + after.T
    return np.asarray(most * (np.maximum(powers, 0.0) / len(now)) ** (1 / NORM))


def _misses_after(uses: Ints, rank: Ints, ranks: int, slots: int) -> tuple[Ints, Ints, Ints]:
    """As `_after_swaps` takes them: misses of each rank, `rank`, and those of i's rank with j in the place of i.

    uses: [C] of each copy. A rank has its `slots` most used copies in fast memory.
    """
    missed, kept, least = np.zeros(ranks, np.int64), np.zeros(len(rank), np.int64), np.zeros(len(rank), np.int64)
    for g in range(ranks):
        own = np.flatnonzero(rank == g)
        order = own[np.argsort(-uses[own], kind="stable")]
        missed[g] = uses[order[slots:]].sum()
        for i in own:  # the others, and the least used of those that then are in fast memory
            others = uses[order[order != i]]
            kept[i] = others[slots:].sum()
            least[i] = others[slots - 1] if len(others) >= slots else 0
    return missed, rank, kept[:, None] + np.minimum(uses, least[:, None])


def _to_the_norm(x: NDArray[Any]) -> Floats:
    for _ in range(SQUARES):
        x = x * x
    return x


class _Layer:
    def __init__(self, window: LayerWindow, hosted: Hosted) -> None:
        self.window, self.first = window, hosted
        served = window.served(hosted)
        self.take(hosted, served, window.cost(served, hosted.shape[1]))

    def take(self, hosted: Hosted, served: Ints, cost: Cost) -> None:
        self.hosted, self.served, self.now = hosted, served, cost

    def best(self) -> Found | None:
        """The move with the greatest gain per copy, None if none gains enough."""
        ranks, moved, found = self.hosted.shape[1], self._num_new(self.hosted), list[Found]()
        for hosted in self._swaps() + self._overwrites():
            served = self.window.served(hosted)
            cost = self.window.cost(served, ranks)
            found.append(Found(self.now.seconds - cost.seconds, self._num_new(hosted) - moved, hosted, served, cost))
        able = [one for one in found if one.gain >= LEAST_GAIN * self.now.seconds * max(one.size, FREE)]
        return max(able, key=lambda one: one.gain_per_copy, default=None)

    def _num_new(self, hosted: Hosted) -> int:
        return int((hosted & ~self.first).sum())

    def _swaps(self) -> list[Hosted]:
        """Swaps of two copies, by the change of load and bytes if every copy kept its tokens."""
        experts, ranks = self.hosted.shape
        expert, rank = np.nonzero(self.hosted)
        number = np.full((experts + 1, ranks + 1), -1)
        number[expert, rank] = np.arange(len(expert))
        copy = number[self.window.ids, self.served]  # [N, K], -1 = none
        is_compiled = self.window.rates.slots is None and load_helper() is not None
        swaps = self.compiled_swaps(copy, expert, rank) if is_compiled else self.table_swaps(copy, expert, rank)
        if len(expert) == experts:  # one copy each: what a swap costs is exact, and the best of them enough
            before = self.now.seconds - self.window.rates.byte * self.now.num_bytes / ranks
            swaps = sorted(swaps, key=lambda one: (one.cost - before) / max(one.size, FREE))[:1]
        trials = []
        for i, j, _, _ in swaps:
            trial = self.hosted.copy()
            trial[expert[[i, j]], rank[[i, j]]] = False
            trial[expert[[i, j]], rank[[j, i]]] = True
            trials.append(trial)
        return trials

    def compiled_swaps(self, copy: Ints, expert: Ints, rank: Ints) -> "list[Swap]":
        """The best of every size. copy: [N, K] that serves each pair, -1 = none; expert, rank: [C]."""
        rates, (experts, ranks), helper = self.window.rates, self.hosted.shape, load_helper()
        assert helper is not None
        best, costs = np.empty((3, 2), np.int64), np.empty(3)
        given: list[NDArray[Any]] = [copy.astype(np.int16), self.window.home, expert, rank, self.hosted, self.first]
        arrays = [*map(np.ascontiguousarray, given), best, costs]
        byte = rates.byte / ranks
        call = BEST_SWAPS.pack(
            *copy.shape, len(expert), experts, ranks, rates.is_exact, SQUARES, rates.pair, byte * rates.row,
            byte * rates.result, *(one.ctypes.data for one in arrays),
        )  # fmt: skip
        if helper.moe_best_swaps(call):
            raise MemoryError(f"no memory for swaps of {len(expert)} copies on {len(copy)} tokens; use fewer")
        return [Swap(int(i), int(j), n, float(costs[n])) for n, (i, j) in enumerate(best) if i >= 0]

    def table_swaps(self, copy: Ints, expert: Ints, rank: Ints) -> "list[Swap]":
        """The slow twin of `compiled_swaps`, and with misses."""
        window, rates, ranks = self.window, self.window.rates, self.hosted.shape[1]
        hits = np.zeros((len(copy), len(expert) + 1), np.float32)
        np.put_along_axis(hits, np.where(copy < 0, len(expert), copy), np.float32(1), axis=1)
        hits = hits[:, :-1]
        at_home = np.eye(ranks, dtype=np.float32)[window.home]
        counts = hits @ np.eye(ranks, dtype=np.float32)[rank] + at_home
        away = -(hits.T @ at_home)  # [C, G]: pairs of each copy that travel on a rank, less all of its pairs
        rows = swap_changes(hits, counts, rank)
        moved = away[:, rank] - away[np.arange(len(rank)), rank][:, None]  # what i's pairs travel more on j's rank
        results = moved + moved.T if rates.is_exact else rows
        share = hits.sum(axis=0, dtype=np.float64)
        busy = np.bincount(rank, weights=share, minlength=ranks)
        change = share[None, :] - share[:, None]  # what i's rank gains
        load = _after_swaps(busy, rank, busy[rank][:, None] + change)
        cost = rates.pair * load + rates.byte / ranks * (rates.row * rows + rates.result * results)
        if rates.slots is not None:
            uses = np.zeros(self.hosted.shape, np.int64)
            uses_seen = window.uses(self.served, ranks)
            uses[: len(uses_seen)] = uses_seen
            cost += rates.miss * _after_swaps(*_misses_after(uses[expert, rank], rank, ranks, rates.slots))
        blocked = self.hosted[expert][:, rank]  # i may not come where a twin is, nor stay where it is
        cost[blocked | blocked.T] = np.inf
        cost[np.tril_indices(len(cost))] = np.inf
        new = (~self.first[expert][:, rank]).astype(np.int8)  # [C, C]: whether copy i would be new where j is
        size = new + new.T - new.diagonal()[:, None] - new.diagonal()
        classes = [np.where(of_size, cost, np.inf) for of_size in (size <= 0, size == 1, size == 2)]
        found = ((n, *divmod(index, len(rank))) for n, one in enumerate(classes) for index in _least(one))
        return [Swap(i, j, n, float(cost[i, j])) for n, i, j in found]

    def _overwrites(self) -> list[Hosted]:
        """A copy that has others becomes one of another expert; by the loads if all copies shared alike."""
        if not (self.hosted.sum(axis=1) > 1).any():
            return []
        pairs = np.zeros((len(self.hosted), self.hosted.shape[1] + 1), np.int64)  # that each copy serves
        np.add.at(pairs, (self.window.ids[self.window.is_pair], self.served[self.window.is_pair]), 1)
        pairs = pairs[:, :-1]
        hosted, copies, total = self.hosted, self.hosted.sum(axis=1), pairs.sum(axis=1)
        spare = np.argwhere(hosted & (copies > 1)[:, None])  # [S, 2]
        given = hosted * (pairs / (copies + 1)[:, None])  # what a further copy of each expert takes of each rank
        each, (expert, rank) = np.arange(len(spare)), spare.T
        others = hosted[expert]  # [S, G]
        others[each, rank] = False
        freed = pairs[expert, rank].astype(np.float64)
        busy = pairs.sum(axis=0) + others * (freed / others.sum(axis=1))[:, None]
        busy[each, rank] -= freed
        loads = busy[:, None] - given  # [S, E, G]
        loads[each, :, rank] += total / (copies + 1)
        after = smooth_max(np.maximum(loads, 0.0))
        after[hosted[:, spare[:, 1]].T] = np.inf  # it is there already
        trials = []
        for index in _least(after):
            at, come = divmod(index, len(hosted))
            trial = hosted.copy()
            trial[tuple(spare[at])], trial[come, spare[at, 1]] = False, True
            trials.append(trial)
        return trials


def _least(table: Floats) -> list[int]:
    """Flat indices of the `CANDIDATES` least numbers that are finite."""
    flat = table.ravel()
    few = np.argpartition(flat, CANDIDATES)[:CANDIDATES] if flat.size > CANDIDATES else np.arange(flat.size)
    return [int(index) for index in few if np.isfinite(flat[index])]
