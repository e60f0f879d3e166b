"""The comparison with peers runs to its end on a toy, checks tokens, and says why a peer cannot run."""

import argparse

import pytest

from bench import compare
from bench.walk_model import TINY, answers_to, prompts_of, write


@pytest.mark.heavy
def test_engines_of_this_environment_walk_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.ENVIRONMENTS, "vllm", ("no-such-package-of-this-name",))
    args = argparse.Namespace(work=tmp_path, threads=1, rounds=2, only="ours,transformers grouped,vllm")
    said = compare.run_resident(args, TINY)
    assert said.count("| 1x64 | ours | ") == 1
    assert said.count("| 1x64 | transformers grouped_mm | ") == 1
    assert "other tokens" not in said
    assert "| vllm compiled | cannot run: no-such-package-of-this-name" in said


def test_a_wrong_token_is_no_ratio():
    right = [[1, 2, 3]]
    answer = {"tokens": [[1, 2, 4]], "step": 0.1, "notes": {}}
    answer |= {part: {"wall": 1.0, "cpu": 1.0, "disk": 0} for part in ("prefill", "decode")}
    row = compare.Row()
    compare._add(row, compare.Job("j", 1, 4, 3), answer, right)
    assert "| j | x | other tokens |" in compare.report("t", {"j": {"x": row}}, {}, "x")


def test_the_walk_is_one_cycle(tmp_path):
    folder = write(tmp_path / "model", TINY)
    (answer,) = answers_to(folder, prompts_of(folder, 1, 4, 0), TINY.vocab)
    assert sorted(answer) == list(range(TINY.vocab))
