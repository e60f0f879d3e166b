"""How even ranks are in pieces of the traffic, by second moments.

A plan is fitted on some traffic and serves other. What keeps its load there is that ranks are even not only over all of
the fitted tokens but in pieces of them: the second moment of what a rank serves in a piece, summed over the pieces, has
a price. It is a sum over every two experts of the rank of how hot both are in the same pieces, so that a plan with few
visits, which puts experts of one subject together, pays for it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.solve.program import Floats

PIECE = 128  # consecutive tokens, about, in which ranks should be even


def moments_of(expert_ids: NDArray[np.integer[Any]], num_experts: int, num_ranks: int) -> Floats:
    """What every two experts add to the second moment of a rank that has both: [E, E], symmetric, in pairs of a piece's
    mean load squared over that load.

    expert_ids: [N, K], -1 = none.
    """
    counts, mean = _pieces(expert_ids, num_experts, num_ranks)
    return np.asarray(counts.T @ (counts / mean))


def expected_moments_of(expert_ids: NDArray[np.integer[Any]], num_experts: int, num_ranks: int) -> Floats:
    """`moments_of` as other traffic of the kind will have them, by what is known of so many tokens.

    Two experts that are hot together in these pieces need not be so in others: of what they have above what their own
    loads say, the share is kept that the two halves of the tokens agree on (their correlation over all pairs of
    experts, for twice the tokens by Spearman's and Brown's formula). Of few tokens that is little.
    """
    counts, mean = _pieces(expert_ids, num_experts, num_ranks)
    apart = ~np.eye(num_experts, dtype=bool)
    middle = len(counts) // 2
    halves = [_excess(counts[half], mean[half])[apart] for half in (slice(0, middle), slice(middle, None))]
    spread = float(np.prod([half.std() for half in halves]))
    agreed = float(np.mean(np.prod([half - half.mean() for half in halves], axis=0))) / spread if spread > 0 else 0.0
    kept = 2 * max(agreed, 0.0) / (1 + max(agreed, 0.0))
    return np.asarray(counts.T @ (counts / mean) - (1 - kept) * apart * _excess(counts, mean))


def moments_of_ranks(moments: Floats, hosted: NDArray[np.bool_]) -> Floats:
    """Of each rank, [G], where every copy of an expert has the same share of it. hosted: [E, G]."""
    share = hosted / hosted.sum(axis=1, keepdims=True)
    return np.asarray((share * (moments @ share)).sum(axis=0))


def _pieces(expert_ids: NDArray[np.integer[Any]], num_experts: int, num_ranks: int) -> tuple[Floats, Floats]:
    """Pairs of each expert in each piece, [F, E], and of the mean rank, [F, 1]."""
    tokens = len(expert_ids)
    number = max(1, tokens // PIECE)
    piece = np.arange(tokens) * number // max(tokens, 1)
    flat = (piece[:, None] * (num_experts + 1) + np.where(expert_ids < 0, num_experts, expert_ids)).reshape(-1)
    counts = np.bincount(flat, minlength=number * (num_experts + 1)).reshape(number, -1)[:, :-1].astype(np.float64)
    return counts, np.maximum(counts.sum(axis=1, keepdims=True) / num_ranks, 1)


def _excess(counts: Floats, mean: Floats) -> Floats:
    """Moments of every two experts above those of experts that are as hot in every piece: [E, E]."""
    load = counts.sum(axis=0)
    return np.asarray(counts.T @ (counts / mean) - np.outer(load, load) / max(float(mean.sum()), 1.0))
