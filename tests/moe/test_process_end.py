"""A process ends with its own status, whatever its threads were about to do.

Python ends a thread that asks for its lock once it finalizes; within torch that aborts the process. Nobody closes
anything here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.patience import PATIENCE_S

TINY = Path(__file__).parents[2] / "examples" / "tinymoe"

READING = """
import threading
import torch
from moe.offload.readers import Arrival, Batch, Job, Readers

ones, here, begun = torch.ones(1 << 22), torch.empty(1 << 22), threading.Event()

def read(job):
    begun.set()
    for _ in range(100):
        here.copy_(ones)
    return Arrival(job, 0, None)

Readers(2, read).put_ahead([Job(0, 0, 0, Batch(), due=1)])
assert begun.wait(600)
"""

SERVICE = f"""
import threading
from moe import LLM, SamplingParams
from moe.service import Service

begun = threading.Event()
service = Service(LLM({str(TINY)!r}, experts_in_memory=0.5))
service.submit([[1, 2, 3]] * 4, SamplingParams(max_tokens=400, ignore_eos=True), lambda delta: begun.set())
assert begun.wait(600)
"""

# What was registered first is called last: then no thread is left that may hold a tensor.
RANK = """
import atexit
import os
from pathlib import Path

def look():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        print(names, flush=True)
        os._exit(3)

atexit.register(look)

import torch
import torch.distributed as dist
from moe.comm.membership import process_groups

def main():
    with process_groups() as groups:
        kept = [groups]
        kept.append(kept)  # as models and what they call hold each other
        dist.all_reduce(torch.ones(1), group=groups.world)

main()
"""


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, said


@pytest.mark.parametrize("script", [READING, SERVICE], ids=["reading", "service"])
def test_threads_that_nobody_ended_do_not_abort_the_process(script):
    assert ended(start(script)) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_no_thread_of_gloo_outlives_python():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [start(RANK, RANK=str(r), WORLD_SIZE="2", **where) for r in range(2)]
    assert [ended(rank) for rank in ranks] == [(0, ""), (0, "")]
