"""What a run is told to know of routing beforehand: guesses that warm the cache, and pre-gates that change routing."""

from typing import Any

from moe.config import EngineConfig, Prefetch
from moe.layer.lookahead import (
    Guess,
    Lookahead,
    OnlineGuess,
    learned_guess,
    pregate_guess,
    router_guess,
    transition_guess,
    why_no_router_guess,
)
from moe.layer.pregate import Pregate, width_of
from moe.layer.ridge import Forecast, RidgeFit
from moe.layer.routers import plain_routers
from moe.models.blueprint import Blueprint
from moe.offload.cache import ExpertCache


class Foresight:
    """A model's forecast and pre-gate, as configured. Raises ValueError for a file or a mode that does not fit it."""

    def __init__(self, blueprint: Blueprint, model: Any, config: EngineConfig) -> None:
        self._blueprint = blueprint
        self._sites, self._model, self._config = blueprint.index.sites, model, config
        self._num_experts = [site.num_experts for site in self._sites]
        self._top_k = blueprint.top_k
        told = config.routing
        self.forecast: Forecast | None = None
        if told.lookahead is not None:
            found = Forecast.load(told.lookahead, self._num_experts, self._sites[0].hidden_size)
            self.forecast = found.to(model.device)
        self.pregate: Pregate | None = None
        if told.pregate != "off":
            routers = plain_routers(model, self._sites)
            if routers is None:
                raise ValueError(
                    f"routing.pregate={told.pregate} cannot serve {blueprint.folder}: its routers are no softmax over "
                    "plain logits; set routing.pregate=off"
                )
            assert self.forecast is not None, "the config has refused a pre-gate without a file"
            self.pregate = Pregate(self.forecast, routers, width_of(told.pregate))

    def lookahead(self, cache: ExpertCache, may_pay: bool) -> tuple[Lookahead | None, str | None]:
        """What reads ahead, and its name; None if nothing does. may_pay: asked only where it is left open."""
        prefetch = self._config.offload.prefetch
        if prefetch == "auto":
            prefetch = self._what_may_pay() if may_pay and self._can_wait(cache) else "off"
        return (None, None) if prefetch == "off" else (Lookahead(cache, self._guess(prefetch), None), prefetch)

    def _can_wait(self, cache: ExpertCache) -> bool:
        """Whether a layer waits for reads that others do meanwhile."""
        has_misses = cache.num_slots < sum(self._num_experts)
        return has_misses and not cache.reads_inline and self._config.offload.store != "ram"

    def _what_may_pay(self) -> Prefetch:
        """Found to pay, at one sequence, with experts of megabytes on a disk; where it does not, it stops itself."""
        if self.forecast is not None:
            return "learned"
        return "off" if why_no_router_guess(self._model, self._sites) else "router"

    def _guess(self, prefetch: Prefetch) -> Guess:
        num_layers = len(self._sites)
        if prefetch == "router":
            return router_guess(self._model, self._sites, self._top_k)
        if prefetch == "transition":
            return transition_guess(self._num_experts, self._top_k)
        if self.forecast is None:
            return OnlineGuess(empty_fit(self._blueprint, self._model, distances=1))
        if self.pregate is not None:
            return pregate_guess(self.pregate, self._num_experts)
        return learned_guess(self.forecast, num_layers)


def empty_fit(blueprint: Blueprint, model: Any, distances: int) -> RidgeFit:
    """Regressions for this model, with nothing seen yet."""
    sites = blueprint.index.sites
    num_experts = [site.num_experts for site in sites]
    routers = plain_routers(model, sites)
    return RidgeFit(sites[0].hidden_size, num_experts, blueprint.top_k, distances, routers)
