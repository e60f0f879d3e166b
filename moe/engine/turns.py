"""Whose turn it is to decode: of more running requests than a step takes, those that share experts.

A step reads every expert that any of its tokens needs, once. Requests of one domain route alike (ExpertFlow's token
scheduler and Read-ME's batching use it), and a request routes as it just did: each has a profile, the share of its
latest tokens that took each expert. Beginning with the request that waited longest, the one joins that is expected to
bring the fewest experts which the others do not need and no slot holds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe.engine.requests import Request
from moe.layer.experts import SlotExperts
from moe.layer.routing import NOBODY, RoutedLayer, StepContext, WholeForwards

DECAY = 0.9  # of a token's weight in its request's profile, per later token
PRIOR_TOKENS = 4.0  # what all running requests do together counts as so many tokens of each
RESIDENT_COST = 0.2  # of an expert in a slot, which is read from memory, against one that is read from its store
PATIENCE = 4  # whoever was passed over so many times as often as if all took turns comes first


class Turns:
    """Chooses among running requests. Costs a matrix of `places` x experts of all layers (fp32), and a product with it
    for every request chosen.

    num_experts: of each layer; places: requests that may run at once. Not for models whose layers see other tokens
    than the engine's (encoder-decoders).
    """

    def __init__(self, num_experts: Sequence[int], places: int) -> None:
        self.forwards = WholeForwards(len(num_experts), self._learn)
        self.first_key = np.concatenate([[0], np.cumsum(num_experts)]).astype(np.int64)
        self.places = places
        total = int(self.first_key[-1])
        self._counts = np.zeros((places, total), np.float32)
        self._tokens = np.zeros(places, np.float32)  # by which the counts are shares
        self._row_of: dict[int, int] = {}  # by request
        self._free = list(range(places - 1, -1, -1))
        self._passed_over: dict[int, int] = {}  # steps since the last turn, by request
        self.slot_of: npt.NDArray[np.int32] = np.full(total, -1, np.int32)

    def watch(self, experts: SlotExperts) -> None:
        """Sees from now on what is routed there, and what is in a slot."""
        experts.routing.observers.append(self.forwards)
        experts.settle()  # what the device keeps to itself cannot be seen
        self.slot_of = experts.cache.map.slot_of

    def _learn(self, step: StepContext, layers: Sequence[RoutedLayer]) -> None:
        if any(span.sequence == NOBODY for span in step.spans):
            return
        lengths = step.lengths
        rows = np.array([self._row(span.sequence) for span in step.spans], np.int64)
        left = np.concatenate([np.arange(n - 1, -1, -1) for n in lengths]) if lengths else np.zeros(0)
        weights = (DECAY**left).astype(np.float32)  # of the step's tokens
        faded = DECAY ** np.array(lengths)
        self._counts[rows] *= faded[:, None].astype(np.float32)
        self._tokens[rows] *= faded
        of_token = np.repeat(rows, lengths)
        np.add.at(self._tokens, of_token, weights)
        for first_key, layer in zip(self.first_key, layers):
            token, k = np.nonzero(layer.topk_ids >= 0)
            np.add.at(self._counts, (of_token[token], layer.topk_ids[token, k] + first_key), weights[token])

    def choose(self, ready: Sequence[Request], size: int) -> list[Request]:
        """At most `size` of the requests that can decode, the longest waiting first; the others are passed over.

        While `ready` and `size` stay as they are, a request is passed over fewer than (PATIENCE + 1) *
        ceil(len(ready) / size) times in a row. Ties go to the earlier in `ready`.
        """
        if len(ready) <= size:
            self._passed_over.update(dict.fromkeys((r.id for r in ready), 0))
            return list(ready)
        waited = np.array([self._passed_over.setdefault(r.id, 0) for r in ready])
        order = np.argsort(-waited, kind="stable")
        limit = PATIENCE * -(-len(ready) // size)
        chosen = [int(order[0]), *(int(i) for i in order[1:size] if waited[i] >= limit)]
        chosen += self._alike(np.array([self._row(r.id) for r in ready]), chosen, size)
        for index, request in enumerate(ready):
            self._passed_over[request.id] = 0 if index in set(chosen) else int(waited[index]) + 1
        return [ready[i] for i in sorted(chosen)]

    def forget(self, request: Request) -> None:
        """It runs no more."""
        self._passed_over.pop(request.id, None)
        row = self._row_of.pop(request.id, None)
        if row is not None:
            self._counts[row], self._tokens[row] = 0, 0
            self._free.append(row)

    def _row(self, request: int) -> int:
        if request not in self._row_of:
            self._row_of[request] = self._free.pop()
        return self._row_of[request]

    def _alike(self, rows: npt.NDArray[np.int64], chosen: Sequence[int], size: int) -> list[int]:
        """Indices into `rows` that fill the group up to `size`."""
        common = self._counts.sum(0) / max(1.0, float(self._tokens.sum()))
        needs = (self._counts[rows] + PRIOR_TOKENS * common) / (self._tokens[rows, None] + PRIOR_TOKENS)
        cost = np.where(self.slot_of >= 0, np.float32(RESIDENT_COST), np.float32(1))
        nobody = cost * np.prod(1 - needs[list(chosen)], axis=0)  # what an expert that nobody needs yet would cost
        left = np.ones(len(rows), bool)
        left[list(chosen)] = False
        more = []
        for _ in range(size - len(chosen)):
            index = int(np.argmin(np.where(left, needs @ nobody, np.inf)))
            left[index] = False
            nobody *= 1 - needs[index]
            more.append(index)
        return more
