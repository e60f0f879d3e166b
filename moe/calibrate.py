"""What every expert is asked on some text: inputs for rounding that disturbs the answers least."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.kernels.weights import Activation
from moe.layer.routing import Routing, StepContext


class ExpertInputs:
    """An observer of routing that keeps what it sees: rows of every layer, and who takes them.

    Memory: tokens x hidden size x layers, in the model's dtype.
    """

    def __init__(self, activations: Sequence[Activation]) -> None:
        self._activations = list(activations)
        self._seen: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[] for _ in activations]

    def begin(self, step: StepContext) -> None:
        pass

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        weights = routing.topk_weights.cpu() if routing.scale_input else None
        self._seen[routing.layer].append((x.detach().cpu().clone(), routing.topk_ids.cpu(), weights))

    def inputs(self, layer: int, expert: int) -> Tensor:
        """fp32 [T, H]: the rows that were sent to this expert."""
        rows = []
        for x, ids, weights in self._seen[layer]:
            token, k = torch.where(ids == expert)
            own = x[token].float()
            rows.append(own if weights is None else own * weights[token, k, None].float())
        return torch.cat(rows)

    def activation(self, layer: int) -> Activation:
        return self._activations[layer]
