"""Fits a lookahead to texts: one pass through the model, as many experts in memory as there are, stopped at any time.

Every fifth window is kept apart. When the others are fitted, these judge: how many of the experts that a layer takes
stand among the first K, or 2K, that were foretold.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.engine.foresight import empty_fit
from moe.layer.distil import Sample, distilled
from moe.layer.ridge import Forecast, read_sums, selection, write_sums
from moe.layer.routers import plain_routers
from moe.layer.routing import Observer, Routing, StepContext
from moe.llm import LLM
from moe.params import SamplingParams

GROUP = 8  # windows between two looks at the sums on disk
HELD_OUT = 5  # one window in so many judges


@dataclass(frozen=True, slots=True)
class Recall:
    """Of the experts that layer + distance takes, the share among the first K and the first 2K foretold from layer."""

    layer: int
    distance: int
    first: float
    first_two: float


class Judge:
    """Compares what a forecast says with what comes. An observer of routing."""

    def __init__(self, forecast: Forecast, num_experts: Sequence[int]) -> None:
        self.forecast, self.num_experts = forecast, list(num_experts)
        self._found: dict[tuple[int, int], npt.NDArray[np.float64]] = {key: np.zeros(3) for key in forecast.regressions}
        self._x: list[Tensor] = []

    def begin(self, step: StepContext) -> None:
        self._x = []

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        layer = routing.layer
        self._x.append(x)
        taken = selection(routing.topk_ids, self.num_experts[layer]).bool()
        for distance in range(1, layer + 1):
            key = layer - distance, distance
            if key in self._found:
                scores, top_k = self.forecast.scores(*key, self._x[layer - distance]), self.forecast.top_k
                ranked = taken.gather(1, scores.argsort(dim=1, descending=True))
                found = [ranked[:, :top_k].sum(), ranked[:, : 2 * top_k].sum(), taken.sum()]
                self._found[key] += np.array([int(n) for n in found])

    def recalls(self) -> list[Recall]:
        return [
            Recall(*key, float(first / total), float(two / total))
            for key, (first, two, total) in sorted(self._found.items())
            if total
        ]


def run_observed(llm: LLM, windows: Sequence[list[int]], observer: Observer) -> None:
    """Sends windows through the model, which computes no answer beyond one token, past an observer of routing."""
    experts = llm.engine.experts
    assert experts is not None
    llm.engine.scheduler.pool.sharing = False  # a shared beginning would not be seen again
    experts.routing.observers.append(observer)
    try:
        llm.generate(windows, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    finally:
        experts.routing.observers.remove(observer)


def _distilled(llm: LLM, forecast: Forecast, windows: Sequence[list[int]], steps: int) -> Forecast:
    sites = llm.engine.blueprint.index.sites
    routers = plain_routers(llm.engine.model, sites)
    sample = Sample(sites[0].hidden_size, len(sites))
    for start in range(0, len(windows) if routers is not None else 0, GROUP):
        if not sample.is_full:
            run_observed(llm, windows[start : start + GROUP], sample)
    return distilled(forecast, sample.rows() if routers is not None else [], routers or [], steps)


def fit_lookahead(
    llm: LLM,
    windows: Sequence[list[int]],
    *,
    distances: int = 3,
    ridge: float = 10.0,
    steps: int = 0,
    sums: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Forecast, list[Recall]]:
    """The forecast of windows but every fifth, and its recall on those (none if there are fewer than five).

    steps: of distilling the gates of one layer ahead on some of the windows; 0: the closed form. sums: a file in which
    the work so far stands, for a run that goes on. Raises ValueError for a model without experts
    in slots.
    """
    if llm.engine.experts is None or llm.engine.blueprint.config.is_encoder_decoder:
        raise ValueError(f"{llm.name} has no decoder with experts in slots: there is no routing to foretell")
    fit = empty_fit(llm.engine.blueprint, llm.engine.model, distances)
    judging = [w for n, w in enumerate(windows) if n % HELD_OUT == HELD_OUT - 1]
    fitting = [w for n, w in enumerate(windows) if n % HELD_OUT != HELD_OUT - 1]
    digest = hashlib.sha256(repr(fitting).encode()).hexdigest()
    done = read_sums(fit, sums, digest) if sums is not None and sums.exists() else 0
    for start in range(done, len(fitting), GROUP):
        progress(start, len(windows))
        run_observed(llm, fitting[start : start + GROUP], fit)
        if sums is not None:
            write_sums(fit, sums, digest, min(start + GROUP, len(fitting)))
    forecast = fit.forecast(ridge, llm.name)
    if steps:
        forecast = _distilled(llm, forecast, fitting, steps)
    judge = Judge(forecast.to(torch.device(llm.engine.model.device)), fit.num_experts)
    for start in range(0, len(judging), GROUP):
        progress(len(fitting) + start, len(windows))
        run_observed(llm, judging[start : start + GROUP], judge)
    progress(len(windows), len(windows))
    return forecast, judge.recalls()
