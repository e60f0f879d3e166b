"""Which families decode by blocks of kernels, that a wrong block is found, and that tokens are the host path's."""

import pytest
import torch

from moe.llm import LLM
from moe.models import layer_plan
from moe.models.decode_plan import DecodePlan, plan_decoding
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, config, engine_says, greedy, relative_error


def test_a_model_decodes_by_blocks_and_a_wrong_one_is_found(tmp_path, monkeypatch):
    folder = tiny_checkpoint("qwen3_moe", tmp_path / "model", torch.float32)
    with LLM(folder, config("1.0", kernel="reference")) as llm:
        wanted = engine_says(llm, PROMPTS[:2], greedy(3))
        model = llm.engine.model
        right = layer_plan._planned
        for wrong in ({"scale": 0.2}, {"rotary": 4}, {"eps": 0.1}):
            monkeypatch.setattr(
                layer_plan,
                "_planned",
                lambda *args, wrong=wrong: (one := right(*args))._replace(block=one.block._replace(**wrong)),
            )
            assert "differs from transformers'" in plan_decoding(model, 1024)
    monkeypatch.setattr(layer_plan, "_planned", right)
    with LLM(folder, config("1.0", kernel="grouped", block_size=4)) as llm:
        assert isinstance(llm.engine.loaded.memory.runner.decoding, DecodePlan)
        found = engine_says(llm, PROMPTS[:2], greedy(3))
    assert found.tokens == wanted.tokens
    assert relative_error(found, wanted) <= FP32_BOUND


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe"])
def test_families(family, dtype, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "model", dtype)
    with LLM(folder, config("1.0", dtype=str(dtype).removeprefix("torch."), kernel="grouped", block_size=4)) as llm:
        layers = plan_decoding(llm.engine.model, llm.engine.max_context)
        assert isinstance(layers, list), layers
        assert {one.block.round_once for one in layers} == {(family, dtype) == ("gpt_oss", torch.bfloat16)}
