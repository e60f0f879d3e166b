"""What a rank under torchrun does: meets the others, loads, serves its share of a batch file, reports."""

import argparse
import sys

from moe.batch import batch_workload, lines_done
from moe.comm.control import Control
from moe.comm.errors import LostPeer
from moe.comm.groups import Groups
from moe.comm.lost import speaks_for_job
from moe.comm.membership import process_groups
from moe.config import EngineConfig
from moe.engine.device import find_device
from moe.launch.console import err
from moe.launch.jobs import is_served, serve_file
from moe.launch.options import engine_config
from moe.launch.report import gather_links, gather_reports, print_choices
from moe.llm import LLM


def serve(args: argparse.Namespace) -> int:
    """Exit status. Of the ranks that see a loss one raises it, the others end silently with status 2."""
    config = engine_config(args)
    with process_groups(
        ranks_per_node=config.parallel.ranks_per_node,
        timeout_s=config.parallel.timeout_seconds,
        device=find_device(config.device).type,
        eager_bytes=config.parallel.eager_bytes,
    ) as groups:
        try:
            return _serve(args, config, groups)
        except LostPeer:
            if not speaks_for_job(groups):
                sys.exit(2)
            raise


def _serve(args: argparse.Namespace, config: EngineConfig, groups: Groups) -> int:
    is_first = groups.rank == 0
    if is_first and args.show_config:
        err.print(config.describe(), style="dim", markup=False)
    served = is_first and is_served(args.model, config, args.input, args.output)
    if Control(groups).numbers_of_first([1] if served else []):  # the others need not have the file
        return 0
    work = None
    if config.batch.schedule == "layer_major":
        done = Control(groups).numbers_of_first([*lines_done(args.output)] if is_first else [])
        work = batch_workload(args.model, config, args.input, done, slice(groups.rank, None, groups.world_size))
    with LLM(args.model, config, groups=groups, workload=work) as llm:
        if is_first and args.show_config:
            print_choices(llm.engine)
        for note in llm.notes if is_first else ():
            err.print(note, markup=False)
        serve_file(llm, args.input, args.output, is_first=is_first)
        tables = [gather_links(llm.engine, groups)] if groups.world_size > 1 else []
        tables.append(gather_reports(llm.engine, groups))
        for table in tables if is_first else ():
            err.print(table)
    return 0
