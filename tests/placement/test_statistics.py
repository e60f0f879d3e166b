"""Statistics against loops over tokens, and SRP and SCH against their definitions."""

import itertools

import numpy as np
import pytest

from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.stats.affinity import (
    expert_load,
    heaviest_experts,
    total_variation,
    transition_counts,
    transition_predictability,
    usage_entropy,
)
from moe.placement.stats.locality import cache_hit_rate, knee, segment_histogram
from moe.placement.stats.locality import segment_routing_performance as srp
from moe.placement.trace import RoutingTrace
from tests.placement.instances import topic_trace


def with_holes(trace: RoutingTrace) -> RoutingTrace:
    ids = trace.expert_ids.copy()
    ids[::3, 0, 1] = -1
    ids[5] = -1
    return RoutingTrace(
        expert_ids=ids,
        sequence_lengths=trace.sequence_lengths,
        num_experts=trace.num_experts,
        model=trace.model,
        weights=trace.weights,
    )


def test_counts_equal_a_loop_over_tokens():
    trace = with_holes(topic_trace(60, 3, 8, 3, seed=1))
    load, pairs, homes, dispatched = np.zeros((3, 8)), np.zeros((2, 8, 8)), np.zeros((2, 8, 8)), np.zeros((2, 8, 8))
    heavy = heaviest_experts(trace)
    for t, layer in itertools.product(range(60), range(3)):
        chosen = [(int(e), float(g)) for e, g in zip(trace.expert_ids[t, layer], trace.weights[t, layer]) if e >= 0]
        if chosen:
            assert heavy[t, layer] == max(chosen, key=lambda pair: pair[1])[0]
        for e, _ in chosen:
            load[layer, e] += 1
        if layer == 2:
            continue
        after = [int(e) for e in trace.expert_ids[t, layer + 1] if e >= 0]
        for (e, _), f in itertools.product(chosen, after):
            pairs[layer, e, f] += 1
        if chosen and after:
            homes[layer, heavy[t, layer], heavy[t, layer + 1]] += 1
            for f in after:
                dispatched[layer, heavy[t, layer], f] += 1
    np.testing.assert_allclose(expert_load(trace), load)
    np.testing.assert_allclose(transition_counts(trace), pairs)
    np.testing.assert_allclose(transition_counts(trace, pairs="home_to_all"), dispatched)
    np.testing.assert_allclose(transition_counts(trace, pairs="home"), homes)


def test_chunks_do_not_change_counts(monkeypatch):
    trace = topic_trace(50, 3, 8, 2)
    whole = [transition_counts(trace, pairs=p) for p in ("all", "home", "home_to_all")]
    monkeypatch.setattr("moe.placement.stats.affinity.CHUNK", 7)
    for before, p in zip(whole, ("all", "home", "home_to_all")):
        np.testing.assert_array_equal(transition_counts(trace, pairs=p), before)


def test_empty_and_silent_traces_are_refused():
    trace = topic_trace(40, 3, 8, 2)
    with pytest.raises(ValueError, match="empty"):
        expert_load(trace.select([]))
    ids = trace.expert_ids.copy()
    ids[:, 1] = -1
    silent = RoutingTrace(expert_ids=ids, sequence_lengths=trace.sequence_lengths, num_experts=8, model="m")
    with pytest.raises(ValueError, match=r"layer\(s\) \[1\] of 3 never route"):
        transition_counts(silent)


def test_entropy_distance_and_predictability_have_their_extremes():
    even, one = np.ones((2, 8)), np.eye(8)[:2]
    np.testing.assert_allclose(usage_entropy(even), 1)
    np.testing.assert_allclose(usage_entropy(one), 0)
    np.testing.assert_allclose(total_variation(even, 3 * even), 0)
    np.testing.assert_allclose(total_variation(one, one[::-1]), 1)
    np.testing.assert_allclose(transition_predictability(np.eye(8)[None]), 1)
    np.testing.assert_allclose(transition_predictability(np.ones((1, 8, 8))), 0, atol=1e-12)
    with pytest.raises(ValueError, match="cannot be compared"):
        total_variation(even, np.ones((2, 4)))


def test_srp_is_the_best_f1_over_constant_predictions():
    trace = topic_trace(40, 2, 6, 2, seed=3, length=13)
    m = 5
    histogram = segment_histogram(trace, m)
    starts = trace.sequence_starts
    windows = [t for b, e in itertools.pairwise(starts) for t in range(b, e - m + 1)]
    counts = np.array([[(trace.expert_ids[t : t + m, 0] == e).sum() for e in range(6)] for t in windows])
    np.testing.assert_array_equal(histogram[0], [np.bincount(c, minlength=m + 1) for c in counts.T])
    # any segment-constant predictor: choose per (window, expert) to predict "active in all m tokens" or not
    masks = [counts >= a for a in range(1, m + 1)]
    best = max(2 * counts[mask].sum() / (m * mask.sum() + counts.sum()) for mask in masks)
    found = srp(histogram[0])
    assert found.f1 == pytest.approx(best)
    assert found.predicted_ratio == pytest.approx(m * (counts >= found.threshold).sum() / counts.sum())
    rng = np.random.default_rng(0)
    for _ in range(200):  # no predictor beats the threshold rule
        chosen = rng.random(counts.shape) < rng.random()
        assert 2 * counts[chosen].sum() / (m * chosen.sum() + counts.sum()) <= best + 1e-12
    with pytest.raises(ValueError, match="longest: 13"):
        segment_histogram(trace, 14)


@pytest.mark.parametrize("lookahead", [None, 3, 1000])
def test_cache_equals_a_plain_simulation(lookahead):
    trace = topic_trace(60, 2, 8, 2, seed=5, length=15)
    rates = cache_hit_rate(trace, 3, lookahead=lookahead)
    starts = trace.sequence_starts
    for layer in range(2):
        hits = 0
        for begin, end in itertools.pairwise(starts):
            cached, last = set(), {}
            for t in range(begin, end):
                need = set(trace.expert_ids[t, layer].tolist())
                hits += len(need & cached)
                cached |= need
                last |= dict.fromkeys(need, t)
                ahead = trace.expert_ids[t + 1 : min(t + 1 + (lookahead or 0), end), layer].reshape(-1).tolist()
                while len(cached) > 3:
                    droppable = cached - need if lookahead is None else cached  # SCH drops what was just used too
                    cached.remove(min(droppable, key=lambda e: (ahead.count(e), last[e], e)))
        assert rates[layer] == pytest.approx(hits / (60 * 2))
    assert (cache_hit_rate(trace, 8) >= rates).all()
    with pytest.raises(ValueError, match=r"slots \(1\) must be >= 2"):
        cache_hit_rate(trace, 1)
    assert (cache_hit_rate(trace, 1, lookahead=3) < rates).all()


def test_knee_is_where_the_curve_bends():
    assert knee(np.array([1, 2, 3, 4, 5]), np.array([0.0, 0.7, 0.8, 0.9, 1.0])) == 2


@pytest.mark.heavy
def test_recorded_locality_is_near_the_published_figures(shared_data):
    """DeepSeek-V2-Lite: SRP(16) 37.9 and SCH(16, 0.5 / 1 / 2 / 3) 0.229 / 0.377 / 0.581 / 0.716 over eleven domains."""
    found = []
    for domain in ("intent", "summary", "translation"):
        trace = from_deepseek_esft_npz(shared_data / "traces" / f"deepseek_v2_lite_{domain}.npz")
        found.append((srp(segment_histogram(trace, 16)).f1, cache_hit_rate(trace, 12, lookahead=16).mean()))
    f1, hits = np.array(found).T
    assert 0.36 < f1.min() < 0.42
    assert 0.55 < hits.min() < hits.max() < 0.68
    trace = from_deepseek_esft_npz(shared_data / "traces" / "deepseek_v2_lite_summary.npz")
    curve = [cache_hit_rate(trace, slots, lookahead=16).mean() for slots in (3, 6, 12, 18)]  # times a top-k of 6
    np.testing.assert_allclose(curve, [0.229, 0.377, 0.581, 0.716], atol=0.01)
