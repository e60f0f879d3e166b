"""bf16: routing first, then logits.

transformers rounds to bf16 after each operation of an expert, we keep fp32 until the sum over k is taken. So hidden
states differ by roundings, and a router may choose another expert where two are nearly tied: those tokens are counted
apart, by the reference's own router scores.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.moe_cases import (
    FP32_BOUND,
    Case,
    config,
    engine_says,
    prefill_logits,
    random_prompts,
    relative_error,
)
from tests.moe.moe_cases import PROMPTS as FP32_PROMPTS

# Of router logits: bf16 keeps 8 bits, and the roundings of three layers add up to a few last places.
NEAR_TIE = 0.05
# Of logits, relative to the largest: some 20 roundings of 2^-9 each along the longest path.
BF16_BOUND = 0.04
FAMILIES = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router"}
PROMPTS = random_prompts((1, 2, 3, 5, 7, 8, 10, 12, 13, 15, 17, 19, 20, 21, 23, 63))


def routing_of(model, router: str, top_k: int, prompts) -> tuple[np.ndarray, np.ndarray]:
    """The reference's sorted ids [N, L, K], and the gap [N, L] of its scores behind the last chosen expert."""
    modules = [m for name, m in model.named_modules() if name.endswith(router)]
    seen = []
    hooks = [m.register_forward_hook(lambda _, __, out: seen.append(out[0].float())) for m in modules]
    try:
        prefill_logits(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    per_prompt = [torch.stack(seen[n : n + len(modules)], dim=1) for n in range(0, len(seen), len(modules))]
    scores = torch.cat(per_prompt)  # [N, L, E]
    assert scores.shape[:2] == (sum(map(len, prompts)), len(modules))
    best = scores.topk(top_k + 1, dim=-1)
    ids = best.indices[..., :top_k].sort(-1).values
    return ids.numpy(), (best.values[..., top_k - 1] - best.values[..., top_k]).numpy()


def prefill(llm, prompts):
    """Sorted ids [N, L, K] of the engine, and the logits of every prompt's last place."""
    recorder = llm.engine.record()
    logits = llm.engine.keep_logits()
    llm.generate(prompts, SamplingParams(max_tokens=1))
    return np.sort(recorder.trace().expert_ids, axis=-1), [logits[n][0] for n in range(len(prompts))]


def differing_prompts(ours, theirs) -> list[bool]:
    """Whether any token of a prompt was routed differently in any layer."""
    starts = np.cumsum([0, *map(len, PROMPTS)])
    return [bool((ours[a:b] != theirs[a:b]).any()) for a, b in pairwise(starts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_then_logits(family, tmp_path):
    case = Case(family, tmp_path, torch.bfloat16)
    model = case.reference()
    with LLM(case.original, config("2", dtype="auto")) as llm:
        assert llm.engine.model.dtype == torch.bfloat16
        ours, logits = prefill(llm, PROMPTS)
        theirs, gap = routing_of(model, FAMILIES[family], llm.engine.blueprint.top_k, PROMPTS)
        equal, clear = (ours == theirs).all(-1), gap > NEAR_TIE  # [N, L]
        assert clear.mean() > 0.8
        assert equal[clear].mean() > 0.995, equal[clear].mean()
        assert equal.mean() > 0.97, equal.mean()

        reference = prefill_logits(model, PROMPTS)
        differs = differing_prompts(ours, theirs)
        assert sum(differs) <= len(PROMPTS) // 2
        errors = [
            float((x - y[-1]).abs().max() / y[-1].abs().max())
            for x, y, other in zip(logits, reference, differs)
            if not other
        ]
        assert max(errors) < BF16_BOUND, errors
        shuffled = np.roll(theirs, 1, axis=0)  # wrong controls: another token's routing, another prompt's logits
        assert (ours == shuffled).all(-1).mean() < 0.5
        wrong = [float((x - y[-1]).abs().max() / y[-1].abs().max()) for x, y in zip(logits, reference[1:])]
        assert min(wrong) > BF16_BOUND, wrong


def test_bf16_checkpoint_computed_in_fp32(tmp_path):
    """Experts stay bf16 in their slots and are widened as they are used: the same numbers as transformers' fp32."""
    case = Case("qwen3_moe", tmp_path, torch.bfloat16)
    case.dtype = torch.float32
    with LLM(case.original, config("2")) as llm:
        assert llm.engine.model.dtype == torch.float32
        assert llm.engine.blueprint.index.dtype == torch.bfloat16
        said = engine_says(llm, FP32_PROMPTS)
    assert said.tokens == case.said().tokens
    assert relative_error(said, case.said()) <= FP32_BOUND
