"""Decoding steps from graphs say what eager ones say, by a double that replays what the device was given."""

from dataclasses import replace

import pytest
import torch

from moe.engine import assemble
from moe.engine.device_paths import use_paths
from moe.engine.graphs import DecodeGraphs, why_not
from moe.llm import LLM
from moe.offload.device_cache import DeviceCache
from moe.offload.device_slots import DeviceSlots
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Case, config, engine_says, greedy, relative_error
from tests.recording import Recording


@pytest.fixture(autouse=True)
def torchs_own_dense(monkeypatch):
    """As on a GPU: what the CPU's compiled helper computes is neither an operator nor a kernel."""
    monkeypatch.setattr(assemble, "compile_dense", lambda model: 0)


def device_path(budget="1.0", **settings):
    return config(budget, **({"kernel": "grouped", "block_size": 4} | settings))


def graphs_of(llm) -> DecodeGraphs:
    engine = llm.engine
    runner = engine.loaded.memory.runner
    runner.replays = DecodeGraphs(runner, engine.experts, engine.max_context, Recording())
    return runner.replays


def says_the_same(folder, prompts, new, store="file", **settings):
    """With graphs and without; of experts in host memory the device fetches what is missing, inside of graphs too."""
    one = device_path(**settings)
    with LLM(folder, one if store == "file" else config(settings["budget"])) as llm:
        wanted = engine_says(llm, prompts, greedy(new))
        counts = [(s.hits, s.waves, s.misses) for s in llm.engine.layer_stats()]
    with LLM(folder, replace(one, offload=replace(one.offload, store=store))) as llm:
        graphs = graphs_of(llm)
        assert isinstance(llm.engine.experts.runner.slots, DeviceSlots if store == "file" else DeviceCache)
        found = engine_says(llm, prompts, greedy(new))
        assert graphs.num_replays >= (new - 1 if max(map(len, prompts)) < 8 else 1)
        assert [(s.hits, s.waves, s.misses) for s in llm.engine.layer_stats()] == counts
    assert found.tokens == wanted.tokens
    assert relative_error(found, wanted) <= FP32_BOUND


def test_one_family_with_sinks_and_windows(tmp_path):
    """Three sequences in four places."""
    says_the_same(Case("gpt_oss", tmp_path).original, [PROMPTS[0], PROMPTS[1], PROMPTS[0][:3]], 3)


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "glm4_moe"])
@pytest.mark.parametrize("kernel", ["grouped", "single_launch"])
def test_families(family, kernel, tmp_path):
    says_the_same(Case(family, tmp_path).original, PROMPTS, 4, kernel=kernel)


def test_misses_are_served_inside_of_graphs(tmp_path):
    says_the_same(Case("mixtral", tmp_path).original, [PROMPTS[0], PROMPTS[0][:3]], 3, store="ram", budget="0.5")


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "glm4_moe"])
def test_families_at_budgets(family, tmp_path):
    for budget in ("0.5", "0.7"):
        says_the_same(Case(family, tmp_path).original, PROMPTS, 4, store="ram", budget=budget)


def test_what_asks_the_host_is_not_captured_and_said_once(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = Case("mixtral", tmp_path).original
    with LLM(folder, device_path(kernel="reference")) as llm:
        assert "block tables" in why_not(llm.engine.loaded.memory.runner, llm.engine.experts)
    with LLM(folder, device_path("0.5")) as llm:
        graphs = graphs_of(llm)
        engine_says(llm, PROMPTS[:1], greedy(3))
        assert graphs.num_replays == 0
    assert caplog.text.count("without graphs: the host decides what is in slots") == 1


def test_a_forward_that_depends_on_python_is_seen():
    """The double itself: a value that Python takes along is not what the buffer says later."""
    x = torch.arange(3.0)
    replay, out = Recording().capture(lambda: x.mul(2).add_(1))
    x.fill_(5)
    replay()
    assert out.tolist() == [11.0] * 3
    with pytest.raises(RuntimeError, match="asks the host"):
        Recording().capture(lambda: x + float(x.sum()))


def test_on_needs_a_gpu():
    with pytest.raises(ValueError, match="graphs=on cannot be"):
        use_paths(replace(device_path(), graphs="on"), torch.device("cpu"), None, None, 0)
