"""Collects the routing of finished steps into one `RoutingTrace`."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from moe.engine.requests import Chunk
from moe.layer.routing import RoutingLog
from moe.placement.trace import RoutingTrace


class TraceRecorder:
    """Every token of every request once, in the order in which sequences were added to the engine."""

    def __init__(self, num_layers: int, num_experts: int, model: str) -> None:
        self.log = RoutingLog(num_layers)  # to be among the observers of routing
        self.num_experts, self.model = num_experts, model
        self._parts: dict[int, list[tuple[int, npt.NDArray[np.int16], npt.NDArray[np.float32]]]] = {}
        self._prompt: dict[int, int] = {}

    def add(self, chunks: Seq[Chunk]) -> None:
        """Takes the routing of a step, [T, K] of every layer in the order of the packed row, from the log."""
        layers = self.log.take()
        num_tokens = sum(c.end - c.start for c in chunks)
        for index, layer in enumerate(layers):
            if layer is None or len(layer.topk_ids) != num_tokens:
                routed = None if layer is None else len(layer.topk_ids)
                raise ValueError(
                    f"layer {index} routed {routed} rows in a step of {num_tokens} tokens; cannot be traced"
                )
        ids = np.stack([layer.topk_ids for layer in layers if layer is not None], axis=1)  # [T, L, K]
        weights = np.stack([layer.topk_weights for layer in layers if layer is not None], axis=1)
        first = 0
        for chunk in chunks:
            rows = slice(first, first + chunk.end - chunk.start)
            first = rows.stop
            parts = self._parts.setdefault(chunk.request.id, [])
            if chunk.start == 0:  # also after a preemption: it is computed again
                parts.clear()
            parts.append((chunk.start, ids[rows], weights[rows]))
            self._prompt[chunk.request.id] = chunk.request.num_prompt

    def trace(self) -> RoutingTrace:
        """Raises ValueError if nothing was recorded."""
        if not self._parts:
            raise ValueError("no routing was recorded: no request ran, or the model has no experts in slots")
        order = sorted(self._parts)
        joined = {i: [np.concatenate(column) for column in zip(*(p[1:] for p in self._parts[i]))] for i in order}
        lengths = [len(joined[i][0]) for i in order]
        phase = [np.arange(n) >= self._prompt[i] for i, n in zip(order, lengths)]
        return RoutingTrace(
            expert_ids=np.concatenate([joined[i][0] for i in order]),
            weights=np.concatenate([joined[i][1] for i in order]),
            sequence_lengths=np.array(lengths, np.int32),
            num_experts=self.num_experts,
            model=self.model,
            phase=np.concatenate(phase).astype(np.uint8),
        )
