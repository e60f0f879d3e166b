"""Arguments of `moe probe`; loads neither torch nor a solver."""

import argparse
from pathlib import Path


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `probe`; it names what `run`s it."""
    probe = subparsers.add_parser("probe", help="measure this machine for some seconds: automatic choices start there")
    probe.add_argument(
        "folder", type=Path, nargs="?", default=Path(), help="on the disk that models are read from (default: here)"
    )
    probe.add_argument("--show", action="store_true", help="print what is known, measure nothing")
    probe.add_argument("--file", help="where figures are kept (default: the setting probe_file)")
    probe.set_defaults(run="machine:run")
