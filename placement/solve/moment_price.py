"""What second moments cost in one problem, learnt from halves of its own tokens while every layer is sketched.

A low price saves rows and lets a plan be less even on other traffic than on what it was fitted to; how much less
depends on the traffic, on how much of it there is and on the size of the model, so that no constant fits. Each layer's
sketch is fitted on one half of the sequences, drawn anew for each, and judged on the other beside EPLB's greedy of the
same half, whose copies are dealt evenly, as EPLB deals: where ours is less even the price rises, where it is more so it
falls, by steps that get shorter (Robbins and Monro 1951), to where both are as even.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.solve.evenness import PIECE

FIRST = 0.02  # rank visits, times the ranks: of a pair in a piece's mean load squared over the load
DOUBLINGS = (-3.0, 2.0)  # of the first price, at most
SLOPE = 0.02  # of the mean load: about what twice the price takes off the spread of 256 experts on 32 ranks
PATIENCE = 8  # layers that the first price counts for
MOST_EXCESS = 0.1  # that is believed of one layer
JUDGED = 16384  # tokens at most


class MomentPrice:
    """The price so far, from `FIRST` on."""

    def __init__(self) -> None:
        self._doublings, self._seen = 0.0, 0

    @property
    def value(self) -> float:
        return float(FIRST * 2**self._doublings)

    def learn(self, excess: float) -> None:
        """excess: of one layer, as `excess_spread` says."""
        step = float(np.clip(excess, -MOST_EXCESS, MOST_EXCESS)) / (SLOPE * (PATIENCE + self._seen))
        self._doublings = float(np.clip(self._doublings + step, *DOUBLINGS))
        self._seen += 1


def half_of(sequence_lengths: NDArray[np.integer[Any]], seed: int) -> NDArray[np.bool_] | None:
    """Whether each token is of the half that is fitted: whole sequences, drawn by seed; of one text, or nearly one, the
    earlier tokens. None where a half would have less than a piece."""
    tokens = int(sequence_lengths.sum())
    if tokens < 2 * PIECE:
        return None
    order = np.random.default_rng(seed).permutation(len(sequence_lengths))
    lengths = sequence_lengths[order].astype(np.int64)
    is_first = np.empty(len(order), bool)
    is_first[order] = np.cumsum(lengths) - lengths / 2 < tokens / 2
    half = np.repeat(is_first, sequence_lengths)
    return half if PIECE <= half.sum() <= tokens - PIECE else np.arange(tokens) < tokens // 2


def excess_spread(
    expert_ids: NDArray[np.integer[Any]],
    home: NDArray[np.integer[Any]],
    hosted: NDArray[np.bool_],
    greedy: NDArray[np.bool_],
    *,
    home_first: bool,
) -> float:
    """Standard deviation of the ranks' loads on other tokens, over their mean, less that of the greedy's dealt evenly.

    It says the same as the busiest rank's load and is half as noisy. expert_ids: [N, K], -1 = none, 0.0 where all are;
    home: [N]. hosted, greedy: [E, G].
    """
    experts, ranks = hosted.shape
    pairs = np.bincount(expert_ids[expert_ids >= 0], minlength=experts)
    plan = Plan.from_hosted(hosted[None])
    chosen = choose_replicas(expert_ids, home, ServingTable.of(plan, 0), home_first=home_first)
    served = np.bincount(chosen[chosen >= 0] // plan.physical_per_rank, minlength=ranks)
    dealt = (pairs / greedy.sum(axis=1)) @ greedy
    return float((served.std() - dealt.std()) / max(float(dealt.mean()), 1e-12))
