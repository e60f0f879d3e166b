"""Pre-gates: a layer routes by what the layer before foretold, wholly or among the candidates. Lossy, so opt-in.

    restrict:M   the layer's own router, on its own input, chooses among the M experts foretold; a token whose
                 experts are all among them keeps its routing, bit for bit
    replace      the foretold scores are the router's logits, weights too (Pre-gated MoE, ISCA 2024, without training)

What a layer may want is known while the layer before is computed, so that everything can be fetched in time. The first
layer of experts keeps its router, and nothing crosses a decoder step: a token's routing depends on no other token.
"""

from collections.abc import Sequence

from torch import Tensor

from moe.kernels.cpu_expected import Choose, chooser
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
        self.routers, self.width = list(routers), width
        self._own = [chooser(router.weight, router.bias) for router in routers]
        self._foretell = [_forecast_chooser(forecast, layer) for layer in range(len(routers) - 1)]
        self.foretold: tuple[Tensor, Tensor] | None = None  # of the next layer: candidates int64 [T, W], and weights

    def route(self, x: Tensor, routing: Routing, step: StepContext) -> Routing:
        layer, foretold = routing.layer, self.foretold
        self.foretold = None if layer + 1 == len(self.routers) else self._foretold(layer + 1, x)
        if layer == 0:
            return routing
        assert foretold is not None, layer
        assert len(foretold[0]) == len(x), (layer, foretold[0].shape, x.shape)
        ids, weights = foretold
        if self.width is not None:
            is_kept = (routing.topk_ids[:, :, None] == ids[:, None, :]).any(-1).all(-1, keepdim=True)  # [T, 1]
            ids, weights = self._own[layer](x, self.routers[layer].top_k, ids, self.routers[layer].normalize)
            ids = ids.where(~is_kept, routing.topk_ids)
            weights = weights.where(~is_kept, routing.topk_weights)
        return routing._replace(
            topk_ids=ids.to(routing.topk_ids.dtype), topk_weights=weights.to(routing.topk_weights.dtype)
        )

    def _foretold(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: what the layer before `layer` sees."""
        router = self.routers[layer]
        count = router.top_k if self.width is None else min(self.width, len(router.weight))
        return self._foretell[layer - 1](x, count, None, router.normalize)


def _forecast_chooser(forecast: Forecast, layer: int) -> Choose:
    """Of the layer behind `layer`."""
    weight = forecast.regressions[layer, 1].weight
    return chooser(weight[:-1].T.contiguous(), weight[-1].contiguous())


def width_of(pregate: str) -> int | None:
    """Candidates of `restrict:M`; None: replace."""
    return None if pregate == "replace" else int(pregate.partition(":")[2])
