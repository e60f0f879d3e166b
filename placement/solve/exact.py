"""Exact dynamic programming over the layer chain, and the same recursion over a pool of candidate partitions.

The cost couples only consecutive layers, so ranks of equal capacity may trade names at every layer cut: a state is
an unlabelled partition, and the best labels between two partitions are an assignment problem. With all partitions
in the pool (35 for 8 experts on 2 ranks, 105 on 4, 1 on 8) the result is the optimum; with the layers of many local
optima it recombines them optimally. When labels carry cost (nodes, migration) states stay labelled.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moe.placement.deadline import NEVER, Deadline
from moe.placement.solve.program import Floats, Ints, Program

WORK_LIMIT = 2e8  # cells of one layer's transition table, n * n * G * G
CELLS = 1e6  # of them between two looks at the clock
PERMUTATION_RANKS = 4  # up to 24 permutations are tried at once; beyond that one assignment problem per pair


class Chain(NamedTuple):
    """An assignment [L, E] of ranks and its cost."""

    assignment: Ints
    cost: float


def num_states(program: Program) -> int:
    """Partitions of one layer that the exact recursion must visit."""
    states = math.factorial(program.num_experts)
    for capacity in program.capacities:
        states //= math.factorial(int(capacity))
    if program.labels_free:
        for count in np.unique(program.capacities, return_counts=True)[1]:
            states //= math.factorial(int(count))
    return states


def is_exact_feasible(program: Program) -> bool:
    """Whether `solve_exact` ends in seconds and covers the weights (all but misses)."""
    cells = (num_states(program) * program.num_ranks) ** 2
    return program.weights.miss == 0 and cells <= WORK_LIMIT


def solve_exact(program: Program, deadline: Deadline = NEVER) -> Chain:
    """The proven optimum without replicas. Raises ValueError if `is_exact_feasible` is false, TimeoutError."""
    if not is_exact_feasible(program):
        raise ValueError(f"{num_states(program)} partitions per layer are too many for exact search; use solve")
    pool = all_partitions(program.capacities, unlabelled=program.labels_free)
    return best_chain(program, [pool] * program.num_layers, deadline)


def all_partitions(capacities: Ints, *, unlabelled: bool) -> NDArray[np.int8]:
    """Every way to fill the ranks: [n, E]. unlabelled keeps one of those that differ by equal ranks' names."""
    experts = int(capacities.sum())
    rows: list[NDArray[np.int8]] = []
    owner = np.full(experts, -1, np.int8)

    def fill(rest: tuple[int, ...], rank: int) -> None:
        if rank == len(capacities):
            rows.append(owner.copy())
            return
        size = int(capacities[rank])
        # Equal ranks in a row are interchangeable: the later one may not begin before the earlier one.
        previous = rank > 0 and capacities[rank - 1] == capacities[rank] and size > 0
        floor = int((owner == rank - 1).argmax()) if unlabelled and previous else -1
        for chosen in itertools.combinations(rest, size):
            if floor >= 0 and chosen[0] < floor:
                continue
            taken = set(chosen)
            owner[list(chosen)] = rank
            fill(tuple(e for e in rest if e not in taken), rank + 1)
            owner[list(chosen)] = -1

    fill(tuple(range(experts)), 0)
    return np.stack(rows)


def best_chain(program: Program, pools: list[NDArray[np.int8]], deadline: Deadline = NEVER) -> Chain:
    """The cheapest chain that takes each layer's partition from its pool [n_l, E]; optimal over the pools.

    Raises TimeoutError where the deadline comes first.
    """
    free, ranks = program.labels_free, program.num_ranks
    unary = program.unary()
    scale = program.weights.cross
    value = _layer_cost(program, unary, 0, pools[0])
    back: list[Ints] = []
    for layer in range(program.num_layers - 1):
        step = np.empty((len(pools[layer]), len(pools[layer + 1])))
        chunk = max(1, int(CELLS // (len(pools[layer + 1]) * ranks * ranks)))
        for start in range(0, len(step), chunk):
            if deadline.is_over():
                raise TimeoutError(f"time ended in layer {layer} of {program.num_layers}; give more or use the search")
            part = pools[layer][start : start + chunk]
            step[start : start + chunk] = _edge_costs(program, layer, part, pools[layer + 1], free)
        total = value[:, None] + scale * step
        best = total.argmin(axis=0)
        back.append(best)
        value = total[best, np.arange(len(best))] + _layer_cost(program, unary, layer + 1, pools[layer + 1])
    state = int(value.argmin())
    cost = float(value[state])
    path = [state]
    for best in reversed(back):
        path.append(int(best[path[-1]]))
    rows = np.stack([pool[k] for pool, k in zip(pools, reversed(path), strict=True)]).astype(np.int64)
    return Chain(align_labels(program, rows) if free else rows, cost)


def align_labels(program: Program, assignment: Ints) -> Ints:
    """Rename the ranks layer by layer so that consecutive layers overlap most; optimal when labels are free."""
    rows = assignment.copy()
    for layer in range(program.num_layers - 1):
        mass = _overlap(program, layer, rows[layer][None], rows[layer + 1][None])[0, 0]
        mass = np.where(program.capacities[:, None] == program.capacities[None, :], mass, -1e3)
        _, renamed = linear_sum_assignment(mass.T, maximize=True)
        rows[layer + 1] = renamed[rows[layer + 1]]
    return rows


def _overlap(program: Program, layer: int, left: NDArray[np.int8], right: NDArray[np.int8]) -> Floats:
    """Transition mass from rank g of each left partition to rank h of each right one: [a, b, G, G]."""
    ranks = np.arange(program.num_ranks)
    x = (left[:, None, :] == ranks[:, None]).astype(float)  # [a, G, E]
    y = (right[:, None, :] == ranks[:, None]).astype(float)
    flow = (x @ program.transitions[layer]).reshape(-1, program.num_experts)
    mass = flow @ y.reshape(-1, program.num_experts).T
    return np.asarray(mass.reshape(len(left), len(ranks), len(right), len(ranks)).transpose(0, 2, 1, 3))


def _edge_costs(program: Program, layer: int, left: NDArray[np.int8], right: NDArray[np.int8], free: bool) -> Floats:
    mass = _overlap(program, layer, left, right)
    if not free:
        return np.asarray(np.einsum("abgh,gh->ab", mass, program.links))
    ranks = program.num_ranks
    unit = float(program.links[0, 1]) if ranks > 1 else 0.0
    same = program.capacities[:, None] == program.capacities[None, :]
    if ranks <= PERMUTATION_RANKS:
        orders = [p for p in itertools.permutations(range(ranks)) if all(same[g, p[g]] for g in range(ranks))]
        kept = np.max([mass[:, :, range(ranks), p].sum(axis=2) for p in orders], axis=0)
    else:
        gain = np.where(same, mass, -1e3)
        kept = np.empty(mass.shape[:2])
        for a, b in np.ndindex(*kept.shape):
            rows, columns = linear_sum_assignment(gain[a, b], maximize=True)
            kept[a, b] = gain[a, b][rows, columns].sum()
    return np.asarray(unit * (program.transitions[layer].sum() - kept))


def _layer_cost(program: Program, unary: Floats, layer: int, pool: NDArray[np.int8]) -> Floats:
    """What a partition costs by itself: migration, and the load of its busiest rank. [n]"""
    cost = unary[layer][np.arange(program.num_experts), pool].sum(axis=1)
    if program.weights.load:
        hot = np.stack([(pool == g) @ program.shares[layer] for g in range(program.num_ranks)], axis=1).max(axis=1)
        cost = cost + program.weights.load * (hot * program.num_ranks - 1) / program.num_layers
    return np.asarray(cost)
