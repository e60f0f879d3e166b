"""The threads of the compiled kernels: how many there are, whose they are, and that they end."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.kernels.cpu import instruction_sets
from moe.kernels.cpu_linear import CpuLinear
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.skipif(
    not instruction_sets() or not Path("/proc/self/task").exists(), reason="the compiled helper, or /proc, is absent"
)

WEIGHT = torch.randn(700, 1024, generator=torch.Generator().manual_seed(0))  # large enough for several threads
X = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))


def in_thread(work: Callable[[], None]) -> None:
    """Runs it in a thread of its own; raises what it raises."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "threads wait for each other forever"
    if failed:
        raise failed[0]


def workers() -> set[str]:
    found = {path.parent.name: path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    return {task for task, name in found.items() if name == "moe-team"}


def blocked(task: str) -> int:
    status = Path(f"/proc/self/task/{task}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)


def test_threads_belong_to_their_caller_take_no_signals_and_end_with_it() -> None:
    linear = CpuLinear(WEIGHT)
    expected, before = linear(X), workers()

    def work() -> None:
        for threads, number in ((2, 1), (5, 4), (3, 4), (1, 4), (6, 5)):
            torch.set_num_threads(threads)
            assert torch.equal(linear(X), expected)
            new = workers() - before
            assert len(new) == number, (threads, new)
            assert all(blocked(task) & 1 << 2 - 1 for task in new), "a worker may be given Ctrl-C"

    in_thread(work)
    # Python's thread is over before the system's
    until(lambda: workers() == before, told=lambda: "workers outlive the thread that called")


def test_many_callers_at_once() -> None:
    linear = CpuLinear(WEIGHT)
    expected, wrong = linear(X), []

    def work(seed: int) -> None:
        for i in range(200):
            torch.set_num_threads(1 + (seed + i) % 4)  # of this thread
            if not torch.equal(linear(X), expected):
                wrong.append((seed, i))

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


def test_nobody_is_called_up_for_what_others_do() -> None:
    linear = CpuLinear(WEIGHT)
    before = workers()

    def woken(task: str) -> int:
        lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    def is_asleep(task: str) -> bool:
        return "State:\tS" in Path(f"/proc/self/task/{task}/status").read_text()

    def work() -> None:
        torch.set_num_threads(6)
        linear(X)
        until(lambda: all(is_asleep(task) for task in workers() - before))  # they spin for a while
        counts = {task: woken(task) for task in workers() - before}
        torch.set_num_threads(2)
        for _ in range(100):
            linear(X)
        assert sum(woken(task) != count for task, count in counts.items()) <= 1, "only one of the five has work"

    in_thread(work)


def test_more_threads_than_the_system_gives_are_an_error_and_fewer_work_on() -> None:
    program = """
import os, resource, torch
from pathlib import Path
from moe.kernels.cpu_linear import CpuLinear
linear, x = CpuLinear(torch.randn(700, 1024)), torch.randn(3, 1024)
torch.set_num_threads(2)
expected = linear(x)
torch.set_num_threads(40)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), -1))  # some stacks fit
try:
    linear(x)
    raise SystemExit("40 threads have stacks in 64 MiB")
except MemoryError as error:
    assert "no thread" in str(error), error
torch.set_num_threads(3)
assert torch.equal(linear(x), expected)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
torch.set_num_threads(40)
assert torch.equal(linear(x), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S)


def test_a_forked_child_has_threads_of_its_own() -> None:
    program = """
import os, torch
from moe.kernels.cpu_linear import CpuLinear
torch.set_num_threads(3)
linear, x = CpuLinear(torch.randn(700, 1024)), torch.randn(3, 1024)
expected = linear(x)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(linear(x), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(linear(x), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S)
