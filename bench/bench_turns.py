"""What it is worth to choose who decodes: distinct experts of a step, tokens/s, and how long a request waits.

Replay: recorded routing of three domains mixed, `pool` x B sequences at once, B of them in a step; whoever waited
longest first (`in order`), or by moe/engine/turns.py. Both advance the same number of tokens; a sequence that ends is
followed by another. Live: a model with a quarter of its experts in slots, prompts of four domains, the same requests
with batch.max_sequences=B, and with batch.pool as well; greedy tokens are compared first. Distinct experts bind the
bytes that a step reads, from memory or from the store.

    python bench/bench_turns.py [--traces FOLDER] [--model FOLDER --texts FOLDER]
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from bench_lookahead import texts

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.requests import Chunk, Request, step_of
from moe.engine.turns import Turns
from moe.layer.routing import Routing
from moe.llm import LLM
from moe.params import SamplingParams

DOMAINS = ("intent", "summary", "translation")


class Replay:
    """A pool of sequences that route as recorded. ids of a sequence: [tokens, L, K]."""

    def __init__(self, sequences: list[list[np.ndarray]], places: int, seed: int) -> None:
        self.rng, self.sequences = np.random.default_rng(seed), sequences
        self.numbers = itertools.count()
        self.running = [self.drawn(anywhere=True) for _ in range(places)]

    def drawn(self, anywhere: bool = False) -> tuple[Request, np.ndarray]:
        while True:
            domain = self.sequences[self.rng.integers(len(self.sequences))]
            ids = domain[self.rng.integers(len(domain))]
            if len(ids) >= 24:
                request = Request(next(self.numbers), [], SamplingParams(), 0)
                request.num_computed = int(self.rng.integers(16, len(ids))) if anywhere else 16
                return request, ids

    def run(self, turns: Turns | None, size: int, steps: int) -> tuple[float, list[int], float]:
        """(distinct experts per layer and step, waits in steps, seconds of choosing and watching per step)."""
        num_layers = self.running[0][1].shape[1]
        if turns is not None:
            for request, ids in self.running:
                watch(turns, [Chunk(request, 0, request.num_computed)], ids[: request.num_computed])
        last, waits, distinct, cost = dict.fromkeys((r.id for r, _ in self.running), -1), [], [], 0.0
        for step in range(steps):
            began = time.perf_counter()
            by_wait = sorted(self.running, key=lambda one: last[one[0].id])
            chosen = [r for r, _ in by_wait[:size]]
            if turns is not None:
                chosen = turns.choose([r for r, _ in self.running], size)
            cost += time.perf_counter() - began
            ids_of = {r.id: ids for r, ids in self.running}
            routed = np.stack([ids_of[r.id][r.num_computed] for r in chosen])  # [size, L, K]
            distinct.append(np.mean([len(np.unique(routed[:, layer])) for layer in range(num_layers)]))
            if turns is not None:
                began = time.perf_counter()
                watch(turns, [Chunk(r, r.num_computed, r.num_computed + 1) for r in chosen], routed)
                cost += time.perf_counter() - began
            for request in chosen:
                waits.append(step - last[request.id])
                last[request.id] = step
                request.num_computed += 1
            for place, (request, ids) in enumerate(self.running):
                if request.num_computed == len(ids):
                    if turns is not None:
                        turns.forget(request)
                    self.running[place] = self.drawn()
                    last[self.running[place][0].id] = step
                    if turns is not None:
                        begun, ids = self.running[place]
                        watch(turns, [Chunk(begun, 0, 16)], ids[:16])
        return float(np.mean(distinct)), waits, cost / steps


def watch(turns: Turns, chunks: list[Chunk], routed: np.ndarray) -> None:
    step = step_of(chunks)
    turns.forwards.begin(step)
    for layer in range(routed.shape[1]):
        ids = torch.from_numpy(routed[:, layer].astype(np.int64))
        turns.forwards.routed(torch.empty(0), Routing(layer, ids, torch.ones_like(ids, dtype=torch.float32)), step)


def load_domain(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return np.split(file["expert_ids"], np.cumsum(file["seq_lens"])[:-1])


def replay(folder: Path, steps: int) -> list[str]:
    domains = {name: load_domain(folder / f"deepseek_v2_lite_{name}.npz") for name in DOMAINS}
    mixes = {"three domains": list(domains.values()), **{f"{name} alone": [domains[name]] for name in DOMAINS}}
    lines = [
        "| traffic | B | pool | in order | by turns | change | wait p95, most (steps) | ms a step |",
        "|" + "---|" * 8,
    ]
    for traffic, sequences in mixes.items():
        for size, factor in ((4, 16), (8, 2), (8, 4), (8, 16), (16, 16)) if len(sequences) > 1 else ((8, 16),):
            before, _, _ = Replay(sequences, size * factor, 0).run(None, size, steps)
            turns = Turns([64] * 26, size * factor)
            after, waits, seconds = Replay(sequences, size * factor, 0).run(turns, size, steps)
            lines.append(
                f"| {traffic} | {size} | {factor} B | {before:.2f} | {after:.2f} | {after / before - 1:+.1%} "
                f"| {np.percentile(waits, 95):.0f}, {max(waits)} | {1e3 * seconds:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def live(model: Path, folder: Path, budget: str, size: int, factor: int, rounds: int, tokens: int) -> list[str]:
    prompts = [
        text[start : start + 160]
        for start in range(0, 160 * size * factor // 4, 160)
        for text in texts(folder).values()
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    seen: dict[str, list[tuple[float, float, float]]] = {"in order": [], "by turns": []}
    said: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name, pool in (("in order", None), ("by turns", size * factor)):
            config = EngineConfig(
                threads=1,
                offload=OffloadConfig(budget=budget, direct=True),
                batch=BatchConfig(max_sequences=size, pool=pool),
            )
            with LLM(model, config) as llm:
                began = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - began
                layers = llm.engine.layer_stats()
                asked = sum(s.hits + s.misses for s in layers)
                read = sum(s.bytes_read for s in layers)
            seen[name].append((len(prompts) * tokens / seconds, asked / (len(prompts) * tokens), read / 2**20))
            answers = [o.outputs[0].token_ids for o in outputs]
            assert said.setdefault("tokens", answers) == answers, "tokens differ"
    lines = ["| | tokens/s (median, least, most) | experts asked for per token | MiB read |", "|---|---|---|---|"]
    for name, runs in seen.items():
        speed, asked, read = zip(*runs)
        lines.append(
            f"| {name} | {statistics.median(speed):.1f} ({min(speed):.1f}, {max(speed):.1f}) "
            f"| {statistics.median(asked):.1f} | {statistics.median(read):.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--factor", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, list[str]] = {}
    if args.traces:
        found["Replay of DeepSeek-V2-Lite's routing"] = replay(args.traces, args.steps)
    if args.model:
        found[f"Live, {args.model.name}, budget {args.budget}, B = {args.size}, pool {args.factor} B"] = live(
            args.model, args.texts, args.budget, args.size, args.factor, args.rounds, args.tokens
        )
    if args.out:
        text = "\n\n".join("\n".join((f"## {title}", "", *lines)) for title, lines in found.items())
        args.out.write_text(f"# Who decodes, by turns\n\n`python bench/bench_turns.py`\n\n{text}\n")
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
