"""The device path on CPU tensors, by the interpreter: what runs on a GPU says what the host path says."""

import pytest

from moe.llm import LLM
from moe.models.paged import PagedDecode, paged
from moe.params import SamplingParams
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, TINYMOE, Case, config, engine_says, greedy, relative_error

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "glm4_moe"]
SHORT = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]


def device_path(budget, **batch):
    return config(budget, kernel="grouped", block_size=4, **batch)


def says_the_same(folder, budget, prompts, new):
    with LLM(folder, config(budget)) as llm:
        wanted = engine_says(llm, prompts, greedy(new))
    with LLM(folder, device_path(budget)) as llm:
        assert isinstance(llm.engine.loaded.memory.runner.kv.alone, PagedDecode)
        found = engine_says(llm, prompts, greedy(new))
    assert found.tokens == wanted.tokens
    assert relative_error(found, wanted) <= FP32_BOUND


def test_one_family_with_sinks_and_windows(tmp_path):
    says_the_same(Case("gpt_oss", tmp_path).original, "1.0", SHORT, 3)


@pytest.mark.heavy
@pytest.mark.parametrize("family", FAMILIES)
def test_families_at_all_budgets(family, tmp_path):
    folder = Case(family, tmp_path).original
    for budget in ("1.0", "0.5", "3"):
        says_the_same(folder, budget, PROMPTS, 4)


@pytest.mark.heavy
def test_the_demo_model_drawn_by_seeds(tmp_path):
    params = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, seed=4)
    answers = []
    for one in (config("1.0"), device_path("1.0")):
        with LLM(TINYMOE, one) as llm:
            answers.append([o.outputs[0].token_ids for o in llm.generate(["The old", "A number of"], params)])
    assert answers[0] == answers[1]


def test_latents_are_attended_as_they_are_cached(tmp_path):
    says_the_same(Case("deepseek_v3", tmp_path).original, "1.0", [PROMPTS[0], PROMPTS[1]], 3)


def test_another_matrix_of_latents_is_found(tmp_path, monkeypatch):
    with LLM(Case("deepseek_v3", tmp_path).original, config("1.0", kernel="reference")) as llm:
        model = llm.engine.model
        assert all(one.latent is not None for one in paged(model, 256))
        kind = type(model.model.layers[0].self_attn)
        right = kind.expand_kv

        def wrong(self, *latents):
            keys, values = right(self, *latents)
            return keys * 1.01, values

        monkeypatch.setattr(kind, "expand_kv", wrong)
        assert "latents" in paged(model, 256)


def test_steps_of_prompts_and_answers_together(tmp_path):
    """A long prompt in chunks beside one that decodes; experts by the reference, which is quicker."""
    folder = Case("qwen3_moe", tmp_path).original
    prompts = [PROMPTS[1], PROMPTS[3]]
    with LLM(folder, config("1.0", kernel="reference", max_tokens=8, block_size=4)) as llm:
        wanted = engine_says(llm, prompts, greedy(4))
        kv, steps = llm.engine.loaded.memory.runner.kv, []
        lay_out = PagedDecode(kv, paged(llm.engine.model, 256))
        kv.alone = lambda *step: steps.append(lay_out(*step)) or steps[-1]
        found = engine_says(llm, prompts, greedy(4))
    assert found.tokens == wanted.tokens
    assert relative_error(found, wanted) <= FP32_BOUND
    assert any(step.others is not None for step in steps if step is not None)
    assert any(step.others is None for step in steps if step is not None)
