"""Routers that are known by what they do: softmax over plain logits. Others are only watched."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe.models.layer_plan import plain_router
from moe.offload.layout import ExpertSite


class PlainRouter(NamedTuple):
    """softmax(x Wᵀ + b) ─▶ the top k, made to sum to 1 if `normalize`."""

    weight: Tensor
    bias: Tensor | None
    top_k: int
    normalize: bool

    def logits(self, x: Tensor) -> Tensor:
        """x: [T, H]. fp32 [T, E]."""
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).float()


def plain_routers(model: Any, sites: Sequence[ExpertSite]) -> list[PlainRouter] | None:
    """Every layer's router, found by trying them; None if one does anything else (sigmoids, groups, corrections)."""
    found = [_plain_router(model, site) for site in sites]
    routers = [router for router in found if router is not None]
    return routers if len(routers) == len(found) else None


def _plain_router(model: Any, site: ExpertSite) -> PlainRouter | None:
    block: nn.Module = model.get_submodule(site.module.rpartition(".")[0])
    for gate in block.children():
        if any(p.shape == (site.num_experts, site.hidden_size) for p in gate.parameters()):
            linear, (top_k, normalize, _) = plain_router(gate)
            if linear is not None:
                return PlainRouter(linear.weight, linear.bias, top_k, normalize)
    return None
