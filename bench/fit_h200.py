"""Costs that the simulator charges on H200 presets, fitted to published tables: a layer's experts, exchanges of rows.

Experts: launch + max(weights read / bandwidth, operations / rate) + rows moved / bandwidth, on balanced routing of 13
shapes by vLLM's Triton kernel in bf16 on one GPU; its error is judged on shapes that were left out, one after another.
Exchanges: fixed time + bytes of the busiest rank / bandwidth, for NCCL's all-to-all (judged on the number of GPUs that
was left out) and, beside it, DeepEP's two kinds (judged on shapes left out). The fit is by logarithms, outliers damped.

The tables' rows are in bench/data (ai-dynamo/aiconfigurator, Apache-2.0). Needs a second of CPU.
Run: python bench/fit_h200.py
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from moe.placement.topology import ExpertCost

Floats = NDArray[np.float64]
DATA = Path(__file__).parent / "data"
ELEMENT = 2  # bytes


class Fit(NamedTuple):
    """Constants, and relative errors: median and 90th percentile on what was left out, and of the whole fit."""

    constants: tuple[float, ...]
    held_median: float
    held_p90: float
    own_median: float
    count: int


def rows_of(name: str) -> list[dict[str, str]]:
    lines = [line for line in (DATA / name).read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def fitted(model: Callable[[Floats], Floats], start: tuple[float, ...], seconds: Floats, groups: list[Any]) -> Fit:
    """model: constants -> seconds [n]. groups: [n], left out one after another for the error."""

    def solve(rows: NDArray[np.bool_]) -> Floats:
        found = least_squares(
            lambda p: np.log(model(np.exp(p))[rows] / seconds[rows]), np.log(start), loss="soft_l1", f_scale=0.1
        )
        return np.asarray(np.exp(found.x))

    error = np.empty(len(seconds))
    for group in sorted(set(groups)):
        out = np.array([g == group for g in groups])
        error[out] = np.abs(model(solve(~out)) / seconds - 1)[out]
    constants = solve(np.ones(len(seconds), bool))
    own = np.abs(model(constants) / seconds - 1)
    return Fit(
        tuple(map(float, constants)), float(np.median(error)), float(np.quantile(error, 0.9)), float(np.median(own)),
        len(own),
    )  # fmt: skip


def experts() -> Fit:
    rows = rows_of("h200_experts.csv")
    tokens, hidden, inter, top, count, us = (
        np.array([float(r[k]) for r in rows]) for k in ("tokens", "hidden", "inter", "top_k", "experts", "us")
    )
    used, pairs = np.minimum(count, tokens * top), tokens * top
    expert_bytes = 3 * hidden * inter * ELEMENT

    def model(p: Floats) -> Floats:
        return ExpertCost(*p).seconds(used, pairs, hidden, expert_bytes, ELEMENT)

    shapes = [(r["hidden"], r["inter"], r["top_k"], r["experts"]) for r in rows]
    return fitted(model, (4e-5, 4e12, 6e14, 6e11), us * 1e-6, shapes)


def exchange(kind: str) -> Fit:
    """kind: nccl, deepep_normal (dispatch), deepep_low_latency (dispatch)."""
    rows = [r for r in rows_of("h200_exchange.csv") if r["kind"] == kind]
    num_bytes, us = (np.array([float(r[k]) for r in rows]) for k in ("bytes", "us"))

    def model(p: Floats) -> Floats:
        return np.asarray(p[0] + num_bytes / p[1])

    return fitted(model, (2e-5, 2e11), us * 1e-6, [r["group"] for r in rows])


def fits() -> dict[str, Fit]:
    kinds = ("nccl", "deepep_normal", "deepep_low_latency")
    return {"experts": experts(), **{kind: exchange(kind) for kind in kinds}}


def main() -> None:
    found = fits()
    print("| | constants | error held out: median | p90 | of the fit: median | rows |\n|---|---|---|---|---|---|")
    for name, fit in found.items():
        told = ", ".join(f"{c:.3g}" for c in fit.constants)
        errors = [f"{e:.1%}" for e in (fit.held_median, fit.held_p90, fit.own_median)]
        print("| " + " | ".join([name, told, *errors, str(fit.count)]) + " |")
    print(json.dumps({name: fit._asdict() for name, fit in found.items()}))


if __name__ == "__main__":
    main()
