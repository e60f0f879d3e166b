"""Does this model suit offloading: SRP and SCH of "Not All Models Suit Expert Offloading", and the cache knee.

SRP (segment routing best performance) asks how well a segment of m tokens is served by one fixed set of experts;
SCH (segment cache best hit rate) asks what an oracle cache with a look-ahead of m tokens would hit. Both are upper
bounds for what a policy can do, and both come from arXiv 2505.16056, section 3.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.stats.affinity import check_routes
from moe.placement.trace import RoutingTrace


class SegmentRouting(NamedTuple):
    """SRP of a group of experts: best F1 in [0, 1], the threshold it uses, and predicted / true activations."""

    f1: float
    threshold: int
    predicted_ratio: float


def segment_histogram(trace: RoutingTrace, m: int) -> NDArray[np.int64]:
    """How many windows of m tokens, at every position of every sequence, used an expert v times: [L, E, m + 1].

    Sequences shorter than m have no window; ValueError if none is long enough.
    """
    check_routes(trace)
    if m < 1:
        raise ValueError(f"segment length m ({m}) must be at least 1")
    histogram = np.zeros((trace.num_layers, trace.num_experts, m + 1), np.int64)
    flat = np.arange(trace.num_experts) * (m + 1)
    for chosen in _sequences(trace):
        if chosen.shape[0] < m:
            continue
        total = np.concatenate([np.zeros((1, *chosen.shape[1:]), np.int32), chosen.cumsum(axis=0, dtype=np.int32)])
        counts = total[m:] - total[:-m]  # [windows, L, E]
        for layer in range(trace.num_layers):
            cells = (counts[:, layer] + flat).reshape(-1)
            histogram[layer] += np.bincount(cells, minlength=flat.size * (m + 1)).reshape(-1, m + 1)
    if not histogram.any():
        raise ValueError(f"no sequence has {m} tokens (longest: {int(trace.sequence_lengths.max())}); use a smaller m")
    return histogram


def segment_routing_performance(histogram: NDArray[np.int64]) -> SegmentRouting:
    """SRP of the experts whose window counts are pooled: histogram [..., m + 1], the last axis is the count f.

    Maximises 2 sum_{f >= a} f / sum (m [f >= a] + f) over one threshold a for the whole group.
    """
    pooled = histogram.reshape(-1, histogram.shape[-1]).sum(axis=0).astype(np.float64)
    m = len(pooled) - 1
    uses = pooled * np.arange(m + 1)
    kept_uses, kept = uses[::-1].cumsum()[::-1], pooled[::-1].cumsum()[::-1]
    if uses.sum() == 0:
        return SegmentRouting(0.0, m, 0.0)
    f1 = 2 * kept_uses / (m * kept + uses.sum())
    best = int(f1[1:].argmax()) + 1
    return SegmentRouting(float(f1[best]), best, float(m * kept[best] / uses.sum()))


def cache_hit_rate(trace: RoutingTrace, slots: int, *, lookahead: int | None = None) -> NDArray[np.float64]:
    """Hit rate per layer of a cache of `slots` experts in every layer: [L].

    lookahead m: keep the experts used most in the next m tokens, ties by recency, whether a token has just used them
    or not (SCH as published; slots may be fewer than one token's experts); None: plain LRU, which holds a token's
    experts while it needs them. Every sequence starts with an empty cache. Raises ValueError for slots below 1, or
    below top-k without a lookahead.
    """
    check_routes(trace)
    least = trace.top_k if lookahead is None else 1
    if slots < least:
        reason = "one token needs them all at once" if least > 1 else "a cache holds one expert at least"
        raise ValueError(f"slots ({slots}) must be >= {least}; {reason}")
    slots = min(slots, trace.num_experts)
    hits = np.zeros(trace.num_layers)
    uses = np.zeros(trace.num_layers)
    tie = np.arange(trace.num_experts)
    for chosen in _sequences(trace):
        count = chosen.shape[0]
        total = np.concatenate([np.zeros((1, *chosen.shape[1:]), np.int64), chosen.cumsum(axis=0, dtype=np.int64)])
        cached = np.zeros(chosen.shape[1:], bool)
        last = np.full(chosen.shape[1:], -1, np.int64)
        for t in range(count):
            need = chosen[t]
            hits += (need & cached).sum(axis=1)
            uses += need.sum(axis=1)
            last[need] = t
            cached |= need
            future = 0 if lookahead is None else total[min(t + 1 + lookahead, count)] - total[t + 1]
            value = np.where(cached, (future * (count + 1) + last) * len(tie) + tie, -1)
            if lookahead is None:
                value[need] = np.iinfo(np.int64).max
            lowest = np.argpartition(value, -slots, axis=1)[:, :-slots]
            np.put_along_axis(cached, lowest, False, axis=1)
    return hits / np.maximum(uses, 1)


def knee(sizes: NDArray[np.int64], hit_rates: NDArray[np.float64]) -> int:
    """The cache size furthest above the chord between the smallest and the largest size."""
    x = (sizes - sizes[0]) / (sizes[-1] - sizes[0])
    y = (hit_rates - hit_rates[0]) / max(hit_rates[-1] - hit_rates[0], 1e-12)
    return int(sizes[int((y - x).argmax())])


def _sequences(trace: RoutingTrace) -> list[NDArray[np.bool_]]:
    """Which experts each token of each sequence chose: one bool [tokens, L, E] per sequence."""
    starts = trace.sequence_starts
    out = []
    for begin, end in pairwise(starts.tolist()):
        rows = np.zeros((end - begin, trace.num_layers, trace.num_experts + 1), bool)
        ids = trace.expert_ids[begin:end].astype(np.int64) % (trace.num_experts + 1)
        np.put_along_axis(rows, ids, True, axis=2)
        out.append(rows[:, :, :-1])
    return out
