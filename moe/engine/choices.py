"""What a run chose by itself where no setting said it, and why; `--show-config` prints it.

Figures come from `moe probe`; without them defaults stand, and the reason says so. A figure chooses only between ways
whose bits are equal: how experts are read. Threads, kernels and dense layers stay as they are told, for another choice
could round sums otherwise on another day.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from moe.config import EngineConfig, OffloadConfig
from moe.kernels.cpu import instruction_sets
from moe.models.blueprint import Blueprint
from moe.offload.budget import format_bytes
from moe.offload.stores import page_cache_holds
from moe.placement.machine import How, Machine, disk_of, load_machine, machine_name

DEFAULT_READERS = 2
_DEPTHS = (1, 2, 4, 8)
_ENOUGH = 0.9  # of the best rate: more threads for the rest only wait


class AutoChoice(NamedTuple):
    setting: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.setting} is {self.value}: {self.reason}"


def this_machine() -> str:
    """The name that this machine's figures are kept by."""
    return machine_name(len(os.sched_getaffinity(0)), next(iter(instruction_sets()), "no compiled kernels"))


def probed(config: EngineConfig) -> Machine | None:
    """What `moe probe` found here. Raises ValueError for a damaged file."""
    return load_machine(Path(config.probe_file).expanduser(), this_machine())


def choose_reads(
    offload: OffloadConfig, blueprint: Blueprint, machine: Machine | None
) -> tuple[OffloadConfig, list[AutoChoice]]:
    """`offload` with nothing left open of how a store of files is read, and what was chosen."""
    if offload.store != "file":
        readers = DEFAULT_READERS if offload.readers is None else offload.readers
        return replace(offload, readers=readers), []
    disk = disk_of(blueprint.folder)
    nbytes = max(layout.nbytes for layout in blueprint.index.layouts)
    known = machine if machine is not None and disk in machine.disks else None
    chosen: list[AutoChoice] = []
    if offload.direct is None:
        direct, reason = _choose_direct(page_cache_holds(blueprint.index), known, disk, nbytes)
        offload = replace(offload, direct=direct)
        chosen.append(AutoChoice("offload.direct", direct, reason))
    if offload.readers is None:
        readers, reason = _choose_readers("direct" if offload.direct else "cached", known, disk, nbytes)
        offload = replace(offload, readers=readers)
        chosen.append(AutoChoice("offload.readers", readers, reason))
    return offload, chosen


def _choose_direct(holds: bool, machine: Machine | None, disk: str, nbytes: int) -> tuple[bool, str]:
    if not holds:
        return True, "the experts' files are larger than half of the free memory: the page cache would not keep them"
    held = "the experts' files fit half of the free memory"
    if machine is None:
        return False, f"{held}; the default, as {_unprobed(disk)}"
    direct, cached = (_rate(machine, disk, how, nbytes, DEFAULT_READERS) for how in ("direct", "cached"))
    if not direct or not cached:
        return False, f"{held}; direct reads were not possible when this disk was probed"
    said = f"{held}, {format_bytes(cached)}/s from there and {format_bytes(direct)}/s past it"
    return direct > cached, f"{said}, in reads of {format_bytes(nbytes)}"


def _choose_readers(how: How, machine: Machine | None, disk: str, nbytes: int) -> tuple[int, str]:
    """The fewest that reach nearly the best rate; two at least, so that one reads ahead while another reads a miss."""
    if machine is None:
        return DEFAULT_READERS, f"the default, as {_unprobed(disk)}"
    rates = {depth: _rate(machine, disk, how, nbytes, depth) for depth in _DEPTHS}
    known = {depth: rate for depth, rate in rates.items() if rate}
    if not known:
        return DEFAULT_READERS, f"the default: {how} reads were not measured on {disk}"
    depth = min(d for d, rate in known.items() if rate >= _ENOUGH * max(known.values()))
    readers = max(DEFAULT_READERS, depth)
    return (
        readers,
        f"{format_bytes(known[depth])}/s with {depth} at a time, at most {format_bytes(max(known.values()))}/s",
    )


def _rate(machine: Machine, disk: str, how: How, nbytes: int, depth: int) -> float | None:
    return machine.read_bytes_per_s(disk, how, nbytes, depth)


def _unprobed(disk: str) -> str:
    return f"{disk} was not probed (`moe probe FOLDER` measures it)"


def told_choices(config: EngineConfig, device: torch.device, prefetch: str | None, kernel: str) -> list[AutoChoice]:
    """What no figure chooses, with the reason. prefetch: what reads ahead, None if nothing does."""
    chosen = []
    if config.threads is None and device.type == "cpu":
        threads = torch.get_num_threads()
        chosen.append(AutoChoice("threads", threads, "torch's own: one a core, or OMP_NUM_THREADS"))
    if config.offload.prefetch == "auto":
        reason = "one process reads large experts, and it ends itself where it does not pay"
        if prefetch is None:
            reason = "all experts are in memory, or reads are small or shared by ranks, or no router can be asked"
        chosen.append(AutoChoice("offload.prefetch", prefetch or "off", reason))
    if config.kernel == "auto":
        reason = "compiled for this processor; the same bits at any number of rows and threads"
        if device.type != "cpu":
            reason = f"by number of tokens, as timed on this GPU ({config.crossover_table}); both sum in one order"
        chosen.append(AutoChoice("kernel", kernel, reason))
    return chosen
