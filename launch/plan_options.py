"""Arguments of `moe probe` and `moe plan`; loads neither torch nor a solver."""

import argparse
from pathlib import Path

from moe.config import MOST_THREADS
from moe.launch.options import add_trust_option, named_path, whole


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `probe` and `plan`; each names what `run`s it."""
    probe = subparsers.add_parser("probe", help="measure this machine for a minute: automatic choices start there")
    probe.add_argument(
        "folder",
        type=named_path,
        nargs="?",
        default=Path(),
        help="on the disk that models are read from (default %(default)s: here)",
    )
    probe.add_argument("--show", action="store_true", help="print what is known, measure nothing")
    probe.add_argument("--file", help="where figures are kept (default: the setting probe_file)")
    probe.set_defaults(run="machine:run")

    plan = subparsers.add_parser("plan", help="what a model would do here, or with other memory, disk or ranks")
    plan.add_argument("model", type=named_path, help="folder of a Hugging Face checkpoint, original or packed")
    plan.add_argument("--here", action="store_true", help="measure this machine first if nothing is known of it")
    plan.add_argument("--gpus", metavar="[N x]KIND", help="by published figures in place of this machine: 4xh200")
    plan.add_argument("--ram", help="for the whole model, such as 16GiB (default: what is free here)")
    plan.add_argument(
        "--slots",
        metavar="BUDGET",
        help="experts in slots, in place of what fits: 0.25 (fraction), 64 (experts) or 6GiB",
    )
    plan.add_argument("--nvme", metavar="BYTES/s", help="of reads, such as 3GB, in place of what the probe measured")
    plan.add_argument("--link", metavar="BYTES/s,SECONDS", help="between ranks, such as 10GB,2e-5 (default: no wire)")
    plan.add_argument(
        "--ranks", type=whole(1, 4096), nargs="+", help="numbers of ranks to compare (default: 1, or the GPUs)"
    )
    plan.add_argument(
        "--workload",
        default="1x64+64",
        metavar="NxPROMPT+NEW",
        help="sequences at a time, tokens of each: 8x512+128 (default %(default)s)",
    )
    plan.add_argument("--plan", type=named_path, help="placement of `moe place`; without one, contiguous blocks")
    plan.add_argument("--threads", type=whole(1, MOST_THREADS), default=1, help="of a rank (default %(default)s)")
    plan.add_argument("--trace", type=named_path, help="routing of this model (moe trace): which experts are in slots")
    plan.add_argument(
        "--against", metavar="RUN", help="tokens/s, or a file of --record: how far off was the first line"
    )
    plan.add_argument("--probe-file", help="figures of `moe probe` (default: the setting probe_file)")
    add_trust_option(plan)
    plan.set_defaults(run="plan:run")
