"""Routers: wrapped by whoever speaks in their place, and known by what they do where that is softmax over plain logits.

A wrapper sees what a router is given and decides what it says: another kernel's result, other logits, a mask. Where all
that is wanted is other experts than the router's, a stage of routing is simpler (moe/layer/routing.py).
"""

from collections.abc import Callable, Sequence
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
    name = _find_router(model, site)
    if name is None:
        return None
    linear, (top_k, normalize, _) = plain_router(model.get_submodule(name))
    return None if linear is None else PlainRouter(linear.weight, linear.bias, top_k, normalize)


def _find_router(model: Any, site: ExpertSite) -> str | None:
    """The module beside a layer's experts that has a weight [E, H], by name."""
    above = site.module.rpartition(".")[0]
    block: nn.Module = model.get_submodule(above)
    for name, child in block.named_children():
        if any(p.shape == (site.num_experts, site.hidden_size) for p in child.parameters()):
            return f"{above}.{name}"
    return None


# (router, what it is given) -> what it says, in the form of this family's routers.
Around = Callable[..., Any]


class WrappedRouter(nn.Module):
    """In the place of a router: `around(router, *given)` says what it says. All else of it is as it was."""

    def __init__(self, router: nn.Module, around: Around) -> None:
        super().__init__()
        self.router, self.around = router, around

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.around(self.router, *given, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("router"), name)


def wrap_router(model: Any, site: ExpertSite, around: Around) -> Callable[[], None]:
    """Lets `around` speak for the router of a layer, in every runner; returns what undoes it. Wrappers may be nested.

    Between two steps. A layer whose router is wrapped calls it as transformers' block does, and leaves a compiled one
    aside. Raises ValueError for a layer without a router of its own beside the experts.
    """
    name = _find_router(model, site)
    if name is None:
        shape = f"{site.num_experts} x {site.hidden_size}"
        raise ValueError(f"beside {site.module} there is no weight of {shape}: there is no router to wrap")
    before = model.get_submodule(name)
    model.set_submodule(name, WrappedRouter(before, around))
    return lambda: model.set_submodule(name, before)
