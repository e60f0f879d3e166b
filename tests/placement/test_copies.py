"""Token copies: exact swap tables, valid replicas, choices and bounds against loops and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import (
    add_replicas,
    busiest_load,
    fill_up,
    greedy_cover,
    k_hot,
    ranks_touched,
    solve_copies,
    visited,
)
from moe.placement.solve.copies_bound import copies_bound, layer_bound, tangents
from moe.placement.solve.swaps import CopyOptions, LayerSearch, Touched, swap_changes
from moe.placement.stats.affinity import expert_load
from moe.placement.trace import RoutingTrace
from tests.placement.instances import layer_assignments, topic_trace


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_every_swap_changes_what_the_tables_say(seed, pinned, with_nodes):
    rng = np.random.default_rng(seed)
    hits = (rng.random((30, 6)) < 0.4).astype(np.float32)
    pins = (rng.random((30, 4)) < 0.2).astype(np.float32) if pinned else None
    options = CopyOptions(node_weight=2.0, nodes=(0, 0, 1, 1)) if with_nodes else CopyOptions()
    search = LayerSearch(Touched(hits, pins), hits.sum(axis=0).astype(float), 15.0, 4, options)
    ranks = rng.integers(0, 4, 6)
    table = swap_changes(hits, search.counts(ranks), ranks)
    overload = search.overload_changes(ranks)
    for e, f in itertools.combinations(range(6), 2):
        if ranks[e] == ranks[f]:
            continue
        other = ranks.copy()
        other[e], other[f] = other[f], other[e]
        visits = [(search.counts(r) > 0).sum() for r in (ranks, other)]
        assert table[e, f] == visits[1] - visits[0]
        over = [np.maximum(np.bincount(r, weights=search.load, minlength=4) - 15.0, 0).sum() for r in (ranks, other)]
        assert overload[e, f] == pytest.approx(over[1] - over[0])
    better = search.descend(ranks.copy())
    assert search.cost(better) <= search.cost(ranks)
    for e, f in itertools.combinations(range(6), 2):
        other = better.copy()
        other[e], other[f] = other[f], other[e]
        assert search.cost(other) >= search.cost(better) - 1e-2


def test_solver_touches_fewer_ranks_at_no_more_load_than_the_greedy():
    fit, held = topic_trace(1500, 3, 16, 4, seed=2).split(0.6)
    load = expert_load(fit)
    greedy, ours = eplb_greedy(load, 4), solve_copies(fit, 4, options=CopyOptions(rounds=15))
    assert ranks_touched(held, ours.hosted).mean() < 0.91 * ranks_touched(held, greedy.hosted).mean()
    assert (busiest_load(ours.hosted, load) <= busiest_load(greedy.hosted, load) * 1.001).all()
    assert ours.value == pytest.approx(ranks_touched(fit, ours.hosted).mean())
    replicated = solve_copies(fit, 4, slots_per_rank=5, options=CopyOptions(rounds=15))
    assert (replicated.hosted.sum(axis=1) <= 5).all()
    assert ranks_touched(fit, replicated.hosted).mean() < ours.value
    coherent = solve_copies(fit, 4, options=CopyOptions(rounds=15, coherent=True))
    assert (coherent.hosted.sum(axis=1) == 4).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(0, 3))
def test_replicas_are_added_validly(seed, ranks, spare):
    rng = np.random.default_rng(seed)
    hits = (rng.random((40, 7)) < 0.4).astype(np.float32)
    hosted = np.arange(7)[:, None] % ranks == np.arange(ranks)
    slots = -(-7 // ranks) + spare
    full = add_replicas(hits, hosted, hits.sum(axis=0).astype(float), slots, 20.0)
    assert (full >= hosted).all()
    assert full.sum() == min(ranks * slots, 7 * ranks)
    assert (full.sum(axis=0) <= slots).all()
    used = greedy_cover(hits, full)
    assert ((hits @ full.astype(np.float32) > 0) >= used).all()  # no rank without an expert of the token
    served = (used.astype(np.float32) @ full.T.astype(np.float32)) > 0
    assert (served >= (hits > 0)).all()
    assert used.sum() <= greedy_cover(hits, hosted).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 63]), st.integers(1, 8))
def test_ranks_are_counted_from_bits_as_by_the_cover(seed, tokens, ranks):
    rng = np.random.default_rng(seed)
    hosted = rng.random((12, ranks)) < 0.3
    hosted[np.arange(12), rng.integers(0, ranks, 12)] = True
    ids = np.argsort(rng.random((tokens, 12)), axis=1)[:, :5].astype(np.int16)
    ids[rng.random(ids.shape) < 0.1] = -1
    masks = (hosted * (np.uint64(1) << np.arange(ranks, dtype=np.uint64))).sum(axis=1, dtype=np.uint64)
    assert (visited(ids, masks) == greedy_cover(k_hot(ids, 12), hosted).sum(axis=1)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 4))
def test_choice_of_replicas(seed, tokens, ranks):
    rng = np.random.default_rng(seed)
    hosted = rng.random((1, 8, ranks)) < 0.5
    hosted[0, np.arange(8), rng.integers(0, ranks, 8)] = True
    plan = Plan.from_hosted(hosted)
    ids = np.argsort(rng.random((tokens, 8)), axis=1)[:, :3].astype(np.int16)
    ids[rng.random(ids.shape) < 0.2] = -1
    home = rng.integers(0, ranks, tokens)
    chosen = choose_replicas(ids, home, ServingTable.of(plan, 0))
    assert chosen.shape == ids.shape
    assert ((chosen < 0) == (ids < 0)).all()
    np.testing.assert_array_equal(plan.phy2log[0][chosen[ids >= 0]], ids[ids >= 0])
    rank = np.where(chosen >= 0, chosen // plan.physical_per_rank, -1)
    for t in range(tokens):
        served = [(hosted[0, e], r) for e, r in zip(ids[t], rank[t]) if e >= 0]
        visited = {int(home[t])} | {int(row.argmax()) for row, _ in served if row.sum() == 1}
        covered = [r for row, r in served if visited & set(np.flatnonzero(row))]
        assert set(covered) <= visited | {r for row, r in served if not visited & set(np.flatnonzero(row))}
        assert len({r for _, r in served} | visited) <= len(visited) + len(served) - len(covered)


def test_free_tokens_go_to_the_idlest_copy():
    plan = Plan.from_hosted(np.array([[[True, True, False], [True, False, False], [False, False, True]]]))
    ids = np.array([[1]] * 4 + [[0]] * 10)
    # Nobody lives on ranks 0 and 1; rank 0 already has four.
    chosen = choose_replicas(ids, 2, ServingTable.of(plan, 0))
    assert np.bincount(chosen[:, 0] // plan.physical_per_rank, minlength=3).tolist() == [7, 7, 0]


def test_a_visited_rank_is_as_free_as_home():
    plan = Plan.from_hosted(np.array([[[True, True], [True, False], [False, True]]]))
    ids = np.array([[0, 1, 2]] * 3 + [[1, -1, -1]] * 4)  # rank 0 serves expert 1 of all: expert 0 goes to rank 1
    table = ServingTable.of(plan, 0)
    rank = choose_replicas(ids, 0, table) // plan.physical_per_rank
    assert rank[:3, 0].tolist() == [1, 1, 1]
    assert choose_replicas(np.array([[0, -1, -1]]), 0, table)[0, 0] // plan.physical_per_rank == 0  # no new visit


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 50))
def test_fill_up_levels_the_bins(load, count):
    load = np.array(load)
    share = fill_up(load, count)
    assert share.sum() == count
    assert (share >= 0).all()
    one_by_one = load.copy()
    for _ in range(count):
        one_by_one[one_by_one.argmin()] += 1
    assert sorted(load + share) == sorted(one_by_one)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_copies_bound_is_below_brute_force(seed):
    rng = np.random.default_rng(seed)
    hits = (rng.random((25, 6)) < 0.5).astype(float)
    best = min(
        (hits @ np.eye(ranks)[np.array(s)] > 0).sum(axis=1).mean()
        for ranks in (2,)
        for s in layer_assignments(np.array([3, 3]))
    )
    assert layer_bound(hits, 2, 0.1) <= best + 1e-9
    owner = rng.permutation(np.repeat([0, 1], 3))
    shared = (owner[:, None] == owner[None]).astype(float)
    np.fill_diagonal(shared, 0)
    constant, weight = tangents(hits, rng.random() * shared)
    exact = (hits @ np.eye(2)[owner] > 0).sum()
    assert constant - (weight * shared).sum() / 2 <= exact + 1e-9
    constant, weight = tangents(hits, shared)  # tight where it touches
    assert constant - (weight * shared).sum() / 2 == pytest.approx(exact)


def test_k_hot_ignores_absent_experts():
    rows = k_hot(np.array([[0, 2], [-1, 1], [-1, -1]], np.int16), 3)
    np.testing.assert_array_equal(rows, [[1, 0, 1], [0, 1, 0], [0, 0, 0]])


def test_rounds_make_the_search_reproducible():
    trace = topic_trace(300, 2, 12, 3)
    for slots in (None, 4):
        options = CopyOptions(rounds=3, seed=5)
        one, two = (solve_copies(trace, 4, slots_per_rank=slots, options=options) for _ in range(2))
        np.testing.assert_array_equal(one.phy2log, two.phy2log)


@pytest.mark.heavy
def test_recorded_routing_meets_the_target_without_replicas(shared_data):
    """A fifth fewer rank visits than the greedy on held-out tokens of six layers, load within 2 % of its load."""
    trace = from_deepseek_esft_npz(shared_data / "traces" / "deepseek_v2_lite_intent.npz")
    few = {"expert_ids": trace.expert_ids[:, ::5], "weights": None}
    fit, held = RoutingTrace(**{name: getattr(trace, name) for name in trace.__slots__} | few).split(0.6)
    for ranks in (4, 8):
        greedy = eplb_greedy(expert_load(fit), ranks)
        ours = solve_copies(fit, ranks, options=CopyOptions(rounds=30))
        assert ranks_touched(held, ours.hosted).mean() < 0.8 * ranks_touched(held, greedy.hosted).mean()
        loads = [busiest_load(p.hosted, expert_load(held)).sum() for p in (ours, greedy)]
        assert loads[0] <= 1.02 * loads[1]
        assert copies_bound(fit, ranks, seconds=5, hint=ours.hosted).mean() <= ours.value


def test_rounds_make_a_plan_repeatable_and_a_limit_is_kept():
    trace = topic_trace(400, 3, 16, 3, seed=2)
    plans = [solve_copies(trace, 4, options=CopyOptions(rounds=5, seed=3)) for _ in range(2)]
    assert (plans[0].phy2log == plans[1].phy2log).all()
    stopped = solve_copies(trace, 4, options=CopyOptions(seconds=0.0))
    assert (stopped.phy2log == eplb_greedy(expert_load(trace), 4).phy2log).all()


@pytest.mark.parametrize("slots", [None, 5])
def test_an_interrupt_leaves_the_best_plan_so_far(slots):
    trace = topic_trace(400, 4, 16, 3, seed=2)

    def stop(share):
        if share >= 0.5:
            raise KeyboardInterrupt

    def stop_early(_):
        raise KeyboardInterrupt

    plan = solve_copies(trace, 4, slots_per_rank=slots, options=CopyOptions(rounds=2), progress=stop)
    greedy = eplb_greedy(expert_load(trace), 4, slots)
    whole = solve_copies(trace, 4, slots_per_rank=slots, options=CopyOptions(rounds=2))
    assert (plan.hosted[:2] == whole.hosted[:2]).all()
    few = solve_copies(trace, 4, slots_per_rank=slots, options=CopyOptions(rounds=2), progress=stop_early)
    assert (few.hosted[1:] == greedy.hosted[1:]).all()  # interrupted in the first layer
    assert (plan.hosted != greedy.hosted).any(axis=(1, 2)).all()  # a short search comes to every layer first
