"""What is known of this machine: the figures that `moe probe` keeps."""

import os

from moe.config import EngineConfig
from moe.kernels.cpu import instruction_sets
from moe.placement.machine import Machine, load_machine, machine_name


def this_machine() -> str:
    """The name that this machine's figures are kept by."""
    return machine_name(len(os.sched_getaffinity(0)), next(iter(instruction_sets()), "no compiled kernels"))


def probed(config: EngineConfig) -> Machine | None:
    """What `moe probe` found here. Raises ValueError for a damaged file."""
    return load_machine(config.probe_path, this_machine())
