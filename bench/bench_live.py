"""Reading ahead on a live model, beside what it could win at most: tokens/s, exposed stall, bytes and their fate.

A packed model decodes greedily prompts of four domains from its disk, page cache bypassed. For each share of experts in
slots and each batch, ways take turns run by run:

on demand      nothing is read ahead; the baseline
router         the next layer's own router is asked
learned        a lookahead file (`moe fit-lookahead`), without the controller's trial
auto           what the program does by itself: learned with its trial, which may stop it
oracle         the next layer's experts are known: what one layer of foresight can win; the bound of time
restrict:M     lossy, so their tokens may differ: the true router chooses among the forecast's best M
replace        lossy: the forecast is the router

Tokens of the exact ways are compared. `Belady` is the least number of bytes that any eviction without reading ahead can
read. A row "nothing to win" is one where the oracle gains less than 5 %.

    python bench/bench_live.py PACKED --lookahead FILE --texts FOLDER [--shares 0.5 0.25 0.125] [--batches 1 4 16]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_lookahead import texts
from torch import Tensor

from moe.config import BatchConfig, EngineConfig, OffloadConfig, RoutingConfig
from moe.layer.lookahead import Lookahead
from moe.layer.routing import Routing, StepContext
from moe.llm import LLM
from moe.offload.policy import Access, Belady, misses_of
from moe.params import SamplingParams

EXACT = ("on demand", "router", "learned", "auto", "oracle")
BYTES = ("bytes_read", "useful_bytes", "late_bytes", "wasted_bytes", "prefetch_bytes")


class Recorder:
    """An observer that keeps which experts each layer of each forward asked for."""

    def __init__(self) -> None:
        self.forwards: list[list[np.ndarray]] = []

    def begin(self, step: StepContext) -> None:
        self.forwards.append([])

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        self.forwards[-1].append(np.unique(routing.topk_ids.numpy()))


class Known:
    """A guess that has seen the future: the recorded next layer of the same forward. Begins anew when it has ended."""

    def __init__(self, forwards: list[list[np.ndarray]], num_experts: list[int]) -> None:
        self.forwards, self.num_experts, self.now = forwards, num_experts, -1

    def __call__(self, layer: int, x: Tensor, topk_ids: np.ndarray) -> np.ndarray | None:
        if layer == 0:
            self.now = (self.now + 1) % len(self.forwards)
        of = self.forwards[self.now]
        assert np.array_equal(np.unique(topk_ids), of[layer]), (self.now, layer)
        if layer + 1 == len(of):
            return None
        return np.bincount(of[layer + 1], minlength=self.num_experts[layer + 1]).astype(np.float32)


def open_way(name: str, args: argparse.Namespace, share: float, batch: int, readers: int) -> LLM:
    lookahead = str(args.lookahead) if name not in ("on demand", "router", "oracle") else None
    prefetch = {"on demand": "off", "router": "router", "auto": "auto", "oracle": "router"}.get(name, "learned")
    lossy = name if name not in EXACT else "off"
    config = EngineConfig(
        threads=1,
        offload=OffloadConfig(budget=str(share), direct=True, io="preadv", readers=readers, prefetch=prefetch),
        routing=RoutingConfig(lookahead=lookahead, pregate=lossy),
        batch=BatchConfig(max_sequences=batch, kv_tokens=4096),
    )
    llm = LLM(args.model, config)
    ahead: Lookahead | None = llm.engine.experts.lookahead
    if ahead is not None and name != "auto":
        ahead.prefetcher._trial = None
    return llm


def totals(llm: LLM) -> dict[str, float]:
    steps, stats = llm.engine.stats, llm.engine.layer_stats()
    found = {key: float(sum(getattr(s, key) for s in stats)) for key in (*BYTES, "stall_seconds", "hits", "misses")}
    return found | {"tokens": steps.pure_decode_tokens, "seconds": steps.decode_seconds}


def case(args: argparse.Namespace, share: float, batch: int) -> list[dict[str, Any]]:
    names = [*EXACT, *args.lossy]
    ways = {name: open_way(name, args, share, batch, args.readers) for name in names}
    first = next(iter(ways.values()))
    index = first.engine.blueprint.index
    num_experts = [site.num_experts for site in index.sites]
    prompts = [
        text[400 * n : 400 * n + 120] for n in range(1, 1 + -(-batch // 4)) for text in texts(args.texts).values()
    ]
    prompts = prompts[:batch] if batch > 1 else [prompts[0]]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    recorder = Recorder()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    said: list[list[int]] | None = None
    for llm in ways.values():
        llm.engine.scheduler.pool.sharing = False  # every run has the same forwards
    first.engine.experts.routing.observers.append(recorder)
    for repeat in range(args.repeats + 1):
        order = names if repeat == 0 else [names[(n + repeat) % len(names)] for n in range(len(names))]
        for name in order:
            llm = ways[name]
            if name == "oracle" and repeat == 0:
                llm.engine.experts.lookahead.guess = Known(list(recorder.forwards), num_experts)
            before = totals(llm)
            answers = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
            if name in EXACT:
                said = answers if said is None else said
                assert said == answers, f"{name}: other tokens"
            if repeat == 0:
                if name == "on demand":
                    first.engine.experts.routing.observers.remove(recorder)
                continue  # caches and clocks are warm from here on
            runs[name].append({key: value - before[key] for key, value in totals(llm).items()})
            llm.engine.experts.cache.check()
    first_key = np.concatenate([[0], np.cumsum(num_experts)])
    once = [Access(n, first_key[n] + ids) for forward in recorder.forwards for n, ids in enumerate(forward)]
    policy = Belady(int(first_key[-1]), once * 2)
    num_slots = first.engine.experts.cache.num_slots
    least = sum(misses_of(policy, once * 2, num_slots)[len(once) :]) * index.in_files.layouts[0].nbytes
    rows = []
    for name in names:
        row: dict[str, Any] = {"share": share, "batch": batch, "way": name}
        row["tokens_per_s"] = statistics.median(r["tokens"] / r["seconds"] for r in runs[name])
        pairs = zip(runs[name], runs["on demand"])
        row["x"] = statistics.median(base["seconds"] / r["seconds"] for r, base in pairs)
        count = sum(r["tokens"] for r in runs[name])
        for key in (*BYTES, "stall_seconds"):
            row[key] = sum(r[key] for r in runs[name]) / count
        row["hit"] = sum(r["hits"] for r in runs[name]) / sum(r["hits"] + r["misses"] for r in runs[name])
        row["belady_bytes"] = least / (count / len(runs[name]))
        ahead = ways[name].engine.experts.lookahead
        row["verdict"] = "" if ahead is None or name == "oracle" else ahead.prefetcher.verdict or ""
        rows.append(row)
    gap = next(r["x"] for r in rows if r["way"] == "oracle") - 1
    for row in rows:
        row["closed"] = None if gap < 0.05 else (row["x"] - 1) / gap
        exact = row["way"] in EXACT and row["way"] not in ("on demand", "oracle")
        closed = "" if not exact else "nothing to win" if row["closed"] is None else f"{row['closed']:.0%}"
        mib = {key: row[key] / 2**20 for key in (*BYTES, "belady_bytes")}
        waste = row["wasted_bytes"] / max(1.0, row["bytes_read"])
        print(
            f"| {share:.1%} | {batch} | {row['way']} | {row['tokens_per_s']:.1f} | {row['x']:.2f} | {closed} "
            f"| {1e3 * row['stall_seconds']:.2f} | {mib['bytes_read']:.2f} | {mib['useful_bytes']:.2f} "
            f"| {mib['late_bytes']:.2f} | {mib['wasted_bytes']:.2f} ({waste:.0%}) | {mib['belady_bytes']:.2f} "
            f"| {row['hit']:.0%} | {row['verdict'].partition(':')[0]} |",
            flush=True,
        )
    for llm in ways.values():
        llm.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lookahead", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--lossy", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--readers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = f"load {os.getloadavg()[0]:.1f} at start"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}, torch {torch.__version__}, one thread")
    print(f"python {' '.join(sys.argv)}, {time.strftime('%Y-%m-%d')}\n")
    heads = "slots | batch | way | tokens/s | x on demand | of the gap | stall ms | MiB a token | useful | late"
    heads += " | wasted | Belady | hits | verdict"
    print(f"| {heads} |\n" + "|---" * 14 + "|")
    rows = [row for share in args.shares for batch in args.batches for row in case(args, share, batch)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
