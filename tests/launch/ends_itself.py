"""A batch command whose process is killed, by itself, once its output has so many lines: never too late.

    python -m tests.launch.ends_itself LINES RANK moe.launch.torchrun MODEL in.jsonl out.jsonl …

RANK: of torchrun's, 0 without it; the other ranks go on.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from moe import batch


def main() -> None:
    lines, rank, program = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    output, step = Path(sys.argv[6]), batch._Run.step
    sys.argv = sys.argv[3:]

    def step_or_end(run: batch._Run) -> None:
        if output.exists() and output.read_bytes().count(b"\n") >= lines:
            os.kill(os.getpid(), signal.SIGKILL)
        step(run)

    if os.environ.get("RANK", "0") == rank:
        batch._Run.step = step_or_end  # type: ignore[method-assign]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
