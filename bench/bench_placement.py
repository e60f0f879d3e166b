"""Placement on synthetic routing: plan, bound, gap and time on fixed instances, and how the cost of solving grows.

Bound by CPU: eigenvalue projections (bound) and linear assignments (plan), one process. Baseline: the project's first
experiments, whose figures stand in the table. Run: python bench/bench_placement.py [--seconds 60] [--out FILE]
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import highspy
import numpy as np
import scipy

from moe.placement.solve.bounds import lower_bound
from moe.placement.solve.copies import k_hot
from moe.placement.solve.program import Program
from moe.placement.solve.relaxation import relax
from moe.placement.solve.solver import solve
from moe.placement.solve.swaps import swap_changes
from tests.placement.instances import topic_trace, transitions

# layers, experts, ranks, kind, best plan and best bound of the first experiments
INSTANCES = (
    (4, 8, 2, "topic", 0.4237, 0.4237),
    (32, 8, 4, "topic", 0.69907, 0.69907),
    (12, 16, 4, "topic", 0.6721, 0.6718),
    (24, 32, 4, "topic", 0.6439, 0.6168),
    (24, 64, 8, "topic", 0.7757, 0.7353),
    (48, 128, 8, "topic", 0.7454, 0.6911),
    (61, 256, 32, "topic", 0.8847, 0.8548),
    (12, 16, 4, "zipf", 0.5525, 0.5339),
    (24, 64, 8, "zipf", 0.677, 0.438),
)
HEADER = (
    "| L, E, G, kind | plan | bound | gap | was: plan | was: bound | bound CPU s | search CPU s | iterations | beats |"
)


def hardware() -> dict[str, str]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": f"{names[0] if names else platform.processor()} x {os.cpu_count()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "highs": highspy.Highs().version(),
        "load": f"{os.getloadavg()[0]:.1f} at start (shared machine)",
    }


def contention() -> float:
    """Wall seconds that a second of CPU takes now, 1 to 4: budgets are meant on an idle core, the machine is shared."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.5:
        np.linalg.eigvalsh(np.eye(64))
    return min(max((time.perf_counter() - wall) / 0.5, 1.0), 4.0)


def run_instance(layers: int, experts: int, ranks: int, kind: str, seconds: float) -> dict[str, object]:
    program = Program.even(transitions(layers, experts, ranks, kind), ranks)
    began = time.process_time()
    bound = lower_bound(program, time_limit=seconds * contention())
    middle = time.process_time()
    found = solve(program, time_limit=seconds * contention(), guide=bound.relaxation, seed=1)
    ended = time.process_time()
    assert bound.value <= found.cost + 1e-9
    return {
        "instance": [layers, experts, ranks, kind],
        "plan": found.cost,
        "bound": min(bound.value, found.cost),
        "gap": max(found.cost - bound.value, 0.0) / found.cost,
        "method": bound.method,
        "bound_seconds": bound.seconds,
        "search_seconds": found.seconds,
        "bound_cpu_seconds": middle - began,
        "search_cpu_seconds": ended - middle,
        "iterations": bound.relaxation.iterations if bound.relaxation else None,
        "history": found.history,
    }


def exponent(xs: list[int], ys: list[float]) -> float:
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def growth() -> list[dict[str, object]]:
    """Fitted exponents of: one relaxation iteration, one full sweep, one swap table; medians of 3."""

    def median(action, repeats=3) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    def iteration(layers: int, experts: int, ranks: int) -> float:
        mass = transitions(layers, experts, ranks)
        few = relax(mass, ranks, time_limit=0.8)
        return few.seconds / few.iterations

    def sweep(layers: int, experts: int, ranks: int) -> float:
        program = Program.even(transitions(layers, experts, ranks), ranks)
        return median(lambda: solve(program, time_limit=1e9, rounds=0).cost)  # three starts, one recombination

    def table(tokens: int, experts: int, ranks: int) -> float:
        hits = k_hot(topic_trace(tokens, 1, experts, 4, 4).expert_ids[:, 0], experts)
        ranks_of = np.arange(experts) % ranks
        counts = hits @ np.eye(ranks, dtype=np.float32)[ranks_of]
        return median(lambda: swap_changes(hits, counts, ranks_of))

    rows = []
    chain = {"L": (0, [4, 8, 16]), "E": (1, [32, 64, 128]), "G": (2, [2, 4, 8])}
    tokens = {"N": (0, [2000, 4000, 8000, 16000]), "E": (1, [32, 64, 128])}
    for name, measure, base, axes in (
        ("relaxation iteration", iteration, (8, 32, 4), chain),
        ("a short solve", sweep, (8, 32, 4), chain),
        ("one table of swaps", table, (4000, 64, 8), tokens),
    ):
        for axis, (place, values) in axes.items():
            times = [measure(*[v if i == place else b for i, b in enumerate(base)]) for v in values]
            ms = [t * 1e3 for t in times]
            rows.append({"what": name, "axis": axis, "values": values, "ms": ms, "exponent": exponent(values, times)})
    return rows


def table_line(row: dict) -> str:
    plan, bound = row["first_plan"], row["first_bound"]
    better = ("plan " if row["plan"] < plan - 5e-5 else "") + ("bound" if row["bound"] > bound + 5e-5 else "")
    cells = [
        ", ".join(str(v) for v in row["instance"]),
        f"{row['plan']:.5f}",
        f"{row['bound']:.5f}",
        f"{row['gap']:.3%}",
        plan,
        bound,
        f"{row.get('bound_cpu_seconds', row['bound_seconds']):.1f}",
        f"{row.get('search_cpu_seconds', row['search_seconds']):.1f}",
        row["iterations"] or row["method"],
        better or "=",
    ]
    return "| " + " | ".join(str(c) for c in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for the bound, again for the search; half up to E = 32"
    )
    parser.add_argument("--only", type=int, nargs="*", help="run these instances again, keep the other rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_synthetic")
    args = parser.parse_args()
    lines = [f"command: python bench/bench_placement.py --seconds {args.seconds:g}", ""]
    about = hardware()
    lines += [f"{key}: {value}" for key, value in about.items()] + ["", HEADER, "|" + "---|" * 10]
    print("\n".join(lines), flush=True)
    path = args.out.with_suffix(".json")
    kept = json.loads(path.read_text())["instances"] if args.only is not None and path.exists() else []
    rows = {tuple(row["instance"]): row for row in kept}
    for number, (layers, experts, ranks, kind, plan, bound) in enumerate(INSTANCES):
        key = (layers, experts, ranks, kind)
        if args.only is None or number in args.only:
            row = run_instance(layers, experts, ranks, kind, args.seconds if experts > 32 else args.seconds / 2)
            row["first_plan"], row["first_bound"] = plan, bound
            rows[key] = row
        if key in rows:
            lines.append(table_line(rows[key]))
            print(lines[-1], flush=True)
    table = growth()
    lines += ["", "| cost of | grows with | values | ms | exponent |", "|---|---|---|---|---|"]
    for r in table:
        lines.append(
            f"| {r['what']} | {r['axis']} | {r['values']} | {[round(x, 2) for x in r['ms']]} | {r['exponent']:.2f} |"
        )
    print("\n".join(lines[-len(table) - 2 :]))
    document = {"hardware": about, "seconds": args.seconds, "instances": list(rows.values()), "growth": table}
    args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps({k: v for k, v in document.items() if k != "instances"}))


if __name__ == "__main__":
    main()
