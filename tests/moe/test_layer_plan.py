"""Which families run by compiled blocks, that a wrong block is found, and that cuts and neighbours change no bit."""

import pytest
import torch

from moe.kernels.cpu import load_helper
from moe.llm import LLM
from moe.models import layer_plan
from moe.models.layer_plan import LayerPlan, plan_layers
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import PROMPTS, TINYMOE, config, engine_says

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
PLANNED = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True, "olmoe": True, "glm4_moe": False}  # router too?
NOT_PLANNED = {
    "deepseek_v3": "parts of its own",
    "gpt_oss": "differs from transformers'",  # pairs of its rotary positions lie elsewhere
    "granitemoe": "parts of its own",
    "dbrx": "is made of",
}


@pytest.mark.parametrize("family", [*PLANNED, *NOT_PLANNED])
def test_families(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "model", torch.float32)
    with LLM(folder, config("1.0")) as llm:
        layers = plan_layers(llm.engine.model, llm.engine.max_context)
        if family in NOT_PLANNED:
            assert NOT_PLANNED[family] in layers
            assert llm.engine.loaded.memory.runner.plan is None
        else:
            assert llm.engine.loaded.memory.runner.plan is not None
            assert all((one.block.router is not None) == PLANNED[family] for one in layers)


def test_the_reference_kernel_runs_by_modules():
    with LLM(TINYMOE, config("1.0", kernel="reference")) as llm:
        assert llm.engine.loaded.memory.runner.plan is None


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.2}, {"window": 3}, {"rotary": 16}, {"eps": 0.1}], ids=lambda wrong: next(iter(wrong))
)
def test_a_wrong_block_is_found(wrong, monkeypatch):
    right = layer_plan._planned

    def planned(*args):
        one = right(*args)
        return one._replace(block=one.block._replace(**wrong))

    with LLM(TINYMOE, config("1.0")) as llm:
        assert isinstance(plan_layers(llm.engine.model, 1024), list)
        monkeypatch.setattr(layer_plan, "_planned", planned)
        assert "differs from transformers'" in plan_layers(llm.engine.model, 1024)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_neighbours_or_chunks(dtype):
    said = []
    for batch in ({"max_tokens": 64, "max_sequences": 4}, {"max_tokens": 5, "max_sequences": 1}):
        with LLM(TINYMOE, config("1.0", dtype=dtype, **batch)) as llm:
            assert isinstance(llm.engine.loaded.memory.runner.plan, LayerPlan)
            said.append(engine_says(llm, PROMPTS))
    assert said[0].tokens == said[1].tokens
    assert all(torch.equal(a, b) for a, b in zip(said[0].logits, said[1].logits))
