"""Replays prompts with every expert resident and says whether anything changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import EngineConfig
from moe.llm import LLM
from moe.offload.nested import BY_BUDGET
from moe.outputs import RequestOutput
from moe.params import SamplingParams
from moe.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Verification:
    """num_tokens: compared; num_equal: the same at the same place. Logits are compared up to the first difference."""

    num_prompts: int
    num_tokens: int
    num_equal: int
    max_abs_logit_delta: float
    max_abs_logit: float

    @property
    def agreement(self) -> float:
        return self.num_equal / max(1, self.num_tokens)

    def __str__(self) -> str:
        return (
            f"verified {self.num_prompts} prompts with all experts in memory: {self.num_equal} of {self.num_tokens} "
            f"tokens equal ({self.agreement:.2%}), max |Δlogit| {self.max_abs_logit_delta:.3g} "
            f"of logits up to {self.max_abs_logit:.3g}"
        )


class Answers(NamedTuple):
    """What one run said: outputs, and the logits [tokens, V] of each."""

    outputs: list[RequestOutput]
    logits: list[Tensor]


def answer(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> Answers:
    """Runs `prompts` and keeps the logits of every token. params.n must be 1."""
    logits = llm.engine.keep_logits()
    first = llm.engine.next_id
    outputs = llm.generate(list(prompts), params)
    return Answers(outputs, [torch.stack(logits[first + i]) for i in range(len(outputs))])


def check_verifiable(config: EngineConfig) -> None:
    """Raises ValueError where a run with every expert in memory would not be another run of the same experts."""
    if config.offload.bits in BY_BUDGET:
        raise ValueError(
            f"offload.bits={config.offload.bits} keeps all experts in memory, in as many bits as offload.budget buys: "
            "there is no other run to verify it by; compare it with the unrounded model, by `moe evaluate --against`"
        )


def verify(folder: str | Path, config: EngineConfig, prompts: Sequence[Prompt], params: SamplingParams) -> Verification:
    """Runs `prompts` under `config` and again with every expert in memory. params.n must be 1.

    Costs two loads, one after the other, and the memory of all experts for the second. Raises ValueError as
    `check_verifiable` does.
    """
    check_verifiable(config)
    if not prompts:
        raise ValueError("there are no prompts to verify; give at least one")
    with LLM(folder, config) as llm:
        served = answer(llm, prompts, params)
    with LLM(folder, config.with_budget("1.0")) as llm:
        full = answer(llm, prompts, params)
    return compare(served, full)


def compare(served: Answers, full: Answers) -> Verification:
    """Token for token, and logits up to the first token that differs (after it the inputs differ)."""
    equal = total = 0
    delta = largest = 0.0
    for one, other, x, y in zip(served.outputs, full.outputs, served.logits, full.logits):
        a, b = one.outputs[0].token_ids, other.outputs[0].token_ids
        same = [p == q for p, q in zip(a, b)]
        equal += sum(same)
        total += max(len(a), len(b))
        upto = min((same.index(False) if False in same else len(same)) + 1, len(x), len(y))
        # NaN compares with nothing: it is as far from a logit as can be.
        delta = max(delta, float((x[:upto] - y[:upto]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
        largest = max(largest, float(y[:upto].abs().max()))
    return Verification(len(served.outputs), total, equal, delta, largest)
