"""`verify` finds nothing wrong with a right run, and finds a broken expert."""

import dataclasses

import pytest
import torch

from moe.llm import LLM
from moe.params import SamplingParams
from moe.verify import Answers, answer, compare, verify
from tests.moe.moe_cases import TINYMOE, config

PROMPTS = ["Once upon a time", "ROMEO:\nO, she", "def read(self", [5, 6, 7]]
PARAMS = SamplingParams(max_tokens=12)


def test_a_right_run_agrees_with_everything_in_memory():
    result = verify(TINYMOE, config("2", max_tokens=5), PROMPTS, PARAMS)
    assert result.agreement == 1.0
    assert result.num_prompts == 4
    assert result.num_tokens == result.num_equal > 12
    assert result.max_abs_logit_delta <= 1e-5 * result.max_abs_logit
    assert "100.00%" in str(result)
    with pytest.raises(ValueError, match="no prompts"):
        verify(TINYMOE, config("2"), [], PARAMS)


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("1.0")) as llm:
        yield llm


def broken(llm, expert, change) -> Answers:
    """What the model says while one expert's down projection of layer 2 is changed."""
    cache = llm.engine.experts.cache
    weights = cache.views(2)["down"][int(cache.resident_slots(2)[expert])]
    kept = weights.clone()
    weights.copy_(change(weights))
    try:
        return answer(llm, PROMPTS, PARAMS)
    finally:
        weights.copy_(kept)


def test_a_broken_expert_is_found(llm):
    full = answer(llm, PROMPTS, PARAMS)
    assert compare(answer(llm, PROMPTS, PARAMS), full).max_abs_logit_delta == 0.0
    zeroed = [compare(broken(llm, e, torch.zeros_like), full) for e in range(6)]
    assert all(r.max_abs_logit_delta > 0.01 for r in zeroed)
    assert min(r.agreement for r in zeroed) < 1
    slightly = [compare(broken(llm, e, lambda w: w * 1.01), full) for e in range(2)]
    assert all(r.max_abs_logit_delta > 1e-3 for r in slightly)


def test_nan_is_no_agreement(llm):
    full = answer(llm, PROMPTS, PARAMS)
    for expert in range(2):
        nan = broken(llm, expert, lambda w: w * torch.nan)
        assert compare(nan, full).max_abs_logit_delta == float("inf")
        assert compare(nan, nan).max_abs_logit_delta == float("inf")


def test_tokens_are_compared_place_by_place_and_logits_up_to_the_first_difference(llm):
    full = answer(llm, PROMPTS[:1], PARAMS)
    short = answer(llm, PROMPTS[:1], SamplingParams(max_tokens=5))
    result = compare(short, full)
    assert (result.num_tokens, result.num_equal) == (len(full.outputs[0].outputs[0].token_ids), 5)
    logits = full.logits[0].clone()
    logits[7:] += 100
    outputs = [
        dataclasses.replace(
            full.outputs[0],
            outputs=[
                dataclasses.replace(c, token_ids=[*c.token_ids[:6], -1, *c.token_ids[7:]])
                for c in full.outputs[0].outputs
            ],
        )
    ]
    result = compare(Answers(outputs, [logits]), full)
    assert result.num_equal == result.num_tokens - 1
    assert result.max_abs_logit_delta == 0.0  # place 6 differs; what follows has another prefix
