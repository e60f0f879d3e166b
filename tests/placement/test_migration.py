"""Migrations: valid at every step, as full as a step's budget allows, reversible, and refused where they do not pay."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.placement.migrate import plan_migration, relabel, widened
from moe.placement.plan import Plan
from moe.placement.topology import Topology
from tests.placement.instances import random_hosted

PAIR = Topology.preset("2xh200x2")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_migration_is_valid_at_every_step_and_reversible(seed, replicas, per_layer):
    rng = np.random.default_rng(seed)
    if replicas:
        plans = [Plan.from_hosted(random_hosted(rng)) for _ in range(2)]
    else:
        plans = [Plan.random(2, 8, 4, seed=int(rng.integers(1000))) for _ in range(2)]
    target = relabel(plans[0], plans[1], per_layer=per_layer)
    np.testing.assert_array_equal(np.sort(target.replicas, axis=1), np.sort(plans[1].replicas, axis=1))
    budget = int(rng.choice([2, 3, 50])) * 100
    args = {"expert_bytes": 100, "bytes_per_step": budget, "seconds_per_step": (2.0, 1.0)}
    move = plan_migration(plans[0], target, PAIR, **args)
    states = list(move.states())
    if states:
        np.testing.assert_array_equal(states[-1].phy2log, move.target.phy2log)
    assert move.num_bytes >= 100 * int((target.hosted & ~plans[0].hosted).sum())


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_a_migration_are_as_full_as_can_be(seed):
    """Experts that trade places two by two, of every rank and layer: no step but the last has room for two more."""
    rng = np.random.default_rng(seed)
    present = Plan.contiguous(6, 64, 8)
    rows = present.assignment.copy()
    for row in rows:
        for one, other in rng.permutation(64).reshape(-1, 2)[: rng.integers(1, 12)]:
            row[[one, other]] = row[[other, one]]
    args = {"expert_bytes": 100, "bytes_per_step": 1200, "seconds_per_step": (2.0, 1.0)}
    move = plan_migration(present, relabel(present, Plan.from_assignment(rows, 8)), Topology.preset("h200x8"), **args)
    moved = int((move.target.hosted & ~present.hosted).sum())
    assert move.num_bytes == 100 * moved
    plans = [present, *move.states()]
    came = [int((new.hosted & ~old.hosted).sum()) for old, new in itertools.pairwise(plans)]
    assert sum(came) == moved
    assert max(came) <= 12
    assert len(came) <= -(-moved // 12) + (max(came) < 12), came
    np.testing.assert_array_equal(plans[-1].phy2log, move.target.phy2log)


@pytest.mark.parametrize("budget", [2, 3, 50])
@pytest.mark.parametrize("seed", range(5))
def test_an_expert_that_moves_into_the_only_empty_place_is_nowhere_lost(seed, budget):
    present, target = (Plan.random(2, 11, 4, seed=seed + 10 * n) for n in range(2))
    args = {"expert_bytes": 1, "bytes_per_step": budget, "seconds_per_step": (2.0, 1.0)}
    move = plan_migration(present, relabel(present, target), PAIR, **args)
    states = list(move.states())  # each is a plan: it has every expert
    np.testing.assert_array_equal(states[-1].phy2log, move.target.phy2log)


def test_relabelling_finds_the_renamed_plan_and_keeps_nodes():
    present = Plan.random(3, 8, 4, seed=2)
    names = np.array([2, 3, 1, 0])
    renamed = Plan.from_assignment(names[present.assignment], 4)
    back = relabel(present, renamed)
    np.testing.assert_array_equal(back.phy2log, present.phy2log)
    move = plan_migration(present, back, PAIR, expert_bytes=1, bytes_per_step=2, seconds_per_step=(1, 1))
    assert (move.num_bytes, move.steps, move.steps_to_pay) == (0, (), 0.0)
    whole_nodes = relabel(present, renamed, nodes=(0, 0, 1, 1))
    np.testing.assert_array_equal(whole_nodes.phy2log, present.phy2log)  # 2, 3 | 1, 0 trades whole nodes
    mixed = relabel(present, Plan.from_assignment(np.array([0, 2, 1, 3])[present.assignment], 4), nodes=(0, 0, 1, 1))
    pairs = [{frozenset(np.flatnonzero(p.assignment[0] // 2 == n)) for n in (0, 1)} for p in (mixed, present)]
    assert pairs[0] != pairs[1]  # a renaming across nodes must not be undone


def test_migrations_that_do_not_pay_are_refused():
    a, b = Plan.random(2, 8, 4, seed=0), Plan.random(2, 8, 4, seed=1)
    args = {"expert_bytes": 10**9, "bytes_per_step": 10**10}
    with pytest.raises(ValueError, match="never pays back"):
        plan_migration(a, b, PAIR, seconds_per_step=(1.0, 1.0), **args)
    with pytest.raises(ValueError, match="horizon 10"):
        plan_migration(a, b, PAIR, seconds_per_step=(1.0, 0.9999), horizon_steps=10, **args)
    with pytest.raises(ValueError, match="less than a group"):
        plan_migration(a, b, PAIR, expert_bytes=100, bytes_per_step=100, seconds_per_step=(2.0, 1.0))
    with pytest.raises(ValueError, match="cannot be joined"):
        relabel(a, Plan.random(3, 8, 4))
    with pytest.raises(ValueError, match="cannot hold"):
        widened(a, 1)
