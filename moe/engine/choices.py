"""What a run chose by itself where no setting said it, and why; `--show-config` prints it.

Figures come from `moe probe`; without them defaults stand, and the reason says so. A figure chooses only between ways
whose bits are equal: how experts are read and whether ahead, and threads where every sum is made by compiled kernels,
whose bits do not depend on them. Other kernels and codes in registers would round sums otherwise on another day.
"""

import os
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from moe.config import EngineConfig, OffloadConfig
from moe.engine.stores import open_store
from moe.kernels.cpu import load_helper
from moe.layer.experts import chosen_kernel
from moe.models.blueprint import Blueprint
from moe.offload.budget import format_bytes
from moe.offload.deepnvme import is_built
from moe.offload.requantise import sizes
from moe.offload.segments import ExpertIndex
from moe.offload.short_floats import not_bf16, shortened, why_not_shortened
from moe.offload.stores import page_cache_holds
from moe.offload.stretches import reads_of
from moe.placement.machine import How, Machine, disk_of

DEFAULT_READERS = 2
_DEPTHS = (1, 2, 4, 8)
_DIRECT_READERS: tuple[How, How] = ("direct", "deepnvme")
_ENOUGH = 0.9  # of the best rate: more threads for the rest only wait
_PAYS = 1.2  # times as fast: less is not worth a copy of the experts


class AutoChoice(NamedTuple):
    setting: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.setting} is {self.value}: {self.reason}"


def choose_keep(
    config: EngineConfig, blueprint: Blueprint, machine: Machine | None, device: torch.device
) -> tuple[ExpertIndex, AutoChoice | None]:
    """Of the experts as slots are to hold them, and the choice where no setting says it.

    Raises ValueError for offload.keep=bf12 where they cannot be kept so. Costs reads of three experts where they can.
    """
    index, keep = blueprint.index, config.offload.keep
    if keep == "stored" or not blueprint.experts:
        return index, None
    made = _shortened(config, index, device)
    why_not = made if isinstance(made, str) else _bf12_is_slower(machine) if keep == "auto" else None
    if not isinstance(made, str):
        why_not = why_not or _spread(config.offload, made)
        if why_not is None:
            reason = "a third more experts in the same memory, nothing lost, and kernels as fast by `moe probe`"
            return made, AutoChoice("offload.keep", "bf12", reason) if keep == "auto" else None
    if keep == "bf12":
        raise ValueError(f"offload.keep=bf12 is not for {blueprint.folder}: {why_not}; leave it out")
    return index, AutoChoice("offload.keep", "stored", f"{why_not}")


def _shortened(config: EngineConfig, index: ExpertIndex, device: torch.device) -> ExpertIndex | str:
    """`index` in bf12, or why it cannot be."""
    if device.type != "cpu" or chosen_kernel(config.kernel, device) != "cpu" or load_helper() is None:
        return "experts become bf12 for the compiled kernels of the CPU"
    if config.offload.store == "ram":
        return "offload.store=ram keeps a copy of what is stored"
    if reason := not_bf16(index):
        return reason
    return shortened(index) or "rows are so narrow that bf12 would not make slots a tenth smaller"


def _bf12_is_slower(machine: Machine | None) -> str | None:
    """None where the figures say that it is not."""
    rates = machine.rates if machine is not None else ()
    times = {r.format: r.seconds for r in sorted(rates, key=lambda r: -r.seconds) if (r.work, r.rows) == ("expert", 1)}
    short, plain = times.get("bf12"), times.get("bfloat16")
    if short is None or plain is None:
        return "the default, as this machine's kernels were not measured (`moe probe`)"
    if short <= plain:
        return None
    return f"kernels read {1e-9 / short:.1f} G weights/s of bf12 and {1e-9 / plain:.1f} of bf16, by `moe probe`"


def _spread(offload: OffloadConfig, made: ExpertIndex) -> str | None:
    store = open_store(offload, made.in_files)
    try:
        return why_not_shortened(store, made)
    except OSError as error:  # whoever needs that expert is told
        return f"one that was looked at cannot be read ({error})"
    finally:
        store.close()


def choose_reads(
    offload: OffloadConfig, blueprint: Blueprint, machine: Machine | None
) -> tuple[OffloadConfig, list[AutoChoice]]:
    """`offload` with nothing left open of how a store of files is read, and what was chosen."""
    if offload.store != "file":
        readers = DEFAULT_READERS if offload.readers is None else offload.readers
        return replace(offload, readers=readers), []
    if offload.io == "deepnvme":
        offload = replace(offload, direct=True)
    disk = disk_of(blueprint.folder)
    nbytes = max(layout.nbytes for layout in blueprint.index.in_files.layouts)
    known = machine if machine is not None and disk in machine.disks else None
    chosen: list[AutoChoice] = []
    if offload.direct is None:
        direct, reason = _choose_direct(page_cache_holds(blueprint.index.in_files), known, disk, nbytes)
        offload = replace(offload, direct=direct)
        chosen.append(AutoChoice("offload.direct", direct, reason))
    if offload.io is None:
        io, reason = _choose_io(offload, blueprint, known, disk, nbytes)
        offload = replace(offload, io=io)
        chosen.append(AutoChoice("offload.io", io, reason))
    if offload.readers is None:
        readers, reason = _choose_readers(_how(offload), known, disk, nbytes)
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


def _choose_io(
    offload: OffloadConfig, blueprint: Blueprint, machine: Machine | None, disk: str, nbytes: int
) -> tuple[Literal["preadv", "deepnvme"], str]:
    if not offload.direct or not blueprint.index.is_packed:
        return "preadv", "DeepNVMe reads packed experts past the page cache"
    if not is_built():
        return "preadv", "the extra [deepspeed] is not built here"
    preadv, other = (_best(machine, disk, how, nbytes) if machine else 0.0 for how in _DIRECT_READERS)
    if not preadv or not other:
        return "preadv", f"the default, as DeepNVMe was not measured on {disk} (`moe probe FOLDER`)"
    figures = f"{format_bytes(preadv)}/s by preadv, {format_bytes(other)}/s by DeepNVMe, at the best number of readers"
    return "deepnvme" if _ENOUGH * other >= preadv else "preadv", figures


def _how(offload: OffloadConfig) -> How:
    if not offload.direct:
        return "cached"
    return "deepnvme" if offload.io == "deepnvme" else "direct"


def _best(machine: Machine, disk: str, how: How, nbytes: int) -> float:
    return max(_rate(machine, disk, how, nbytes, depth) or 0.0 for depth in _DEPTHS)


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


class ReadTime(NamedTuple):
    """Seconds of one expert that is read alone: as its files are, and if they were packed."""

    stored: float
    packed: float


def read_time(blueprint: Blueprint, machine: Machine | None, offload: OffloadConfig) -> ReadTime | None:
    """None where nothing is known of it. offload: with nothing open."""
    if machine is None or offload.store != "file" or not blueprint.index.sites:
        return None
    how = _how(offload)
    nbytes = max(layout.nbytes for layout in blueprint.index.in_files.layouts)
    reads = reads_of(blueprint.index.in_files, direct=bool(offload.direct))
    disk = disk_of(blueprint.folder)
    rates = [_rate(machine, disk, how, size, 1) for size in (nbytes // reads.number, nbytes)]
    if not all(rates):
        return None
    stored, packed = (nbytes / rate for rate in rates if rate)
    return ReadTime(stored + reads.copied_bytes / machine.copy_bytes_per_s, packed)


def compute_time(blueprint: Blueprint, machine: Machine, threads: int) -> float | None:
    """Seconds of one expert and one row, by as many threads or fewer, whichever was faster; None for a format that was
    not measured."""
    site, layout = blueprint.index.sites[0], blueprint.index.layouts[0]
    format_ = layout.gate_up_format
    weights = (site.parts + 1) * site.hidden_size * site.intermediate_size
    kind = format_.code or str(format_.dtype).removeprefix("torch.")
    measured = {rate.threads for rate in machine.rates if (rate.work, rate.format) == ("expert", kind)}
    few = [n for n in measured if n <= threads] or sorted(measured)[:1]
    return min((weights * machine.seconds_per_weight("expert", kind, 1, n) for n in few), default=None)


def why_not_ahead(blueprint: Blueprint, machine: Machine | None, offload: OffloadConfig) -> str | None:
    """A sentence where reads hide behind the rest of their own layer; None where some wait, or nothing is known."""
    read = read_time(blueprint, machine, offload)
    compute = None if read is None or machine is None else compute_time(blueprint, machine, torch.get_num_threads())
    if read is None or compute is None:
        return None
    others = (blueprint.top_k - 1) * compute
    if read.stored > others:
        return None
    return f"an expert is read in {_ms(read.stored)}, its layer's others take {_ms(others)}: a miss waits for nothing"


def pack_offer(
    blueprint: Blueprint, machine: Machine | None, offload: OffloadConfig, *, may_be_short: bool = False
) -> list[str]:
    """One line where packing makes reads enough faster by the figures, or nothing. may_be_short: bf12 is read here."""
    files = blueprint.index.in_files
    told = sizes(files).get("bf12") if may_be_short else None
    read = read_time(blueprint, machine, offload) if told or not blueprint.index.is_packed else None
    if read is None:
        return []
    packed = read.packed if told is None else read.packed * told[1] / max(layout.nbytes for layout in files.layouts)
    if read.stored < _PAYS * packed:
        return []
    how = "" if told is None else " --experts bf12 --dense bf12"
    times = f"{_ms(packed)} instead of {_ms(read.stored)}"
    return [
        f"`moe pack {blueprint.folder} OUT{how}` would pay, and loses nothing: an expert is then read in {times}, by "
        "`moe probe`"
    ]


def choose_threads(config: EngineConfig, machine: Machine | None, why_not: str | None) -> AutoChoice | None:
    """Of torch and the compiled kernels, where no setting says them. why_not: no figure may choose, and the reason."""
    if config.threads is not None:
        return None
    default = f"torch's own, {torch.get_num_threads()}"
    if os.environ.get("OMP_NUM_THREADS"):
        return AutoChoice("threads", torch.get_num_threads(), "as OMP_NUM_THREADS says")
    if why_not is not None or machine is None:
        reason = why_not or "this machine was not probed (`moe probe` measures it)"
        return AutoChoice("threads", torch.get_num_threads(), f"{default}: {reason}")
    rates = {r.threads: r.seconds for r in machine.rates if (r.work, r.format, r.rows) == ("dense", "bfloat16", 1)}
    if not rates:
        return AutoChoice("threads", torch.get_num_threads(), f"{default}: no dense layer of bfloat16 was measured")
    best = min(rates.values())
    threads = min(n for n, seconds in rates.items() if seconds <= best / _ENOUGH)
    each = ", ".join(f"{1e-9 / seconds:.1f} with {n}" for n, seconds in sorted(rates.items()))
    return AutoChoice("threads", threads, f"the fewest near the best: {each}, G weights/s at one row")


def told_choices(
    config: EngineConfig, device: torch.device, prefetch: str | None, kernel: str, hidden: str | None = None
) -> list[AutoChoice]:
    """What else was left open. prefetch: what reads ahead, None if nothing does. hidden: why no read waits."""
    chosen = []
    if config.offload.prefetch == "auto":
        reason = "one process reads large experts, and it ends itself where it does not pay"
        if prefetch is None:
            reason = hidden or "all experts are in memory, or reads are small or shared by ranks, or no router is plain"
        chosen.append(AutoChoice("offload.prefetch", prefetch or "off", reason))
    if config.kernel == "auto":
        reason = "compiled for this processor, the one path of these bits at any number of rows and threads"
        if device.type != "cpu":
            reason = f"by number of tokens, as timed on this GPU ({config.crossover_path}); both sum in one order"
        chosen.append(AutoChoice("kernel", kernel, reason))
    reason = "as set: decoding at load and in registers round otherwise, so no figure chooses"
    return [*chosen, AutoChoice("dense", config.dense, reason)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms"
