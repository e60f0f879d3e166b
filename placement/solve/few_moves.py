"""A better plan near the present one: the moves that gain most by what is served, and few of them.

A move swaps two copies of different ranks, or overwrites a copy of an expert that has others by another expert, so that
every rank keeps its number of experts. Tables of all swaps and of all overwritings, with the tokens' split over copies
held fixed, name candidates; the best are served by the engine's own rule (placement/replicas.py), and the layers
compete for the moves. Greedy: nothing is proven.
"""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.helper import MOST_RANKS
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.solve.program import Floats, Ints
from moe.placement.solve.swaps import swap_changes

NORM = 16  # of the ranks' loads: nearly the busiest, but the next busiest counts as well
CANDIDATES = 2  # moves of a layer that are served, of each kind
LEAST_GAIN = 1e-3  # of the layer's cost, for each expert that moves: less is noise of the window

Hosted = NDArray[np.bool_]  # [E, G]: where copies are


class Rates(NamedTuple):
    """What a layer costs: seconds of a pair on the busiest rank, and of a byte that a rank sends.

    row, result: bytes of a row out and of one back. is_exact: a result per pair served away from home, and a copy at
    home serves first; else a result per rank visited.
    """

    pair: float
    byte: float
    row: int
    result: int
    is_exact: bool = True


class Cost(NamedTuple):
    """One layer's tokens: seconds by `Rates`; bytes sent; the busiest rank's pairs over the mean."""

    seconds: float
    num_bytes: int
    imbalance: float


class LayerWindow:
    """One layer of a window of routing, which serves and costs placements. ids: [N, K], -1 = none; home: [N]."""

    def __init__(self, ids: NDArray[np.int16], home: Ints, rates: Rates) -> None:
        self.ids, self.home, self.rates = np.ascontiguousarray(ids), home, rates
        self.is_pair = self.ids >= 0
        self._token = np.arange(len(ids))

    def served(self, hosted: Hosted) -> Ints:
        """The rank that serves each pair: [N, K], G where there is none."""
        experts, ranks = hosted.shape
        if (hosted.sum(axis=1) == 1).all():
            return np.asarray(np.where(self.is_pair, hosted.argmax(axis=1)[self.ids], ranks), np.int64)
        physical = np.where(hosted, np.arange(experts * ranks).reshape(experts, ranks), -1).astype(np.int32)
        bits = np.uint64(1) << np.arange(min(ranks, MOST_RANKS), dtype=np.uint64)
        masks = np.where(hosted, bits, np.uint64(0)).sum(axis=1, dtype=np.uint64) if ranks <= MOST_RANKS else None
        chosen = choose_replicas(self.ids, self.home, ServingTable(physical, masks), home_first=self.rates.is_exact)
        return np.asarray(np.where(chosen >= 0, chosen % ranks, ranks), np.int64)

    def cost(self, served: Ints, ranks: int) -> Cost:
        busy = np.bincount(served.ravel(), minlength=ranks + 1)[:-1]
        visits = np.zeros((len(served), ranks + 1), np.bool_)
        visits[self._token[:, None], served] = True
        visits[self._token, self.home] = False
        rows = results = int(visits[:, :-1].sum())
        if self.rates.is_exact:
            results = int(((served != self.home[:, None]) & self.is_pair).sum())
        num_bytes = rows * self.rates.row + results * self.rates.result
        seconds = self.rates.pair * float(smooth_max(busy)) + self.rates.byte * num_bytes / ranks
        return Cost(seconds, num_bytes, float(busy.max() / max(float(busy.mean()), 1e-12)))


class Found(NamedTuple):
    """A move of one layer: seconds it saves, copies that come, the placement after it and who then serves what."""

    gain: float
    size: int
    hosted: Hosted
    served: Ints
    cost: Cost


def few_moves(windows: list[LayerWindow], hosted: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Copies [L, E, G] after at most `most` of them moved, at a cost on the windows that is no higher.

    Best gain per moved copy first, over all layers. Costs O(C² N) per move for C copies and N tokens of a layer.
    """
    layers = [_Layer(window, own) for window, own in zip(windows, hosted, strict=True)]
    queue: list[tuple[float, int, Found]] = []

    def offer(number: int) -> None:
        found = layers[number].best()
        if found is not None:
            heapq.heappush(queue, (-found.gain / found.size, number, found))

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
    return np.asarray(most[..., 0] * ((busy / most) ** NORM).mean(axis=-1) ** (1 / NORM))


class _Layer:
    def __init__(self, window: LayerWindow, hosted: Hosted) -> None:
        self.window = window
        served = window.served(hosted)
        self.take(hosted, served, window.cost(served, hosted.shape[1]))

    def take(self, hosted: Hosted, served: Ints, cost: Cost) -> None:
        self.hosted, self.served, self.now = hosted, served, cost

    def best(self) -> Found | None:
        """The move with the greatest gain per copy, None if none gains enough."""
        experts, ranks = self.hosted.shape
        pairs = np.zeros((experts, ranks + 1), np.int64)
        np.add.at(pairs, (self.window.ids[self.window.is_pair], self.served[self.window.is_pair]), 1)
        trials = [(2, hosted) for hosted in self._swaps()] + [(1, hosted) for hosted in self._overwrites(pairs[:, :-1])]
        found = []
        for size, hosted in trials:
            served = self.window.served(hosted)
            cost = self.window.cost(served, ranks)
            found.append(Found(self.now.seconds - cost.seconds, size, hosted, served, cost))
        able = [one for one in found if one.gain >= LEAST_GAIN * self.now.seconds * one.size]
        return max(able, key=lambda one: one.gain / one.size, default=None)

    def _swaps(self) -> list[Hosted]:
        """Swaps of two copies, by the change of load and bytes if every copy kept its tokens."""
        window, rates, (experts, ranks) = self.window, self.window.rates, self.hosted.shape
        expert, rank = np.nonzero(self.hosted)
        number = np.full((experts + 1, ranks + 1), len(expert))
        number[expert, rank] = np.arange(len(expert))
        copy = number[window.ids, self.served]  # [N, K]
        hits = np.zeros((len(copy), len(expert) + 1), np.float32)
        np.put_along_axis(hits, copy, np.float32(1), axis=1)
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
        most = max(float(busy.max()), 1e-12)
        scaled = busy / most
        here, there = scaled[rank][:, None] + change / most, scaled[rank][None, :] - change / most
        powers = (scaled**NORM).sum() + here**NORM + there**NORM
        powers -= (scaled**NORM)[rank][:, None] + (scaled**NORM)[rank][None, :]
        load = most * (np.maximum(powers, 0.0) / ranks) ** (1 / NORM)
        cost = rates.pair * load + rates.byte / ranks * (rates.row * rows + rates.result * results)
        blocked = self.hosted[expert][:, rank]  # i may not come where a twin is, nor stay where it is
        cost[blocked | blocked.T] = np.inf
        trials = []
        for index in _least(np.triu(cost, 1) + np.tril(np.full_like(cost, np.inf))):
            i, j = divmod(index, len(rank))
            trial = self.hosted.copy()
            trial[expert[[i, j]], rank[[i, j]]] = False
            trial[expert[[i, j]], rank[[j, i]]] = True
            trials.append(trial)
        return trials

    def _overwrites(self, pairs: Ints) -> list[Hosted]:
        """A copy that has others becomes one of another expert; by the loads if all copies shared alike.

        pairs: [E, G] that each copy serves.
        """
        hosted, copies, total = self.hosted, self.hosted.sum(axis=1), pairs.sum(axis=1)
        spare = np.argwhere(hosted & (copies > 1)[:, None])  # [S, 2]
        if not len(spare):
            return []
        given = hosted * (pairs / (copies + 1)[:, None])  # what a further copy of each expert takes of each rank
        loads = np.empty((len(spare), *hosted.shape))
        for at, (expert, rank) in enumerate(spare):
            busy = pairs.sum(axis=0).astype(np.float64)
            others = hosted[expert].copy()
            others[rank] = False
            busy[rank] -= pairs[expert, rank]
            busy[others] += pairs[expert, rank] / others.sum()
            loads[at] = busy - given
            loads[at, :, rank] += total / (copies + 1)
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
