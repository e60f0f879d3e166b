"""The bytes that `moe simulate` prints are those that a run over real ranks prints, both as a user would start them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_parallel import DEMO

from moe.placement.plan import Plan
from moe.placement.topology import Topology
from tests.patience import PATIENCE_S

PROMPTS = ["Once upon a time there was a", "The dog ran", "Lily and Tom went to the park", "One day", "He said, I am"]
BODY = {"max_tokens": 5, "temperature": 0}
NUM_RANKS = 4
DISPATCHERS = ("all_to_all", "hierarchical", "coherent")
MODES = [(d, c, t) for d in DISPATCHERS for c in ("exact", "partial") for t in ("auto", "float32")]  # auto: bf16


def command(*words: object) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def links(text: str) -> list[list[int]]:
    """The rows "rank N  bytes ..." of the table of bytes by link."""
    lines = text[text.index("from row to column") :].splitlines()
    rows = [re.findall(r"\d+", line) for line in lines if re.search(r"^\W*rank \d", line)]
    return [[int(n) for n in row[1:]] for row in rows if len(row) == 1 + NUM_RANKS]


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    asked = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/completions"} for n in range(len(PROMPTS))]
    lines = [json.dumps(one | {"body": BODY | {"prompt": prompt}}) for one, prompt in zip(asked, PROMPTS, strict=True)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
    Plan.random(6, 16, NUM_RANKS, seed=3).save(folder / "plan.json")
    Topology.uniform(2, 2).save(folder / "topology.json")
    return folder


@pytest.fixture(scope="module")
def recorded(asked) -> Callable[[str], Path]:
    """The trace in a dtype, made when it is first asked for."""

    def of(dtype: str) -> Path:
        path = asked / f"{dtype}.npz"
        if not path.exists():
            command("-m", "moe", "trace", DEMO, asked / "in.jsonl", path, "--max-tokens", 5, "--set", f"dtype={dtype}")
        return path

    return of


@pytest.mark.heavy
@pytest.mark.parametrize(("dispatcher", "combine", "dtype"), MODES)
def test_predicted_is_measured_from_the_command_line(asked, recorded, dispatcher, combine, dtype, tmp_path):
    plan, topology = asked / "plan.json", asked / "topology.json"
    mode = ["--topology", topology, "--dispatcher", dispatcher, "--combine", combine]
    said = command("-m", "moe", "simulate", recorded(dtype), plan, *mode)
    parallel = [f"plan={plan}", f"dispatcher={dispatcher}", f"combine={combine}", "ranks_per_node=2"]
    settings = [f"dtype={dtype}", *(f"parallel.{one}" for one in parallel)]
    sets = [word for one in settings for word in ("--set", one)]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", NUM_RANKS, "--standalone", "-m", "moe.launch.torchrun"]
    ran = command(*start, DEMO, asked / "in.jsonl", tmp_path / "out.jsonl", *sets)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(PROMPTS)
    predicted = links(said)
    assert [len(row) for row in predicted] == [NUM_RANKS] * NUM_RANKS
    assert sum(map(sum, predicted)) > 0
    assert links(ran) == predicted
