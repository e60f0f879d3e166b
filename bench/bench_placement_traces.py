"""Placement on recorded DeepSeek-V2-Lite routing: fitted on 60 % of the sequences, judged on the others.

Copies are what a dispatcher sends (one per token and destination rank); homes are dealt over ranks by sequence. The
limit is the data: held-out tokens, and load no worse than the EPLB-style greedy's. Baselines: random, contiguous,
round-robin, EPLB-style greedy (dealing evenly, as it does, and with our replica choice), ExFlow's objective.
Run: python bench/bench_placement_traces.py TRACE_FOLDER [--seconds 16] [--out FILE]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.bench_placement import contention, hardware
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.plan import Plan
from moe.placement.simulate import Workload, simulate
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.bounds import lower_bound
from moe.placement.solve.copies import ranks_touched, solve_copies
from moe.placement.solve.copies_bound import copies_bound
from moe.placement.solve.program import Program
from moe.placement.solve.solver import plan_of, solve
from moe.placement.solve.swaps import CopyOptions
from moe.placement.stats.affinity import expert_load, transition_counts
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import WireFormat

DOMAINS = ("intent", "summary", "translation")
HEADER = "| fit → serve | G | slots | plan | copies | vs EPLB | nodes | max/mean | in step | coherent | vs EPLB | s |"


def judge(held: RoutingTrace, plan: Plan, topology: Topology, split: str = "local") -> dict[str, float]:
    home = simulate(held, plan, topology, Workload(split=split))
    moving = simulate(held, plan, topology, Workload(split=split, wire=WireFormat(dispatcher="coherent")))
    return {
        "copies": home.copies,
        "node_copies": home.node_copies,
        "imbalance": home.imbalance,
        "step_imbalance": home.step_imbalance,
        "coherent_copies": moving.copies,
    }


def candidates(fit: RoutingTrace, ranks: int, slots: int | None, seconds: float) -> dict[str, tuple[Plan, str, float]]:
    """Plans by name, how their replicas share tokens, and the wall seconds they took.

    Budgets are CPU seconds: a shared machine gets proportionally more time.
    """
    seconds *= contention()
    load, shape = expert_load(fit), (fit.num_layers, fit.num_experts, ranks)
    began = time.perf_counter()
    eplb = eplb_greedy(load, ranks, slots)
    eplb_seconds = time.perf_counter() - began
    ours = solve_copies(fit, ranks, slots_per_rank=slots, options=CopyOptions(seconds=seconds))
    if slots is not None:
        return {
            "EPLB, even deal": (eplb, "even", eplb_seconds),
            "EPLB, our choice": (eplb, "local", eplb_seconds),
            "ours": (ours, "local", ours.seconds or 0.0),
        }
    program = Program.even(transition_counts(fit, pairs="home"), ranks)
    bound = lower_bound(program, time_limit=seconds / 4)
    found = solve(program, time_limit=seconds / 4, guide=bound.relaxation)
    exflow = plan_of(program, found, bound=min(bound.value, found.cost), solver="exflow objective")
    coherent = solve_copies(fit, ranks, options=CopyOptions(seconds=seconds, coherent=True))
    return {
        "random": (Plan.random(*shape), "local", 0.0),
        "contiguous": (Plan.contiguous(*shape), "local", 0.0),
        "round-robin": (Plan.round_robin(*shape), "local", 0.0),
        "EPLB": (eplb, "local", eplb_seconds),
        f"ExFlow objective, gap {exflow.gap:.1%}": (exflow, "local", bound.seconds + found.seconds),
        "ours": (ours, "local", ours.seconds or 0.0),
        "ours, coherent": (coherent, "local", coherent.seconds or 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=16.0, help="CPU seconds per plan")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_deepseek_v2_lite")
    parser.add_argument("--only", choices=("replicas",), help="run this part again, keep the other rows")
    args = parser.parse_args()
    about = hardware()
    lines = [f"command: python bench/bench_placement_traces.py FOLDER --seconds {args.seconds:g}", ""]
    lines += [f"{key}: {value}" for key, value in about.items()] + ["", HEADER, "|" + "---|" * 12]
    print("\n".join(lines), flush=True)
    traces = {d: from_deepseek_esft_npz(args.folder / f"deepseek_v2_lite_{d}.npz") for d in DOMAINS}
    parts = {d: t.split(0.6, seed=0) for d, t in traces.items()}
    results = []

    def report(key: tuple[str, str, int, int | None], name: str, row: dict, base: dict, seconds: float) -> None:
        fit, serve, ranks, slots = key
        about_row = {"fit": fit, "serve": serve, "ranks": ranks, "slots": slots, "plan": name, "seconds": seconds}
        results.append(about_row | row)
        cells = [f"{fit} → {serve}", ranks, slots or 64 // ranks, name]
        cells += [f"{row['copies']:.3f}", f"{row['copies'] / base['copies'] - 1:+.1%}", f"{row['node_copies']:.3f}"]
        cells += [f"{row['imbalance']:.3f}", f"{row['step_imbalance']:.3f}", f"{row['coherent_copies']:.3f}"]
        cells += [f"{row['coherent_copies'] / base['coherent_copies'] - 1:+.1%}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
        print(lines[-1], flush=True)

    bounds = {}
    if args.only:
        kept = json.loads(args.out.with_suffix(".json").read_text())
        bounds = kept["bounds"]
        by_key = {(r["fit"], r["serve"], r["ranks"], r["plan"]): r for r in kept["rows"] if r["slots"] is None}
        for (fit, serve, ranks, name), row in by_key.items():
            report((fit, serve, ranks, None), name, row, by_key[fit, serve, ranks, "EPLB"], row["seconds"])
    for ranks in (4, 8):
        topology = Topology.preset(f"2xh200x{ranks // 2}")
        for slots in (72 // ranks,) if args.only else (None, 72 // ranks):
            for domain in DOMAINS:
                fit, held = parts[domain]
                plans = candidates(fit, ranks, slots, args.seconds)
                rows = {name: judge(held, plan, topology, split) for name, (plan, split, _) in plans.items()}
                base = rows["EPLB" if slots is None else "EPLB, our choice"]
                for name, row in rows.items():
                    report((domain, domain, ranks, slots), name, row, base, plans[name][2])
                others = [d for d in DOMAINS if d != domain]
                for other in others:  # fitted on one domain, serving another
                    target = parts[other][1]
                    keep = ("EPLB", "ours") if slots is None else ("EPLB, our choice", "ours")
                    crossed = {n: judge(target, plans[n][0], topology, plans[n][1]) for n in keep}
                    for name, row in crossed.items():
                        report((domain, other, ranks, slots), name, row, crossed[keep[0]], plans[name][2])
                if slots is None:
                    ours = plans["ours"][0]
                    bound = copies_bound(fit, ranks, seconds=args.seconds / 2, hint=ours.hosted)
                    bounds[f"{domain}, {ranks} ranks"] = {
                        "touched": float(ranks_touched(fit, ours.hosted).mean()),
                        "bound": float(bound.mean()),
                        "eplb": float(ranks_touched(fit, plans["EPLB"][0].hosted).mean()),
                    }
                document = {"hardware": about, "seconds": args.seconds, "rows": results, "bounds": bounds}
                args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
                args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    lines += [
        "",
        "| ranks touched per token, fitted part, no replicas | EPLB | ours | proven at least |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {b['eplb']:.3f} | {b['touched']:.3f} | {b['bound']:.3f} |" for name, b in bounds.items()]
    print("\n".join(lines[-len(bounds) - 2 :]))
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps({"hardware": about, "bounds": bounds}))


if __name__ == "__main__":
    main()
