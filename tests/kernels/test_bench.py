"""The GPU benchmark runs to its end in the interpreter: checks, every candidate, one JSON document last."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
def test_bench_runs_without_a_gpu():
    command = [sys.executable, "-m", "bench.bench_kernels", "--tiny"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["skipped"] == []
    found = [set(row["found"]) for row in document["rows"]]
    assert {"grouped", "torch._grouped_mm", "single", "fp8", "int8"} in found
    assert {"2 ranks", "grouped"} in found
