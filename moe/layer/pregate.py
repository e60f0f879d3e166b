"""Pre-gates: a layer routes by what the layer before foretold, wholly or among the candidates. Lossy, so opt-in.

    restrict:M   the layer's own router, on its own input, chooses among the M experts foretold
    replace      the foretold scores are the router's logits, weights too (Pre-gated MoE, ISCA 2024, without training)

What a layer may want is known while the layer before is computed, so that everything can be fetched in time. The first
layer of experts keeps its router, and nothing crosses a decoder step: a token's routing depends on no other token.
"""

from collections.abc import Sequence

from torch import Tensor

from moe.layer.ridge import Forecast
from moe.layer.routers import PlainRouter
from moe.layer.routing import Routing, StepContext


class Pregate:
    """A stage of routing. width: candidates a token has; None replaces the router.

    Raises ValueError for fewer candidates than a token takes experts, or a forecast that has no logits to replace with.
    """

    def __init__(self, forecast: Forecast, routers: Sequence[PlainRouter], width: int | None) -> None:
        top_k = max(router.top_k for router in routers)
        if width is not None and width < top_k:
            raise ValueError(f"routing.pregate=restrict:{width} leaves fewer experts than a token takes ({top_k})")
        if width is None and forecast.kind != "logits":
            raise ValueError("routing.pregate=replace needs a lookahead of logits, this one foretells choices alone")
        self.forecast, self.routers, self.width = forecast, list(routers), width
        self._before: Tensor | None = None  # x of the layer before

    @property
    def num_candidates(self) -> int:
        return max(router.top_k for router in self.routers) if self.width is None else self.width

    def route(self, x: Tensor, routing: Routing, step: StepContext) -> Routing:
        layer, before = routing.layer, self._before
        self._before = x
        if layer == 0:
            return routing
        assert before is not None, layer
        assert len(before) == len(x), (layer, before.shape, x.shape)
        router, foretold = self.routers[layer], self.forecast.scores(layer - 1, 1, before)
        if self.width is None:
            weights, ids = foretold.softmax(-1).topk(router.top_k)
        else:
            own = router.logits(x).float().softmax(-1)
            candidates = foretold.topk(min(self.width, foretold.shape[1])).indices
            weights, of_these = own.gather(1, candidates).topk(router.top_k)
            ids = candidates.gather(1, of_these)
        if router.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return routing._replace(
            topk_ids=ids.to(routing.topk_ids.dtype), topk_weights=weights.to(routing.topk_weights.dtype)
        )


def width_of(pregate: str) -> int | None:
    """Candidates of `restrict:M`; None: replace."""
    return None if pregate == "replace" else int(pregate.partition(":")[2])
