"""Annealed assignments without replicas: the cost by its definition, optima of small layers, caps of moments."""

from itertools import product

import numpy as np
import pytest

from moe.placement.deadline import NEVER
from moe.placement.helper import load_helper
from moe.placement.solve.assign import (
    CAP_PRICE,
    MOMENT_CAP,
    Layer,
    Limits,
    anneal_assignment,
    search_assignment,
)
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.evenness import PIECE
from moe.placement.solve.schedule import Schedule
from moe.placement.solve.swaps import CopyOptions
from tests.placement.instances import topic_trace

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")


def cost(layer, ranks, options):
    """The objective, token by token."""
    total = 0.0
    for t, row in enumerate(layer.expert_ids.tolist()):
        touched = {int(ranks[e]) for e in row if e >= 0}
        if layer.pin is not None and layer.pin[t] >= 0:
            touched.add(int(layer.pin[t]))
        total += len(touched)
        if options.node_weight:
            total += options.node_weight * len({options.nodes[g] for g in touched})
    limits = layer.limits
    for rank in range(int(max(ranks)) + 1):
        held = np.flatnonzero(np.asarray(ranks) == rank)
        total += CAP_PRICE * max(0.0, float(limits.load[held].sum()) - limits.cap)
        total += max(0.0, float(limits.moments[np.ix_(held, held)].sum()) - limits.moment_cap)
    return total


def random_layer(rng, tokens, experts, ranks, *, pinned):
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :3].astype(np.int16)
    ids[rng.random(ids.shape) < 0.2] = -1
    pin = rng.integers(-1, ranks, tokens) if pinned else None
    counts = rng.integers(0, 3, (5, experts))
    return Layer(ids, pin, Limits(counts.sum(axis=0) * 1.0, 14.0, counts.T @ counts * 0.7, 35.0))


@pytest.mark.parametrize("tokens", [0, 1, 63, 65, 130])
@pytest.mark.parametrize("kind", ["plain", "pinned", "nodes"])
def test_the_cost_is_what_its_definition_says(tokens, kind):
    rng = np.random.default_rng(tokens)
    experts, ranks = 10, 4  # 12 places
    options = CopyOptions(node_weight=1.5, nodes=(0, 1, 0, 1)) if kind == "nodes" else CopyOptions()
    layer = random_layer(rng, tokens, experts, ranks, pinned=kind != "plain")
    start = np.arange(experts) % ranks
    keep = {"seed": 1, "options": options}
    for iterations in (0, 1, 700):
        now, best, found = anneal_assignment(
            layer, start, start, ranks, schedule=Schedule(iterations, (3.0, 0.1)), **keep
        )
        assert found == pytest.approx(cost(layer, best, options))
        assert found <= cost(layer, start, options) + 1e-6
        assert max(np.bincount(now).max(), np.bincount(best).max()) <= 3
        _, _, of_end = anneal_assignment(layer, now, now, ranks, schedule=Schedule(0), **keep)
        assert of_end == pytest.approx(cost(layer, now, options))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_a_small_layer_is_found(seed):
    rng = np.random.default_rng(seed)
    experts, ranks = (6, 3) if seed % 2 else (7, 3)
    layer = random_layer(rng, 40, experts, ranks, pinned=seed > 1)
    options = CopyOptions()
    every = (r for r in product(range(ranks), repeat=experts) if np.bincount(r).max() <= -(-experts // ranks))
    best = min(cost(layer, r, options) for r in every)
    start = np.arange(experts) % ranks
    keep = {"rounds": 2, "deadline": NEVER, "options": options}
    found = [search_assignment(layer, start, ranks, seed=s, **keep) for s in range(3)]
    assert min(cost(layer, rows, options) for rows in found) == pytest.approx(best)


def test_limits_are_of_the_greedys_plan():
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 9, (5 * PIECE, 2))
    greedy = np.arange(9) % 3
    limits = Limits.of(ids, greedy, 3, 1.1)
    np.testing.assert_array_equal(limits.load, [(ids == e).sum() for e in range(9)])
    moments = [limits.moments[np.ix_(greedy == g, greedy == g)].sum() for g in range(3)]
    assert limits.moment_cap == pytest.approx(1.1 * MOMENT_CAP * max(moments))
    assert limits.cap == pytest.approx(1.1 * max(limits.load[greedy == g].sum() for g in range(3)))
    few = Layer(ids, None, limits).sample(32, seed=1)
    share = (few.expert_ids >= 0).sum() / (ids >= 0).sum()
    assert few.limits.cap == pytest.approx(limits.cap * share)
    assert few.limits.moment_cap == pytest.approx(limits.moment_cap * share)
    assert Limits.of(ids[:0], greedy, 3, 1.0).cap == 0


def test_experts_that_are_hot_together_part():
    """Two topics of two experts; over all tokens either pairing is even, within pieces of them only mixed ones are."""
    half = PIECE // 2
    ids = np.concatenate([np.tile([[0], [1]], (half, 1)), np.tile([[2], [3]], (half, 1))])
    layer = Layer(ids, None, Limits.of(ids, np.array([0, 1, 0, 1]), 2, 1.0))
    found = search_assignment(layer, np.array([0, 0, 1, 1]), 2, rounds=5, seed=0, deadline=NEVER, options=CopyOptions())
    assert found[0] != found[1]
    assert found[2] != found[3]


def test_what_does_not_fit_is_refused():
    layer = random_layer(np.random.default_rng(0), 10, 6, 2, pinned=False)
    keep = {"schedule": Schedule(1), "seed": 0, "options": CopyOptions()}
    even, uneven = np.arange(6) % 2, np.array([0, 0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match="3 places"):
        anneal_assignment(layer, uneven, even, 2, **keep)
    with pytest.raises(ValueError, match="out of range"):
        anneal_assignment(layer._replace(expert_ids=layer.expert_ids + 9), even, even, 2, **keep)
    with pytest.raises(ValueError, match="do not fit"):
        anneal_assignment(layer._replace(pin=np.zeros(3)), even, even, 2, **keep)


@pytest.mark.parametrize("coherent", [False, True])
def test_more_ranks_than_a_word_has_bits_and_nodes(coherent):
    trace = topic_trace(120, 2, 140, 4, seed=1)
    options = CopyOptions(rounds=1, node_weight=2.0, nodes=tuple(g // 10 for g in range(70)), coherent=coherent)
    plan = solve_copies(trace, 70, options=options)
    assert (plan.hosted.sum(axis=1) <= 2).all()
    assert (plan.hosted.sum(axis=2) == 1).all()


def test_large_layers_get_a_first_plan_early():
    """Every layer is better than the greedy's by the time a tenth of the work is done."""
    trace = topic_trace(600, 3, 32, 4, seed=2)
    seen = []

    def stop(share):
        seen.append(share)
        if share >= 0.1 - 1e-9:
            raise KeyboardInterrupt

    early = solve_copies(trace, 4, options=CopyOptions(rounds=40), progress=stop)
    whole = solve_copies(trace, 4, options=CopyOptions(rounds=40))
    greedy = solve_copies(trace, 4, options=CopyOptions(seconds=0.0))
    assert len(seen) == 3
    assert early.value < greedy.value

    def objective(plan):
        layers = zip(trace.expert_ids.transpose(1, 0, 2), plan.assignment, greedy.assignment)
        return sum(cost(Layer(i, None, Limits.of(i, base, 4, 1.0)), rows, CopyOptions()) for i, rows, base in layers)

    assert objective(whole) <= objective(early)
