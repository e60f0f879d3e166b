"""A network partition under Ray: the host that is cut off is given up and stays out, and no token is lost."""

import json
import os
import subprocess
import sys

import pytest

from bench.hosts import hosts, why_not
from moe.config import EngineConfig
from moe.llm import LLM
from tests.moe.partition import DEMO, PARAMS, PROMPTS, ROOT
from tests.patience import PATIENCE_S

pytest.importorskip("ray")
pytestmark = pytest.mark.heavy


def test_a_host_behind_a_cut_link_is_given_up_and_stays_out():
    if reason := why_not():
        pytest.skip(f"no hosts here: {reason}")
    with LLM(DEMO, EngineConfig(dtype="float32", threads=1)) as llm:
        right = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    with hosts() as names:
        # Processes of a namespace of their own: all of Ray ends with the program, whatever becomes of it.
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*alone, "ip", "netns", "exec", names[0], sys.executable, "-m", "tests.moe.partition", "all_to_all"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        said = subprocess.run(
            [*command, *names], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
    assert said.returncode == 0, said.stderr[-3000:]
    seen = json.loads(said.stdout.splitlines()[-1])
    assert seen["tokens"] == right
    assert seen["ran apart"]  # nothing that the controller did could reach it
    assert seen["serving"] == [n for n in sorted(map(int, seen["hosts"])) if n != seen["far"]], seen["noted"]
    # cluster.silence_s is 10; the last beat came up to 0.25 s before
    assert seen["given up after"] >= 9.5, seen["noted"]
    assert seen["ended when the link was back"]
    assert seen["serving afterwards"] == seen["serving"]  # it is fenced
    assert seen["again"] == right
