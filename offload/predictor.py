"""Which experts the next layer will want, learned from the run itself.

A prediction only warms the cache. It never changes routing, so a wrong one costs bytes and no token.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
TopkIds = npt.NDArray[np.integer]


class _Guess(NamedTuple):
    """What was said of a layer's successor, until its routing shows how right it was."""

    layer: int
    rows: npt.NDArray[np.integer]  # [R] experts that any token chose
    chose: Floats  # [T, R] 0 or 1
    probability: Floats  # [T, E]


class Transitions:
    """P(expert of layer + 1 | a token's experts in layer), by logistic regression that learns with every step.

    One weight per pair of experts and one bias per expert, per layer; AdaGrad. Where counts of pairs treat the K
    experts of a token as independent evidence, this does not: on recorded routing of DeepSeek-V2-Lite it finds 61 to
    81 % of the six experts of the next layer, pairwise counts 50 to 63 % (bench/bench_prefetch.py). Popularity is the
    bias. Takes 8 bytes per pair of experts and layer; costs some 50 µs a call for one token, and looks at no more than
    `MOST_TOKENS` of a step, evenly spaced.
    """

    MOST_TOKENS = 64
    RATE = 0.3

    def __init__(self, num_experts: Sequence[int], top_k: int) -> None:
        pairs = list(pairwise(num_experts))
        # Row e: the weights of expert e. The last row is the bias: an expert that every token chose.
        self._weights = [np.zeros((e + 1, to), np.float32) for e, to in pairs]
        self._squares = [np.full((e + 1, to), 0.1, np.float32) for e, to in pairs]
        for weights, (_, to) in zip(self._weights, pairs):
            share = min(0.5, top_k / to)
            weights[-1] = np.log(share / (1 - share))
        self._said: _Guess | None = None

    def expected(self, layer: int, topk_ids: TopkIds) -> Floats | None:
        """As the protocol says. The same tokens in the same order must come in every layer of a forward."""
        ids = topk_ids[:: max(1, -(-len(topk_ids) // self.MOST_TOKENS))]
        self._learn(layer, ids)
        if layer == len(self._weights):
            self._said = None
            return None
        weights = self._weights[layer]
        rows = np.append(np.unique(ids[ids >= 0]), len(weights) - 1)
        chose = (ids[:, :, None] == rows).any(axis=1).astype(np.float32)
        chose[:, -1] = 1.0
        probability = 1.0 / (1.0 + np.exp(-(chose @ weights[rows])))
        self._said = _Guess(layer, rows, chose, probability)
        return np.asarray(probability.sum(axis=0) * (len(topk_ids) / max(1, len(ids))), np.float32)

    def _learn(self, layer: int, ids: TopkIds) -> None:
        said = self._said
        if said is None or said.layer != layer - 1 or len(said.probability) != len(ids):
            return  # another forward began, or there was none
        error = np.append(said.probability, np.zeros((len(ids), 1), np.float32), axis=1)  # the last column takes -1
        error[np.arange(len(ids))[:, None], ids] -= 1.0
        gradient = said.chose.T @ error[:, :-1]
        squares = self._squares[layer - 1]
        squares[said.rows] += gradient * gradient
        self._weights[layer - 1][said.rows] -= self.RATE * gradient / np.sqrt(squares[said.rows])
