"""ExFlow's program and that of transitions, from the command line down: exact where it can be, bounded elsewhere."""

import argparse
import itertools
from dataclasses import replace

import numpy as np
import pytest

from moe.launch.cli import _function
from moe.launch.place_options import add_parsers
from moe.placement.plan import Plan
from moe.placement.solve.copies import ranks_touched, solve_copies
from moe.placement.solve.exact import is_exact_feasible
from moe.placement.solve.milp import exflow, solve_milp
from moe.placement.solve.program import Program, Weights
from moe.placement.solve.solver import solve
from moe.placement.solve.swaps import CopyOptions
from moe.placement.solve.transitions import solve_transitions
from moe.placement.stats.affinity import heaviest_experts
from moe.placement.trace import RoutingTrace
from tests.patience import PATIENCE_S
from tests.placement.instances import topic_trace


def place(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    args = parser.parse_args(["place", *map(str, arguments)])
    return int(_function(args.run)(args))


def hops(trace: RoutingTrace, plan: Plan) -> float:
    """The share of the steps of top-1 paths that change rank, counted token by token."""
    paths, ranks = heaviest_experts(trace), plan.assignment
    steps = range(trace.num_layers - 1)
    return float(np.mean([ranks[n][p[n]] != ranks[n + 1][p[n + 1]] for p in paths for n in steps]))


def roomy(experts: int, ranks: int) -> list[np.ndarray]:
    """Every way to place a layer's experts with ceil(E / G) places per rank."""
    places = -(-experts // ranks)
    every = (np.array(row) for row in itertools.product(range(ranks), repeat=experts))
    return [row for row in every if np.bincount(row, minlength=ranks).max() <= places]


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (7, 3)])
def test_exflows_program_from_the_command_line_is_the_published_one(tmp_path, capsys, experts, ranks):
    """Its optimum is that of the formulation with a variable per token and step, where counts must be equal."""
    trace = topic_trace(60, 3, experts, 2, seed=4, length=60)  # one sequence: all of it is fitted
    trace.save(tmp_path / "t.npz")
    options = ["--topology", f"laptopx{ranks}", "--seconds", PATIENCE_S, "--objective", "exflow"]
    assert place(tmp_path / "t.npz", "--out", tmp_path / "p.json", *options) == 0
    plan = Plan.load(tmp_path / "p.json")
    assert "gap 0.00%, by exact" in capsys.readouterr().out
    assert plan.value == plan.bound == pytest.approx(hops(trace, plan))
    published = exflow(heaviest_experts(trace), experts, ranks, time_limit=PATIENCE_S)
    assert published.gap == pytest.approx(0, abs=1e-6)
    assert published.value == pytest.approx(hops(trace, published))
    if experts % ranks:
        assert plan.value <= published.value + 1e-9  # an expert may stand in an empty place
    else:
        assert plan.value == pytest.approx(published.value)
    with pytest.raises(ValueError, match="no load in it"):
        place(tmp_path / "t.npz", "--out", tmp_path / "p.json", *options, "--load-weight", 1)


@pytest.mark.parametrize("seed", range(6))
def test_experts_move_into_empty_places(seed):
    """Uneven counts against brute force: transitions with load by every solver, ranks touched by the swaps."""
    rng = np.random.default_rng(seed)
    experts, ranks = [(5, 3), (4, 3), (5, 2)][seed % 3]
    program = Program.even(rng.random((1, experts, experts)) ** 4, ranks, weights=Weights(load=0.2 * (seed % 2)))
    ways = roomy(experts, ranks)
    truth = min(program.cost(Plan.from_assignment(np.stack(pair), ranks)) for pair in itertools.product(ways, ways))
    plan = solve_transitions(program, seconds=PATIENCE_S)
    assert plan.solver == "exact"
    assert program.cost(plan) == pytest.approx(plan.value) == pytest.approx(truth)
    places = program.with_empty_places()
    assert solve(places, time_limit=PATIENCE_S, rounds=200).cost == pytest.approx(truth)
    assert solve_milp(places, time_limit=PATIENCE_S).plan.value == pytest.approx(truth, abs=1e-6)
    trace = topic_trace(40, 1, experts, 2, seed=seed)
    touched = [float(ranks_touched(trace, Plan.from_assignment(way[None], ranks).hosted)[0]) for way in ways]
    found = solve_copies(trace, ranks, options=CopyOptions(slack=10.0, rounds=60, seed=seed))
    assert found.value == pytest.approx(min(touched))


def test_what_the_exact_recursion_cannot_the_integer_program_proves():
    rng = np.random.default_rng(1)
    mass = np.zeros((1, 12, 12))
    for _ in range(16):
        mass[0, rng.integers(12), rng.integers(12)] += rng.random()
    program = Program.even(mass, 4)
    assert not is_exact_feasible(program)
    plan = solve_transitions(program, seconds=PATIENCE_S, rounds=50)
    assert plan.gap == pytest.approx(0, abs=1e-5)  # HiGHS: feasible to 1e-6
    assert program.cost(plan) == pytest.approx(plan.value)


def test_the_search_begins_at_the_present_plan():
    program = Program.even(np.random.default_rng(2).random((4, 13, 13)) ** 6, 4)
    good = solve_transitions(program, seconds=1, rounds=150)
    again = solve_transitions(program, seconds=1e-3, rounds=0, present=good)
    assert again.value <= good.value + 1e-12
    assert again.bound <= again.value


def test_replicas_of_transitions_are_the_integer_programs(tmp_path):
    trace = topic_trace(40, 2, 6, 2, seed=2, length=40)
    trace.save(tmp_path / "t.npz")
    options = ["--topology", "laptopx2", "--seconds", PATIENCE_S, "--objective", "transitions"]
    plans = []
    for name, more in (("one", []), ("two", ["--replicas", 0.34])):
        assert place(tmp_path / "t.npz", "--out", tmp_path / name, *options, *more) == 0
        plans.append(Plan.load(tmp_path / name))
    one, two = plans
    assert two.solver == "milp"
    assert two.hosted.sum(axis=1).max() == 4
    assert two.bound <= two.value < one.value
    with pytest.raises(ValueError, match="by the integer program alone"):
        solve_transitions(Program.even(np.ones((2, 64, 64)), 4), seconds=1, slots=20)
    single = replace(trace, expert_ids=trace.expert_ids[:, :1], weights=trace.weights[:, :1])
    single.save(tmp_path / "s.npz")
    with pytest.raises(ValueError, match="needs two layers"):
        place(tmp_path / "s.npz", "--out", tmp_path / "p", *options)


@pytest.mark.parametrize("objective", ["bytes", "copies", "coherent", "transitions", "exflow"])
def test_the_same_seed_gives_the_same_plan_whatever_the_time(tmp_path, objective):
    """Budgets are rounds, of the bound that guides a search, too: another limit on time changes nothing."""
    topic_trace(200, 2, 13, 2, seed=5, length=50).save(tmp_path / "t.npz")
    told = ["--topology", "laptopx4", "--objective", objective, "--rounds", 3, "--seed", 2]
    told += ["--dispatcher", "coherent"] if objective == "coherent" else []
    plans = []
    for name, seconds in (("a", 300), ("b", 1000), ("c", 300)):
        assert place(tmp_path / "t.npz", "--out", tmp_path / name, *told, "--seconds", seconds) == 0
        plans.append(Plan.load(tmp_path / name))
    assert all((plan.hosted == plans[0].hosted).all() for plan in plans)


def test_time_ends_every_part_and_an_interrupt_leaves_a_plan():
    program = Program.even(np.random.default_rng(2).random((5, 40, 40)) ** 6, 5)
    plan = solve_transitions(program, seconds=0.01, rounds=10**6)
    assert plan.bound <= plan.value
    for limit in (0.0, 0.55):  # in the bound, and in the search
        shares = []

        def stop(share, shares=shares, limit=limit):
            shares.append(share)
            if share > limit:
                raise KeyboardInterrupt

        found = solve_transitions(program, seconds=1000, rounds=4, progress=stop)
        assert found.value == pytest.approx(program.cost(found))
        assert shares == sorted(shares)
        assert max(shares) > limit
        assert found.value <= program.cost(Plan.random(6, 40, 5))
