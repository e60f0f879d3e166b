"""One rank of a batch run under torchrun.

    torchrun --nproc-per-node 4 -m moe.launch.torchrun MODEL in.jsonl out.jsonl --set parallel.plan=plan.json

Every rank reads the input file and takes its share of the lines; rank 0 writes the output and shows the progress. An
error on one rank ends all of them with its message; the same command then continues with the lines that are missing.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import torch

from moe.comm.groups import Groups
from moe.comm.membership import process_groups
from moe.config import EngineConfig
from moe.launch.cli import run_guarded
from moe.launch.console import err
from moe.launch.jobs import serve_file
from moe.launch.options import add_batch_options, engine_config
from moe.launch.report import gather_links, gather_reports
from moe.llm import LLM


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe.launch.torchrun", description=(__doc__ or "").splitlines()[0])
    add_batch_options(parser)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error, too")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def start() -> int:
        config = engine_config(args)
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with process_groups(
            ranks_per_node=config.parallel.ranks_per_node,
            timeout_s=config.parallel.timeout_seconds,
            device=device,
            eager_bytes=config.parallel.eager_bytes,
        ) as groups:
            return _run(args, config, groups)

    return run_guarded("moe.launch.torchrun", args, start, is_first=os.environ.get("RANK", "0") == "0")


def _run(args: argparse.Namespace, config: EngineConfig, groups: Groups) -> int:
    is_first = groups.rank == 0
    if is_first and args.show_config:
        err.print(config.describe(), style="dim", markup=False)
    with LLM(args.model, config, groups=groups) as llm:
        for note in llm.notes if is_first else ():
            err.print(note, markup=False)
        serve_file(llm, args.input, args.output, is_first=is_first)
        tables = [gather_links(llm.engine, groups)] if groups.world_size > 1 else []
        tables.append(gather_reports(llm.engine, groups))
        for table in tables if is_first else ():
            err.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
