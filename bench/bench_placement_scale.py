"""Placing experts at the size of DeepSeek-V3, 61 layers of 256 experts on 32 ranks, within a minute of CPU, and how the
cost grows. Bound by CPU: annealing, one process and thread; times are CPU seconds, since other jobs run beside.

Routing is made from recorded: every recorded expert is split in four, of which a sequence prefers one and a token takes
it in two cases of three, and tokens get two more experts from those of the next token. So load is as uneven and experts
are as often chosen together as in the record. `tiled` says how.

Run: python bench/bench_placement_scale.py FOLDER [--seconds 60]; FOLDER has the ESFT arrays.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.bench_placement import hardware
from moe.placement.deadline import Deadline
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.solve.baselines import eplb_greedy
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.stats.affinity import expert_load
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes, WireFormat
from tests.placement.scorer import in_turn

DOMAINS = ("translation", "summary", "intent")
TOP_K = 8
HELD = 20_000  # tokens that a plan of the full size is judged on
SIZES = ModelSizes(hidden_size=7168, dtype="bfloat16", expert_bytes=3 * 7168 * 2048 * 2)  # DeepSeek-V3's
FULL = {"4000": (4000, None), "4000, replicas": (4000, 9), "100000": (100_000, None), "100000, replicas": (100_000, 9)}
GROWTH = {"growth": None, "growth, replicas": 0.125}
BASE = {"layers": 2, "experts": 128, "tokens": 8000, "ranks": 16}
STEPS = {"experts": (64, 128, 256), "tokens": (2000, 8000, 32000, 128000), "ranks": (4, 8, 16, 32), "layers": (1, 2, 4)}


def tiled(recorded: RoutingTrace, tokens: int, layers: int, experts: int, seed: int = 0) -> RoutingTrace:
    """A trace of so many tokens, layers and experts (a multiple of the recorded number) with top-8 routing.

    Sequences are drawn again and again, layers taken in turn with their experts' names shuffled.
    """
    rng, split = np.random.default_rng(seed), experts // recorded.num_experts
    assert experts == split * recorded.num_experts, (experts, recorded.num_experts)
    starts = np.cumsum(recorded.sequence_lengths) - recorded.sequence_lengths
    rows, lengths = [], []
    while sum(lengths) < tokens:
        one = int(rng.integers(recorded.num_sequences))
        length = min(int(recorded.sequence_lengths[one]), tokens - sum(lengths))
        rows.append(starts[one] + np.arange(length))
        lengths.append(length)
    token = np.concatenate(rows)
    after = np.minimum(token + 1, recorded.num_tokens - 1)
    likes = np.repeat(rng.integers(0, split, len(lengths)), lengths)[:, None]  # the part that a sequence prefers
    out = np.empty((tokens, layers, TOP_K), np.int16)
    for layer in range(layers):
        ids = recorded.expert_ids[:, layer % recorded.num_layers]
        chosen = np.concatenate([ids[token], ids[after]], axis=1).astype(np.int64)
        part = np.where(rng.random(chosen.shape) < 2 / 3, likes, rng.integers(0, split, chosen.shape))
        chosen = chosen * split + part
        top = ids.shape[1]
        twice = (chosen[:, top:, None] == chosen[:, None, :top]).any(axis=2)
        chosen[:, top:] = np.where(twice, -1, chosen[:, top:])
        late = np.argsort(np.where(chosen[:, top:] < 0, 2.0, rng.random(twice.shape)), axis=1)[:, : TOP_K - top]
        more = np.take_along_axis(chosen[:, top:], late, axis=1)
        name = np.append(rng.permutation(experts), -1)
        out[:, layer] = name[np.concatenate([chosen[:, :top], more], axis=1)]
    return RoutingTrace(
        expert_ids=out, sequence_lengths=np.array(lengths, np.int32), num_experts=experts, model="tiled"
    )


class Run:
    """One search: CPU seconds until every layer has a first plan and until the end."""

    def __init__(self, trace: RoutingTrace, ranks: int, slots: int | None, options: CopyOptions) -> None:
        self._calls, self._layers = 0, trace.num_layers  # the short search comes to every layer first
        self.first, self.began = 0.0, time.process_time()
        self.plan = solve_copies(trace, ranks, slots_per_rank=slots, options=options, progress=self._progress)
        self.cpu = time.process_time() - self.began

    def _progress(self, share: float) -> None:
        self._calls += 1
        if self._calls == self._layers:
            self.first = time.process_time() - self.began


def judged(trace: RoutingTrace, plan: Plan, *, dealt_in_turn: bool = False) -> dict[str, float]:
    """Served by the engine's rule for combine=partial, homes by sequence in turn: rows that leave home and bytes both
    ways per token and layer, busiest over mean load. dealt_in_turn: each copy in turn instead, as EPLB deals."""
    wire = WireFormat(combine="partial")
    each = wire.row_bytes(SIZES.hidden_size, SIZES.element_bytes, TOP_K) + wire.result_bytes(
        SIZES.hidden_size, SIZES.element_bytes
    )
    home = np.repeat(np.arange(trace.num_sequences), trace.sequence_lengths) % plan.num_ranks
    rows, load = [], []
    for layer in range(trace.num_layers):
        ids = trace.expert_ids[:, layer]
        if dealt_in_turn:
            chosen = in_turn(ids, ServingTable.of(plan, layer))
        else:
            chosen = choose_replicas(ids, home, ServingTable.of(plan, layer))
        rank = np.where(chosen < 0, -1, chosen // plan.physical_per_rank)
        bits = np.where(rank < 0, np.uint64(0), np.uint64(1) << rank.astype(np.uint64))  # -1: no expert
        visited = np.bitwise_or.reduce(bits, axis=1)
        rows.append((np.bitwise_count(visited) - (visited >> home.astype(np.uint64) & np.uint64(1))).mean())
        busy = np.bincount(rank[rank >= 0], minlength=plan.num_ranks)
        load.append(busy.max() / busy.mean())
    return {"rows": float(np.mean(rows)), "load": float(np.mean(load)), "bytes": float(np.mean(rows)) * each}


def whole(recorded: RoutingTrace, tokens: int, slots: int | None, seconds: float) -> dict[str, Any]:
    """The full size, within a limit of CPU seconds: judged on the fitted tokens, and on others of the same kind."""
    both = tiled(recorded, tokens + HELD, 61, 256, seed=1)
    sequence = np.repeat(np.arange(both.num_sequences), both.sequence_lengths)
    last = np.arange(both.num_sequences) > sequence[tokens]
    fit, held = both.select(np.flatnonzero(~last)), both.select(np.flatnonzero(last))
    began = time.process_time()
    greedy = eplb_greedy(expert_load(fit), 32, slots)
    eplb = time.process_time() - began
    run = Run(fit, 32, slots, CopyOptions(seconds=Deadline(seconds, time.process_time)))
    row = {"tokens": tokens, "slots": slots, "greedy_cpu": eplb, "first_cpu": run.first, "cpu": run.cpu}
    for name, trace in (("fitted", fit), ("held", held)):
        row[name] = [judged(trace, plan) for plan in (greedy, run.plan)]
    if slots is not None:
        row["dealt_in_turn"] = judged(held, greedy, dealt_in_turn=True)
    return row


def growth(recorded: RoutingTrace, slots_share: float | None, rounds: int) -> list[dict[str, Any]]:
    """One size at a time, the same rounds; the slope of logarithms."""
    rows = []
    for name, sizes in STEPS.items():
        spent = []
        for size in sizes:
            at = BASE | {name: size}
            trace = tiled(recorded, at["tokens"], at["layers"], at["experts"], seed=1)
            slots = None if slots_share is None else int(at["experts"] * (1 + slots_share)) // at["ranks"]
            spent.append(Run(trace, at["ranks"], slots, CopyOptions(rounds=rounds)).cpu)
        slope = float(np.polyfit(np.log(sizes), np.log(spent), 1)[0])
        rows.append({"size": name, "sizes": sizes, "replicas": slots_share, "cpu": spent, "exponent": slope})
        print(rows[-1], flush=True)
    return rows


def _cell(one: dict[str, float]) -> str:
    return f"{one['bytes']:.0f} ({one['rows']:.3f}) @ {one['load']:.3f}"


def table(document: dict[str, Any]) -> str:
    """All parts that are there, as Markdown."""
    about, parts = document["hardware"], document["parts"]
    lines = ["command: python bench/bench_placement_scale.py FOLDER, a part at a time", ""]
    lines += [f"{key}: {value}" for key, value in about.items()]
    lines += [
        "",
        f"61 layers x 256 experts on 32 ranks, at most {document['seconds']:g} CPU s; "
        "bytes per token and layer in partial, both ways (rows) @ load",
        "",
    ]
    lines += [
        "| tokens | slots | EPLB's greedy, fitted | ours | EPLB's greedy, held out | the same dealt evenly "
        "| ours | first plan, CPU s | all |"
    ]
    lines += ["|---" * 9 + "|"]
    for name, row in parts.items():
        if name in FULL:
            cells = [row["tokens"], row["slots"] or "no replicas", *map(_cell, row["fitted"])]
            cells += [_cell(row["held"][0]), _cell(row["dealt_in_turn"]) if row["slots"] else "", _cell(row["held"][1])]
            cells += [f"{row['first_cpu']:.1f}", f"{row['cpu']:.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"{document['rounds']} rounds, {BASE} but for the size that grows",
        "",
        "| | size | CPU s | exponent |",
    ]
    lines += ["|---" * 4 + "|"]
    for row in (row for name in GROWTH for row in parts.get(name, [])):
        times = ", ".join(f"{size}: {s:.2f}" for size, s in zip(row["sizes"], row["cpu"], strict=True))
        kind = "no replicas" if row["replicas"] is None else "12.5 % replicas"
        lines.append(f"| {kind} | {row['size']} | {times} | {row['exponent']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=55.0, help="of CPU, for each plan of the full size")
    parser.add_argument("--rounds", type=int, default=4, help="where growth is measured")
    parser.add_argument("--parts", nargs="*", choices=[*FULL, *GROWTH], default=[*FULL, *GROWTH], help="run again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement_scale")
    args = parser.parse_args()
    traces = [from_deepseek_esft_npz(args.folder / f"deepseek_v2_lite_{d}.npz") for d in DOMAINS]
    recorded = RoutingTrace(
        expert_ids=np.concatenate([t.expert_ids for t in traces]),
        sequence_lengths=np.concatenate([t.sequence_lengths for t in traces]),
        num_experts=64,
        model="recorded",
    )
    found = args.out.with_suffix(".json")
    for part in args.parts:
        made: Any = (
            whole(recorded, *FULL[part], args.seconds) if part in FULL else growth(recorded, GROWTH[part], args.rounds)
        )
        document = json.loads(found.read_text()) if found.exists() else {"parts": {}}
        document |= {"hardware": hardware(), "seconds": args.seconds, "rounds": args.rounds}
        document["parts"] = {n: document["parts"].get(n) for n in (*FULL, *GROWTH)} | {part: made}
        document["parts"] = {name: value for name, value in document["parts"].items() if value is not None}
        found.write_text(json.dumps(document, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(document))
        print(part, made, flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
