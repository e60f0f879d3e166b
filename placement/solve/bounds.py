"""Lower bounds on the program's cost, strongest affordable first.

Every bound here is proven for placements without replicas. The crossing term is bounded by the exact recursion or the
semidefinite relaxation; with nodes it is split into a rank part and a node part that are bounded apart. The load term
is bounded by the hottest expert and the mean.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.deadline import Deadline
from moe.placement.solve.exact import is_exact_feasible, solve_exact
from moe.placement.solve.program import Floats, Program
from moe.placement.solve.relaxation import Relaxation, relax

Method = Literal["auto", "semidefinite"]
CUTS_UP_TO = 64  # experts; beyond, triangle separation costs more than it lifts


class Bound(NamedTuple):
    """A proven lower bound, how it was found, the seconds it took, and the relaxation if one was solved."""

    value: float
    method: str
    seconds: float
    relaxation: Relaxation | None = None


def lower_bound(
    program: Program,
    *,
    method: Method = "auto",
    time_limit: float | Deadline = 20.0,
    iterations: float = np.inf,
    progress: Callable[[float], None] = lambda share: None,
) -> Bound:
    """Bound the total cost from below. auto: exact where feasible, else semidefinite.

    iterations, progress: of the semidefinite relaxation, as `relax` has them.
    """
    deadline = Deadline.of(time_limit)
    began = deadline.spent()
    if method == "auto" and is_exact_feasible(program):
        return Bound(solve_exact(program, deadline).cost, "exact", deadline.spent() - began)
    total, first = program.weights.load * load_bound(program), None
    weight, parts = program.weights.cross, _levels(program)
    if weight and program.num_layers > 1:
        for left, (unit, ranks, capacity) in zip(range(len(parts), 0, -1), parts):
            mass = _padded(program.transitions, ranks, capacity)
            cuts = 20 * len(mass) * mass.shape[1] if mass.shape[1] <= CUTS_UP_TO else 0
            limit = deadline.part(1 / left)
            solved = relax(mass, ranks, time_limit=limit, max_cuts=cuts, iterations=iterations, progress=progress)
            first = solved if first is None else first
            total += weight * unit * max(solved.bound, 0.0)
    return Bound(total, "semidefinite", deadline.spent() - began, first)


def load_bound(program: Program) -> float:
    """Least possible load term: no rank can carry less than the mean, or than the hottest expert alone.

    Also no rank set can dodge the top experts: with G ranks, two of the hottest G + 1 experts share one.
    """
    ranks = program.num_ranks
    ordered = -np.sort(-program.shares, axis=1)
    least = np.maximum(ordered[:, 0], 1 / ranks)
    if program.num_experts > ranks and (program.capacities > 0).all():
        least = np.maximum(least, ordered[:, ranks - 1] + ordered[:, ranks])
    return float((least * ranks).mean()) - 1.0


def _levels(program: Program) -> list[tuple[float, int, int]]:
    """(unit cost, parts, largest capacity) whose crossing costs add up to at most the program's crossing cost."""
    ranks, links = program.num_ranks, program.links
    if ranks == 1:
        return []
    off = links[~np.eye(ranks, dtype=bool)]
    near, far = float(off.min()), float(off.max())
    levels = [(near, ranks, int(program.capacities.max()))]
    if far > near and len(np.unique(off)) == 2:
        together = links < far
        node = together.argmax(axis=1)
        if (together == (node[:, None] == node[None, :])).all():
            sizes = [int(program.capacities[node == k].sum()) for k in np.unique(node)]
            levels.append((far - near, len(sizes), max(sizes)))
    return [level for level in levels if level[0] > 0]


def _padded(transitions: Floats, ranks: int, capacity: int) -> NDArray[np.float64]:
    """Add silent experts until every part holds `capacity`: only enlarges what is feasible, so bounds stay valid."""
    missing = ranks * capacity - transitions.shape[1]
    return np.pad(transitions, ((0, 0), (0, missing), (0, missing))) if missing else transitions
