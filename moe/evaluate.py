"""What a lossy mode costs: loss, tokens and distributions beside the exact run of the same model on the same text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.engine.engine import Engine
from moe.engine.runner import PackedRunner
from moe.layer.routing import NOBODY, Span, StepContext
from moe.llm import LLM
from moe.models.kv import CACHE_NAME


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over num_tokens. agreement: share of places where both runs find the same token likeliest; kl in nats."""

    num_tokens: int
    loss: float
    exact_loss: float
    agreement: float
    kl: float

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens: loss {self.loss:.4f}, exact {self.exact_loss:.4f} "
            f"({self.loss / self.exact_loss - 1:+.2%}); {self.agreement:.1%} of the likeliest tokens are the same, KL "
            f"{self.kl:.4f}"
        )


def evaluate(
    llm: LLM,
    windows: Sequence[list[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    against: LLM | None = None,
) -> Evaluation:
    """Both runs over every window, each token foretold from those before it: with the stages of routing, and without.

    against: the model that this one was rounded from, which is then the exact run. A window counts as a step, between
    which experts may get more bits (offload.bits=upgrade). Raises ValueError for an encoder-decoder, and for
    a model of another vocabulary.
    """
    engine = llm.engine
    if engine.blueprint.config.is_encoder_decoder:
        raise ValueError(f"{llm.name} is an encoder-decoder: its text is no single sequence to be evaluated")
    if against is not None and against.engine.limits.vocabulary != engine.limits.vocabulary:
        raise ValueError(
            f"{llm.name} has {engine.limits.vocabulary} tokens in its vocabulary, {against.name} "
            f"{against.engine.limits.vocabulary}: it is no rounded copy of that model; give the one it was made from"
        )
    seam = None if engine.experts is None else engine.experts.routing
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for number, window in enumerate(windows):
        progress(number, len(windows))
        engine.give_bits()
        said = every_logit(engine, window)
        exact = said if against is None else every_logit(against.engine, window)
        if against is None and seam is not None and seam.stages:
            stages, seam.stages = seam.stages, []
            try:
                exact = every_logit(engine, window)
            finally:
                seam.stages = stages
        sums += _compared(said[:-1], exact[:-1], torch.tensor(window[1:], device=said.device))
        count += len(window) - 1
    progress(len(windows), len(windows))
    loss, exact_loss, agreement, kl = (sums / max(1, count)).tolist()
    return Evaluation(count, loss, exact_loss, agreement, kl)


@torch.inference_mode()
def every_logit(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """fp32 [T, V]: of every token's successor, in one forward by the model's own modules. No request may be open."""
    runner, pool, device = engine.loaded.memory.runner, engine.scheduler.pool, engine.model.device
    ids = torch.tensor([list(tokens)], device=device)
    engine.loaded.dense.routing.begin(StepContext((Span(NOBODY, 0, len(tokens), len(tokens)),)))
    if not isinstance(runner, PackedRunner):
        logits: Tensor = engine.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()
    num_blocks = -(-len(tokens) // pool.block_size)
    engine.make_room(num_blocks)
    if num_blocks > pool.num_available:
        raise ValueError(
            f"a window of {len(tokens)} tokens does not fit the KV cache of {pool.room * pool.block_size}; raise "
            "batch.kv_tokens or give shorter windows"
        )
    blocks = pool.take(num_blocks)
    try:
        step = runner.kv.begin([blocks], [0], [len(tokens)])
        positions = torch.arange(len(tokens), device=device)[None]
        arguments = {"input_ids": ids, "position_ids": positions, "use_cache": True, CACHE_NAME: runner.kv.cache}
        logits = engine.model(**arguments, step=step).logits
    finally:
        pool.release(blocks)
    return logits[0].float()


def _compared(said: Tensor, exact: Tensor, targets: Tensor) -> Tensor:
    """Sums of loss, exact loss, equal best tokens, KL(exact ‖ said); fp64 [4] on the CPU."""
    p, q = F.log_softmax(exact, -1), F.log_softmax(said, -1)
    sums = [
        F.cross_entropy(said, targets, reduction="sum"),
        F.cross_entropy(exact, targets, reduction="sum"),
        (said.argmax(-1) == exact.argmax(-1)).sum(),
        (p.exp() * (p - q)).sum(),
    ]
    return torch.stack([s.double().cpu() for s in sums])
