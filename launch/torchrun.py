"""One rank of a batch run under torchrun.

    torchrun --nproc-per-node 4 -m moe.launch.torchrun MODEL in.jsonl out.jsonl --set parallel.plan=plan.json

Every rank reads the input file and takes its share of the lines; rank 0 writes the output and shows the progress. An
error on one rank ends all of them with its message; the same command then continues with the lines that are missing.

Reads the arguments and loads the rest where Ctrl-C is one sentence already.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from importlib import import_module

from moe.launch.cli import run_guarded, run_process
from moe.launch.options import add_rank_options
from moe.uncollected import uncollected


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="moe.launch.torchrun", description=(__doc__ or "").splitlines()[0])
    add_rank_options(made)
    made.add_argument("--debug", action="store_true", help="print the traceback of an error, too")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def serve() -> int:
        with uncollected():
            ranks = import_module("moe.launch.ranks")
        status: int = ranks.serve(args)
        return status

    return run_guarded("moe.launch.torchrun", args, serve, is_first=os.environ.get("RANK", "0") == "0")


if __name__ == "__main__":
    run_process(main)
