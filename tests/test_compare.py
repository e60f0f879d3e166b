"""The comparison with peers runs to its end on a toy, checks tokens, and says why a peer cannot run."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench_rounded, compare
from bench.walk_model import TINY, answers_to, prompts_of, write


@pytest.mark.heavy
def test_engines_of_this_environment_walk_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.ENVIRONMENTS, "vllm", ("no-such-package-of-this-name",))
    args = argparse.Namespace(work=tmp_path, threads=1, rounds=2, busy=1, only="ours,transformers grouped,vllm")
    said = compare.run_resident(args, TINY)
    assert "1 thread(s), beside 1 busy process(es)" in said
    assert said.count("| 1x64 | ours | ") == 1
    assert said.count("| 1x64 | transformers grouped_mm | ") == 1
    assert "other tokens" not in said
    assert "| vllm compiled | cannot run: no-such-package-of-this-name" in said


def test_peers_have_the_environment_of_the_command(tmp_path):
    """Not that of a process that has imported moe, which asks OpenMP for threads that sleep."""
    code = f"""
import os, subprocess
from pathlib import Path
from bench import compare
import moe
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
found = {{}}
class Caught(Exception): pass
def caught(*words, env, **how):
    found.update(env)
    raise Caught
subprocess.Popen = caught
try:
    compare.Worker(compare.Candidate("ours", "ours", {{}}), 2, Path({str(tmp_path)!r}), None)
except Caught:
    assert found["OMP_NUM_THREADS"] == "2"
    assert "OMP_WAIT_POLICY" not in found
else:
    raise AssertionError("no process")
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


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


def test_a_rounded_models_step_is_foretold_from_bytes_alone():
    plain = {"step": 10.0, "expert_seconds": 6.0, "dense_seconds": 2.0, "stall_seconds": 0.0}
    plain |= {"expert_bytes": 100.0, "dense_bytes": 40.0, "bytes_read": 0.0}
    rounded = {"expert_bytes": 50.0, "dense_bytes": 10.0, "bytes_read": 0.0}
    assert bench_rounded.foretold(plain, rounded) == 3.0 + 0.5 + 2.0


@pytest.mark.heavy
@pytest.mark.parametrize("budget", ["1.0", "0.25"])  # all in memory: layers that one call would compute
def test_rounded_models_walk_the_same_way_and_their_steps_are_divided(tmp_path, budget):
    args = argparse.Namespace(work=tmp_path, rounds=1, tiny=True)
    rows = bench_rounded.measure(args, write(tmp_path / "model", TINY), budget)
    for by_name in rows.values():
        (plain,), *others = by_name.values()
        assert list(by_name) == ["bf16", "int8", "int4"]
        assert min(plain["expert_seconds"], plain["dense_seconds"]) > 0
        assert plain["expert_seconds"] + plain["dense_seconds"] + plain["stall_seconds"] < plain["step"]
        for key in ("expert_bytes", "dense_bytes", "bytes_read")[: 2 if budget == "1.0" else 3]:
            sizes = [plain[key], *(rounds[0][key] for rounds in others)]
            assert sizes == sorted(sizes, reverse=True), key
            assert sizes[-1] > 0
    assert "| 1 sequence | int4 | " in "\n".join(bench_rounded.table(rows))
