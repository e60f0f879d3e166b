"""Measured points with a theory's curve beside them, as a small picture (SVG, both axes logarithmic)."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDE, HIGH = 280, 210  # of one panel, pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 26, 36


class Curve(NamedTuple):
    """measured, theory: (x, y) each, all above 0."""

    title: str
    axis: str
    measured: Sequence[tuple[float, float]]
    theory: Sequence[tuple[float, float]]


def picture(curves: Sequence[Curve]) -> str:
    body = "\n".join(part for number, curve in enumerate(curves) for part in _panel(curve, number * WIDE))
    key = (
        f'<circle cx="{LEFT + 4}" cy="{HIGH + 10}" r="3" fill="#2a6fc9"/>'
        f'<text x="{LEFT + 12}" y="{HIGH + 14}">measured</text>'
        f'<path d="M{LEFT + 80} {HIGH + 10}h20" stroke="#c77700" stroke-width="2"/>'
        f'<text x="{LEFT + 106}" y="{HIGH + 14}">the plan, from figures of the machine</text>'
    )
    size = f"{WIDE * len(curves)} {HIGH + 22}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n{key}\n</svg>\n'
    )


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that lie between, ends included."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for p in powers for v in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if low <= v * 1.0001 and v <= high * 1.0001]


def _panel(curve: Curve, shift: float) -> Iterator[str]:
    points = [*curve.measured, *curve.theory]
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v)) for v in zip(*points))
    y_low, y_high = y_low / 1.3, y_high * 1.3

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / max(1e-9, math.log(x_high / x_low))
        up = math.log(y / y_low) / math.log(y_high / y_low)
        return shift + LEFT + across * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - up * (HIGH - TOP - BOTTOM)

    yield f'<text x="{shift + LEFT}" y="16" font-weight="bold">{escape(curve.title)}</text>'
    for value in ticks(y_low, y_high):
        left, y = at(x_low, value)
        yield f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{shift + WIDE - RIGHT}" y2="{y:.1f}" stroke="#d4d8de"/>'
        yield f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value, _ in curve.measured:
        x, bottom = at(value, y_low)
        yield f'<text x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{value:g}</text>'
    middle = shift + (LEFT + WIDE - RIGHT) / 2
    yield f'<text x="{middle:.1f}" y="{HIGH - 6}" text-anchor="middle">{escape(curve.axis)}</text>'
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in curve.theory)
    yield f'<polyline points="{line}" fill="none" stroke="#c77700" stroke-width="2"/>'
    for point in curve.measured:
        x, y = at(*point)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2a6fc9"/>'
