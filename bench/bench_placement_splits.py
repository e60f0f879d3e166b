"""How much of a plan's load on other text is the draw of that text: plans without replicas over many splits of a
record's sequences, and what it costs to be more even. Baseline: EPLB's greedy of the same split. Bound by CPU:
annealing, one process.

Each split fits 60 % of the sequences and judges the rest. The price of second moments is that of the solver, times 1, 4
and 16.

Run: python bench/bench_placement_splits.py FOLDER [--splits 12]; FOLDER has the ESFT arrays.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.bench_placement import hardware
from bench.bench_placement_frontier import some_layers
from moe.placement.deadline import NEVER
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.solve.assign import Layer, Limits, search_assignment
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import busiest_load, ranks_touched
from moe.placement.solve.swaps import CopyOptions
from moe.placement.stats.affinity import expert_load
from moe.placement.trace import RoutingTrace

CELLS = (("summary", 4), ("summary", 8), ("translation", 4), ("intent", 4))
TIMES = (1.0, 4.0, 16.0)
ABOUT = """Copies @ load; ours by the price of moments times 1, 4 and 16: load over EPLB's, least to greatest of the
splits. Last but one: of split 0, which bench_placement_frontier.py judges, and its longest judged text's
share of the tokens; last: the correlation of both over the splits."""
Found = dict[str, float]


def placed(fit: RoutingTrace, ranks: int, times: float, rounds: int, seed: int) -> np.ndarray:
    """Copies [L, E, G], one of each expert; times: of the price of second moments."""
    greedy = eplb_greedy(expert_load(fit), ranks).assignment
    hosted = []
    for layer, start in enumerate(greedy):
        ids = fit.expert_ids[:, layer]
        limits = Limits.of(ids, start, ranks, 1.0)
        limits = limits._replace(moments=times * limits.moments, moment_cap=times * limits.moment_cap)
        found = search_assignment(
            Layer(ids, None, limits), start, ranks, rounds=rounds, seed=seed, deadline=NEVER, options=CopyOptions()
        )
        hosted.append(found[:, None] == np.arange(ranks))
    return np.stack(hosted)


def judged(held: RoutingTrace, hosted: np.ndarray) -> Found:
    ranks = hosted.shape[2]
    load = expert_load(held)
    away = (ranks - 1) / ranks  # a home is any rank alike
    return {
        "load": float(np.mean(busiest_load(hosted, load) / (load.sum(axis=1) / ranks))),
        "copies": float(np.mean(ranks_touched(held, hosted))) * away,
    }


def cell(trace: RoutingTrace, ranks: int, splits: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each split."""
    rows = []
    for seed in range(splits):
        fit, held = trace.split(0.6, seed=seed)
        row: dict[str, Any] = {"longest": float(held.sequence_lengths.max() / held.num_tokens)}
        row["greedy"] = judged(held, eplb_greedy(expert_load(fit), ranks).hosted)
        row["ours"] = {times: judged(held, placed(fit, ranks, times, rounds, seed)) for times in TIMES}
        rows.append(row)
    return rows


def line(name: str, rows: list[dict[str, Any]]) -> str:
    cells = [name, f"{np.mean([row['greedy']['copies'] for row in rows]):.3f}"]
    cells[1] += f" @ {np.mean([row['greedy']['load'] for row in rows]):.3f}"
    for times in TIMES:
        over = np.array([row["ours"][times]["load"] - row["greedy"]["load"] for row in rows])
        copies = np.mean([row["ours"][times]["copies"] for row in rows])
        cells.append(f"{copies:.3f} @ {over.mean():+.3f} ({over.min():+.3f} to {over.max():+.3f}, sd {over.std():.3f})")
    over = np.array([row["ours"][1.0]["load"] - row["greedy"]["load"] for row in rows])
    cells.append(f"{over[0]:+.3f}; {rows[0]['longest']:.0%}")
    cells.append(f"{np.corrcoef(over, [row['longest'] for row in rows])[0, 1]:+.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--splits", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int, default=6, help="of 26, evenly spread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_splits.md")
    args = parser.parse_args()
    lines = [f"command: python bench/bench_placement_splits.py FOLDER --splits {args.splits} --rounds {args.rounds}"]
    lines += ["", *(f"{key}: {value}" for key, value in hardware().items()), ""]
    lines += [ABOUT, ""]
    names = [f"ours, x {times:g}" for times in TIMES]
    lines += ["| " + " | ".join(["domain, ranks", "EPLB's greedy", *names, "split 0; longest", "correlation"]) + " |"]
    lines += ["|---" * (len(TIMES) + 4) + "|"]
    document: dict[str, Any] = {}
    for domain, ranks in CELLS:
        trace = some_layers(from_deepseek_esft_npz(args.folder / f"deepseek_v2_lite_{domain}.npz"), args.layers)
        rows = cell(trace, ranks, args.splits, args.rounds)
        document[f"{domain}, {ranks}"] = rows
        lines.append(line(f"{domain}, {ranks}", rows))
        print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
