"""`moe info`: what a model's folder holds and what it needs; of weights it reads three experts at most."""

import argparse

import torch
from rich.table import Table

from moe.config import EngineConfig
from moe.engine.choices import choose_keep
from moe.engine.known import probed
from moe.launch.console import err, out
from moe.launch.progress import batch_progress
from moe.models.blueprint import Blueprint, read_blueprint
from moe.models.load import loaded_bytes
from moe.models.neighbours import why_not_packed
from moe.offload.budget import format_bytes, slots_within
from moe.offload.check import check_folder
from moe.offload.memory import available_memory
from moe.offload.requantise import sizes


def info(args: argparse.Namespace) -> int:
    b = read_blueprint(args.model, trust_remote_code=args.trust_remote_code)
    if args.check:
        return _check(b)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("architecture", f"{type(b.skeleton).__name__} ({b.config.model_type})")
    table.add_row("context", f"{b.max_context or 'no limit'} tokens")
    kept, choice = choose_keep(EngineConfig(), b, probed(EngineConfig()), torch.device("cpu"))
    dense, told = _dense(b, shortens=kept.stored is not None)
    table.add_row("dense weights", told)
    reason = why_not_packed(b.skeleton, b.max_context)
    table.add_row("batching", "packed, continuous" if reason is None else f"one sequence at a time: {reason}")
    if b.experts:
        site, blob = kept.sites[0], max(layout.nbytes for layout in kept.layouts)
        kinds = {(s.num_experts, s.hidden_size, s.intermediate_size) for s in b.index.sites}
        shape = f"{site.hidden_size} x {site.intermediate_size}" if len(kinds) == 1 else "of several sizes"
        table.add_row(
            "experts",
            f"{len(b.experts)} layers, {b.num_experts} experts, top-{b.top_k}, {shape}, {b.expert_formats}",
        )
        if choice is not None and choice.value == "bf12":
            table.add_row("in slots", "bf12: bf16 in 12 bits, nothing is lost (offload.keep)")
        table.add_row("one expert", format_bytes(blob))
        table.add_row("all experts", format_bytes(kept.expert_bytes))
        table.add_row(
            "on disk", "packed" if b.checkpoint.packed else "original checkpoint (moe pack makes reads faster)"
        )
        step = b.top_k * len(b.experts)
        free = max(0, available_memory() - dense) * 9 // 10
        of_layer, counts = [layout.nbytes for layout in kept.layouts], [site.num_experts for site in kept.sites]
        fits = slots_within(free, of_layer, counts)
        table.add_row("smallest budget", f"1 expert ({format_bytes(blob)}); slow: every layer runs in waves")
        table.add_row(
            "recommended",
            f"at least {min(2 * step, b.num_experts)} experts "
            f"({format_bytes(min(2 * step, b.num_experts) * blob)}): twice what one token uses",
        )
        table.add_row("fits here", f"{fits} experts, {fits / b.num_experts:.0%} of all, in the memory that is free now")
        for target, (total, largest) in sizes(b.index).items():
            share = min(b.num_experts, free // largest) / b.num_experts
            loss = "nothing is lost" if target == "bf12" else "lossy"
            table.add_row(f"as {target}", f"{format_bytes(total)} in all, {share:.0%} of them fit here; {loss}")
    else:
        table.add_row("experts", "none in slots: the whole model is kept in memory")
    out.print(table)
    return 0


def _dense(blueprint: Blueprint, *, shortens: bool) -> tuple[int, str]:
    """What default settings take on a CPU, and that with the smaller ways to keep them. shortens: bf16 becomes bf12."""
    short = blueprint.dtype == torch.bfloat16
    taken = loaded_bytes(blueprint, blueprint.dtype, short=short, shortens=shortens)
    packed = loaded_bytes(blueprint, blueprint.dtype, packed=True, short=short, shortens=shortens)
    told = format_bytes(taken)
    if taken < blueprint.dense_bytes:
        told += ", linear layers in bf12"
    elif decoded := blueprint.quantised.labels(blueprint.coded_dense):
        told += f", decoded from {decoded}"
    return taken, told + (f" ({format_bytes(packed)} with dense=packed)" if packed < taken else "")


def _check(blueprint: Blueprint) -> int:
    """Prints what is damaged; 1 if anything is."""
    with batch_progress() as progress:
        task = progress.add_task("", total=blueprint.num_experts, figures="experts read")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = list(check_folder(blueprint.checkpoint, blueprint.index, show))
    for sentence in found:
        err.print(sentence, style="red", markup=False)
    kind = "against their checksums" if blueprint.checkpoint.packed else "and could be read"
    out.print(
        f"{blueprint.folder}: {len(found)} faults; {blueprint.num_experts} experts were read {kind}", markup=False
    )
    return 1 if found else 0
