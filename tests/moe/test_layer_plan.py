"""Which families run by compiled blocks, that a wrong block is found, and that cuts and neighbours change no bit."""

import pytest
import torch

from moe.kernels.cpu import load_helper
from moe.layer.routing import WholeForwards
from moe.llm import LLM
from moe.models import layer_plan
from moe.models.layer_plan import LayerPlan, plan_layers
from tests.families import tiny_checkpoint
from tests.moe.moe_cases import PROMPTS, TINYMOE, config, engine_says

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
PLANNED = {  # router too?
    **{"mixtral": True, "qwen2_moe": False, "qwen3_moe": True, "olmoe": True, "glm4_moe": False, "gpt_oss": True},
}
NOT_PLANNED = {
    "deepseek_v3": "parts of its own",
    "granitemoe": "parts of its own",
    "dbrx": "is made of",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*PLANNED, *NOT_PLANNED])
def test_families(family, dtype, tmp_path):
    folder = tiny_checkpoint(family, tmp_path / "model", torch.float32)
    with LLM(folder, config("1.0", dtype=dtype)) as llm:
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


class Calls:
    """Counts what asks for all layers in one call, and what then is one."""

    def __init__(self, llm):
        self.asked, self.whole, self.plan = 0, 0, llm.engine.loaded.memory.runner.plan
        self.ask = llm.engine.experts.in_one_call
        self.plan.use(self)

    def __call__(self, blocks):
        found = self.ask(blocks)
        self.asked, self.whole = self.asked + 1, self.whole + (found is not None)
        return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layers_in_one_call_say_what_layers_say(dtype):
    with LLM(TINYMOE, config("1.0", dtype=dtype, prefix_sharing=False)) as llm:
        by_layers, hits = None, None
        for ask in (lambda blocks: None, llm.engine.experts.in_one_call):
            llm.engine.experts.cache.reset_stats()
            llm.engine.loaded.memory.runner.plan.use(ask)
            said = engine_says(llm, PROMPTS)
            assert by_layers is None or by_layers.tokens == said.tokens
            assert by_layers is None or all(torch.equal(a, b) for a, b in zip(by_layers.logits, said.logits))
            counted = [(s.hits, s.misses, s.waves) for s in llm.engine.layer_stats()]
            assert hits is None or hits == counted
            by_layers, hits = said, counted


def test_one_call_is_for_few_tokens_in_slots_that_nobody_looks_at(monkeypatch):
    with LLM(TINYMOE, config("1.0")) as llm:
        calls = Calls(llm)
        engine_says(llm, PROMPTS)
        assert 0 < calls.whole == calls.asked
        monkeypatch.setattr(layer_plan, "FEW_TOKENS", 1)  # prompts go layer by layer, and then tokens one by one do not
        before = calls.asked
        engine_says(llm, PROMPTS[:1])
        assert before < calls.asked < before + 40
        calls.asked = calls.whole = 0
        seen = []
        llm.engine.loaded.dense.routing.observers.append(WholeForwards(6, lambda step, layers: seen.append(step)))
        engine_says(llm, PROMPTS[:1])
        assert (calls.asked > 0, calls.whole, len(seen) > 0) == (True, 0, True)
    with LLM(TINYMOE, config("0.9")) as llm:
        calls = Calls(llm)
        engine_says(llm, PROMPTS[:1])
        assert (calls.asked > 0, calls.whole) == (True, 0)
    with LLM(TINYMOE, config("1.0")) as llm:  # whoever puts another compute in its place is called
        calls, module = Calls(llm), llm.engine.loaded.memory.runner.plan.layers[2].mlp.experts
        compute, called = module.compute, []
        module.compute = lambda *args: called.append(1) or compute(*args)
        engine_says(llm, PROMPTS[:1])
        assert (calls.asked, len(called) > 0) == (0, True)
