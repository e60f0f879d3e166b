"""A batch file served by the hosts of a Ray cluster.

    python -m moe.launch.ray_cluster MODEL in.jsonl out.jsonl --hosts 4
    ray job submit --working-dir . -- python -m moe.launch.ray_cluster MODEL in.jsonl "$PWD/out.jsonl" --hosts 4

Without a cluster one is started on this machine for the run. The model's folder must be there on every node. A host
that is lost costs no line: the others go on, and another is started. When this command itself is lost, the same command
goes on with the lines that are missing.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from moe.launch.cli import run_guarded, run_process
from moe.launch.console import err
from moe.launch.jobs import is_served, serve_file
from moe.launch.options import add_rank_options, engine_config, whole
from moe.llm import LLM


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe.launch.ray_cluster", description=(__doc__ or "").splitlines()[0])
    add_rank_options(parser)
    parser.add_argument("--hosts", type=whole(1), required=True, help="actors, each with a part of the experts")
    parser.add_argument("--address", help="of the Ray cluster; without one, that of this job or machine, or a new one")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moe.cluster").setLevel(logging.INFO)  # losses and generations
    return run_guarded("moe.launch.ray_cluster", args, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    config = engine_config(args)
    if args.show_config:
        err.print(config.describe(), style="dim", markup=False)
    _check_stays(args.output)
    if is_served(args.model, config, args.input, args.output):
        return 0
    with LLM(args.model, config, hosts=args.hosts, address=args.address) as llm:
        for note in llm.notes:
            err.print(note, markup=False)
        serve_file(llm, args.input, args.output)
    return 0


def _check_stays(output: Path) -> None:
    """Raises ValueError where Ray will delete it: a job runs in a copy of the folder that was submitted."""
    if any(part.startswith("_ray_pkg_") for part in output.absolute().parts):
        raise ValueError(
            f"{output} would be written into the job's copy of its folder, which Ray deletes; give an absolute path"
        )


if __name__ == "__main__":
    run_process(main)
