"""Ctrl-C under a real torchrun, while the ranks load and while they step: one sentence a job, finished lines stay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch import kill_ranks
from tests.launch.kill_ranks import ROOT, Case
from tests.patience import PATIENCE_S, until

NUM_LONG = 400


def is_loading(rank: psutil.Process) -> bool:
    """Whether it has begun to load torch, which takes seconds."""
    return "libtorch" in Path(f"/proc/{rank.pid}/maps").read_text()


def test_torch_is_loaded_where_an_interrupt_is_a_sentence():
    code = "import sys, moe.launch.torchrun; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.heavy
@pytest.mark.parametrize("moment", ["loading", "stepping"])
def test_an_interrupt_is_one_sentence_and_finished_lines_stay(tmp_path, moment):
    output = tmp_path / "out.jsonl"
    kill_ranks.write_requests(tmp_path / "in.jsonl", NUM_LONG)  # they take minutes: an interrupt is never too late
    job = kill_ranks.start(Case(0, 2, "all_to_all", "1.0", None, 0.0), tmp_path / "in.jsonl", output)
    if moment == "loading":
        until(lambda: len(ranks := kill_ranks.ranks_of(job)) == 2 and all(map(is_loading, ranks)))
    else:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 3)
    os.killpg(job.pid, signal.SIGINT)
    said, _ = job.communicate(timeout=PATIENCE_S)
    sentences = [line for line in said.splitlines() if "moe.launch.torchrun: " in line]
    assert sentences == ["moe.launch.torchrun: interrupted"], said
    # torchrun itself shows a traceback of its own frames; none of ours may be in one.
    assert not [line for line in said.splitlines() if 'File "' in line and f"{ROOT}/" in line and ".venv" not in line]
    texts, faults = kill_ranks.answers(output)
    assert faults == []
    if moment == "stepping":
        assert 3 <= len(texts) < kill_ranks.NUM_LINES + NUM_LONG
