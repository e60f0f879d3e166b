"""How the process of a command ends: with its status, everything written, and nothing left out but Python's own end."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

ENDS = """
import atexit, sys, threading, time

class Module:
    def __del__(self):
        print("taken apart")

kept = sys.modules["kept"] = Module()
kept.itself = kept

def main():
    atexit.register(print, "registered")
    printed = threading.Event()
    threading.Thread(target=lambda: (printed.wait(), time.sleep(0.3), print("thread"))).start()
    print("main")
    printed.set()
    print("error", file=sys.stderr)
    {end}

from moe.launch.cli import run_process
run_process(main)
"""


@pytest.mark.parametrize(
    ("end", "status", "takes_apart"),
    [("return 0", 0, False), ("return 3", 3, False), ("sys.exit(4)", 4, True), ("raise ValueError('fault')", 1, True)],
)
def test_a_process_ends_with_its_status_when_all_is_done(end, status, takes_apart):
    ran = subprocess.run([sys.executable, "-c", ENDS.format(end=end)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == status
    assert ran.stdout.split("\n") == ["main", "thread", "registered", *["taken apart"] * takes_apart, ""]
    assert ran.stderr.startswith("error\n")
    assert ("ValueError: fault" in ran.stderr) == ("ValueError" in end)


def test_output_that_nobody_reads_is_no_error():
    command = f"{sys.executable} -m moe info examples/tinymoe | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")
