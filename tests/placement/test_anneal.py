"""Annealed replicas, judged by a scorer of its own: loops over tokens, no code of the solver."""

from itertools import combinations

import numpy as np
import pytest

from moe.placement.deadline import NEVER
from moe.placement.helper import MOST_RANKS, load_helper
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.plan import Plan
from moe.placement.simulate import Workload, simulate
from moe.placement.solve.anneal import PENALTY, Caps, Price, anneal, home_ranks, search_layer
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.evenness import PIECE
from moe.placement.solve.schedule import Schedule
from moe.placement.solve.swaps import CopyOptions
from moe.placement.stats.affinity import expert_load
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import WireFormat
from tests.placement.instances import topic_trace
from tests.placement.scorer import score

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")


def cost(ids, home, hosted, caps, price=Price()):  # noqa: B008
    """The objective by its definition, for tokens of which no cover has a choice between equals."""
    visits, load = 0, np.zeros(hosted.shape[1])
    for row, at in zip(ids.tolist(), home.tolist()):
        hosts = [set(np.flatnonzero(hosted[e])) for e in row if e >= 0]
        forced = {at}.union(*(h for h in hosts if len(h) == 1))
        extra = next(
            set(extra)
            for size in range(len(hosts) + 1)
            for extra in combinations(range(hosted.shape[1]), size)
            if all(h & (forced | set(extra)) for h in hosts)
        )
        used = forced | extra
        visits += len(used) - 1
        for h in hosts:
            able = {at} if price.home_first and at in h else h & used
            visits += price.pair * (1 - (at in able) / len(able))
            for rank in able:
                load[rank] += 1 / len(able)
    over = PENALTY * np.maximum(load - caps.load, 0).sum()
    for rank in range(hosted.shape[1]):
        held = [(e, 1 / hosted[e].sum()) for e in np.flatnonzero(hosted[:, rank])]
        over += sum(s * t * caps.moments[e, f] for e, s in held for f, t in held)
    return visits, over


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_the_scorer_and_the_simulator_count_the_same(combine):
    trace = topic_trace(150, 2, 16, 3, seed=3)
    plan = Plan.random(2, 16, 4, seed=1)
    found = score(trace, plan, is_exact=combine == "exact", rotations=(0,))
    told = simulate(trace, plan, Topology.uniform(1, 4), Workload(wire=WireFormat(combine=combine)))
    assert found == pytest.approx((told.copies, told.imbalance, told.bytes))


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_is_what_its_definition_says(seed):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((30, 8)), axis=1)[:, :3]
    ids[rng.random(ids.shape) < 0.2] = -1
    hosted = np.arange(8)[:, None] % 4 == np.arange(4)
    home = home_ranks(30, 4, seed)
    counts = rng.integers(0, 3, (5, 8))
    caps = Caps(15.0, counts.T @ counts * 0.7) if seed % 2 else Caps.one(8, 15.0)
    for iterations in (0, 500):  # without replicas a token's ranks are given
        keep = {"slots": 2, "caps": caps, "seed": seed}
        hosted, found = anneal(ids, home, hosted, schedule=Schedule(iterations, (5.0, 0.1)), **keep)
        assert found == pytest.approx(sum(cost(ids, home, hosted, caps)))
        bytes_price = Price(pair=0.9, home_first=True)
        _, of_bytes = anneal(ids, home, hosted, schedule=Schedule(0), price=bytes_price, **keep)
        assert of_bytes == pytest.approx(sum(cost(ids, home, hosted, caps, bytes_price)))
        assert (hosted.sum(axis=1) == 1).all()
        assert (hosted.sum(axis=0) == 2).all()


def test_the_best_of_a_small_layer_is_found():
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((40, 6)) + (np.arange(6) % 2 == rng.integers(0, 2, (40, 1))), axis=1)[:, :2]
    home = home_ranks(40, 2, 0)
    options = [np.isin(np.arange(6), left)[:, None] == np.array([True, False]) for left in combinations(range(6), 3)]
    caps = Caps.one(6, 40.0)
    best = min(sum(cost(ids, home, hosted, caps)) for hosted in options)
    hosted, found = anneal(ids, home, options[0], slots=3, caps=caps, schedule=Schedule(3000, (10.0, 0.1)), seed=1)
    assert found == pytest.approx(best)
    assert sum(cost(ids, home, hosted, caps)) == pytest.approx(best)


def test_experts_move_into_empty_places():
    """Two ranks of three slots, experts 0..2 always together, 3 alone: and all at home fit but one."""
    ids = np.array([[0, 1, 2]] * 15 + [[3, -1, -1]] * 5)
    hosted = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    out, _ = anneal(
        ids, np.zeros(20), hosted, slots=3, caps=Caps.one(4, 1e9), schedule=Schedule(2000, (5.0, 0.1)), seed=0
    )
    assert (out[:3] == out[0]).all()


def test_moves_by_tokens_in_common_find_more_than_moves_at_random():
    """Four searches of 4000 moves, 64 experts on 16 ranks: partners drawn at random leave a cost of 9792 in all."""
    found = 0.0
    for seed in range(4):
        trace = topic_trace(600, 1, 64, 4, num_topics=16, seed=seed)
        ids, start = trace.expert_ids[:, 0], eplb_greedy(expert_load(trace), 16, 5).hosted[0]
        keep = {"slots": 5, "caps": Caps.of(ids, 64, 16, 1.05), "seed": seed}
        found += anneal(ids, home_ranks(600, 16, 0), start, schedule=Schedule(4000, (4.0, 0.3)), **keep)[1]
    assert found < 9700


def test_replicas_are_repeatable_valid_and_a_limit_is_kept():
    trace = topic_trace(400, 2, 16, 3, seed=2)
    plans = [solve_copies(trace, 4, slots_per_rank=5, options=CopyOptions(rounds=20, seed=4)) for _ in range(2)]
    assert (plans[0].hosted == plans[1].hosted).all()
    assert (plans[0].hosted.sum(axis=1) <= 5).all()
    assert plans[0].hosted.any(axis=2).all()
    stopped = solve_copies(trace, 4, slots_per_rank=5, options=CopyOptions(seconds=0.0))
    assert (stopped.hosted == eplb_greedy(expert_load(trace), 4, 5).hosted).all()


def test_a_start_that_is_best_is_kept():
    ids = np.array([[0, 1], [2, 3]] * 20)
    best = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    caps = Caps.of(ids, 4, 2, 1.01)
    found = search_layer(ids, best, slots=2, caps=caps, rounds=5, seed=0, deadline=NEVER)
    assert (found == best).all()


def test_what_is_even_over_all_is_evened_in_its_parts():
    """Two halves with two experts each: two ranks are even over all whichever pairs, and in each in one way."""
    ids = np.repeat([[0], [1], [2], [3]], 2 * PIECE, axis=0)
    uneven = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    caps = Caps.of(ids, 4, 2, 1.0)
    found = search_layer(ids, uneven, slots=2, caps=caps, rounds=10, seed=0, deadline=NEVER)
    assert (found[0] != found[1]).all()
    assert (found[2] != found[3]).all()


def test_what_does_not_fit_is_refused():
    ids, home, hosted = np.array([[0, 1]]), np.array([0]), np.eye(2, dtype=bool)
    keep = {"caps": Caps.one(2, 1.0), "schedule": Schedule(1), "seed": 0}
    with pytest.raises(ValueError, match="out of range"):
        anneal(np.array([[0, 2]]), home, hosted, slots=1, **keep)
    with pytest.raises(ValueError, match="no copy"):
        anneal(ids, home, hosted & (np.arange(2) == 0), slots=1, **keep)
    with pytest.raises(ValueError, match="no copy"):
        anneal(ids, home, hosted | True, slots=1, **keep)
    with pytest.raises(ValueError, match="moments"):
        anneal(ids, home, hosted, slots=1, **keep | {"caps": Caps.one(3, 1.0)})
    with pytest.raises(ValueError, match="ranks"):
        anneal(ids, home, np.ones((2, MOST_RANKS + 1), bool), slots=2, **keep)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("domain", "ranks", "most"),
    [
        ("translation", 4, (1.57, 1.02)),
        ("summary", 4, (1.645, 1.055)),
        ("translation", 8, (2.59, 1.055)),
        ("summary", 8, (2.65, 1.13)),
    ],
)
def test_recorded_routing_with_replicas(shared_data, domain, ranks, most):
    """Six layers of a recorded model, 12.5 % spare slots, 60 % of the sequences fitted, the rest judged."""
    trace = from_deepseek_esft_npz(shared_data / "traces" / f"deepseek_v2_lite_{domain}.npz")
    layers = {"expert_ids": trace.expert_ids[:, ::5], "weights": None}
    fit, held = RoutingTrace(**{name: getattr(trace, name) for name in trace.__slots__} | layers).split(0.6)
    copies, load, _ = score(held, solve_copies(fit, ranks, slots_per_rank=72 // ranks))
    assert copies <= most[0]
    assert load <= most[1]
    assert copies <= 0.85 * score(held, eplb_greedy(expert_load(fit), ranks, 72 // ranks))[0]
