"""Every kernel the engine can choose says the same; the measured choice is stored and used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe.config import EngineConfig, OffloadConfig
from moe.layer import kernel_choice
from moe.llm import LLM
from moe.params import SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
CONFIG = EngineConfig(dtype="float32", offload=OffloadConfig(budget="24"))
PROMPTS = [[5, 9, 300]]
PARAMS = SamplingParams(max_tokens=2)


def tokens_of(config: EngineConfig) -> list[list[int]]:
    with LLM(DEMO, config) as llm:
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("kernel", ["reference", "grouped", "single_launch"])
def test_kernels_give_the_same_greedy_tokens(kernel):
    assert tokens_of(replace(CONFIG, kernel=kernel)) == tokens_of(replace(CONFIG, kernel="cpu"))


@pytest.mark.heavy
def test_the_faster_path_is_measured_once_and_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_choice, "_measure", counted := Counted(kernel_choice._measure))
    monkeypatch.setattr(kernel_choice, "MEASURED_TOKENS", (1,))
    config = replace(CONFIG, kernel="measured", crossover_table=str(tmp_path / "table.json"))
    expected = tokens_of(replace(CONFIG, kernel="cpu"))
    assert tokens_of(config) == expected
    assert counted.calls == 1  # six layers of one shape
    (rows,) = json.loads((tmp_path / "table.json").read_text()).values()
    assert [row["tokens"] for row in rows] == [1]
    assert tokens_of(config) == expected
    assert counted.calls == 1


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_triton_kernels_are_refused_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="kernel 'grouped' needs a GPU"):
        tokens_of(replace(CONFIG, kernel="grouped"))
