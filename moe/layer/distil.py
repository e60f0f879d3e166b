"""Pre-gates trained on from the closed form, by distillation of the router that they stand for.

A ridge regression of logits weighs every expert's error alike; a router's choice is made among the best few. The
Kullback-Leibler divergence from the router's softmax to the gate's weighs them as the choice does. Some hundred steps
take a third of the loss of `restrict:K` away on examples/tinymoe (bench/results/distill.md). cf. Pre-gated MoE (ISCA
2024), which fine-tunes the whole model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.layer.ridge import Forecast, Regression, with_one
from moe.layer.routers import PlainRouter
from moe.layer.routing import Routing, StepContext

RATE, ROWS = 3e-3, 512  # AdamW's at the beginning, falling to nothing; tokens of a step
MOST_TOKENS, MOST_BYTES = 1 << 14, 1 << 30


class Sample:
    """An observer of routing that keeps what routers saw, up to as many tokens as memory is meant for."""

    def __init__(self, hidden_size: int, num_layers: int) -> None:
        self.most = max(1, min(MOST_TOKENS, MOST_BYTES // (4 * hidden_size * num_layers)))
        self._x: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.num_tokens = 0  # that all layers have seen

    def begin(self, step: StepContext) -> None: ...

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        room = self.most - sum(map(len, self._x[routing.layer]))
        self._x[routing.layer].append(x[: max(0, room)].float().cpu())
        self.num_tokens = sum(map(len, self._x[-1]))

    @property
    def is_full(self) -> bool:
        return self.num_tokens >= self.most

    def rows(self) -> list[Tensor]:
        """By layer, fp32 [T, H]."""
        return [torch.cat(parts) for parts in self._x]


def distilled(forecast: Forecast, x: Sequence[Tensor], routers: Sequence[PlainRouter], steps: int) -> Forecast:
    """`forecast` with its gates of one layer ahead trained; those of more layers ahead are as they were.

    x: by layer, [T, H], T >= 1. Costs steps x ROWS x (H + 1) x E multiplications a layer, thrice; the same for the same
    x. Raises ValueError for a forecast of choices, which have no distribution.
    """
    if forecast.kind != "logits":
        raise ValueError("--steps needs a lookahead of logits, this one foretells choices alone; leave --steps out")
    found = dict(forecast.regressions)
    for n in range(len(x) - 1):
        router = routers[n + 1]
        with torch.no_grad():
            logits = router.logits(x[n + 1].to(router.weight.device)).cpu()
        found[n, 1] = _trained(found[n, 1], with_one(x[n]).float(), logits, steps, seed=n)
    return Forecast(forecast.kind, forecast.top_k, found, forecast.model)


def _trained(one: Regression, inputs: Tensor, logits: Tensor, steps: int, seed: int) -> Regression:
    """inputs: [T, H + 1]; logits: [T, E]."""
    generator = torch.Generator().manual_seed(seed)
    wanted = logits.log_softmax(1)
    weight = one.weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(inputs), (min(ROWS, len(inputs)),), generator=generator)
        said = (inputs[rows] @ weight).log_softmax(1)
        loss = torch.nn.functional.kl_div(said, wanted[rows], reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
    with torch.no_grad():
        said = inputs @ weight
        left = (said - said.mean(1, keepdim=True)) - (logits - logits.mean(1, keepdim=True))
        spread = left.square().mean(0).sqrt().clamp(min=1e-6)
    return Regression(weight.detach(), spread)
