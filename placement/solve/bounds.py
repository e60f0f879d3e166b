"""Lower bounds on the program's cost, strongest affordable first, and the device-free clique LP.

Every bound here is proven for placements without replicas; `replicas.py` bounds placements with them. The crossing
term is bounded by the exact recursion, the semidefinite relaxation or an LP; with nodes it is split into a rank part
and a node part that are bounded apart. The load term is bounded by the hottest expert and the mean.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import highspy
import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray

from moe.placement.deadline import NEVER, Deadline
from moe.placement.solve.exact import is_exact_feasible, solve_exact
from moe.placement.solve.highs import quiet_highs
from moe.placement.solve.program import Floats, Program
from moe.placement.solve.relaxation import Relaxation, relax, violated_triangles

Method = Literal["auto", "exact", "semidefinite", "clique", "matching"]
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
    target: float = np.inf,
    iterations: float = np.inf,
    progress: Callable[[float], None] = lambda share: None,
) -> Bound:
    """Bound the total cost from below. auto: exact where feasible, else semidefinite. target: good enough, stop.

    iterations, progress: of the semidefinite relaxation, as `relax` has them.
    """
    deadline = Deadline.of(time_limit)
    began = deadline.spent()
    if method == "exact" or (method == "auto" and is_exact_feasible(program)):
        return Bound(solve_exact(program, deadline).cost, "exact", deadline.spent() - began)
    method = "semidefinite" if method == "auto" else method
    weight, rest = program.weights.cross, program.weights.load * load_bound(program)
    parts = _levels(program)
    total, first = rest, None
    if weight and program.num_layers > 1:
        for left, (unit, ranks, capacity) in zip(range(len(parts), 0, -1), parts):
            mass = _padded(program.transitions, ranks, capacity)
            limit = deadline.part(1 / left)
            if method == "semidefinite":
                goal = (target - total) / (weight * unit) if len(parts) == 1 else np.inf
                cuts = 20 * len(mass) * mass.shape[1] if mass.shape[1] <= CUTS_UP_TO else 0
                solved = relax(
                    mass, ranks, time_limit=limit, max_cuts=cuts, target=goal, iterations=iterations, progress=progress
                )
                first = first if first is not None else solved
                value = solved.bound
            elif method == "clique":
                value = clique_bound(mass, ranks, time_limit=limit)
            else:
                value = matching_lp_bound(mass, ranks)
            total += weight * unit * max(value, 0.0)
    return Bound(total, method, deadline.spent() - began, first)


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


def clique_bound(transitions: Floats, num_ranks: int, *, time_limit: float | Deadline = 60.0) -> float:
    """Device-free clique LP: co-location variables, degree rows, triangle inequalities added as violated (HiGHS).

    For E up to about 16; larger problems run out of time and return the weaker bound reached so far.
    """
    deadline = Deadline.of(time_limit)
    n, e, _ = transitions.shape
    c = e // num_ranks
    lp = _degree_lp(transitions, c, with_layers=True)
    highs = quiet_highs(deadline)
    highs.passModel(lp)
    best, constant = 0.0, float(transitions.sum())
    low, high = np.triu_indices(e, 1)
    s_column = np.zeros((e, e), np.int64)
    s_column[low, high] = np.arange(len(low))
    while True:
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return best
        x = np.array(highs.getSolution().col_value)
        best = constant + float(highs.getInfo().objective_function_value) - 1e-9
        between = x[: n * e * e].reshape(n, e, e)
        within = np.zeros((n + 1, e, e))
        within[:, low, high] = x[n * e * e :].reshape(n + 1, -1)
        within += within.transpose(0, 2, 1)
        triples = violated_triangles(between, within, 400 * n, 1e-6)
        if triples.shape[1] == 0 or deadline.is_over():
            return best
        size = n * e * e
        layer, pair = np.divmod(np.maximum(triples - size, 0), e * e)
        s_flat = size + layer * len(low) + s_column[pair // e, pair % e]
        columns = np.where(triples < size, triples, s_flat).T.reshape(-1).astype(np.int32)
        rows = triples.shape[1]
        values = np.tile([1.0, 1.0, -1.0], rows)
        starts = (3 * np.arange(rows)).astype(np.int32)
        highs.addRows(rows, np.full(rows, -highspy.kHighsInf), np.ones(rows), columns.size, starts, columns, values)


def matching_lp_bound(transitions: Floats, num_ranks: int) -> float:
    """Independent b-matchings per layer pair: what a labelled program's LP relaxation amounts to (HiGHS)."""
    total = float(transitions.sum())
    for mass in transitions:
        highs = quiet_highs(NEVER)
        highs.passModel(_degree_lp(mass[None], mass.shape[0] // num_ranks, with_layers=False))
        highs.run()
        assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal, highs.getModelStatus()
        total += highs.getInfo().objective_function_value
    return float(total - 1e-9)


def _degree_lp(transitions: Floats, c: int, *, with_layers: bool) -> highspy.HighsLp:
    """min -<mass, w> with w rows and columns summing to c, and s (i < j) degrees summing to c - 1."""
    n, e, _ = transitions.shape
    eye, ones = sparse.identity(e), np.ones((1, e))
    pair = sparse.vstack([sparse.kron(eye, ones), sparse.kron(ones, eye)])
    matrix = sparse.kron(sparse.identity(n), pair)
    right = np.full(2 * e * n, float(c))
    num_s = 0
    if with_layers:
        low, high = np.triu_indices(e, 1)
        degree = sparse.csr_matrix(
            (np.ones(2 * len(low)), (np.r_[low, high], np.r_[np.arange(len(low)), np.arange(len(low))])), (e, len(low))
        )
        matrix = sparse.block_diag([matrix, sparse.kron(sparse.identity(n + 1), degree)])
        right = np.concatenate([right, np.full(e * (n + 1), c - 1.0)])
        num_s = (n + 1) * len(low)
    matrix = sparse.csr_matrix(matrix)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = matrix.shape[1], matrix.shape[0]
    lp.col_cost_ = np.concatenate([-transitions.reshape(-1), np.zeros(num_s)])
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.ones(lp.num_col_)
    lp.row_lower_ = lp.row_upper_ = right
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    return lp


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
