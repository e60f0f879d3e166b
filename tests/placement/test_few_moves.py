"""Few moves near a plan: what a layer costs, with misses of fast memory, and that no search makes it worse."""

from dataclasses import replace

import numpy as np
import pytest

from moe.placement.helper import load_helper
from moe.placement.plan import Plan
from moe.placement.solve.few_moves import LayerWindow, _after_swaps, _Layer, _misses_after, few_moves, smooth_max
from moe.placement.topology import Topology
from moe.placement.turn import Machine, Window, predict
from moe.placement.wire_format import WireFormat
from tests.placement.windows import EXPERTS, LAYERS, MACHINE, RANKS, SIZES, TOP_K, replicated, routing


@pytest.mark.parametrize("present", [Plan.contiguous(LAYERS, EXPERTS, RANKS), replicated()], ids=["plain", "replicas"])
@pytest.mark.parametrize("most", [0, 1, 5, 100])
def test_few_moves_keep_counts_and_never_cost_more(present, most):
    window = routing(300, 2, seed=most)
    layers = window.layers(MACHINE.rates(TOP_K))
    hosted = few_moves(layers, present.hosted, most)
    assert (hosted & ~present.hosted).sum() <= most
    assert (hosted.sum(axis=1) == present.hosted.sum(axis=1)).all()
    assert hosted.any(axis=2).all()
    for layer, old, new in zip(layers, present.hosted, hosted, strict=True):
        costs = [layer.cost(layer.served(h), RANKS).seconds for h in (old, new)]
        assert costs[1] <= costs[0]
    if most == 100:
        assert window.imbalance(Plan.from_hosted(hosted), MACHINE.rates(TOP_K)) < 1.1


def test_what_a_layer_costs_is_what_the_serving_rule_serves():
    """Against pairs counted one by one, with a token that has no expert."""
    ids = np.array([[0, 5, -1], [4, 5, 6], [15, 1, 2], [-1, -1, -1]], np.int16)
    home = np.array([0, 1, 2, 3])
    layer = LayerWindow(ids, home, MACHINE.rates(TOP_K))
    plan = Plan.contiguous(1, EXPERTS, RANKS)
    cost = layer.cost(layer.served(plan.hosted[0]), RANKS)
    rows, results = 1 + 0 + 2, 1 + 0 + 3  # to rank 1; none; to ranks 3 and 0
    rates = MACHINE.rates(TOP_K)
    assert cost.num_bytes == rows * rates.row + results * rates.result
    assert cost.imbalance == 4 / (8 / RANKS)  # rank 1 serves 5, 4, 5, 6


@pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
@pytest.mark.parametrize("combine", ["exact", "partial"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 63, 65, 200])
def test_the_compiled_swaps_are_those_of_the_tables(tokens, copies, combine):
    """Of every size the least cost is the same; of one copy each it is what serving the tokens costs."""
    window = routing(tokens, 2, seed=tokens)
    window.ids[::7, :, 1] = -1
    rates = replace(MACHINE, wire=WireFormat(combine=combine)).rates(TOP_K)
    present = replicated() if copies else Plan.contiguous(LAYERS, EXPERTS, RANKS)
    for one, first in zip(window.layers(rates), present.hosted, strict=True):
        layer = _Layer(one, first)
        a, b = (7, 13) if copies else (0, 5)  # one swap is made, so that others may undo it
        hosted = first.copy()
        hosted[[a, b]] = first[[b, a]]
        served = one.served(hosted)
        layer.take(hosted, served, one.cost(served, RANKS))
        expert, rank = np.nonzero(hosted)
        number = np.full((EXPERTS + 1, RANKS + 1), -1)
        number[expert, rank] = np.arange(len(expert))
        copy = number[one.ids, served]
        found, slow = layer.compiled_swaps(copy, expert, rank), layer.table_swaps(copy, expert, rank)
        assert [swap.size for swap in found] == [swap.size for swap in slow] == [0, 1, 2]
        np.testing.assert_allclose([s.cost for s in found], [s.cost for s in slow], rtol=1e-9, atol=1e-15)
        for i, j, size, cost in [] if copies else found:
            after = hosted.copy()
            after[[expert[i], expert[j]]] = hosted[[expert[j], expert[i]]]
            assert max((after & ~first).sum() - (hosted & ~first).sum(), 0) == size
            served_then = one.cost(one.served(after), RANKS)
            before = layer.now.num_bytes * rates.byte / RANKS
            assert served_then.seconds - before == pytest.approx(cost, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_every_swap_is_costed_with_the_misses_that_it_makes(slots):
    """The table of all swaps against placements that are costed one by one."""
    rng = np.random.default_rng(slots)
    rank, uses = rng.permutation(np.arange(14) % RANKS), rng.integers(0, 9, 14)
    missed, _, here = _misses_after(uses, rank, RANKS, slots)

    def slow(ranks: np.ndarray) -> np.ndarray:
        return np.array([np.sort(uses[ranks == g])[::-1][slots:].sum() for g in range(RANKS)])

    assert (missed == slow(rank)).all()
    norm = _after_swaps(missed, rank, here)
    for i, j in zip(*np.nonzero(rank[:, None] != rank), strict=True):
        after = rank.copy()
        after[[i, j]] = rank[[j, i]]
        assert slow(after)[rank[i]] == here[i, j]
        assert norm[i, j] == pytest.approx(float(smooth_max(slow(after))))


def test_moves_that_only_save_misses_are_found_and_the_simulator_agrees():
    """Ranks serve the same number of pairs, but those of rank 0 go to six experts and those of rank 1 to two."""
    tokens = np.arange(960)
    ids = np.where(tokens % 2, 8 + tokens // 2 % 2, tokens // 2 % 6)[:, None, None].astype(np.int16)
    window = Window(ids, tokens // 12 % 2)  # as many at home as away, wherever experts are
    present = Plan.contiguous(1, EXPERTS, 2)
    topology = Topology.uniform(1, 2)
    few = Machine(sizes=replace(SIZES, expert_bytes=10**6), wire=WireFormat(), topology=topology, fast_slots=2)
    hosted = few_moves(window.layers(few.rates(1, 1)), present.hosted, 8)
    before, after = (predict(window, plan, few) for plan in (present, Plan.from_hosted(hosted)))
    assert before.imbalance == 1.0
    assert after.seconds < before.seconds
    rich = replace(few, fast_slots=None).rates(1, 1)
    assert (few_moves(window.layers(rich), present.hosted, 8) == present.hosted).all(), "nothing else is to be gained"
