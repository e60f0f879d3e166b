"""Plans for the program of transitions, ExFlow's among them, by whatever proves most in the time there is.

Exactly where `solve_exact` can; else the search beside the semidefinite bound, and where variables are few HiGHS on the
integer program, from the search's plan on. Replicas are the integer program's alone.
"""

import logging
from collections.abc import Callable

import numpy as np

from moe.placement.deadline import Deadline
from moe.placement.plan import Plan, check_capacity
from moe.placement.solve.bounds import lower_bound
from moe.placement.solve.exact import is_exact_feasible, solve_exact
from moe.placement.solve.milp import num_columns, solve_milp
from moe.placement.solve.program import Ints, Program
from moe.placement.solve.solver import plan_of, solve
from moe.placement.stats.affinity import transition_counts
from moe.placement.trace import RoutingTrace

log = logging.getLogger(__name__)
MOST_COLUMNS = 6000  # of the integer program; beyond, HiGHS proves nothing that the relaxation has not in minutes
PER_ROUND = 5  # iterations of the bound, and nodes of the integer program, for a round of the search
TIGHT = 1e-7  # a gap below which a plan is optimal


def exflow_program(trace: RoutingTrace, num_ranks: int) -> Program:
    """ExFlow's own (arXiv 2401.08383, section 4): as few as possible of the steps of a token's top-1 path change rank.

    Every rank holds ceil(E / G) experts at most; load and links do not count. Summed by transition, which leaves the
    program's optimum as it is (`milp.exflow` has a variable per token and step).
    """
    return Program.even(transition_counts(trace, pairs="home"), num_ranks)


def solve_transitions(
    program: Program,
    *,
    seconds: float | Deadline,
    rounds: int | None = None,
    seed: int = 0,
    slots: int | None = None,
    present: Plan | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Plan:
    """The best plan found within the seconds, with its value, its bound, and by which solver.

    Experts may stand in any of ceil(E / G) places per rank and layer. rounds: perturbations of the search. slots:
    copies per rank and layer, None = one copy each. present: a plan to begin from, where it fits. progress: called with
    the share that is done. Rounds are the budget of all parts (iterations of the bound, nodes of the integer program),
    so that the same seed gives the same plan; the seconds are a cap, beyond which that no longer holds. Interrupted
    (Ctrl-C) it returns the best plan so far. Raises ValueError if replicas are asked of more variables than the integer
    program can have.
    """
    deadline = Deadline.of(seconds)
    places, experts = program.with_empty_places(), program.num_experts
    if slots is not None:
        check_capacity(experts, program.num_ranks, slots)
        if num_columns(program, slots) > MOST_COLUMNS:
            raise ValueError(
                f"copies of experts for transitions are solved by the integer program alone, up to {MOST_COLUMNS} "
                f"variables; these have {num_columns(program, slots)}: leave --replicas out, or use --objective bytes"
            )
    if slots is None and is_exact_feasible(places):
        try:
            rows, value = solve_exact(places, deadline.part(0.5))
        except TimeoutError as error:
            log.warning("the exact recursion does not end within half of the time: %s", error)
        else:
            plan = Plan.from_assignment(rows[:, :experts], program.num_ranks, solver="exact", value=value, bound=value)
            return plan.with_result(seconds=deadline.spent())
    has_milp = num_columns(places, slots) <= MOST_COLUMNS
    parts = 3 if has_milp else 2
    starts = [] if present is None else _starts(present, places)
    budget = np.inf if rounds is None else PER_ROUND * rounds
    nodes = None if rounds is None else PER_ROUND * rounds
    try:
        bound = lower_bound(
            places,
            method="semidefinite",
            time_limit=deadline.part(1 / parts),
            iterations=budget,
            progress=lambda done: progress(min(done, 1.0) / parts),
        )
    except KeyboardInterrupt:
        log.warning("interrupted: this is a first plan, without a bound")
        found = solve(places, time_limit=deadline, rounds=0, seed=seed, starts=starts)
        plan = plan_of(program, found._replace(assignment=found.assignment[:, :experts]), solver="search", bound=0.0)
        return plan.with_result(seconds=deadline.spent())
    found = solve(
        places, time_limit=deadline.part(1 / (parts - 1)), rounds=rounds, seed=seed, starts=starts,
        guide=bound.relaxation, progress=lambda done: progress((1 + min(done, 1.0)) / parts),
    )  # fmt: skip
    rows = found.assignment[:, :experts]
    plan = plan_of(program, found._replace(assignment=rows), solver="search", bound=min(bound.value, found.cost))
    try:
        if found.interrupted:
            pass
        elif slots is not None:
            plan = solve_milp(program, time_limit=deadline, replica_slots=slots, warm=rows, most_nodes=nodes).plan
        elif has_milp and not deadline.is_over() and found.cost - bound.value > TIGHT:
            milp = solve_milp(places, time_limit=deadline, warm=found.assignment, most_nodes=nodes).plan
            plan = _better(plan, milp, experts)
    except KeyboardInterrupt:  # HiGHS answers once it is done
        log.warning("interrupted: this is the search's plan")
    return plan.with_result(seconds=deadline.spent())


def _better(found: Plan, milp: Plan, experts: int) -> Plan:
    """The cheaper of two plans, with the tighter of their bounds. milp: of all places, of which `experts` hold one."""
    assert found.value is not None
    assert found.bound is not None
    assert milp.value is not None
    assert milp.bound is not None
    best = found
    if milp.value < found.value:
        rows = milp.assignment[:, :experts]
        best = Plan.from_assignment(rows, milp.num_ranks, solver="milp", value=milp.value)
    return best.with_result(bound=min(max(milp.bound, found.bound), milp.value, found.value))


def _starts(present: Plan, places: Program) -> list[Ints]:
    """The present plan as an assignment of all places, if it has one copy each and no rank holds too many."""
    ranks = places.num_ranks
    if present.hosted.shape[2] != ranks or (present.replicas > 1).any():
        return []
    rows = present.assignment
    room = places.capacities - np.stack([np.bincount(row, minlength=ranks) for row in rows])  # [L, G]
    if room.min() < 0:
        return []
    return [np.concatenate([rows, np.stack([np.repeat(np.arange(ranks), free) for free in room])], axis=1)]
