"""A recorded trace is the routing that hooks on transformers' own routers see, however the prompts were served."""

import numpy as np
import pytest
import torch

from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.trace import RoutingTrace
from tests.families import tiny_config
from tests.moe.moe_cases import Case, config, greedy, random_prompts

NUM_NEW = 6
PROMPTS = random_prompts((5, 1, 37, 20, 63))
# A new token, unlike the prompt's, depends on the logits: these bounds are of fp32 routing weights.
WEIGHT_BOUND = 1e-5


def routing_of(model, modules, tokens):
    """What each of the experts modules was called with: (ids, weights)."""
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[1:])) for m in modules]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


class Expected:
    """ids [N, L, K] and weights of each sequence, prompt and answer but for the last token, which is never computed."""

    def __init__(self, case, router: str, num_new: int = NUM_NEW) -> None:
        model = case.reference()
        model.generation_config.eos_token_id = None
        self.ids, self.weights, self.lengths = [], [], []
        modules = [m for name, m in model.named_modules() if name.endswith(router)]
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False)
            seen = routing_of(model, modules, tokens[:, :-1])
            self.ids.append(torch.stack([i for i, _ in seen], dim=1).numpy())
            self.weights.append(torch.stack([w for _, w in seen], dim=1).detach().numpy())
            self.lengths.append(len(prompt) + num_new - 1)

    def assert_equals(self, trace: RoutingTrace) -> None:
        assert trace.sequence_lengths.tolist() == self.lengths
        assert np.array_equal(trace.expert_ids, np.concatenate(self.ids))
        assert np.abs(trace.weights - np.concatenate(self.weights)).max() <= WEIGHT_BOUND
        phases = np.split(trace.phase, np.cumsum(self.lengths)[:-1])
        for phase, prompt in zip(phases, PROMPTS):
            assert phase.tolist() == [0] * len(prompt) + [1] * (len(phase) - len(prompt))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def expected(case):
    return Expected(case, "mlp.experts")


SERVED = {
    "in one batch": config("1.0", max_tokens=512, max_sequences=8),
    "in chunks, one slot": config("1 expert", max_tokens=7, max_sequences=3, block_size=4),
    "preempted": config("0.5", max_tokens=24, max_sequences=5, kv_tokens=80, block_size=8),
    "not packed": config("0.5", packed=False),
}


@pytest.mark.parametrize("how", SERVED)
def test_routing_is_the_references(case, expected, how):
    with LLM(case.original, SERVED[how]) as llm:
        recorder = llm.engine.record()
        llm.generate(PROMPTS, greedy(NUM_NEW))
        assert (llm.engine.stats.preemptions > 0) == (how == "preempted")
        trace = recorder.trace()
        expected.assert_equals(trace)
        assert (trace.num_experts, trace.model) == (8, "original")
        if how == "in one batch":  # shared prefixes would leave tokens out: they are computed while recording
            llm.generate(PROMPTS, greedy(NUM_NEW))
            twice = recorder.trace()
            assert twice.sequence_lengths.tolist() == expected.lengths * 2
            assert np.array_equal(twice.expert_ids[: trace.num_tokens], twice.expert_ids[trace.num_tokens :])
            wrong = trace.expert_ids[::-1]
            assert not np.array_equal(wrong, np.concatenate(expected.ids))


def test_a_model_that_cannot_be_packed(tmp_path):
    case = Case("jamba", tmp_path)
    with LLM(case.original, config("2", max_sequences=3)) as llm:
        assert not llm.engine.is_packed
        recorder = llm.engine.record()
        llm.generate(PROMPTS, greedy(NUM_NEW))
        Expected(case, "feed_forward.experts").assert_equals(recorder.trace())


def test_saved_and_read_again(case, tmp_path):
    with LLM(case.original, config("1.0")) as llm:
        recorder = llm.engine.record()
        llm.generate(PROMPTS[:2], SamplingParams(max_tokens=2, ignore_eos=True))
        trace = recorder.trace()
    for name in ("trace.npz", "trace.safetensors"):
        trace.save(tmp_path / name)
        again = RoutingTrace.load(tmp_path / name)
        assert np.array_equal(again.expert_ids, trace.expert_ids)
        assert np.array_equal(again.phase, trace.phase)
        assert again.expert_ids.shape == (5 + 1 + 2, tiny_config("qwen3_moe").num_hidden_layers, 4)


def test_what_cannot_be_recorded(case, tmp_path):
    with LLM(case.original, config("1.0")) as llm:
        request = llm.engine.add_request([1, 2, 3], greedy(4))
        with pytest.raises(ValueError, match="requests are running"):
            llm.engine.record()
        llm.engine.finish(request, "abort")
        with pytest.raises(ValueError, match="no routing was recorded"):
            llm.engine.record().trace()
    with LLM(Case("switch_transformers", tmp_path / "switch").original, config("1.0")) as llm:
        with pytest.raises(ValueError, match="encoder-decoder"):
            llm.engine.record()
    with LLM(Case("nllb_moe", tmp_path / "nllb").original, config("1.0")) as llm:
        with pytest.raises(ValueError, match="no experts in slots"):
            llm.engine.record()
