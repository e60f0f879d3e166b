"""One limit on time, kept by every solver: clocks that count looks instead of seconds."""

import itertools
import signal
import traceback

import numpy as np
import pytest

from moe.placement.deadline import ASK, Deadline, Pace
from moe.placement.helper import load_helper
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.copies_bound import copies_bound
from moe.placement.solve.exact import solve_exact
from moe.placement.solve.milp import solve_milp
from moe.placement.solve.program import Program
from moe.placement.solve.swaps import CopyOptions
from moe.placement.solve.transitions import solve_transitions
from moe.placement.stats.affinity import expert_load
from tests.placement.instances import topic_trace


class Looks:
    """A clock that goes on by one with every look at it."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return float(self.count)


def test_parts_end_with_the_whole():
    now = [0.0]
    whole = Deadline(10.0, lambda: now[0])
    assert [whole.at(share).left() for share in (0.0, 0.5, 1.0)] == [0.0, 5.0, 10.0]
    now[0] = 6.0
    assert whole.part(0.5).left() == pytest.approx(2.0)
    assert whole.at(0.5).is_over()
    assert not whole.is_over()
    assert whole.share() == pytest.approx(0.6)
    now[0] = 10.0
    assert whole.is_over()
    assert whole.part(0.5).is_over()
    assert whole.has_cut
    assert not Deadline().is_over()


def test_the_pace_leaves_time_for_a_whole_schedule():
    now = [0.0]
    end = Deadline(10.0, lambda: now[0])
    pace = Pace(end, 1000)
    ask = ASK(pace.address)
    assert ask(0) == 1000
    now[0] = 2.0
    assert ask(300) == 1000  # 150 a second leave time for all
    assert not end.has_cut
    assert ask(100) == 500  # 50 a second do not
    assert end.has_cut
    now[0] = 10.0
    assert ask(420) == 420
    assert Pace(Deadline(), 7).address == 0


@pytest.mark.parametrize("slots", [None, 6])
def test_ctrl_c_while_compiled_code_searches_ends_it(slots, caplog):
    """The clock is looked at inside the search, and the signal comes there: an exception there would be lost."""
    looks, before, asked = itertools.count(), signal.getsignal(signal.SIGINT), []

    def clock() -> float:
        if "_allowed" in {frame.name for frame in traceback.extract_stack(limit=4)}:
            asked.append(1)
            if len(asked) == 2:
                signal.raise_signal(signal.SIGINT)
        return next(looks) / 1e6 + 50 * (len(asked) > 2)  # a search that goes on ends, too

    options = CopyOptions(rounds=10**5, seconds=Deadline(100.0, clock))
    plan = solve_copies(topic_trace(600, 5, 16, 4), 4, slots_per_rank=slots, options=options)
    assert plan.num_ranks == 4
    assert [record.message for record in caplog.records] == ["interrupted: this is the best plan so far"]
    assert len(asked) == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("slots", [None, 6])
def test_a_first_plan_is_there_within_five_seconds_of_any_limit(slots):
    trace = topic_trace(600, 5, 16, 4)
    clock, seen = Looks(), []
    end = Deadline(100.0, lambda: clock() / 10)  # a look is a tenth of a second
    options = CopyOptions(rounds=10**6, seconds=end)
    solve_copies(trace, 4, slots_per_rank=slots, options=options, progress=lambda _: seen.append(end.spent()))
    first, last = seen[trace.num_layers - 1], seen[-1]
    assert 1 < first < 5 < 90 < last


SOLVERS = {
    "copies": lambda trace, end: solve_copies(trace, 4, options=CopyOptions(rounds=10**6, seconds=end)),
    "coherent": lambda trace, end: solve_copies(
        trace, 4, options=CopyOptions(rounds=10**6, seconds=end, coherent=True)
    ),
    "replicas": lambda trace, end: solve_copies(
        trace, 4, slots_per_rank=6, options=CopyOptions(rounds=10**6, seconds=end)
    ),
    "replicas in numpy": lambda trace, end: solve_copies(
        trace, 4, slots_per_rank=6, options=CopyOptions(rounds=10**6, seconds=end, node_weight=1.0, nodes=(0, 0, 1, 1))
    ),
    "bound of copies": lambda trace, end: copies_bound(trace, 4, seconds=end),
    "transitions": lambda trace, end: solve_transitions(
        Program.even(np.random.default_rng(0).random((7, 20, 20)), 4), seconds=end
    ),
    "exact": lambda trace, end: solve_transitions(
        Program.even(np.random.default_rng(0).random((31, 8, 8)), 4), seconds=end
    ),
    "replicas of transitions": lambda trace, end: solve_transitions(
        Program.even(np.random.default_rng(0).random((2, 6, 6)), 3), seconds=end, slots=3
    ),
}


@pytest.mark.parametrize("looks", [0, 40, 200])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_ends_within_a_tenth(solver, looks):
    """Rounds without end, so that only the clock can end them. What is over when it begins looks once for each part of
    the work; what has begun stops within a few looks."""
    clock = Looks()
    end = Deadline(float(looks), clock)
    SOLVERS[solver](topic_trace(300, 8, 20, 3, seed=1), end)
    assert clock.count - end.until <= (12 if looks else 50)
    if solver != "exact":  # which is done within 40
        assert clock.count >= end.until


def test_without_time_plans_are_the_greedys_and_whole():
    trace = topic_trace(100, 3, 20, 3, seed=1)
    greedy = eplb_greedy(expert_load(trace), 4, 6)
    plan = solve_copies(trace, 4, slots_per_rank=6, options=CopyOptions(seconds=0.0))
    assert (plan.hosted == greedy.hosted).all()
    bound = copies_bound(trace, 4, seconds=0.0)
    assert bound == pytest.approx(np.ceil((trace.expert_ids >= 0).sum(axis=2) / 5).mean(axis=0))


@pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
def test_less_time_cools_faster_and_still_gains():
    """Half of the looks that all rounds take: the plan is better than the greedy's and the search has ended cold."""
    trace = topic_trace(600, 2, 64, 6, seed=3)
    greedy = solve_copies(trace, 8, options=CopyOptions(seconds=0.0)).value
    whole = Looks()
    all_of_it = solve_copies(trace, 8, options=CopyOptions(rounds=40, seconds=Deadline(1e9, whole))).value
    few = Looks()
    half = solve_copies(trace, 8, options=CopyOptions(rounds=40, seconds=Deadline(whole.count / 2, few))).value
    assert few.count < 0.7 * whole.count
    assert half < greedy - 0.7 * (greedy - all_of_it)


def test_the_exact_recursion_says_where_time_ended():
    program = Program.even(np.random.default_rng(0).random((3, 8, 8)), 4)
    with pytest.raises(TimeoutError, match="layer 0 of 4"):
        solve_exact(program, Deadline(0.0))
    plan = solve_transitions(program, seconds=Deadline(30.0, Looks()))
    assert plan.bound <= plan.value + 1e-9


def test_the_integer_program_keeps_its_start_where_there_is_no_time():
    program = Program.even(np.random.default_rng(0).random((2, 6, 6)), 3)
    start = np.tile(np.arange(6) % 3, (3, 1))
    clock = itertools.count()
    found = solve_milp(program, time_limit=Deadline(0.0, lambda: float(next(clock))), warm=start)
    assert found.plan.value <= program.cost(found.plan) + 1e-9
    assert not found.optimal
