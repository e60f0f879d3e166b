"""Copies, load and bytes of plans on recorded routing, beside EPLB's greedy: fitted on 60 % of the sequences, judged on
the rest by tests/placement/scorer.py, served by the engine's rule ("dealt evenly": each copy in turn, as EPLB deals).
Ours are means over the solver's seeds, with the least and the greatest load. Beside plans without replicas: ranks
touched on the fitted part, and what `copies_bound` proves that any plan touches, and any that is as even. Bound by CPU:
annealing, one process.

Run: python bench/bench_placement_frontier.py FOLDER [--rounds 50] [--layers 6] [--seeds 3]; FOLDER has the ESFT arrays.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.bench_placement import hardware
from moe.placement.deadline import Deadline
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.plan import Plan
from moe.placement.solve.anneal import VISITS, Price
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import busiest_load, ranks_touched, solve_copies
from moe.placement.solve.copies_bound import copies_bound
from moe.placement.solve.swaps import CopyOptions
from moe.placement.stats.affinity import expert_load
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import WireFormat
from tests.placement.scorer import Score, score

SINGLE = 2  # rounds without replicas for each with: they cost far less
BOUND_SECONDS = 2.0  # of a layer
KINDS = ("single", "replicas")
DOMAINS = ("translation", "summary", "intent")
HEADER = (
    "| domain, ranks, slots | plan | copies @ load, partial | bytes, partial | copies @ load, exact | bytes, exact | "
    "CPU s |\n|---|---|---|---|---|---|---|"
)


def some_layers(trace: RoutingTrace, count: int) -> RoutingTrace:
    """`count` layers, evenly spread."""
    chosen = [n * trace.num_layers // count for n in range(count)]
    weights = None if trace.weights is None else trace.weights[:, chosen]
    return replace(trace, expert_ids=trace.expert_ids[:, chosen], weights=weights)


class Effort(NamedTuple):
    """What each search may take; seeds: 0, 1, ... so many."""

    rounds: int
    seeds: int


def plans_of(fit: RoutingTrace, ranks: int, slots: int | None, effort: Effort) -> dict[str, tuple[list[Plan], float]]:
    """EPLB's greedy, ours for visits, and with replicas ours for bytes in exact mode: plans of all seeds, and the CPU
    seconds of one."""
    greedy = eplb_greedy(expert_load(fit), ranks, slots)
    made = {"EPLB's greedy": ([greedy], 0.0)}
    if slots is not None:
        made["EPLB's greedy, dealt evenly"] = ([greedy], 0.0)
    prices = {"ours": VISITS}
    if slots is not None:
        assert fit.sizes is not None
        prices["ours, bytes"] = Price.of(WireFormat(), fit.sizes, fit.top_k)
    for name, price in prices.items():
        began, plans = time.process_time(), list[Plan]()
        for seed in range(effort.seeds):
            options = CopyOptions(rounds=effort.rounds if slots else SINGLE * effort.rounds, seed=seed)
            plans.append(solve_copies(fit, ranks, slots_per_rank=slots, options=options, price=price))
        made[name] = (plans, (time.process_time() - began) / effort.seeds)
    return made


def kind_of(row: dict[str, Any]) -> str:
    return KINDS[row["slots"] is not None]


def mean_of(scores: list[Score]) -> dict[str, Any]:
    mean = {name: float(np.mean([getattr(one, name) for one in scores])) for name in Score._fields}
    return mean | {"loads": [one.load for one in scores]}


def judged(
    folder: Path, domain: str, ranks: int, effort: Effort, layers: int, kinds: list[str]
) -> list[dict[str, Any]]:
    """All plans of one cell, of these `KINDS`."""
    trace = from_deepseek_esft_npz(folder / f"deepseek_v2_lite_{domain}.npz")
    fit, held = some_layers(trace, layers).split(0.6, seed=0)
    rows: list[dict[str, Any]] = []
    for slots in ({"single": None, "replicas": -(-72 // ranks)}[kind] for kind in kinds):
        for name, (plans, seconds) in plans_of(fit, ranks, slots, effort).items():
            even = name.endswith("evenly")
            partial, exact = (
                mean_of([score(held, plan, is_exact=x, dealt_in_turn=even) for plan in plans]) for x in (False, True)
            )
            rows.append(
                {"domain": domain, "ranks": ranks, "slots": slots, "plan": name, "cpu_seconds": seconds}
                | {"partial": partial, "exact": exact}
            )
            if slots is None:
                rows[-1]["touched"] = float(np.mean([ranks_touched(fit, plan.hosted) for plan in plans]))
        if slots is None:
            rows[-1] |= proven(fit, plans[0])
    return rows


def proven(fit: RoutingTrace, plan: Plan) -> dict[str, float]:
    """Ranks touched at least by any plan, and by any whose ranks serve no more than the fullest of the greedy's or of
    this one, layer by layer."""
    load = expert_load(fit)
    both = [busiest_load(one.hosted, load) for one in (plan, eplb_greedy(load, plan.num_ranks))]
    found = {}
    for name, most in (("bound", None), ("bound_capped", np.maximum(*both))):
        end = Deadline(BOUND_SECONDS * fit.num_layers, time.process_time)
        bounds = copies_bound(fit, plan.num_ranks, seconds=end, hint=plan.hosted, most_pairs=most)
        found[name] = float(bounds.mean())
    return found


def proven_again(folder: Path, row: dict[str, Any], effort: Effort, layers: int) -> dict[str, float]:
    """`proven` of a row of ours without replicas, by the plan of its first seed."""
    trace = from_deepseek_esft_npz(folder / f"deepseek_v2_lite_{row['domain']}.npz")
    fit, _ = some_layers(trace, layers).split(0.6, seed=0)
    return proven(fit, solve_copies(fit, row["ranks"], options=CopyOptions(rounds=SINGLE * effort.rounds)))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER]
    for row in rows:
        cells = [f"{row['domain']}, {row['ranks']}, {row['slots'] or 'no replicas'}", row["plan"]]
        for one in (row["partial"], row["exact"]):
            spread = f" ({min(one['loads']):.3f} to {max(one['loads']):.3f})" if len(one["loads"]) > 1 else ""
            cells += [f"{one['copies']:.3f} @ {one['load']:.3f}{spread}", f"{one['num_bytes']:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['cpu_seconds']:.1f}"]) + " |")
    lines += ["", "Ranks touched on the fitted part, home among them, without replicas", ""]
    lines += [
        "| domain, ranks | EPLB's greedy | ours | proven at least | under the cap on load |",
        "|---|---|---|---|---|",
    ]
    for greedy, ours in itertools.pairwise(rows):
        if "bound" in ours:
            touched = (greedy["touched"], ours["touched"], ours["bound"], ours["bound_capped"])
            lines.append(f"| {ours['domain']}, {ours['ranks']} | " + " | ".join(f"{x:.3f}" for x in touched) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--layers", type=int, default=6, help="of 26, evenly spread")
    parser.add_argument("--seeds", type=int, default=3, help="of the solver")
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 4], help="run these again, keep the others")
    parser.add_argument("--domains", nargs="*", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="plans without replicas, with them")
    parser.add_argument("--bounds", action="store_true", help="prove again, of the plans that were found")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_frontier")
    args = parser.parse_args()
    found = args.out.with_suffix(".json")
    if args.bounds:
        document = json.loads(found.read_text())
        rows = [row for row in document["rows"] if "bound" in row]
        for row in rows:
            row |= proven_again(args.folder, row, Effort(args.rounds, args.seeds), args.layers)
            print(row["domain"], row["ranks"], row["touched"], row["bound"], row["bound_capped"], flush=True)
        found.write_text(json.dumps(document, indent=1) + "\n")
        text = args.out.with_suffix(".md").read_text()
        args.out.with_suffix(".md").write_text(text[: text.index("| domain, ranks, slots")] + table(document["rows"]))
        return
    for ranks, domain in itertools.product(args.ranks, args.domains):
        new = judged(args.folder, domain, ranks, Effort(args.rounds, args.seeds), args.layers, args.kinds)
        print(table(new), flush=True)
        about = {"hardware": hardware(), "rounds": args.rounds, "layers": args.layers, "seeds": args.seeds}
        document = json.loads(found.read_text()) if found.exists() else {"rows": []}
        kept = document["rows"] if about.items() <= (document | {"hardware": about["hardware"]}).items() else []
        order = {(r, d): n for n, (r, d) in enumerate(itertools.product((8, 16, 4), DOMAINS))}
        made = [(ranks, domain, kind) for kind in args.kinds]
        rows = [row for row in kept if (row["ranks"], row["domain"], kind_of(row)) not in made] + new
        rows.sort(key=lambda row: (order[row["ranks"], row["domain"]], KINDS.index(kind_of(row))))
        document = about | {"rows": rows}
        found.write_text(json.dumps(document, indent=1) + "\n")
        lines = [
            f"command: python bench/bench_placement_frontier.py FOLDER --rounds {args.rounds} --layers {args.layers} "
            f"--seeds {args.seeds}"
        ]
        lines += ["", *(f"{key}: {value}" for key, value in about["hardware"].items()), ""]
        args.out.with_suffix(".md").write_text("\n".join(lines) + "\n" + table(document["rows"]))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
