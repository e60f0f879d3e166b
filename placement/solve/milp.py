"""The integer program as such, with HiGHS: transitions aggregated, ranks labelled, every term of the objective.

An oracle for small problems and for replicas on them; `solver` and `relaxation` take over where labels make branch
and bound hopeless (beyond about 8 experts). Also ExFlow's own formulation, with one cost variable per token and step.
"""

from typing import Literal, NamedTuple

import highspy
import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray

from moe.placement.deadline import Deadline
from moe.placement.plan import Plan, even_capacities
from moe.placement.solve.highs import quiet_highs
from moe.placement.solve.program import Ints, Program


class Milp(NamedTuple):
    """A plan with its cost and proven bound in `plan.value` and `plan.bound`, and whether it is optimal."""

    plan: Plan
    optimal: bool
    nodes: int


def num_columns(program: Program, replica_slots: int | None = None) -> int:
    """Variables of `solve_milp`'s integer program, about."""
    places = program.num_layers * program.num_experts * program.num_ranks
    return places * (1 if replica_slots is None else 2) + int(np.count_nonzero(program.transitions)) * program.num_ranks


class _Model:
    """Rows and columns gathered block by block, then handed to HiGHS at once."""

    def __init__(self) -> None:
        self.columns = self.rows = 0
        self.cost: list[NDArray[np.float64]] = []
        self.integer: list[NDArray[np.bool_]] = []
        self.upper: list[NDArray[np.float64]] = []
        self.entries: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        self.bounds: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []

    def add_columns(self, cost: NDArray[np.float64], *, integer: bool, upper: float = 1.0) -> Ints:
        index = np.arange(self.columns, self.columns + cost.size).reshape(cost.shape)
        self.columns += cost.size
        self.cost.append(cost.reshape(-1).astype(float))
        self.integer.append(np.full(cost.size, integer))
        self.upper.append(np.full(cost.size, upper))
        return index

    def add_rows(
        self, *terms: tuple[Ints, float | NDArray[np.float64]], low: float = -np.inf, high: float = np.inf
    ) -> None:
        """One row per leading index of the terms; each term is (columns [rows, n], coefficient)."""
        count = terms[0][0].shape[0]
        for columns, value in terms:
            flat = columns.reshape(count, -1)
            row = np.repeat(np.arange(self.rows, self.rows + count), flat.shape[1])
            coefficient = np.broadcast_to(value, flat.shape).reshape(-1)
            self.entries.append((row, flat.reshape(-1), coefficient.astype(float)))
        self.bounds.append((np.full(count, low), np.full(count, high)))
        self.rows += count

    def solve(
        self, deadline: Deadline, start: tuple[Ints, Ints] | None, most_nodes: int | None = None
    ) -> tuple[NDArray[np.float64], float, bool, int]:
        """(solution, proven lower bound, optimal, nodes). ValueError if infeasible, TimeoutError if empty-handed.

        start: columns and their values; the solution where time ends before HiGHS has taken it up.
        """
        row, column, value = (np.concatenate(parts) for parts in zip(*self.entries, strict=True))
        matrix = sparse.csr_matrix((value, (row, column)), (self.rows, self.columns))
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.columns, self.rows
        lp.col_cost_ = np.concatenate(self.cost)
        lp.col_lower_, lp.col_upper_ = np.zeros(self.columns), np.concatenate(self.upper)
        lp.row_lower_ = np.concatenate([low for low, _ in self.bounds])
        lp.row_upper_ = np.concatenate([high for _, high in self.bounds])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(flag)] for flag in np.concatenate(self.integer)]
        highs = quiet_highs(deadline)
        for tolerance in ("mip_rel_gap", "mip_abs_gap"):
            highs.setOptionValue(tolerance, 1e-9)
        if most_nodes is not None:
            highs.setOptionValue("mip_max_nodes", most_nodes)
        highs.passModel(lp)
        if start is not None:  # HiGHS completes the columns that are not named
            highs.setSolution(start[0].size, start[0].astype(np.int32), start[1].astype(float))
        highs.run()
        status, info = highs.getModelStatus(), highs.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            raise ValueError("no placement satisfies the capacities and budgets; raise the slots per rank")
        values = np.array(highs.getSolution().col_value)
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible and start is not None:
            values = np.zeros(self.columns)
            values[start[0]] = start[1]
        elif info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise TimeoutError(
                f"HiGHS found no placement within {deadline.spent():.1f} s; give more time or use the scalable solver"
            )
        bound = float(info.mip_dual_bound) if np.isfinite(info.mip_dual_bound) else -np.inf
        optimal = status == highspy.HighsModelStatus.kOptimal
        return values, bound, optimal, int(info.mip_node_count)


def solve_milp(
    program: Program,
    *,
    time_limit: float | Deadline = 60.0,
    replica_slots: int | None = None,
    warm: Ints | None = None,
    most_nodes: int | None = None,
) -> Milp:
    """Minimise the whole program exactly; the plan carries value and bound even when time runs out.

    replica_slots: copies each rank may hold per layer, which makes experts replicable; None = one copy each and the
    program's capacities. warm: an assignment [L, E] to start from. most_nodes: of branch and bound; where they and not
    the time end it, the same program gives the same plan. With replicas a copy's load is split freely, which
    can only be cheaper than the equal split that `Program.terms` charges.
    """
    deadline = Deadline.of(time_limit)
    began = deadline.spent()
    experts, ranks, model = program.num_experts, program.num_ranks, _Model()
    x = model.add_columns(program.unary(), integer=True)
    if replica_slots is None:
        model.add_rows((x.reshape(-1, ranks), 1.0), low=1, high=1)
        for rank, capacity in enumerate(program.capacities):
            model.add_rows((x[:, :, rank], 1.0), low=float(capacity), high=float(capacity))
    else:
        model.add_rows((x.reshape(-1, ranks), 1.0), low=1)
        model.add_rows((x.transpose(0, 2, 1).reshape(-1, experts), 1.0), high=replica_slots)
    if program.labels_free and len(set(program.capacities.tolist())) == 1:
        for expert in range(min(experts, ranks)):  # expert e of layer 0 sits on one of the ranks 0..e
            if replica_slots is None and expert + 1 < ranks:
                model.add_rows((x[0, expert, expert + 1 :][None], 1.0), high=0)
    constant = _add_crossing(program, model, x, replica_slots)
    if program.weights.load:
        constant += _add_load(program, model, x, replica_slots)
    if program.weights.miss and program.fast_slots is not None:
        if replica_slots is not None:
            raise ValueError(
                "misses with replicas are not part of the exact program; set the miss weight or the slots to none"
            )
        constant += _add_misses(program, model, x, program.fast_slots)
    start = None
    if warm is not None:
        rows = np.array(warm)
        if program.labels_free and replica_slots is None:
            rows = np.argsort(np.unique(rows[0], return_index=True)[1]).argsort()[rows]  # by first appearance
        start = (x.reshape(-1), (rows[:, :, None] == np.arange(ranks)).reshape(-1))
    values, bound, optimal, nodes = model.solve(deadline, start, most_nodes)
    hosted = values[x] > 0.5
    plan = Plan.from_hosted(hosted, solver="milp", objective="program")
    cost = program.cost(plan)
    bound = min(max(bound + constant - 1e-7, 0.0), cost)  # every term is at least 0, whatever little time proved
    return Milp(plan.with_result(value=cost, bound=bound, seconds=deadline.spent() - began), optimal, nodes)


def _add_load(program: Program, model: _Model, x: Ints, replica_slots: int | None) -> float:
    """The busiest rank of each layer; returns what is constant."""
    layers, experts, ranks = x.shape
    weight = program.weights.load
    top = model.add_columns(np.full(layers, weight * ranks / layers), integer=False, upper=1e9)
    split = x
    coefficient = program.shares[:, None, :].repeat(ranks, axis=1).reshape(-1, experts)
    if replica_slots is not None:
        split = model.add_columns(np.zeros(x.shape), integer=False)
        model.add_rows((split.reshape(-1, ranks), 1.0), low=1, high=1)
        model.add_rows((split.reshape(-1, 1), 1.0), (x.reshape(-1, 1), -1.0), high=0)
    per_rank = split.transpose(0, 2, 1).reshape(-1, experts)
    model.add_rows((per_rank, coefficient), (np.repeat(top, ranks)[:, None], -1.0), high=0)
    return -weight


def _add_misses(program: Program, model: _Model, x: Ints, fast_slots: Ints) -> float:
    """Rewards the experts that are resident; returns the cost if none were."""
    layers, _, ranks = x.shape
    gain = -program.weights.miss * program.shares[:, :, None].repeat(ranks, axis=2) / layers
    resident = model.add_columns(gain, integer=True)
    model.add_rows((resident.reshape(-1, 1), 1.0), (x.reshape(-1, 1), -1.0), high=0)
    for rank, slots in enumerate(fast_slots):
        model.add_rows((resident[:, :, rank].reshape(1, -1), 1.0), high=float(slots))
    return program.weights.miss


def _add_crossing(program: Program, model: _Model, x: Ints, replica_slots: int | None) -> float:
    """Reward co-located transitions, per group of ranks at one link cost; returns the cost if all were apart."""
    ranks = program.num_ranks
    off = program.links[~np.eye(ranks, dtype=bool)]
    if ranks == 1 or program.num_layers == 1 or not program.weights.cross:
        return 0.0
    kinds = np.unique(off)
    node = (program.links < kinds[-1]).argmax(axis=1) if len(kinds) == 2 else np.arange(ranks)
    if len(kinds) > 2 or (len(kinds) == 2 and ((program.links < kinds[-1]) != (node[:, None] == node[None])).any()):
        raise ValueError("the exact program knows ranks and nodes: at most two link costs, the cheaper within nodes")
    levels = [(kinds[0], np.arange(ranks))] + ([(kinds[1] - kinds[0], node)] if len(kinds) == 2 else [])
    for unit, group_of in levels:
        groups = [np.flatnonzero(group_of == g) for g in np.unique(group_of)]
        layer, i, j = np.nonzero(program.transitions)
        reward = -program.weights.cross * unit * program.transitions[layer, i, j]
        y = model.add_columns(np.repeat(reward[:, None], len(groups), axis=1), integer=False)
        for g, members in enumerate(groups):
            model.add_rows((y[:, g][:, None], 1.0), (x[layer, i][:, members], -1.0), high=0)
            model.add_rows((y[:, g][:, None], 1.0), (x[layer + 1, j][:, members], -1.0), high=0)
        model.add_rows((y, 1.0), high=1)
        if replica_slots is None:
            _add_meetings(program, model, x, y, groups)
    return float(program.weights.cross * kinds[-1])


def _add_meetings(program: Program, model: _Model, x: Ints, y: Ints, groups: list[Ints]) -> None:
    """An expert in a group meets at most the group's capacity of the next layer's experts, and vice versa.

    y: [transitions, groups], the columns that say whether a transition stays in a group.
    """
    experts = program.num_experts
    layer, i, j = np.nonzero(program.transitions)
    meetings: list[tuple[int, Ints]] = []  # an expert of a layer, and its transitions
    for ids in (layer * experts + i, (layer + 1) * experts + j):
        order = np.argsort(ids, kind="stable")
        keys, first = np.unique(ids[order], return_index=True)
        meetings += zip(keys.tolist(), np.split(order, first[1:]), strict=True)
    for g, members in enumerate(groups):
        room = float(program.capacities[members].sum())
        for key, rows in meetings:
            if len(rows) > room:
                at = x[key // experts, key % experts, members]
                model.add_rows((y[rows, g][None], 1.0), (at[None], -room), high=0)


def exflow(
    paths: Ints,
    num_experts: int,
    num_ranks: int,
    *,
    time_limit: float | Deadline = 60.0,
    split: Literal["direct", "bipart", "staged"] = "direct",
    num_nodes: int = 1,
) -> Plan:
    """ExFlow's program as published: top-1 paths [tokens, L], one cost variable per token and step, equal counts.

    Minimises the tokens' rank changes / steps (`plan.value`, with its bound when solved directly). split "bipart"
    halves recursively (its default), "staged" divides over num_nodes first and then inside each node; both need
    numbers that divide and give no bound. arXiv 2401.08383, section 4.
    """
    tokens, layers = paths.shape
    deadline = Deadline.of(time_limit)
    began = deadline.spent()
    if tokens == 0 or layers < 2:
        raise ValueError(f"paths are {paths.shape}; ExFlow's program needs tokens and at least two layers")
    owner = np.zeros((layers, num_experts), np.int64)
    bound: float | None = None
    if split == "direct":
        owner, bound = _exflow_step(paths, np.ones_like(owner, bool), even_capacities(num_experts, num_ranks), deadline)
    else:
        branching = _branching(split, num_experts, num_ranks, num_nodes)
        owner = _exflow_levels(paths, num_experts, branching, deadline)
    value = float((np.take_along_axis(owner, paths.T, 1)[1:] != np.take_along_axis(owner, paths.T, 1)[:-1]).mean())
    plan = Plan.from_assignment(owner, num_ranks, solver=f"exflow-{split}", objective="top-1 hops / step", value=value)
    bound = None if bound is None else min(bound, value)
    return plan.with_result(bound=bound, seconds=deadline.spent() - began)


def _branching(split: str, num_experts: int, num_ranks: int, num_nodes: int) -> list[int]:
    """How many parts each level divides into."""
    if split == "bipart":
        if num_ranks & (num_ranks - 1) or num_experts % num_ranks:
            raise ValueError(
                f"recursive halving needs a power of two that divides {num_experts} experts, not {num_ranks}"
            )
        return [2] * (num_ranks.bit_length() - 1)
    if num_nodes < 1 or num_ranks % num_nodes or num_experts % num_ranks:
        raise ValueError(
            f"staging needs nodes that divide ranks that divide experts: {num_nodes}, {num_ranks}, {num_experts}"
        )
    return [num_nodes, num_ranks // num_nodes]


def _exflow_levels(paths: Ints, num_experts: int, branching: list[int], deadline: Deadline) -> Ints:
    """Divide level by level; a part of one level is a sub-problem of the next."""
    owner = np.zeros((paths.shape[1], num_experts), np.int64)
    parts, problems = 1, int(sum(np.cumprod([1, *branching[:-1]])))
    for branches in branching:
        next_owner = owner * branches
        for part in range(parts):
            member = owner == part
            size = np.full(branches, num_experts // (parts * branches))
            inner, _ = _exflow_step(paths, member, size, deadline.part(1 / problems))
            problems -= 1
            next_owner[member] += inner[member]
        owner, parts = next_owner, parts * branches
    return owner


def _exflow_step(paths: Ints, member: NDArray[np.bool_], capacities: Ints, deadline: Deadline) -> tuple[Ints, float]:
    layers, experts = member.shape
    parts = len(capacities)
    model = _Model()
    x = model.add_columns(np.zeros((layers, experts, parts)), integer=True)
    token, step = np.nonzero(
        np.take_along_axis(member, paths.T, 1).T[:, :-1] & np.take_along_axis(member, paths.T, 1).T[:, 1:]
    )
    cost = model.add_columns(np.ones(len(token)), integer=False)
    a, b = x[step, paths[token, step]], x[step + 1, paths[token, step + 1]]
    for c in range(parts):
        for left, right in ((a, b), (b, a)):
            if len(token):
                model.add_rows((cost[:, None], 1.0), (left[:, c][:, None], -1.0), (right[:, c][:, None], 1.0), low=0)
    model.add_rows((x[member], 1.0), low=1, high=1)
    for layer in range(layers):
        for c, capacity in enumerate(capacities):
            model.add_rows((x[layer, member[layer], c][None], 1.0), low=float(capacity), high=float(capacity))
    values, bound, _, _ = model.solve(deadline, None)
    return values[x].argmax(axis=2), bound / max(paths.shape[0] * (layers - 1), 1)
