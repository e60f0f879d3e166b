"""The scalable solver: layer-wise exact assignments, sweeps, restarts, recombination and perturbation.

With both neighbours fixed, the cheapest way to fill one layer is a transportation problem, solved exactly as a
linear assignment (each rank's column repeated by its capacity); a load weight is then served by swaps. Sweeps run to
a fixed point from many greedy starts; the layers of all local optima are recombined optimally (`exact.best_chain`);
windows of layers are then perturbed and swept again until time is up. Costs O(E^3) per layer visit at worst.
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moe.placement.deadline import Deadline
from moe.placement.plan import Plan
from moe.placement.solve.exact import Chain, align_labels, best_chain
from moe.placement.solve.program import Floats, Ints, Program
from moe.placement.solve.relaxation import Relaxation

log = logging.getLogger(__name__)
POOL = 10  # candidate partitions per layer that a recombination chooses from
TOLERANCE = 1e-12


class Solved(NamedTuple):
    """The best assignment found, its cost, the seconds it took, (seconds, cost) at every improvement, and whether an
    interrupt ended the search."""

    assignment: Ints
    cost: float
    seconds: float
    history: tuple[tuple[float, float], ...]
    interrupted: bool = False


def solve(
    program: Program,
    *,
    time_limit: float | Deadline = 10.0,
    rounds: int | None = None,
    seed: int = 0,
    starts: Iterable[Ints] = (),
    guide: Relaxation | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Solved:
    """Minimise the program without replicas; every result is valid, none is proven (see `bounds`).

    rounds: stop after so many perturbations even if time is left; where time did not end it, the same seed gives the
    same result. starts: assignments [L, E] to begin from besides the greedy ones, for example the present plan.
    guide: a relaxation whose fractional co-location is rounded into further starts. progress: called with the share of
    the rounds or of the time that is done. Interrupted (Ctrl-C) once there is an assignment, it returns the best one.
    """
    search = _Search(program, np.random.default_rng(seed), Deadline.of(time_limit))
    search.offer(search.sweep(search.greedy()))
    interrupted = False
    try:
        search.run(rounds, starts, guide, progress)
    except KeyboardInterrupt:
        log.warning("interrupted: this is the best plan so far")
        interrupted = True
    return Solved(search.best, search.best_cost, search.elapsed(), tuple(search.history), interrupted)


def plan_of(program: Program, solved: Solved | Chain, **fields: object) -> Plan:
    """A `Plan` of an assignment, with its cost noted."""
    return Plan.from_assignment(solved.assignment, program.num_ranks, value=solved.cost, **fields)


def fill_layer(cost: Floats, capacities: Ints) -> Ints:
    """The cheapest assignment of E experts to ranks with these capacities: cost [E, G] -> [E]. Exact."""
    columns = np.repeat(np.arange(len(capacities)), capacities)
    _, chosen = linear_sum_assignment(cost[:, columns])
    return np.asarray(columns[chosen])


def balance_by_swaps(cost: Floats, share: Floats, weight: float, ranks: Ints, num_ranks: int) -> Ints:
    """Swap pairs while cost [E, G] plus weight x the busiest rank's load falls; steepest descent to a fixed point.

    share: [E] load of each expert. One step is O(E^2) and vectorised.
    """
    ranks = ranks.copy()
    index = np.arange(len(ranks))
    while True:
        load = np.bincount(ranks, weights=share, minlength=num_ranks)
        own = cost[index, ranks]
        linear = cost[:, ranks] + cost[:, ranks].T - own[:, None] - own[None, :]  # [e, f]: e goes to f's rank and back
        change = share[None, :] - share[:, None]  # what e's rank gains
        here, there = load[ranks][:, None] + change, load[ranks][None, :] - change
        order = np.argsort(-load)[:3]
        others = np.full((len(ranks), len(ranks)), -np.inf)
        for rank in order[::-1]:  # the busiest rank that is neither e's nor f's
            free = (ranks[:, None] != rank) & (ranks[None, :] != rank)
            others = np.where(free, load[rank], others)
        gain = linear + weight * (np.maximum(np.maximum(here, there), others) - load.max())
        gain[ranks[:, None] == ranks[None, :]] = 0.0
        e, f = np.unravel_index(int(gain.argmin()), gain.shape)
        if gain[e, f] >= -TOLERANCE:
            return ranks
        ranks[e], ranks[f] = ranks[f], ranks[e]


class _Search:
    """One run of the solver: the incumbent, the pool of partitions and the clock."""

    def __init__(self, program: Program, rng: np.random.Generator, deadline: Deadline) -> None:
        self.program, self.rng, self.deadline = program, rng, deadline
        self.began = deadline.spent()
        self.unary = program.unary()
        self.load_weight = program.weights.load * program.num_ranks / program.num_layers
        self.best: Ints = np.zeros((program.num_layers, program.num_experts), np.int64)
        self.best_cost = self.current_cost = np.inf
        self.current = self.best
        self.seen = 0
        self.chain_seconds = 0.0  # that the last recombination took: one that time would cut is left out
        self.history: list[tuple[float, float]] = []
        self.pools: list[list[NDArray[np.int8]]] = [[] for _ in range(program.num_layers)]
        self.eye = np.eye(program.num_ranks)

    def elapsed(self) -> float:
        return self.deadline.spent() - self.began

    def run(
        self,
        rounds: int | None,
        starts: Iterable[Ints],
        guide: Relaxation | None,
        progress: Callable[[float], None],
    ) -> None:
        """Starts, their recombination, perturbations."""
        early = self.deadline.part(0.25 if rounds is None else 1.0)
        for start in starts:
            self.offer(self.sweep(np.array(start, np.int64)))
        restarts = POOL if rounds is None else min(POOL, max(2, rounds // 10))
        while self.seen < restarts and not early.is_over():
            self.offer(self.sweep(self.greedy() if guide is None or self.seen % 2 else self.rounded(guide)))
        self.recombine()
        count = 0
        while not self.deadline.is_over() and (rounds is None or count < rounds):
            count += 1
            self.perturb()
            progress(max(self.deadline.share(), 0.0 if rounds is None else count / rounds))
            if count % 40 == 0:
                self.recombine()
        self.recombine()

    def linear(self, rows: Ints, layer: int) -> Floats:
        """Cost of each expert of a layer on each rank, neighbours fixed: [E, G]."""
        program, flow = self.program, np.zeros((self.program.num_experts, self.program.num_ranks))
        if layer > 0:
            flow += program.transitions[layer - 1].T @ self.eye[rows[layer - 1]]
        if layer + 1 < program.num_layers:
            flow += program.transitions[layer] @ self.eye[rows[layer + 1]]
        return np.asarray(self.unary[layer] + program.weights.cross * (flow @ program.links))

    def improve_layer(self, rows: Ints, layer: int) -> bool:
        """Refill one layer at least cost; whether the cost fell."""
        cost, share = self.linear(rows, layer), self.program.shares[layer]
        index = np.arange(len(share))

        def price(ranks: Ints) -> float:
            hot = np.bincount(ranks, weights=share, minlength=self.program.num_ranks).max() if self.load_weight else 0.0
            return float(cost[index, ranks].sum() + self.load_weight * hot)

        candidates = [fill_layer(cost, self.program.capacities)]
        if self.load_weight:
            starts = (candidates[0], rows[layer], self.rng.permutation(rows[layer]))
            candidates = [balance_by_swaps(cost, share, self.load_weight, s, self.program.num_ranks) for s in starts]
        best = min(candidates, key=price)
        if price(best) < price(rows[layer]) - TOLERANCE:
            rows[layer] = best
            return True
        return False

    def sweep(self, rows: Ints, layers: Iterable[int] | None = None) -> Ints:
        """Improve layers back and forth until none changes; in place."""
        last = self.program.num_layers - 1
        dirty = set(range(last + 1)) if layers is None else set(layers)
        forward = True
        while dirty:
            for layer in sorted(dirty, reverse=not forward):
                if self.deadline.is_over():
                    return rows
                dirty.discard(layer)
                if self.improve_layer(rows, layer):
                    dirty |= {n for n in (layer - 1, layer + 1) if 0 <= n <= last}
            forward = not forward
        return rows

    def greedy(self) -> Ints:
        """Fill from a random layer outwards, each layer the best answer to the one before, with some noise."""
        program = self.program
        start = int(self.rng.integers(program.num_layers))
        rows = np.tile(np.repeat(np.arange(program.num_ranks), program.capacities), (program.num_layers, 1))
        rows[start] = self.rng.permutation(np.repeat(np.arange(program.num_ranks), program.capacities))
        noise = self.rng.choice([0.0, 0.1, 0.3])
        order = [(n, n - 1) for n in range(start + 1, program.num_layers)] + [
            (n, n + 1) for n in range(start - 1, -1, -1)
        ]
        for layer, neighbour in order:
            if self.deadline.is_over():
                break
            mass = program.transitions[neighbour].T if neighbour < layer else program.transitions[layer]
            cost = self.unary[layer] + program.weights.cross * (mass @ self.eye[rows[neighbour]] @ program.links)
            cost *= 1 + noise * self.rng.random(cost.shape)
            rows[layer] = fill_layer(cost, program.capacities)
        return rows

    def rounded(self, guide: Relaxation) -> Ints:
        """Cluster one layer of the fractional co-location, then let every next layer follow its neighbour."""
        program = self.program
        experts, ranks = program.num_experts, program.num_ranks
        start = int(self.rng.integers(program.num_layers))
        rows = np.tile(np.repeat(np.arange(ranks), program.capacities), (program.num_layers, 1))
        within, between = guide.within[:, :experts, :experts], guide.between[:, :experts, :experts]
        rows[start] = fill_layer(-within[start][:, self.rng.choice(experts, ranks, replace=False)], program.capacities)
        for _ in range(20):
            rows[start] = fill_layer(-within[start] @ self.eye[rows[start]], program.capacities)
        order = [(n, n - 1) for n in range(start + 1, program.num_layers)] + [
            (n, n + 1) for n in range(start - 1, -1, -1)
        ]
        for layer, neighbour in order:
            if self.deadline.is_over():
                break
            near = between[neighbour].T if neighbour < layer else between[layer]
            rows[layer] = fill_layer(-near @ self.eye[rows[neighbour]], program.capacities)
            rows[layer] = fill_layer(
                -near @ self.eye[rows[neighbour]] - within[layer] @ self.eye[rows[layer]], program.capacities
            )
        return rows

    def offer(self, rows: Ints) -> float:
        """Remember a local optimum: its layers for recombination, itself if it is the best."""
        cost = self.cost(rows)
        self.seen += 1
        for pool, row in zip(self.pools, rows, strict=True):
            pool.append(row.astype(np.int8))
        if cost < self.best_cost - TOLERANCE:
            self.best, self.best_cost = rows.copy(), cost
            self.history.append((self.elapsed(), cost))
        if cost < self.current_cost:
            self.current, self.current_cost = rows.copy(), cost
        return cost

    def cost(self, rows: Ints) -> float:
        """The objective of an assignment without building a plan."""
        program, total = self.program, 0.0
        for layer in range(program.num_layers - 1):
            apart = program.links[rows[layer]][:, rows[layer + 1]]
            total += program.weights.cross * float((program.transitions[layer] * apart).sum())
        total += float(np.take_along_axis(self.unary, rows[:, :, None], axis=2).sum())
        if self.load_weight:
            hot = sum(np.bincount(r, weights=s).max() for r, s in zip(rows, program.shares, strict=True))
            total += self.load_weight * float(hot) - program.weights.load
        return total

    def relabel(self, rows: Ints) -> Ints:
        """From a random layer on, let equal ranks trade names: best possible if free, else two at random."""
        if self.program.labels_free:
            return align_labels(self.program, rows)
        first = int(self.rng.integers(self.program.num_layers))
        a = int(self.rng.integers(self.program.num_ranks))
        b = int(self.rng.choice(np.flatnonzero(self.program.capacities == self.program.capacities[a])))
        names = np.arange(self.program.num_ranks)
        names[[a, b]] = names[[b, a]]
        rows[first:] = names[rows[first:]]
        return rows

    def shuffle_anchor(self, rows: Ints) -> Ints:
        """Shuffle experts of two or more ranks in one layer, and let the neighbours answer before it may turn back."""
        rng, layers = self.rng, self.program.num_layers
        anchor, reach = int(rng.integers(layers)), int(rng.integers(1, 4))
        few = rng.choice(self.program.num_ranks, min(self.program.num_ranks, int(rng.integers(2, 5))), replace=False)
        among = np.flatnonzero(np.isin(rows[anchor], few))
        among = among[rng.random(len(among)) < rng.choice([0.3, 0.6, 1.0])]
        rows[anchor, among] = rng.permutation(rows[anchor, among])
        for step in range(1, reach + 1):
            for layer in (anchor - step, anchor + step):
                if 0 <= layer < layers:
                    self.improve_layer(rows, layer)
        return rows

    def shuffle_window(self, rows: Ints) -> tuple[int, int]:
        """Shuffle some experts of a few ranks in a window of layers, in place; the layers to sweep."""
        program, rng = self.program, self.rng
        width = int(rng.integers(1, min(program.num_layers, 9) + 1))
        first = int(rng.integers(0, program.num_layers - width + 1))
        few = rng.choice(program.num_ranks, min(program.num_ranks, int(rng.integers(2, 5))), replace=False)
        part = rng.choice([0.15, 0.3, 0.6, 1.0])
        keep = rng.random() < 0.5
        for layer in range(first, first + width):
            among = np.flatnonzero(np.isin(rows[layer], few))
            among = among[rng.random(len(among)) < part]
            rows[layer, among] = rng.permutation(rows[layer, among])
            if not keep and rng.random() < 0.5:
                rows[layer] = fill_layer(self.linear(rows, layer), program.capacities)
        return max(0, first - 1), min(program.num_layers, first + width + 1)

    def recombine(self) -> None:
        """Replace the incumbent by the best chain over the pooled partitions, swept."""
        pools = []
        for layer, pool in enumerate(self.pools):
            newest = [self.best[layer].astype(np.int8), *pool[::-1]]
            unique: dict[bytes, NDArray[np.int8]] = {}
            for row in newest:
                unique.setdefault(canonical(row).tobytes() if self.program.labels_free else row.tobytes(), row)
                if len(unique) == POOL:
                    break
            pools.append(np.stack(list(unique.values())))
            self.pools[layer] = list(unique.values())[::-1]
        if self.program.num_ranks > 127 or self.deadline.left() < self.chain_seconds:
            return
        began = self.deadline.spent()
        try:
            chain = best_chain(self.program, pools, self.deadline).assignment
        except TimeoutError:
            return
        self.chain_seconds = self.deadline.spent() - began
        self.offer(self.sweep(chain))

    def perturb(self) -> None:
        """Change the current solution, sweep it, and keep the result by a simulated-annealing rule."""
        kind = self.rng.random()
        if kind < 0.1:
            self.offer(self.sweep(self.greedy()))  # a fresh local optimum for the pool
            return
        rows = self.current.copy()
        if kind < 0.2 and self.program.num_ranks > 1:
            self.sweep(self.relabel(rows))
        elif kind < 0.5:
            self.sweep(self.shuffle_anchor(rows))
        else:
            first, last = self.shuffle_window(rows)
            self.sweep(rows, range(first, last))
        before, cost = self.current_cost, self.offer(rows)
        if cost < before + TOLERANCE or self.rng.random() < np.exp(
            -(cost - before) / (3e-4 * max(self.best_cost, 1e-9))
        ):
            self.current, self.current_cost = rows, cost
        if self.current_cost > 1.005 * self.best_cost + TOLERANCE:
            self.current, self.current_cost = self.best.copy(), self.best_cost


def canonical(row: NDArray[np.int8]) -> NDArray[np.int64]:
    """The partition with ranks renamed by first appearance, so that equal partitions compare equal."""
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse])
