"""Collects the routing of forwards into one `RoutingTrace`."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moe.layer.routing import NOBODY, RoutedLayer, StepContext, WholeForwards
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes


class _Part(NamedTuple):
    """Tokens of one request, side by side: [T, L, K], [T, L, K], [T]."""

    ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]
    phase: npt.NDArray[np.uint8]


class TraceRecorder:
    """Every token of every request once, in the order in which sequences were added to the engine.

    forwards: to be among the observers of routing.
    """

    def __init__(self, num_layers: int, num_experts: int, model: str, sizes: ModelSizes | None = None) -> None:
        self.forwards = WholeForwards(num_layers, self._add)
        self.num_experts, self.model, self.sizes = num_experts, model, sizes
        self._parts: dict[int, list[_Part]] = {}

    def _add(self, step: StepContext, layers: Seq[RoutedLayer]) -> None:
        whole = _Part(
            np.stack([layer.topk_ids for layer in layers], axis=1),
            np.stack([layer.topk_weights for layer in layers], axis=1),
            step.phase_of_token(),
        )
        first = 0
        for span, length in zip(step.spans, step.lengths):
            rows = slice(first, first + length)
            first = rows.stop
            if span.sequence == NOBODY:
                continue
            parts = self._parts.setdefault(span.sequence, [])
            if span.start == 0:  # also after a preemption: it is computed again
                parts.clear()
            parts.append(_Part(whole.ids[rows], whole.weights[rows], whole.phase[rows]))

    def trace(self) -> RoutingTrace:
        """Raises ValueError if nothing was recorded."""
        if not self._parts:
            raise ValueError("no routing was recorded: no request ran, or the model has no experts in slots")
        joined = [_Part(*map(np.concatenate, zip(*self._parts[i]))) for i in sorted(self._parts)]
        return RoutingTrace(
            expert_ids=np.concatenate([one.ids for one in joined]),
            weights=np.concatenate([one.weights for one in joined]),
            sequence_lengths=np.array([len(one.ids) for one in joined], np.int32),
            num_experts=self.num_experts,
            model=self.model,
            sizes=self.sizes,
            phase=np.concatenate([one.phase for one in joined]),
        )
