"""`moe info`: what a model's folder holds and what it needs, without reading a weight.

Of a folder that was looked at before, and has not changed since, it is looked up: then no code of models is imported.
"""

import argparse
from pathlib import Path

from rich.table import Table

from moe.config import EngineConfig
from moe.launch.console import err, out
from moe.offload.budget import format_bytes, slots_within
from moe.offload.memory import available_memory
from moe.summary import Summary, keep, kept, state_of
from moe.uncollected import uncollected


def info(args: argparse.Namespace) -> int:
    if args.check:
        from moe.launch.check import check  # torch and transformers' code of models: seconds

        return check(args.model, trust_remote_code=args.trust_remote_code)
    model, file = args.model, EngineConfig().probe_path.with_name("models.json")
    summary = None if args.trust_remote_code else kept(model, file)
    if summary is None:
        summary = _looked_at(model, file, trust_remote_code=args.trust_remote_code)
    out.print(_table(summary))
    return 0


def _looked_at(model: Path, file: Path, *, trust_remote_code: bool) -> Summary:
    """Kept in `file`, but for models whose code is their own. Raises ValueError for a folder that cannot be served."""
    with uncollected():
        from moe.models.blueprint import read_blueprint  # torch and transformers' code of models: seconds
        from moe.models.summarise import summarise
    state = state_of(model)
    summary = summarise(read_blueprint(model, trust_remote_code=trust_remote_code))
    if not trust_remote_code:
        try:
            keep(model, state, summary, file)
        except OSError as error:
            err.print(f"note: this is not kept for the next time: {error}", style="dim", markup=False)
    return summary


def _table(of: Summary) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("architecture", of.architecture)
    table.add_row("context", f"{of.max_context or 'no limit'} tokens")
    table.add_row(
        "dense weights", format_bytes(of.dense_bytes) + (f", decoded from {of.decoded}" if of.decoded else "")
    )
    how = "packed, continuous" if of.why_alone is None else f"one sequence at a time: {of.why_alone}"
    table.add_row("batching", how)
    if not of.layers:
        table.add_row("experts", "none in slots: the whole model is kept in memory")
        return table
    first, blob, num_experts = of.layers[0], of.largest_blob, of.num_experts
    kinds = {layer[:3] for layer in of.layers}
    shape = f"{first.hidden_size} x {first.intermediate_size}" if len(kinds) == 1 else "of several sizes"
    table.add_row(
        "experts", f"{len(of.layers)} layers, {num_experts} experts, top-{of.top_k}, {shape}, {of.expert_formats}"
    )
    table.add_row("one expert", format_bytes(blob))
    table.add_row("all experts", format_bytes(of.expert_bytes))
    table.add_row("on disk", "packed" if of.is_packed else "original checkpoint (moe pack makes reads faster)")
    least = min(2 * of.top_k * len(of.layers), num_experts)
    free = max(0, available_memory() - of.dense_bytes) * 9 // 10
    fits = slots_within(free, [layer.blob_bytes for layer in of.layers], [layer.num_experts for layer in of.layers])
    table.add_row("smallest budget", f"1 expert ({format_bytes(blob)}); slow: every layer runs in waves")
    table.add_row("recommended", f"at least {least} experts ({format_bytes(least * blob)}): twice what one token uses")
    table.add_row("fits here", f"{fits} experts, {fits / num_experts:.0%} of all, in the memory that is free now")
    for name, form in of.rounded.items():
        share = min(num_experts, free // form.largest) / num_experts
        loss = "nothing is lost" if name == "bf12" else "lossy"
        table.add_row(f"as {name}", f"{format_bytes(form.nbytes)} in all, {share:.0%} of them fit here; {loss}")
    return table
