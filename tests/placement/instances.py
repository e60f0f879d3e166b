"""Synthetic routing for tests and benchmarks: the topic-mixture and Zipf generators, traces, and brute force."""

import itertools

import numpy as np

from moe.placement.plan import Plan
from moe.placement.solve.program import Program
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes


def transitions(num_layers: int, num_experts: int, num_ranks: int, kind: str = "topic", seed: int = 0) -> np.ndarray:
    """Transition masses [L - 1, E, E] of total 1.

    topic: tokens keep one of 1.5 G unequal latent topics from layer to layer, each topic with its own Zipf-shaped
    choice of experts. zipf: every expert leads to its own Zipf-shaped choice, without further structure. The random
    draws come in the order of the project's first experiments, so figures compare.
    """
    rng = np.random.default_rng(seed)

    def zipf(n: int, s: float) -> np.ndarray:
        weights = 1 / np.arange(1, n + 1) ** s
        return weights / weights.sum()

    out = []
    if kind == "topic":
        topics = max(2, int(1.5 * num_ranks))
        popularity = zipf(topics, 0.5)
        emit = []
        for _ in range(num_layers):
            rows = np.stack([rng.permutation(zipf(num_experts, 1.1)) for _ in range(topics)])
            rows = 0.85 * rows + 0.15 * rng.permutation(zipf(num_experts, 0.6))[None]
            emit.append(rows / rows.sum(axis=1, keepdims=True))
        stay = 0.8 * np.eye(topics) + 0.2 * np.tile(popularity, (topics, 1))
        out = [emit[n].T @ np.diag(popularity) @ stay @ emit[n + 1] for n in range(num_layers - 1)]
    elif kind == "zipf":
        share = rng.permutation(zipf(num_experts, 0.7))
        for _ in range(num_layers - 1):
            rows = np.stack([rng.permutation(zipf(num_experts, 1.2)) for _ in range(num_experts)]) * 0.8
            rows += 0.2 * rng.permutation(zipf(num_experts, 0.7))[None]
            out.append(share[:, None] * rows / rows.sum(axis=1, keepdims=True))
            share = out[-1].sum(axis=0)
    else:
        raise ValueError(f"kind is {kind!r}; use 'topic' or 'zipf'")
    return np.stack(out) / np.stack(out).sum()


def topic_trace(num_tokens=600, num_layers=4, num_experts=16, top_k=4, num_topics=4, seed=0, length=20) -> RoutingTrace:
    """Sequences that keep a topic; in every layer a topic prefers its own experts. Gate weights sum to less than 1."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(0, 2.0, (num_topics, num_layers, num_experts)) + rng.normal(0, 1.0, (1, num_layers, num_experts))
    count = -(-num_tokens // length)
    topic = np.repeat(rng.integers(0, num_topics, count), length)[:num_tokens]
    logits = taste[topic] + rng.gumbel(0, 1.0, (num_tokens, num_layers, num_experts))
    ids = np.argsort(-logits, axis=2)[:, :, :top_k]
    gates = np.exp(logits - logits.max(axis=2, keepdims=True))
    gates /= gates.sum(axis=2, keepdims=True)
    lengths = np.full(count, length)
    lengths[-1] = num_tokens - length * (count - 1)
    return RoutingTrace(
        expert_ids=ids.astype(np.int16),
        sequence_lengths=lengths.astype(np.int32),
        num_experts=num_experts,
        model="synthetic",
        weights=np.take_along_axis(gates, ids, axis=2).astype(np.float32),
        sizes=ModelSizes(hidden_size=5, dtype="float16", expert_bytes=1000),
    )


def layer_assignments(capacities: np.ndarray) -> list[tuple[int, ...]]:
    """Every labelled way to fill one layer."""
    return sorted(set(itertools.permutations(np.repeat(np.arange(len(capacities)), capacities).tolist())))


def brute_force(program: Program) -> float:
    """Least cost over every assignment; the slow twin of every solver."""
    states = [np.array(s) for s in layer_assignments(program.capacities)]
    best = np.inf
    for combination in itertools.product(states, repeat=program.num_layers):
        best = min(best, program.cost(Plan.from_assignment(np.stack(combination), program.num_ranks)))
    return best


def random_hosted(rng: np.random.Generator, layers=2, experts=8, ranks=4, share=0.15) -> np.ndarray:
    hosted = rng.random((layers, experts, ranks)) < share
    hosted[np.arange(layers)[:, None], np.arange(experts), rng.integers(0, ranks, (layers, experts))] = True
    return hosted
