"""The GPU session runs to its end without a GPU, from a plain checkout: every phase, no failure, rows as they come."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_layers import LAYERS, TINY, Case, candidates, error_of, published
from bench.gpu_measure import Clock, Rotation, Rows
from bench.gpu_session import PHASES

ROOT = Path(__file__).resolve().parents[2]
SHELL = ROOT / "bench" / "gpu_session.sh"


def test_every_candidate_is_right_where_experts_are_elsewhere():
    for layer in TINY:
        case = Case(layer, torch.device("cpu"), torch.float32)
        inputs = case.inputs(3, "power_law")
        errors = {name: error_of(case.weights, make()(*inputs), *inputs) for name, make in candidates(case, 3).items()}
        assert set(errors) == {"grouped", "usual tile", "torch grouped_mm", "single"}
        assert max(errors.values()) <= 1e-6, errors


def test_a_wrong_result_is_seen():
    case = Case(TINY[0], torch.device("cpu"), torch.float32)
    x, ids, w = case.inputs(3, "balanced")
    assert error_of(case.weights, torch.zeros_like(x), x, ids, w) > 0.9
    assert error_of(case.weights, torch.full_like(x, torch.nan), x, ids, w) != 0


def test_candidates_take_turns_and_never_begin_with_the_same_routing():
    seen = []
    sets = [(torch.full((1,), float(n)),) for n in range(4)]

    def run(name):
        return lambda x: seen.append((name, int(x))) or x

    ready = {name: Rotation(run(name), sets, 2 * n, graph=False) for n, name in enumerate("ab")}
    seen.clear()
    found = Clock(torch.device("cpu")).turns(ready, 1)
    assert seen[:8] == [*(("a", n) for n in (0, 1, 2, 3)), *(("b", n) for n in (2, 3, 0, 1))]
    assert set(found) == {"a", "b"}


def test_rows_are_on_disk_at_once_and_a_failure_is_a_row(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "kernels")
    rows.add(tokens=1)
    with rows.attempt(tokens=2):
        raise RuntimeError("it broke\nand more")
    rows.add(tokens=3)
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in found] == [1, 2, 3]
    assert found[1]["failed"] == "RuntimeError: it broke"
    assert rows.num_failed == 1


def test_published_times_are_here():
    rows = {(layer.name, tokens, kind): us for layer in LAYERS for tokens, kind, us in published(layer)}
    assert {us for (name, tokens, kind), us in rows.items() if (tokens, kind) == (1, "balanced")} == {40.3, 211.6}


def plain_checkout(folder: Path) -> Path:
    """The files of a clone, with neither compiled helpers nor a solver."""
    skipped = shutil.ignore_patterns(
        "*.so", ".venv*", ".git", "__pycache__", "build", "*.egg-info", "results", ".*_cache"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=skipped)
    (folder / "highspy.py").write_text('raise ImportError("no highspy on this machine")\n')
    return folder


@pytest.mark.heavy
def test_the_whole_session_runs_without_a_gpu(tmp_path):
    checkout, out = plain_checkout(tmp_path / "checkout"), tmp_path / "out"
    settings = {"OUT": str(out), "TINY": "1", "TRITON_INTERPRET": "1", "PYTHON": sys.executable, "BUDGET": "1700"}
    command = ["bash", str(checkout / "bench" / "gpu_session.sh")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    phases = [json.loads(line) for line in (out / "phases.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {phase["phase"]: phase["rc"] for phase in phases} == dict.fromkeys(PHASES, 0), done.stdout
    assert {row["phase"] for row in rows} == set(PHASES)
    assert not [row for row in rows if "failed" in row]
    assert all(row["right"] for row in rows if "right" in row)
    assert sum(f.stat().st_size for f in out.iterdir()) < 1 << 20


def test_a_session_without_time_says_so(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "BUDGET": "0", "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(SHELL)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    phases = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert {p["phase"] for p in phases} >= set(PHASES)
    assert all("skipped" in p for p in phases)
