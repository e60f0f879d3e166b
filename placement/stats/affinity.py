"""Routing statistics: load, transitions between layers, and how they drift.

Everything the integer program needs from a trace, as dense float64 arrays. Counting is done by matrix products of
K-hot token rows, in chunks of tokens, so a million tokens cost seconds and no more than a chunk's memory.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe.placement.trace import RoutingTrace

Floats = NDArray[np.float64]
Pairs = Literal["all", "home", "home_to_all"]
CHUNK = 8192  # tokens per product: [8192, 256] floats are 8 MiB per layer


def expert_load(trace: RoutingTrace) -> Floats:
    """How many tokens chose each expert: [L, E]. Raises ValueError if empty."""
    check_routes(trace)
    load = np.zeros((trace.num_layers, trace.num_experts))
    for layer, row in enumerate(load):
        ids = trace.expert_ids[:, layer].ravel()
        row += np.bincount(ids[ids >= 0], minlength=trace.num_experts)
    return load


def transition_counts(trace: RoutingTrace, *, pairs: Pairs = "all") -> Floats:
    """Co-occurrence of an expert in layer l and one in layer l + 1 for the same token: [L - 1, E, E].

    pairs: "all" K x K pairs; "home" the heaviest expert to the heaviest (what ExFlow's top-1 logs hold);
    "home_to_all" the heaviest to all K, which is what coherent decode pays for.
    Raises ValueError for an empty trace or a layer without any routing.
    """
    check_routes(trace)
    counts = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts))
    homes = heaviest_experts(trace) if pairs != "all" else None
    for start, rows in zip(range(0, trace.num_tokens, CHUNK), _chunks(trace), strict=True):
        sources = targets = rows
        if homes is not None:
            home = _one_hot(homes[start : start + CHUNK], trace.num_experts)
            sources, targets = home, (home if pairs == "home" else rows)
        for layer in range(trace.num_layers - 1):
            counts[layer] += sources[layer].T @ targets[layer + 1]
    return counts


def heaviest_experts(trace: RoutingTrace) -> NDArray[np.int64]:
    """The expert with the greatest gate weight per token and layer, the first listed if unweighted: [N, L], -1 none."""
    if trace.weights is None:
        return trace.expert_ids[:, :, 0].astype(np.int64)
    weights = np.where(trace.expert_ids >= 0, trace.weights.astype(np.float32), -np.inf)
    chosen = np.take_along_axis(trace.expert_ids, weights.argmax(axis=2)[:, :, None], axis=2)
    return chosen[:, :, 0].astype(np.int64)


def usage_entropy(load: NDArray[Any]) -> Floats:
    """Entropy of the load over experts divided by log E, per layer: 1 = even, 0 = one expert. [L]"""
    share = load / load.sum(axis=-1, keepdims=True)
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    return np.asarray(-(share * logs).sum(axis=-1) / np.log(load.shape[-1]))


def total_variation(load: NDArray[Any], other: NDArray[Any]) -> Floats:
    """Total-variation distance of two loads, per layer: 0 = same shares, 1 = disjoint experts. [L]"""
    if load.shape != other.shape:
        raise ValueError(f"loads of shapes {load.shape} and {other.shape} cannot be compared; use one model")
    share, other_share = load / load.sum(axis=-1, keepdims=True), other / other.sum(axis=-1, keepdims=True)
    return np.asarray(0.5 * np.abs(share - other_share).sum(axis=-1))


def transition_predictability(transitions: Floats) -> Floats:
    """Mutual information of the expert at l and at l + 1 over the entropy of the latter: [L - 1], 0 = no affinity."""
    joint = transitions / transitions.sum(axis=(1, 2), keepdims=True)
    left, right = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
    ratio = np.divide(joint, left * right, where=joint > 0, out=np.ones_like(joint))
    information = (joint * np.log(ratio)).sum(axis=(1, 2))
    entropy = -(right * np.log(right, where=right > 0, out=np.zeros_like(right))).sum(axis=(1, 2))
    return np.asarray(information / np.maximum(entropy, 1e-300))


def check_routes(trace: RoutingTrace) -> None:
    """Raise ValueError for a trace that has no token, or a layer in which no token chose an expert."""
    if trace.num_tokens == 0:
        raise ValueError("the trace is empty; record at least one token before asking for its statistics")
    silent = np.flatnonzero(~(trace.expert_ids >= 0).any(axis=(0, 2)))
    if silent.size:
        raise ValueError(
            f"layer(s) {silent.tolist()} of {trace.num_layers} never route; leave dense layers out of the trace"
        )


def _chunks(trace: RoutingTrace) -> Iterator[Floats]:
    """K-hot token rows, layer by layer: [L, chunk, E]."""
    for start in range(0, trace.num_tokens, CHUNK):
        ids = trace.expert_ids[start : start + CHUNK].transpose(1, 0, 2)
        rows = np.zeros((*ids.shape[:2], trace.num_experts + 1))  # the last column collects -1
        np.put_along_axis(rows, ids.astype(np.int64) % (trace.num_experts + 1), 1.0, axis=2)
        yield rows[:, :, :-1]


def _one_hot(ids: NDArray[np.int64], num_experts: int) -> Floats:
    """[T, L] expert ids to [L, T, E] rows; -1 is an empty row."""
    rows = np.zeros((ids.shape[1], ids.shape[0], num_experts + 1))
    np.put_along_axis(rows, (ids.T % (num_experts + 1))[:, :, None], 1.0, axis=2)
    return rows[:, :, :-1]
