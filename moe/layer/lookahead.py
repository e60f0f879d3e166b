"""What the next layer will want, of all ranks, while this layer is computed.

    routing of layer l ─guess─▶ expected tokens per expert of l + 1 [E] ─all-gather behind the layer─▶ [G, E]
                                            this rank's own experts ─▶ Prefetcher ─▶ cache.prefetch(l + 1)

Guesses leave tokens as they are: `transition` learns from the routing of the run, `router` asks the next layer's own
router about this layer's hidden states, `learned` asks a regression from these to the next layer's router
(moe/layer/ridge.py), read from a file or fitted to the run. cf. Pre-gated MoE, ISCA 2024.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe.comm.errors import Task
from moe.comm.gather import BackgroundGather, Gathering
from moe.comm.wire import Traffic
from moe.kernels.cpu_expected import CpuExpected, can_expect
from moe.layer.parallel import ExpertParallel
from moe.layer.pregate import Pregate
from moe.layer.ridge import Forecast, Regression, RidgeFit
from moe.layer.routing import Routing, StepContext, on_host
from moe.offload.cache import ExpertCache
from moe.offload.layout import ExpertSite
from moe.offload.predictor import Floats, Transitions
from moe.offload.prefetch import LEAST_EXPECTED, Prefetcher

# (layer, x [T, H], topk_ids [T, K]) -> expected tokens per expert of layer + 1 [E]; None after the last layer.
Guess = Callable[[int, Tensor, npt.NDArray[np.int64]], Floats | None]

_UNIT = 256  # counts travel as int32 in parts of a token


def transition_guess(num_experts: Sequence[int], top_k: int) -> Guess:
    transitions = Transitions(num_experts, top_k)

    def guess(layer: int, x: Tensor, topk_ids: npt.NDArray[np.int64]) -> Floats | None:
        return transitions.expected(layer, topk_ids)

    return guess


def router_guess(model: Any, sites: Sequence[ExpertSite], top_k: int) -> Guess:
    """model: the one that runs. Raises ValueError if a layer has not exactly one weight [E, H] beside its experts.

    What the next router would choose counts as expected, from LEAST_EXPECTED of a token where it stands at the cut to
    nearly one far above it. Bias corrections and groups of the router are left out: it is a guess.
    """
    if (reason := why_no_router_guess(model, sites)) is not None:
        raise ValueError(f"offload.prefetch=router {reason}; set offload.prefetch=transition")
    weights = [_router_weights(model, site)[0] for site in sites]
    routers: list[Callable[[Tensor], Floats]] = [
        CpuExpected(w, top_k, LEAST_EXPECTED) if can_expect(w) else partial(expected_by_router, w, top_k=top_k)
        for w in weights
    ]

    def guess(layer: int, x: Tensor, topk_ids: npt.NDArray[np.int64]) -> Floats | None:
        return None if layer + 1 == len(routers) else routers[layer + 1](x)

    return guess


def expected_by_router(weight: Tensor, x: Tensor, top_k: int) -> Floats:
    """weight: [E, H], x: [T, H]. fp32 [E]; a host sync on an accelerator."""
    scores = (x.to(weight.dtype) @ weight.T).float()
    best, chosen = scores.topk(min(top_k + 1, len(weight)))
    spread = (scores - scores.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
    above = (best - best[:, -1:]) / spread.clamp(min=1e-6)
    unsure = (1 - LEAST_EXPECTED) * np.exp(-above[:, :top_k].numpy(force=True))
    ids = chosen[:, :top_k].numpy(force=True)
    return np.bincount(ids.ravel(), (1 - unsure).ravel(), len(weight)).astype(np.float32)


def why_no_router_guess(model: Any, sites: Sequence[ExpertSite]) -> str | None:
    """None if every layer has exactly one weight [E, H] beside its experts: the router's."""
    for site in sites:
        if (count := len(_router_weights(model, site))) != 1:
            shape = site.num_experts, site.hidden_size
            return f"finds {count} weights of {shape} beside {site.module}, it needs the router's alone"
    return None


def _router_weights(model: Any, site: ExpertSite) -> list[Tensor]:
    block: nn.Module = model.get_submodule(site.module.rpartition(".")[0])
    return [p.detach() for p in block.parameters() if p.shape == (site.num_experts, site.hidden_size)]


def learned_guess(forecast: Forecast, num_layers: int) -> Guess:
    """What the regressions say of the next layer, as expected tokens of each expert."""
    ahead = [foretell(forecast.regressions[layer, 1], forecast.top_k) for layer in range(num_layers - 1)]

    def guess(layer: int, x: Tensor, topk_ids: npt.NDArray[np.int64]) -> Floats | None:
        return None if layer + 1 == num_layers else ahead[layer](x)

    return guess


def foretell(regression: Regression, top_k: int) -> Callable[[Tensor], Floats]:
    """x [T, H] -> expected tokens of each expert [E]; on a CPU in one call, of a copy of the weights."""
    weight = regression.weight[:-1].T.clone(memory_format=torch.contiguous_format)  # [E, H]
    if can_expect(weight):
        bias, spread = regression.weight[-1].clone(), regression.spread.contiguous()
        return CpuExpected(weight, top_k, bias=bias, spread=spread)
    return partial(expected_by_forecast, regression, top_k=top_k)


def expected_by_forecast(regression: Regression, x: Tensor, top_k: int) -> Floats:
    """fp32 [E]; a host sync on an accelerator."""
    forecast = Forecast("logits", top_k, {(0, 1): regression})
    return forecast.probability(0, 1, x).sum(dim=0).numpy(force=True)


class OnlineGuess:
    """The same without a file: regressions fitted to the run itself, one layer a forward, whenever tokens doubled.

    Says nothing of a layer until `FEWEST` tokens were seen, and learns no more after `MOST`.
    """

    FEWEST, MOST = 256, 1 << 15
    RIDGE = 10.0

    def __init__(self, fit: RidgeFit) -> None:
        self.fit = fit
        self.forecast = Forecast("selection" if fit.routers is None else "logits", fit.top_k, {})
        self._ahead: dict[int, Callable[[Tensor], Floats]] = {}
        self._solved_at = [self.FEWEST // 2] * (len(fit.num_experts) - 1)

    def __call__(self, layer: int, x: Tensor, topk_ids: npt.NDArray[np.int64]) -> Floats | None:
        if layer == 0:
            self.fit.begin(StepContext())
        if self.fit.num_tokens < self.MOST:
            self.fit.routed(x, Routing(layer, torch.from_numpy(topk_ids), torch.empty(0)), StepContext())
        if layer == 0:
            self._solve_one(x.device)
        if layer + 1 == len(self.fit.num_experts):
            return None
        if layer not in self._ahead:
            return np.zeros(self.fit.num_experts[layer + 1], np.float32)  # other ranks may know more
        return self._ahead[layer](x)

    def _solve_one(self, device: torch.device) -> None:
        stale = min(range(len(self._solved_at)), key=self._solved_at.__getitem__, default=None)
        if stale is None or self.fit.num_tokens < 2 * self._solved_at[stale]:
            return
        self._solved_at[stale] = self.fit.num_tokens
        solved = self.fit.solve(stale, self.RIDGE)
        self.forecast.regressions |= Forecast("logits", 0, solved).to(device).regressions
        self._ahead[stale] = foretell(self.forecast.regressions[stale, 1], self.forecast.top_k)


def pregate_guess(pregate: Pregate, num_experts: Sequence[int]) -> Guess:
    """Under a pre-gate what the next layer may want is known: the candidates of each token."""

    def guess(layer: int, x: Tensor, topk_ids: npt.NDArray[np.int64]) -> Floats | None:
        if pregate.foretold is None:
            return None
        return np.bincount(on_host(pregate.foretold[0]).ravel(), minlength=num_experts[layer + 1]).astype(np.float32)

    return guess


class Lookahead:
    """One rank's guesses, and its reads of what all ranks expect. With several ranks every call is a collective.

    The gather runs whenever prefetch is configured, also after this rank has stopped reading ahead.
    """

    def __init__(self, cache: ExpertCache, guess: Guess, parallel: ExpertParallel | None, trial: bool = True) -> None:
        self.prefetcher = Prefetcher(cache, trial)
        self.guess = guess
        self.use_ranks(parallel)

    def use_ranks(self, parallel: ExpertParallel | None) -> None:
        """Looks ahead for these ranks from now on; what it has learned stays. None: alone."""
        has_peers = parallel is not None and parallel.groups.world is not None
        self.parallel = parallel
        self.gather = BackgroundGather(parallel.groups) if parallel is not None and has_peers else None
        self._coming: tuple[int, Floats | Gathering] | None = None

    @property
    def traffic(self) -> list[Traffic]:
        """What the gathers of expected counts sent."""
        return [] if self.gather is None else [self.gather.traffic]

    def begin(self, step: StepContext) -> None:
        self.prefetcher.begin_forward()

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        """This rank's tokens have been routed. x: [T, H]; T may be 0."""
        layer = routing.layer
        if self.gather is None and not self.prefetcher.is_asking:
            return  # alone, a forward without prefetch is one without guesses too
        expected = self.guess(layer, x, on_host(routing.topk_ids))
        if expected is None:
            return
        if self.gather is None:
            self._coming = layer + 1, expected
        else:
            counts = torch.from_numpy(np.rint(expected * _UNIT).astype(np.int32)).to(self.gather.groups.device)
            self._coming = layer + 1, self.gather.counts(counts, Task("expected counts", layer + 1))

    def read(self) -> None:
        """Reads ahead what was guessed last, once: for when the layer's own misses are on their way."""
        if self._coming is None:
            return
        (layer, coming), self._coming = self._coming, None
        if isinstance(coming, Gathering):
            assert self.parallel is not None
            (by_rank,) = coming.wait()  # [G, E]
            share = self.parallel.share_here(layer)
            coming = np.asarray((by_rank.numpy(force=True) * share).sum(axis=0) / _UNIT, np.float32)
        self.prefetcher.ask(layer, coming)
