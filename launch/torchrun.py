"""One rank of a batch run under torchrun.

    torchrun --nproc-per-node 4 -m moe.launch.torchrun MODEL in.jsonl out.jsonl --set parallel.plan=plan.json

Every rank reads the input file and takes its share of the lines; rank 0 writes the output and shows the progress. An
error on one rank ends all of them with its message; the same command then continues with the lines that are missing.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moe.batch import BatchProgress, run_batch
from moe.comm.errors import CommError
from moe.comm.groups import Groups
from moe.comm.membership import process_groups
from moe.config import EngineConfig
from moe.launch.report import batch_progress, err, gather_reports, progress_text
from moe.llm import LLM


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe.launch.torchrun", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--plan", help="of `moe place`; without one, contiguous blocks of experts")
    parser.add_argument("--experts-in-memory", metavar="BUDGET", help="of each rank: 0.25 of its share, 64, or 6GiB")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = list(args.set)
    settings += [f"parallel.plan={args.plan}"] if args.plan else []
    settings += [f"offload.budget={args.experts_in_memory}"] if args.experts_in_memory else []
    try:
        config = EngineConfig.load(args.config, settings)
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with process_groups(
            ranks_per_node=config.parallel.ranks_per_node,
            timeout_s=config.parallel.timeout_seconds,
            device=device,
            eager_bytes=config.parallel.eager_bytes,
        ) as groups:
            return _run(args, config, groups)
    except (ValueError, OSError, CommError) as error:
        err.print(f"moe.launch.torchrun: {error}", markup=False)
        return 2


def _run(args: argparse.Namespace, config: EngineConfig, groups: Groups) -> int:
    is_first = groups.rank == 0
    if is_first:
        err.print(config.describe(), style="dim", markup=False)
    with LLM(args.model, config, groups=groups) as llm, batch_progress(disable=not is_first) as progress:
        for note in llm.notes if is_first else ():
            err.print(note, markup=False)
        task = progress.add_task("", total=None, figures="")

        def show(state: BatchProgress) -> None:
            progress.update(task, total=state.total, completed=state.finished, figures=progress_text(llm.engine))

        state = run_batch(llm, args.input, args.output, show)
        progress.stop()
        reports = gather_reports(llm.engine, groups)
        if is_first:
            err.print(
                f"{state.finished} of {state.total} lines are in {args.output}"
                f" ({state.resumed} from an earlier run, {state.failed} with errors)",
                markup=False,
            )
            err.print(reports)
    return 0


if __name__ == "__main__":
    sys.exit(main())
