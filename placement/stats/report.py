"""Pictures and pages of statistics and plans: self-contained HTML with inline SVG; PNG through matplotlib if there.

Nothing here is needed to solve or to run; it shows what the numbers mean.
"""

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan
from moe.placement.stats.affinity import (
    expert_load,
    total_variation,
    transition_counts,
    transition_predictability,
    usage_entropy,
)
from moe.placement.stats.locality import cache_hit_rate, knee, segment_histogram, segment_routing_performance
from moe.placement.trace import RoutingTrace

STYLE = (
    "body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)
CACHE_RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)


def analyse(trace: RoutingTrace, *, segment: int = 16, cache_tokens: int = 4096) -> dict[str, Any]:
    """What the trace says about offloading and placement, as plain numbers; the cache curve uses up to cache_tokens.

    Keys: model, tokens, entropy, hottest, srp, srp_ratio, cache (rows of slots, oracle, lru), knee, affinity, verdict.
    """
    load = expert_load(trace)
    whole = trace
    if trace.num_tokens > cache_tokens:
        count = int(np.searchsorted(np.cumsum(trace.sequence_lengths), cache_tokens)) + 1
        trace = trace.select(slice(0, count))
    m = min(segment, int(trace.sequence_lengths.max()))
    srp = segment_routing_performance(segment_histogram(trace, m))
    sizes = sorted({min(max(round(r * trace.top_k), trace.top_k), trace.num_experts) for r in CACHE_RATIOS})
    oracle = [float(cache_hit_rate(trace, s, lookahead=m).mean()) for s in sizes]
    lru = [float(cache_hit_rate(trace, s).mean()) for s in sizes]
    best = knee(np.array(sizes), np.array(oracle)) if len(sizes) > 1 else sizes[0]
    affinity = transition_predictability(transition_counts(whole)) if whole.num_layers > 1 else np.zeros(0)
    at_knee = oracle[sizes.index(best)]
    verdict = (
        "suits offloading"
        if at_knee >= 0.7
        else "is a fair fit for offloading"
        if at_knee >= 0.5
        else "suits offloading badly"
    )
    return {
        "model": whole.model,
        "tokens": whole.num_tokens,
        "layers": whole.num_layers,
        "experts": whole.num_experts,
        "top_k": whole.top_k,
        "entropy": float(usage_entropy(load).mean()),
        "hottest": float((load.max(axis=1) / load.mean(axis=1)).mean()),
        "segment": m,
        "srp": srp.f1,
        "srp_ratio": srp.predicted_ratio,
        "cache": [{"slots": s, "oracle": o, "lru": u} for s, o, u in zip(sizes, oracle, lru, strict=True)],
        "knee": best,
        "affinity": float(affinity.mean()) if affinity.size else 0.0,
        "verdict": f"{verdict}: an oracle cache of {best} of {whole.num_experts} experts per layer hits {at_knee:.0%}",
    }


def domain_distances(traces: Sequence[RoutingTrace]) -> NDArray[np.float64]:
    """Mean total-variation distance of the load between every two traces: [n, n]."""
    loads = [expert_load(t) for t in traces]
    return np.array([[float(total_variation(a, b).mean()) for b in loads] for a in loads])


def heatmap_svg(values: NDArray[Any], *, title: str, cell: int = 8) -> str:
    """A matrix as coloured cells, white = 0 to dark = maximum."""
    matrix = np.asarray(values, float)
    top = float(matrix.max()) or 1.0
    rows, columns = matrix.shape
    cells = [
        f'<rect x="{x * cell}" y="{y * cell + 18}" width="{cell}" height="{cell}" fill="{_shade(matrix[y, x] / top)}"/>'
        for y in range(rows)
        for x in range(columns)
    ]
    return _svg(columns * cell, rows * cell + 18, title, cells)


def grid_svg(plan: Plan, *, title: str, load: NDArray[np.float64] | None = None, cell: int = 9) -> str:
    """Experts by rank: one row per layer, one column block per rank, a cell per slot, replicas outlined."""
    width = plan.physical_per_rank
    rank_gap = cell // 2
    replicas = plan.replicas
    cells = []
    for layer in range(plan.num_layers):
        for physical, expert in enumerate(plan.phy2log[layer]):
            if expert < 0:
                continue
            rank = physical // width
            x, y = physical * cell + rank * rank_gap, layer * cell + 18
            shade = 0.5 if load is None else float(load[layer, expert] / max(load[layer].max(), 1e-12))
            fill = _shade(0.15 + 0.85 * shade, rank)
            edge = ' stroke="#d33" stroke-width="1.5"' if replicas[layer, expert] > 1 else ""
            cells.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"{edge}>'
                f"<title>layer {layer} rank {rank} expert {expert}</title></rect>"
            )
    return _svg(plan.num_physical * cell + plan.num_ranks * rank_gap, plan.num_layers * cell + 18, title, cells)


def bars_svg(series: dict[str, NDArray[np.float64]], *, title: str, height: int = 120, bar: int = 8) -> str:
    """Grouped bars, one group per layer: for example copies per token before and after."""
    top = max(float(np.max(v)) for v in series.values()) or 1.0
    count = len(series)
    cells = []
    for k, (name, values) in enumerate(series.items()):
        colour = _shade(0.9, k)
        for layer, value in enumerate(np.asarray(values, float)):
            size = height * value / top
            x = layer * (count * bar + 4) + k * bar
            cells.append(
                f'<rect x="{x}" y="{18 + height - size:.1f}" width="{bar - 1}" height="{size:.1f}" fill="{colour}"/>'
            )
        cells.append(f'<text x="{k * 160 + 4}" y="{height + 34}" fill="{colour}">■ {html.escape(name)}</text>')
    layers = len(next(iter(series.values())))
    return _svg(max(layers * (count * bar + 4), 160 * count), height + 40, title, cells)


def table_html(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A plain table; floats to four digits."""

    def line(values: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell_text(v))}</{tag}>" for v in values) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def cell_text(value: Any) -> str:
    """How a value is shown in every table."""
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else "–" if value is None else str(value)


def write_page(path: str | PathLike[str], title: str, parts: Sequence[str]) -> None:
    """One HTML file that needs no other."""
    body = "\n".join(parts)
    Path(path).write_text(
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>\n{body}\n"
    )


def save_png(path: str | PathLike[str], matrices: dict[str, NDArray[Any]]) -> None:
    """Heatmaps side by side as PNG. Raises ModuleNotFoundError with the remedy if matplotlib is absent."""
    figure = _figure(matrices)
    figure.savefig(path, dpi=120)


def png_html(matrices: dict[str, NDArray[Any]]) -> str:
    """The same picture as an inline image."""
    buffer = BytesIO()
    _figure(matrices).savefig(buffer, dpi=120, format="png")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _figure(matrices: dict[str, NDArray[Any]]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PNG pictures need matplotlib: pip install 'moeflow[bench]', or write HTML instead"
        ) from error
    figure = Figure(figsize=(5 * len(matrices), 4), layout="constrained")
    for axis, (name, matrix) in zip(np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True):
        axis.imshow(matrix, aspect="auto", interpolation="nearest")
        axis.set_title(name)
    return figure


def _svg(width: float, height: float, title: str, cells: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-size="12" '
        f'font-family="system-ui"><text x="0" y="12">{html.escape(title)}</text>{"".join(cells)}</svg><br>'
    )


def _shade(share: float, hue_index: int | None = None) -> str:
    """White to full colour; hue_index picks one of many hues, None is blue."""
    hue = 220 if hue_index is None else (220 + 137 * hue_index) % 360
    return f"hsl({hue} 60% {97 - 62 * min(max(float(share), 0.0), 1.0):.0f}%)"
