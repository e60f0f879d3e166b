"""Pictures and pages of statistics and plans: self-contained HTML with inline SVG; PNG through matplotlib if there.

Nothing here is needed to solve or to run; it shows what the numbers mean.
"""

import html
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

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
from moe.placement.written import written_whole

STYLE = (
    ":root{color-scheme:light dark}body{font:14px/1.4 system-ui,sans-serif;margin:1em auto;"
    "padding:0 1em;max-width:70em}"
    "table{border-collapse:collapse;margin:.8em 0;display:block;overflow-x:auto}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #8885}"
    "td:first-child,th:first-child{text-align:left}figure{margin:1.6em 0}figcaption{font-size:.85em;opacity:.8}"
    ".wide{overflow-x:auto}svg{display:block;width:100%;height:auto;shape-rendering:crispEdges}"
    "svg text{font-size:11px;fill:currentColor}"
)
CACHE_RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)
CACHE_TOKENS = 4096


def analyse(trace: RoutingTrace, *, segment: int = 16) -> dict[str, Any]:
    """What the trace says about offloading and placement, as plain numbers; the cache curve uses up to CACHE_TOKENS.

    Keys: model, tokens, entropy, hottest, srp, srp_ratio, cache (rows of slots, oracle, lru), knee, affinity, verdict.
    """
    load = expert_load(trace)
    whole = trace
    if trace.num_tokens > CACHE_TOKENS:
        count = int(np.searchsorted(np.cumsum(trace.sequence_lengths), CACHE_TOKENS)) + 1
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


class Picture(NamedTuple):
    """A matrix, and what its rows, its columns and the colour stand for."""

    values: NDArray[Any]
    rows: str
    columns: str
    unit: str


_TOP, _LEFT, _BELOW = 6, 62, 34  # pixels around a picture, for its axes
_SHORT = 6  # letters of a word that stands in front of a picture
_SHRINKS = 0.8  # the smallest share of its size that it is shown at: letters of 9 pixels


def heatmap_svg(picture: Picture, *, title: str, cell: int = 8) -> str:
    """The matrix as coloured cells, white = 0 to dark = maximum, with its axes and the scale of the colour."""
    matrix = np.asarray(picture.values, float)
    most = float(matrix.max())
    rows, columns = matrix.shape
    cells = [
        f'<rect x="{_LEFT + x * cell}" y="{_TOP + y * cell}" width="{cell}" height="{cell}" '
        f'fill="{_shade(matrix[y, x] / (most or 1.0))}"/>'
        for y in range(rows)
        for x in range(columns)
    ]
    cells += [_frame(columns * cell, rows * cell), *_row_names(picture.rows, rows, cell)]
    for x in {0, columns - 1}:
        cells.append(_text(_LEFT + (x + 0.5) * cell, _TOP + rows * cell + 13, str(x), "middle"))
    cells.append(_text(_LEFT + columns * cell / 2, _TOP + rows * cell + 28, picture.columns, "middle"))
    at = _LEFT + columns * cell + 16
    steps = 20
    for step in range(steps):
        y = _TOP + (steps - 1 - step) * 5
        cells.append(f'<rect x="{at}" y="{y}" width="12" height="5" fill="{_shade(step / (steps - 1))}"/>')
    amount = f"{most:,.0f}" if most >= 1000 else f"{most:.4g}"
    largest = f"{amount} {picture.unit}"
    cells += [_text(at + 17, _TOP + 9, largest), _text(at + 17, _TOP + steps * 5, "0")]
    width = at + 40 + 7 * len(largest)
    told = f"Rows: {picture.rows}; columns: {picture.columns}; darker: more {picture.unit}, up to {amount}."
    return _figure_html(width, _TOP + max(rows * cell, steps * 5) + _BELOW, title, cells, told)


def grid_svg(plan: Plan, *, title: str, load: NDArray[np.float64]) -> str:
    """Experts by rank: one row per layer, one column block per rank, a cell per slot, replicas outlined."""
    width, cell, rank_gap = plan.physical_per_rank, 9, 4  # pixels
    replicas = plan.replicas
    cells = _row_names("layer", plan.num_layers, cell)
    for layer in range(plan.num_layers):
        for physical, expert in enumerate(plan.phy2log[layer]):
            if expert < 0:
                continue
            rank = physical // width
            x, y = _LEFT + physical * cell + rank * rank_gap, _TOP + layer * cell
            fill = _shade(0.15 + 0.85 * float(load[layer, expert] / max(load[layer].max(), 1e-12)), rank)
            edge = ' stroke="#d33" stroke-width="1.5"' if replicas[layer, expert] > 1 else ""
            cells.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"{edge}>'
                f"<title>layer {layer} rank {rank} expert {expert}</title></rect>"
            )
    low = _TOP + plan.num_layers * cell
    block = width * cell
    for rank in range(plan.num_ranks):
        name = f"rank {rank}" if block >= 48 else str(rank)
        cells.append(_text(_LEFT + rank * (block + rank_gap) + block / 2, low + 14, name, "middle"))
    full = _LEFT + plan.num_physical * cell + plan.num_ranks * rank_gap
    told = "A column is a slot of a rank" + (", named below" if block >= 48 else ", whose number stands below")
    told += "; darker: more tokens, against the busiest expert of the layer"
    told += "; red edge: in several places" if (replicas > 1).any() else ""
    return _figure_html(full + 30, low + _BELOW - 12, title, cells, told + ".")


def bars_svg(series: dict[str, NDArray[np.float64]], *, title: str, unit: str) -> str:
    """Grouped bars, one group per layer: for example copies per token before and after."""
    most = max(float(np.max(v)) for v in series.values()) or 1.0
    count, layers = len(series), len(next(iter(series.values())))
    bar = max(3, min(14, 700 // (layers * (count + 1))))
    height = 130  # pixels
    group, low = bar * (count + 1), _TOP + height
    cells, full = [], _LEFT + layers * bar * (count + 1)
    for part in (0, 0.5, 1):
        y = low - height * part
        cells.append(f'<line x1="{_LEFT}" x2="{full}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".25"/>')
        cells.append(_text(_LEFT - 6, y + 4, f"{most * part:.3g}", "end"))
    legend = []
    for k, (name, values) in enumerate(series.items()):
        colour = _shade(0.75, k)
        legend.append(f'<span style="color:{colour}">■</span> {html.escape(name)}')
        for layer, value in enumerate(np.asarray(values, float)):
            size = height * value / most
            x = _LEFT + layer * group + (k + 0.5) * bar
            cells.append(
                f'<rect x="{x:.1f}" y="{low - size:.1f}" width="{bar - 0.5}" height="{size:.1f}" fill="{colour}">'
                f"<title>{html.escape(name)}, layer {layer}: {value:.4g}</title></rect>"
            )
    every = max(1, -(-layers // 16))
    cells += [_text(_LEFT + (n + 0.5) * group, low + 14, str(n), "middle") for n in range(0, layers, every)]
    cells.append(_text(_LEFT + layers * group / 2, low + 29, "layer", "middle"))
    told = f"{html.escape(unit)}: {', '.join(legend)}"
    return _figure_html(full + 10, low + _BELOW, title, cells, told, is_html=True)


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
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>\n{body}\n"
    )
    with written_whole(path) as part:
        part.write_text(page, encoding="utf-8")


def save_png(path: str | PathLike[str], pictures: dict[str, Picture]) -> None:
    """Heatmaps side by side as PNG. Raises ValueError with the remedy if matplotlib is absent."""
    with written_whole(path) as part:
        _figure(pictures).savefig(part, dpi=120)


def _figure(pictures: dict[str, Picture]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("PNG pictures need matplotlib: pip install 'moeflow[bench]', or write HTML instead") from error
    figure = Figure(figsize=(5 * len(pictures), 4), layout="constrained")
    for axis, (name, one) in zip(np.atleast_1d(figure.subplots(1, len(pictures))), pictures.items(), strict=True):
        image = axis.imshow(one.values, aspect="auto", interpolation="nearest")
        axis.set(title=name, xlabel=one.columns, ylabel=one.rows)
        figure.colorbar(image, ax=axis, label=one.unit)
    return figure


def _figure_html(
    width: float, height: float, title: str, cells: Sequence[str], told: str = "", *, is_html: bool = False
) -> str:
    """A picture under its title and over what it tells. It shrinks to the page as long as its words can be read; on a
    phone it is moved sideways."""
    caption, least = told if is_html else html.escape(told), _SHRINKS * width
    return (
        f'<figure><strong>{html.escape(title)}</strong><div class="wide"><svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px;min-width:{least:.0f}px">'
        f"{''.join(cells)}</svg></div>" + (f"<figcaption>{caption}</figcaption>" if told else "") + "</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _frame(width: float, height: float) -> str:
    place = f'x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}"'
    return f'<rect {place} fill="none" stroke="currentColor" stroke-opacity=".35"/>'


def _row_names(word: str, rows: int, cell: int) -> list[str]:
    """The first and the last, and the word for them if there is place for it."""
    first = f"{word} 0" if len(word) <= _SHORT else "0"
    names = [(0, first), (rows - 1, str(rows - 1))][: 1 + (rows * cell >= 2 * 12 and rows > 1)]
    return [_text(_LEFT - 6, _TOP + (y + 0.5) * cell + 4, name, "end") for y, name in names]


def _shade(share: float, hue_index: int | None = None) -> str:
    """White to full colour; hue_index picks one of many hues, None is blue."""
    hue = 220 if hue_index is None else (220 + 137 * hue_index) % 360
    return f"hsl({hue} 60% {97 - 62 * min(max(float(share), 0.0), 1.0):.0f}%)"
