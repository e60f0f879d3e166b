"""The linear program over all groups of experts: below brute force, and the value of the whole program."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from moe.placement.deadline import NEVER, Deadline
from moe.placement.solve.copies import k_hot
from moe.placement.solve.copies_bound import layer_bound
from moe.placement.solve.groups_bound import can_list, groups_bound
from tests.placement.instances import topic_trace


def touched(ids, owner):
    """Mean ranks touched, token by token."""
    return np.mean([len({int(owner[e]) for e in row if e >= 0}) for row in ids])


def random_ids(rng, tokens, experts, top):
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top].astype(np.int16)
    ids[rng.random(ids.shape) < 0.2] = -1
    return ids


@pytest.mark.parametrize(("seed", "experts", "ranks"), [(0, 6, 2), (1, 6, 3), (2, 7, 3), (3, 5, 4), (4, 4, 1)])
def test_below_every_placement_and_equal_to_the_whole_program(seed, experts, ranks):
    rng = np.random.default_rng(seed)
    ids, places = random_ids(rng, [25, 64, 130, 1, 63][seed], experts, 3), -(-experts // ranks)
    every = (np.array(r) for r in itertools.product(range(ranks), repeat=experts))
    best = min(touched(ids, r) for r in every if np.bincount(r).max() <= places)
    start = np.arange(experts) % ranks
    bound = groups_bound(ids, experts, ranks, NEVER, start if seed % 2 else None)
    assert bound <= best + 1e-9
    groups = list(itertools.combinations(range(ranks * places), places))
    cost = [sum(bool(set(row.tolist()) & set(group)) for row in ids) for group in groups]
    rows = [[float(e in group) for group in groups] for e in range(ranks * places)]
    whole = linprog(cost, A_eq=rows, b_eq=np.ones(len(rows))).fun / len(ids)
    assert bound == pytest.approx(whole, rel=3e-4, abs=1e-6)


def test_closer_than_pairs_and_valid_whenever_time_ends():
    trace = topic_trace(300, 1, 16, 4, seed=2)
    ids = trace.expert_ids[:, 0]
    bound = groups_bound(ids, 16, 4, NEVER)
    assert bound > layer_bound(k_hot(ids, 16).astype(float), 4, 1.0)
    assert groups_bound(ids, 16, 4, Deadline(0.0)) == 0.0
    for looks in (600, 700, 900):
        clock = itertools.count()
        assert groups_bound(ids, 16, 4, Deadline(float(looks), lambda clock=clock: float(next(clock)))) <= bound + 1e-3


@pytest.mark.parametrize(("seed", "experts", "ranks"), [(0, 6, 2), (1, 7, 3), (2, 8, 2), (3, 6, 3), (4, 7, 2)])
def test_bounds_under_a_cap_on_load_are_below_the_best_that_keeps_it(seed, experts, ranks):
    """Against brute force. Hot experts are chosen together, so that without the cap they share a rank."""
    rng = np.random.default_rng(seed)
    weight = np.r_[np.full(3, 6.0), np.ones(experts - 3)]
    ids = np.argsort(rng.exponential(size=(60, experts)) / weight, axis=1)[:, :3].astype(np.int16)
    hits, places = k_hot(ids, experts).astype(float), -(-experts // ranks)
    every = (np.array(r) for r in itertools.product(range(ranks), repeat=experts))
    every = [r for r in every if np.bincount(r).max() <= places]
    loads = [np.bincount(r, weights=hits.sum(axis=0)).max() for r in every]
    cap = 1.03 * min(loads)
    costs = [touched(ids, r) if load <= cap else np.inf for r, load in zip(every, loads, strict=True)]
    best = min(costs)
    bound = layer_bound(hits, ranks, NEVER, iterations=60, most_pairs=cap)
    listed = groups_bound(ids, experts, ranks, NEVER, every[costs.index(best)], most_pairs=cap)
    assert max(bound, listed) <= best + 1e-9
    assert listed > groups_bound(ids, experts, ranks, NEVER) + 0.05
    assert layer_bound(hits, ranks, NEVER, iterations=60, most_pairs=3 * cap) <= min(touched(ids, r) for r in every)
    with pytest.raises(ValueError, match="whose groups come first"):
        groups_bound(ids, experts, ranks, NEVER, every[loads.index(max(loads))], most_pairs=cap)


def test_a_cap_on_load_raises_the_bound_by_pairs():
    """Four hot experts that come together: on one rank without a cap, apart with it."""
    rng = np.random.default_rng(0)
    ids = np.concatenate(
        [np.tile(np.arange(3), (200, 1)), rng.permuted(np.tile(np.arange(16), (60, 1)), axis=1)[:, :3]]
    )
    hits = k_hot(ids.astype(np.int16), 16).astype(float)
    capped = layer_bound(hits, 4, NEVER, iterations=200, most_pairs=hits.sum() / 3)
    assert capped > layer_bound(hits, 4, NEVER, iterations=200) + 0.2


def test_what_is_too_many_to_list():
    assert can_list(64, 16)
    assert not can_list(64, 8)
