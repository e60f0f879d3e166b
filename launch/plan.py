"""`moe plan`: tokens/s, time to first token and memory of a model, from figures of `moe probe` and the model's sizes.

Which experts are in slots is replayed with the engine's own policy: on a trace of the model, or else on even routing,
which no cache can win anything on. Every line names the term that binds.
"""

import argparse
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from moe.config import EngineConfig
from moe.engine.choices import choose_keep, choose_reads, why_not_ahead
from moe.engine.known import probed
from moe.launch.console import out, say_who_measures
from moe.launch.options import real
from moe.launch.plan_inputs import even_routing, replay, settled, sizes_of, with_disk
from moe.launch.recording import read_recording
from moe.models.blueprint import Blueprint, read_blueprint
from moe.offload.budget import format_bytes, parse_budget, slots_within
from moe.offload.memory import available_memory
from moe.offload.requantise import sizes as rounded
from moe.placement.cost import Sizes, Terms, Use, decode_step, prefill_step
from moe.placement.gpus import DISK, HOST, gpus_of, machine_link, memory_of, published
from moe.placement.machine import How, Machine, disk_of, lacks, measures_alone, save_machine
from moe.placement.plan import Plan
from moe.placement.topology import Link
from moe.placement.trace import RoutingTrace

_MOST_SEQUENCES = 4096  # routing is drawn for all of them


def run(args: argparse.Namespace) -> int:
    blueprint = read_blueprint(args.model, trust_remote_code=args.trust_remote_code)
    if not blueprint.experts:
        raise ValueError(
            f"{args.model} has no experts in slots: there is nothing to plan, the whole model is in memory"
        )
    work = Workload.of(args.workload, blueprint.max_context)
    measured = None if args.against is None else measured_rate(args.against)
    case = _on_gpus(args, blueprint) if args.gpus else _here(args, blueprint)
    if not args.gpus:
        kept, _ = choose_keep(EngineConfig(), blueprint, case.machine, torch.device("cpu"))
        blueprint = replace(blueprint, index=kept)
    sizes = sizes_of(blueprint, on_cpu=not args.gpus)
    plan = None if args.plan is None else Plan.load(args.plan)
    trace = even_routing(sizes, work.sequences) if args.trace is None else RoutingTrace.load(args.trace)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("ranks", "experts in memory", "tokens/s", "first token", "memory of a rank", "below it", "a step"):
        table.add_column(name)
    rates: list[float] = []
    counts = args.ranks or [case.ranks if plan is None else plan.num_ranks]
    for ranks in counts:
        (plan or Plan.contiguous(sizes.num_layers, sizes.num_experts, ranks)).check_ranks()
    for ranks, is_shared in [(n, True) for n in counts] + [(n, False) for n in counts if n > 1]:
        slots = _slots(args, case, blueprint, sizes, work, ranks, is_shared)
        own = work if is_shared else work._replace(sequences=-(-work.sequences // ranks))
        use = replace(case.use, sequences=own.sequences, context=work.context, slots=slots)
        use = replace(use, ranks=ranks if is_shared else 1, ahead=float(case.use.ahead and ranks == 1))
        use = replace(use, beside=1 if is_shared else ranks)
        visits, away = replay(trace, use, plan=plan if is_shared and ranks > 1 else None)
        step = decode_step(sizes, case.machine, replace(use, away=away), settled(visits))
        first = prefill_step(sizes, case.machine, replace(use, ranks=1), work.prompt)
        rates.append(work.sequences / step.total)
        held = slots // use.ranks * sizes.expert_bytes
        kv = sizes.kv_bytes * (work.prompt + work.new) * own.sequences // use.ranks
        table.add_row(
            f"{ranks}" if is_shared else f"{ranks}, each a replica",
            f"{slots} of {sizes.num_layers * sizes.num_experts}",
            f"{rates[-1]:.1f} ({step.binds})",
            f"{first.total * 1e3:.0f} ms ({first.binds})",
            f"{format_bytes(sizes.dense_bytes)} dense, {format_bytes(held)} slots, {format_bytes(kv)} KV",
            f"{format_bytes(blueprint.expert_bytes)} {case.below}",
            told(step),
        )
    out.print(table)
    if args.slots is None:
        _, room = _room(args, case, sizes, work, counts[0], True)
        total = sizes.num_layers * sizes.num_experts
        fits = [f"{name} {min(total, int(room // of[1])) / total:.0%}" for name, of in rounded(blueprint.index).items()]
        if fits:
            out.print(f"experts that the same memory holds in other formats, lossy but for bf12: {'; '.join(fits)}")
    routing = "even routing is assumed, which no cache wins on (--trace tells)" if args.trace is None else args.trace
    experts = "contiguous blocks" if plan is None else str(args.plan)
    out.print(f"experts in slots: {routing}; on ranks: {experts}", markup=False)
    out.print(f"figures of {case.machine.name}, {case.machine.when}{case.note}", markup=False)
    if case.use.ahead:
        out.print("reading ahead hides what the routing itself foresees of waiting, one layer before", markup=False)
    if measured is not None:
        out.print(f"measured {measured:.1f} tokens/s: {rates[0] / measured - 1:+.0%} off", markup=False)
    return 0


class Workload(NamedTuple):
    """sequences: decoded at a time, over all ranks; prompt, new: tokens of each."""

    sequences: int
    prompt: int
    new: int

    @property
    def context(self) -> int:
        """Tokens of a sequence, halfway."""
        return self.prompt + self.new // 2

    @staticmethod
    def of(text: str, max_context: int | None) -> "Workload":
        """Raises ValueError for what is no workload, or none of a model with such a context."""
        found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
        numbers = [int(n) for n in found.groups()] if found else [0]
        if min(numbers) < 1:
            raise ValueError(f"--workload ({text}) must be SEQUENCESxPROMPT+NEW, such as 8x512+128")
        work = Workload(*numbers)
        if work.sequences > _MOST_SEQUENCES:
            raise ValueError(f"--workload ({text}) must have at most {_MOST_SEQUENCES} sequences")
        if max_context is not None and work.prompt + work.new > max_context:
            raise ValueError(f"--workload ({text}) is longer than the model's context, {max_context} tokens")
        return work


class Case(NamedTuple):
    """What figures say, and how experts would be read. below: the tier under the slots. note: on the figures."""

    machine: Machine
    use: Use
    memory: float | None  # of a rank, bytes; None: all ranks share --ram
    ranks: int
    below: str
    note: str = ""


def _here(args: argparse.Namespace, blueprint: Blueprint) -> Case:
    config = EngineConfig(probe_file=args.probe_file)
    machine, disk = probed(config), disk_of(blueprint.folder)
    if args.here and lacks(machine, disk, whole=True):
        from moe.launch.measure import probe  # loads the engine, which a plan does not need

        with measures_alone(config.probe_path, say_who_measures):
            if lacks(machine := probed(config), disk, whole=True):  # still
                machine = probe(blueprint.folder if os.access(blueprint.folder, os.W_OK) else Path(), machine)
                save_machine(config.probe_path, machine)
    if machine is None:
        raise ValueError(f"nothing is known of this machine; run `moe probe {args.model}` first, or give --here")
    offload, _ = choose_reads(config.offload, blueprint, machine)
    if args.nvme is not None:
        machine = with_disk(machine, disk, _bytes(args.nvme, "--nvme"))
    how: How = "direct" if offload.direct else "cached"
    ahead = float(why_not_ahead(blueprint, machine, offload) is None)
    use = Use(sequences=1, context=1, slots=1, threads=args.threads, readers=offload.readers or 1, how=how, disk=disk)
    below = "on disk" if offload.direct else "in the page cache"
    return Case(machine, replace(use, link=_link(args.link), ahead=ahead), None, 1, below)


def _on_gpus(args: argparse.Namespace, blueprint: Blueprint) -> Case:
    """By published figures; experts that are not in slots come from host memory, or from a disk where it is short."""
    number, kind = gpus_of(args.gpus)
    ram = available_memory() if args.ram is None else _bytes(args.ram, "--ram")
    is_held = blueprint.expert_bytes <= ram
    machine = published(kind)
    if args.nvme is not None:
        machine = with_disk(machine, DISK, _bytes(args.nvme, "--nvme"))
    use = Use(sequences=1, context=1, slots=1, readers=2, disk=HOST if is_held else DISK)
    link = _link(args.link) or (machine_link(kind) if number > 1 else None)
    below = "in host memory" if is_held else "on disk"
    note = "; what the engine's own launches cost is not in them: no run will be faster"
    return Case(machine, replace(use, link=link), memory_of(kind), number, below, note)


def told(step: Terms) -> str:
    """All terms, the largest first."""
    parts = sorted(step._asdict().items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in parts if seconds)


def _room(
    args: argparse.Namespace, case: Case, sizes: Sizes, work: Workload, ranks: int, is_shared: bool
) -> tuple[float, float]:
    """Bytes of a rank, and those left for slots in all ranks that share the experts: in one, if each has all."""
    ram = available_memory() if args.ram is None else _bytes(args.ram, "--ram")
    memory = ram / ranks if case.memory is None else case.memory
    kv = sizes.kv_bytes * (work.prompt + work.new) * -(-work.sequences // ranks)
    return memory, max(0, (ranks if is_shared else 1) * (memory - sizes.dense_bytes - kv))


def _slots(
    args: argparse.Namespace,
    case: Case,
    blueprint: Blueprint,
    sizes: Sizes,
    work: Workload,
    ranks: int,
    is_shared: bool,
) -> int:
    """Of all ranks that share the experts; of one, if each has all of them to itself."""
    total = sizes.num_layers * sizes.num_experts
    of_layer, counts = [layout.nbytes for layout in blueprint.index.layouts], [sizes.num_experts] * sizes.num_layers
    sharing = ranks if is_shared else 1
    if args.slots is not None:
        kind, value = parse_budget(args.slots, "--slots")
        slots = value if kind == "experts" else value * total
        if kind == "bytes":
            slots = slots_within(value, of_layer, counts)
        if slots <= 0 or (kind != "fraction" and slots < sharing):
            one = format_bytes(max(of_layer))
            raise ValueError(f"--slots ({args.slots}) must hold an expert ({one}) of each rank, {sharing} at least")
        return min(total, max(sharing, int(slots)))
    memory, left = _room(args, case, sizes, work, ranks, is_shared)
    slots = slots_within(left, of_layer, counts)
    if slots < sharing:
        raise ValueError(
            f"{format_bytes(memory)} of a rank hold no expert beside dense weights and KV cache; raise --ram, or take "
            "fewer ranks"
        )
    return slots


def measured_rate(text: str) -> float:
    """Tokens a second: a number, or the file of a run recorded with --record. Raises ValueError for anything else."""
    try:
        rate = float(text)
    except ValueError:
        rate = read_recording(Path(text))[-1].get("decode_rate", 0.0)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"--against ({text}) must be tokens/s above 0, or a recording of a run that decoded")
    return rate


def _bytes(text: str, option: str) -> float:
    try:
        budget = parse_budget(text.removesuffix("/s"))
        if budget.kind != "bytes" or budget.value <= 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"{option} ({text}) must be bytes, such as 3GB") from None
    return budget.value


def _link(text: str | None) -> Link | None:
    if text is None:
        return None
    rate, _, latency = text.partition(",")
    try:
        return Link(_bytes(rate, "--link"), real(0)(latency or "0"))
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"--link ({text}) must be BYTES/s,SECONDS, such as 10GB,2e-5") from None
