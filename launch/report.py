"""The numbers that every run can print, and the progress line of long ones."""

from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.lost import in_collective
from moe.engine.engine import Engine
from moe.launch.console import err
from moe.launch.plan_check import checked
from moe.metrics import Metric, changed, shown, title, totals
from moe.offload.checkpoint import Checkpoint
from moe.offload.segments import ExpertIndex


def hit_rate(engine: Engine) -> float:
    hits, misses = (sum(getattr(s, name) for s in engine.layer_stats()) for name in ("hits", "misses"))
    return float(hits / max(1, hits + misses))


def print_report(engine: Engine, console: Console, per_layer: bool = False) -> None:
    """Rates, shares, and every counter that moved."""
    steps, state = engine.stats, engine.state()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    if steps.prefill_tokens:  # a run that is continued may have nothing left to do
        first = steps.time_to_first_token.quantile(0.5)
        table.add_row("prefill", f"{steps.prefill_tokens} tokens, {steps.prefill_rate:.1f} tokens/s")
        table.add_row("decode", f"{steps.decode_tokens} tokens, {steps.decode_rate:.1f} tokens/s")
        if (plan := checked(engine)) is not None:
            table.add_row("planned decode", str(plan))
        table.add_row("time to first token", f"at most {first * 1000:.0f} ms (median)")
    if state.slots:
        table.add_row(
            "experts in memory",
            f"{state.slots} of {state.experts} ({state.slots / state.experts:.1%}), {shown(state.slot_bytes, 'bytes')}",
        )
        if steps.prefill_tokens:
            table.add_row("expert hits", f"{hit_rate(engine):.1%}")
    if engine.experts is not None and (lookahead := engine.experts.lookahead) is not None:
        table.add_row("reading ahead", lookahead.prefetcher.verdict or "still on trial")
    table.add_row(
        "memory",
        f"peak {shown(state.peak_rss_bytes, 'bytes')} resident, dense weights {shown(state.dense_bytes, 'bytes')}",
    )
    sums = {m: v for m, v in totals(engine.metric_sources()).items() if m.kind == "counter"}
    said = {"prefill_tokens", "decode_tokens", "pure_decode_tokens", "pure_decode_steps"}
    for metric in changed([sums]):
        if metric.name not in said:
            table.add_row(title(metric), shown(sums[metric], metric.unit))
    console.print(table)
    if per_layer and engine.layer_stats():
        console.print(_table_of([totals([(s, {})]) for s in engine.layer_stats()], "layer"))


def print_choices(engine: Engine) -> None:
    """What the run chose by itself, and why: beside `--show-config`."""
    for choice in engine.choices:
        err.print(str(choice), style="dim", markup=False)


def progress_text(engine: Engine) -> str:
    """Short figures for a progress bar."""
    text = engine.stats.rate_text()
    if engine.experts is None:
        return text
    read = sum(s.bytes_read for s in engine.layer_stats())
    return f"{text}, {hit_rate(engine):.0%} hits, {shown(read, 'bytes')} read"


def gather_reports(engine: Engine, groups: Groups) -> Table:
    """Every rank's figures. A collective; ranks count the same metrics."""
    own = totals(engine.metric_sources())
    metrics = list(own)
    rows = [torch.tensor([*own.values()], dtype=torch.float64, device=groups.device)]
    if groups.world is not None:
        mine = rows[0]
        rows = [torch.empty_like(mine) for _ in range(groups.world_size)]
        with in_collective(groups, Task("the reports of all ranks")):
            dist.all_gather(rows, mine, group=groups.world)
    table = Table("", *(f"rank {rank}" for rank in range(len(rows))), box=None, padding=(0, 2, 0, 0))
    by_rank = [dict(zip(metrics, row.tolist())) for row in rows]
    for metric in changed(by_rank):
        table.add_row(title(metric), *(shown(row[metric], metric.unit) for row in by_rank))
    return table


def gather_links(engine: Engine, groups: Groups) -> Table:
    """Bytes of tokens and results, what `moe simulate` predicts. A collective."""
    rows = [t.bytes_to for t in engine.traffic if t.carries == "rows"]
    mine = torch.tensor([sum(n) for n in zip(*rows)], dtype=torch.int64, device=groups.device)
    table = [torch.empty_like(mine) for _ in range(groups.world_size)]
    if groups.world is None:
        table = [mine]
    else:
        with in_collective(groups, Task("the reports of links")):
            dist.all_gather(table, mine, group=groups.world)
    names = [f"rank {rank}" for rank in range(groups.world_size)]
    shown_table = Table("", *names, box=None, padding=(0, 2, 0, 0))
    shown_table.title, shown_table.title_justify = "bytes of tokens and results, from row to column", "left"
    for name, row in zip(names, table):
        shown_table.add_row(name, *(str(n) for n in row.tolist()))
    return shown_table


def _table_of(rows: list[dict[Metric, float]], name: str) -> Table:
    """One row for each of them, with every metric that is not zero everywhere."""
    metrics = changed(rows)
    table = Table(name, *map(title, metrics), box=None, padding=(0, 2, 0, 0))
    for index, row in enumerate(rows):
        table.add_row(str(index), *(shown(row[metric], metric.unit) for metric in metrics))
    return table


def print_rounding(folder: Path, index: ExpertIndex, console: Console) -> None:
    """What rounding the experts cost, by layer: relative errors of their weights, and the worst expert."""
    packed = Checkpoint.open(folder).packed or {}
    errors, outputs = packed.get("errors"), packed.get("output_errors")
    table = Table(title="|rounded - original| / |original| of each expert's weights", title_justify="left", box=None)
    headings = ["layer", "gate_up, mean", "down, mean", "worst expert", "its error"]
    for heading in headings if outputs is None else [*headings, "answers to the text, mean", "experts it asked"]:
        table.add_column(heading, justify="right")
    for layer, experts in enumerate(errors or ()):
        first, second = (sum(e[n] for e in experts) / len(experts) for n in (0, 1))
        worst = max(range(len(experts)), key=lambda e: max(experts[e]))
        row = [str(layer), f"{first:.3%}", f"{second:.3%}", str(worst), f"{max(experts[worst]):.3%}"]
        if outputs is not None:
            known = [error for error in outputs[layer] if error is not None]
            row += [f"{sum(known) / max(1, len(known)):.3%}", f"{len(known)} of {len(experts)}"]
        table.add_row(*row)
    old = sum(s.num_experts * b.nbytes for s, b in zip(index.sites, index.layouts))
    new = sum(path.stat().st_size for path in folder.glob("experts-*.safetensors"))
    lost = "nothing is lost"
    if errors is None and new >= old:
        lost = "nothing is lost, nor won: rows are too narrow for bf12, or their exponents spread over more than 15"
    if errors is not None:
        console.print(table)
        lost = "this is lossy: every error is in packed.json, what it does to the answers only a comparison shows"
    console.print(f"{shown(old, 'bytes')} became {shown(new, 'bytes')}; {lost}", markup=False)
