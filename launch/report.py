"""The numbers that every run can print, and the progress line of long ones."""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe.comm.groups import Groups
from moe.engine.engine import Engine, peak_rss_bytes
from moe.launch.console import err
from moe.offload.budget import format_bytes
from moe.offload.checkpoint import Checkpoint
from moe.offload.segments import ExpertIndex


@dataclass(frozen=True, slots=True)
class RunReport:
    """Sums over layers and steps. Rates in tokens/s, times in seconds, memory in bytes."""

    prefill_tokens: int
    prefill_rate: float
    decode_tokens: int
    decode_rate: float
    first_token_seconds: float
    hits: int
    misses: int
    bytes_read: int
    stall_seconds: float
    waves: int
    prefetched: int
    useful: int
    late: int
    wasted: int
    slots: int
    num_experts: int
    slot_bytes: int
    dense_bytes: int
    peak_rss: int
    shared_tokens: int
    preemptions: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def run_report(engine: Engine) -> RunReport:
    steps, layers = engine.stats, engine.layer_stats()
    cache = engine.experts.cache if engine.experts is not None else None
    return RunReport(
        prefill_tokens=steps.prefill_tokens,
        prefill_rate=steps.prefill_tokens / steps.prefill_seconds if steps.prefill_seconds else 0.0,
        decode_tokens=steps.decode_tokens,
        decode_rate=steps.pure_decode_tokens / steps.decode_seconds if steps.decode_seconds else 0.0,
        first_token_seconds=median(steps.first_token_seconds) if steps.first_token_seconds else 0.0,
        hits=sum(s.hits for s in layers),
        misses=sum(s.misses for s in layers),
        bytes_read=sum(s.bytes_read for s in layers),
        stall_seconds=sum(s.stall_seconds for s in layers),
        waves=sum(s.waves for s in layers),
        prefetched=sum(s.prefetch_bytes for s in layers),
        useful=sum(s.useful_bytes for s in layers),
        late=sum(s.late_bytes for s in layers),
        wasted=sum(s.wasted_bytes for s in layers),
        slots=cache.num_slots if cache else 0,
        num_experts=engine.blueprint.num_experts,
        slot_bytes=cache.num_slots * cache.blob_bytes if cache else 0,
        dense_bytes=engine.blueprint.dense_bytes,
        peak_rss=peak_rss_bytes(),
        shared_tokens=steps.shared_tokens,
        preemptions=steps.preemptions,
    )


def print_report(engine: Engine, console: Console, per_layer: bool = False) -> None:
    r = run_report(engine)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("prefill", f"{r.prefill_tokens} tokens, {r.prefill_rate:.1f} tokens/s")
    table.add_row("decode", f"{r.decode_tokens} tokens, {r.decode_rate:.1f} tokens/s")
    table.add_row("time to first token", f"{r.first_token_seconds * 1000:.0f} ms (median)")
    if r.slots:
        table.add_row(
            "experts in memory",
            f"{r.slots} of {r.num_experts} ({r.slots / r.num_experts:.1%}), {format_bytes(r.slot_bytes)}",
        )
        table.add_row("expert hits", f"{r.hit_rate:.1%} ({r.hits} hits, {r.misses} misses, {r.waves} waves)")
        table.add_row("experts read", f"{format_bytes(r.bytes_read)}, waited {r.stall_seconds:.2f} s for them")
    if engine.experts is not None and (lookahead := engine.experts.lookahead) is not None:
        table.add_row(
            "read ahead",
            f"{format_bytes(r.prefetched)}: {format_bytes(r.useful)} useful, {format_bytes(r.late)} late, "
            f"{format_bytes(r.wasted)} wasted; {lookahead.prefetcher.verdict or 'still on trial'}",
        )
    if r.shared_tokens or r.preemptions:
        table.add_row("prefix sharing", f"{r.shared_tokens} tokens saved, {r.preemptions} preemptions")
    table.add_row("memory", f"peak {format_bytes(r.peak_rss)} resident, dense weights {format_bytes(r.dense_bytes)}")
    console.print(table)
    if per_layer:
        _print_layers(engine, console)


def _print_layers(engine: Engine, console: Console) -> None:
    names = ["layer", "hits", "misses", "hit rate", "read", "stall ms", "waves"]
    reads_ahead = engine.experts is not None and engine.experts.lookahead is not None
    names += ["ahead", "useful", "late", "wasted"] if reads_ahead else []
    layers = Table(*names, box=None, padding=(0, 2, 0, 0))
    for index, s in enumerate(engine.layer_stats()):
        rate = s.hits / max(1, s.hits + s.misses)
        values = asdict(s)
        layers.add_row(
            str(index),
            str(values["hits"]),
            str(values["misses"]),
            f"{rate:.1%}",
            format_bytes(s.bytes_read),
            f"{s.stall_seconds * 1000:.1f}",
            str(s.waves),
            *map(format_bytes, (s.prefetch_bytes, s.useful_bytes, s.late_bytes, s.wasted_bytes) if reads_ahead else ()),
        )
    console.print(layers)


def progress_text(engine: Engine) -> str:
    """Short figures for a progress bar."""
    r = run_report(engine)
    seconds = engine.stats.prefill_seconds + engine.stats.decode_seconds
    rate = (r.prefill_tokens + r.decode_tokens) / seconds if seconds else 0.0
    text = f"{rate:.0f} tokens/s"
    return text + (f", {r.hit_rate:.0%} hits, {format_bytes(r.bytes_read)} read" if r.slots else "")


def batch_progress(disable: bool = False) -> Progress:
    """A bar with lines done, time left, and `progress_text` as the task's field `figures`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    return Progress(*columns, console=err, disable=disable)


def gather_reports(engine: Engine, groups: Groups) -> Table:
    """Every rank's figures. A collective."""
    r = run_report(engine)
    own = [
        r.prefill_tokens + r.decode_tokens,
        engine.stats.prefill_seconds + engine.stats.decode_seconds,
        r.slots,
        r.hits,
        r.misses,
        r.bytes_read,
        r.stall_seconds,
        r.peak_rss,
        sum(sum(traffic.bytes_to) for traffic in engine.traffic),
        sum(traffic.cross_node_bytes for traffic in engine.traffic),
        r.prefetched,
        r.useful,
        r.late,
    ]
    rows = [torch.tensor(own, dtype=torch.float64, device=groups.device)]
    if groups.world is not None:
        rows = [torch.empty_like(rows[0]) for _ in range(groups.world_size)]
        dist.all_gather(rows, torch.tensor(own, dtype=torch.float64, device=groups.device), group=groups.world)
    names = ["rank", "tokens", "tokens/s", "slots", "hit rate", "read", "stall s", "peak RSS", "sent", "cross-node"]
    reads_ahead = engine.experts is not None and engine.experts.lookahead is not None
    names += ["ahead", "useful", "late"] if reads_ahead else []
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for rank, row in enumerate(rows):
        tokens, seconds, slots, hits, misses, read, stall, rss, sent, cross, *ahead = row.tolist()
        table.add_row(
            str(rank),
            f"{tokens:.0f}",
            f"{tokens / seconds if seconds else 0:.1f}",
            f"{slots:.0f}",
            f"{hits / max(1, hits + misses):.1%}",
            format_bytes(read),
            f"{stall:.2f}",
            format_bytes(rss),
            format_bytes(sent),
            format_bytes(cross),
            *map(format_bytes, ahead if reads_ahead else ()),
        )
    return table


def print_rounding(folder: Path, index: ExpertIndex, console: Console) -> None:
    """What rounding the experts cost, by layer: relative errors of their weights, and the worst expert."""
    errors = (Checkpoint.open(folder).packed or {})["errors"]
    table = Table(title="|rounded - original| / |original| of each expert's weights", title_justify="left", box=None)
    for heading in ("layer", "gate_up, mean", "down, mean", "worst expert", "its error"):
        table.add_column(heading, justify="right")
    for layer, experts in enumerate(errors):
        first, second = (sum(e[n] for e in experts) / len(experts) for n in (0, 1))
        worst = max(range(len(experts)), key=lambda e: max(experts[e]))
        table.add_row(str(layer), f"{first:.3%}", f"{second:.3%}", str(worst), f"{max(experts[worst]):.3%}")
    console.print(table)
    old = sum(s.num_experts * b.nbytes for s, b in zip(index.sites, index.layouts))
    new = sum(path.stat().st_size for path in folder.glob("experts-*.safetensors"))
    console.print(
        f"{format_bytes(old)} became {format_bytes(new)}; this is lossy: every error is in packed.json, what it does "
        "to the answers only a comparison shows",
        markup=False,
    )
