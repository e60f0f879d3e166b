"""Does reading experts ahead pay? Recorded routing, held-out tokens, experts on disk behind O_DIRECT.

Three questions, one part each:

guess   How many of the next layer's experts are found, by what each predictor may read (DeepSeek-V2-Lite routing)?
replay  What does that do to bytes, exposed stall and tokens/s? Recorded routing through the real cache, reader threads
        and CPU kernel; experts of a quarter of the model's bytes; per layer the work of four more resident experts
        stands for attention and shared experts. Limits: `all resident`, and `next layer known`, which no predictor of
        one layer ahead can beat. All outputs must be bit-identical.
demo    The same of examples/tinymoe, decoded greedily from its own disk form.

    python bench/bench_prefetch.py guess TRACES_FOLDER
    python bench/bench_prefetch.py replay TRACES_FOLDER [--routing intent] [--tokens 60] [--shares 0.25 0.5]
    python bench/bench_prefetch.py demo [--tokens 120]
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config import EngineConfig, OffloadConfig
from moe.kernels.cpu import CpuExperts
from moe.kernels.weights import Activation, ExpertWeights
from moe.layer.experts import SlotExperts
from moe.layer.lookahead import Guess, Lookahead
from moe.layer.routing import NOBODY, Span, StepContext
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.cache import ExpertCache
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.pack import pack
from moe.offload.policy import Access, Belady, Policy
from moe.offload.predictor import Transitions
from moe.offload.prefetch import LEAST_EXPECTED
from moe.params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("intent", "summary", "translation")
E, K = 64, 6
FIRST = 1000  # the policy's constants and the predictor's rate were chosen on other tokens


def load(folder: Path, domain: str) -> np.ndarray:
    """[tokens, 26, 6]"""
    return np.load(folder / f"deepseek_v2_lite_{domain}.npz")["expert_ids"].astype(np.int64)


def k_hot(ids: np.ndarray) -> np.ndarray:
    rows = np.zeros((*ids.shape[:2], E), np.float32)
    np.put_along_axis(rows, ids, 1, 2)
    return rows


def pair_counts(train: np.ndarray) -> list[np.ndarray]:
    """P(expert of l + 1 | expert of l), smoothed by popularity, per layer."""
    rows = k_hot(train)
    share, seen = rows.mean(axis=0), rows.sum(axis=0)
    together = [rows[:, n].T @ rows[:, n + 1] for n in range(train.shape[1] - 1)]
    return [(t + 4 * share[n + 1]) / (seen[n][:, None] + 4) for n, t in enumerate(together)]


def guess(folder: Path) -> list[dict[str, Any]]:
    print("| routing | predictor | learned from tokens | recall@6 | asked for: found | asked for: right | µs |")
    print("|---|---|---|---|---|---|---|")
    results = []
    for domain in DOMAINS:
        ids = load(folder, domain)
        test = slice(FIRST + 3000, FIRST + 3500)
        for num_learned in (0, 200, 3000):
            train = ids[test.start - num_learned : test.start]
            online = Transitions([E] * ids.shape[1], K)
            for token in train:
                for layer, chosen in enumerate(token):
                    online.expected(layer, chosen[None])
            guesses: dict[str, Callable[[int, np.ndarray], np.ndarray | None]] = {
                "transition": lambda layer, chosen, online=online: online.expected(layer, chosen[None])
            }
            if num_learned:
                pairs, share = pair_counts(train), k_hot(train).mean(axis=0)
                guesses["pair counts"] = lambda n, c, pairs=pairs: None if n == len(pairs) else pairs[n][c].mean(axis=0)
                guesses["popularity"] = lambda n, c, share=share: None if n + 1 == len(share) else share[n + 1]
            for name, of in guesses.items():
                found = asked = right = total = 0
                start = time.perf_counter()
                for token in ids[test]:
                    for layer, chosen in enumerate(token):
                        said = of(layer, chosen)
                        if said is None:
                            continue
                        likely = said >= LEAST_EXPECTED
                        asked, right = asked + likely.sum(), right + likely[token[layer + 1]].sum()
                        found += np.isin(np.argsort(-said, kind="stable")[:K], token[layer + 1]).sum()
                        total += K
                micro = (time.perf_counter() - start) / (total / K) * 1e6
                row = {"routing": domain, "predictor": name, "learned": num_learned, "recall": found / total}
                row |= {"found": right / total, "right": right / max(1, asked)}
                results.append(row)
                print(
                    f"| {domain} | {name} | {num_learned} | {row['recall']:.1%} | {row['found']:.1%} "
                    f"| {row['right']:.1%} | {micro:.0f} |",
                    flush=True,
                )
    return results


class BlobFile:
    """A store of one file of random blobs, read with O_DIRECT."""

    def __init__(self, path: Path, layout: ExpertLayout, num_layers: int) -> None:
        self.layouts, self.num_experts = [layout] * num_layers, [E] * num_layers
        generator = torch.Generator().manual_seed(0)
        with path.open("wb") as file:
            for _ in range(num_layers * E):
                blob = torch.randn(layout.nbytes // 2, generator=generator).mul_(0.02).bfloat16()
                file.write(blob.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
        self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        nbytes = len(out)
        assert os.preadv(self._file, [out.numpy().data], (layer * E + expert) * nbytes) == nbytes
        return nbytes

    def close(self) -> None:
        os.close(self._file)


class Replay:
    """One cache and one way to fill it, for recorded tokens [L, K] one after another.

    dense: four resident experts per layer, for the work between the layers of experts.
    """

    def __init__(self, store: BlobFile, dense: ExpertWeights, cache: ExpertCache, guess: Guess | None) -> None:
        self.cache, self.num_layers = cache, len(store.num_experts)
        self.dense = CpuExperts(dense)
        lookahead = None if guess is None else Lookahead(cache, guess, None, trial=False)
        activation = Activation(kind="silu")
        layouts = cache.store.layouts
        kernels = [CpuExperts(layouts[n].weights(cache.views(n), activation)) for n in range(self.num_layers)]
        self.experts = SlotExperts(cache, kernels, None, lookahead)
        self.weights, self.dense_weights = torch.full((1, K), 1 / K), torch.full((1, 4), 0.25)
        self.seconds: list[float] = []
        self.stalls: list[float] = []

    def step(self, x: Tensor, token: Tensor) -> Tensor:
        """x: [1, H]; token: [L, K]. Times itself."""
        before, start = self.stall, time.perf_counter()
        self.experts.routing.begin(StepContext((Span(NOBODY, 0, 1, 1),)))
        for layer in range(self.num_layers):
            slots = torch.arange(4 * layer, 4 * layer + 4, dtype=torch.int32)[None]
            x = x + self.dense.combine(x, slots, self.dense_weights)
            x = x + self.experts.compute(layer, x, token[layer][None], self.weights)
        self.seconds.append(time.perf_counter() - start)
        self.stalls.append(self.stall - before)
        return x

    def forget(self) -> None:
        """What follows is measured."""
        self.cache.reset_stats()
        self.seconds, self.stalls = [], []

    @property
    def stall(self) -> float:
        return sum(s.stall_seconds for s in self.cache.stats)

    def figures(self) -> dict[str, float]:
        """Per token: ms (median), MiB (mean)."""
        stats, num = self.cache.stats, len(self.seconds)
        rows = {"wall_ms": 1e3 * statistics.median(self.seconds), "stall_ms": 1e3 * statistics.median(self.stalls)}
        for name in ("bytes_read", "prefetch_bytes", "useful_bytes", "late_bytes", "wasted_bytes"):
            rows[name.replace("bytes", "mib")] = sum(getattr(s, name) for s in stats) / num / 2**20
        hits, misses = sum(s.hits for s in stats), sum(s.misses for s in stats)
        return rows | {"hit": hits / (hits + misses)}


def disk_rate(store: BlobFile) -> float:
    """Bytes per second of two threads that read random experts."""
    from concurrent.futures import ThreadPoolExecutor

    from moe.offload.stores import aligned_bytes

    rng = np.random.default_rng(0)
    nbytes, num = store.layouts[0].nbytes, 150

    def work(thread: int) -> None:
        out = aligned_bytes(nbytes)
        for key in rng.integers(0, len(store.num_experts) * E, num):
            store.read_into(int(key) // E, int(key) % E, out)

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    return 2 * num * nbytes / (time.perf_counter() - start)


def replay(folder: Path, domain: str, num_tokens: int, shares: list[float]) -> list[dict[str, Any]]:
    num_layers, num_warm = 8, 40
    site = ExpertSite(module="", num_experts=E, hidden_size=1024, intermediate_size=704)
    layout = ExpertLayout.of(site, MatrixFormat(torch.bfloat16))
    recorded = load(folder, domain)[:, 8 : 8 + num_layers]
    ids = recorded[FIRST + 3000 - num_warm :][: num_warm + num_tokens]
    sizes = [E] * num_layers
    trained = Transitions(sizes, K)
    for token in recorded[FIRST : FIRST + 3000 - num_warm]:
        for layer, chosen in enumerate(token):
            trained.expected(layer, chosen[None])

    def known() -> Guess:
        coming = iter([token[layer] for token in ids for layer in range(num_layers)][1:])

        def of(layer: int, x: Tensor, topk_ids: np.ndarray) -> np.ndarray | None:
            chosen = next(coming, None)
            if layer + 1 == num_layers or chosen is None:
                return None
            return np.bincount(chosen, minlength=E).astype(np.float32)

        return of

    def transition() -> Guess:
        predictor = copy.deepcopy(trained)
        return lambda layer, x, topk_ids: predictor.expected(layer, topk_ids)

    accesses = [Access(layer, token[layer] + E * layer) for token in ids for layer in range(num_layers)]
    results = []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        store = BlobFile(Path(scratch) / "experts", layout, num_layers)
        slab = torch.randn(num_layers * 4, layout.nbytes // 2).mul_(0.02).bfloat16().view(torch.uint8)
        dense = ExpertWeights(
            layout.view(slab, layout.gate_up), layout.view(slab, layout.down), None, None, Activation(kind="silu")
        )
        rate = disk_rate(store)
        print(
            f"{domain}: disk {rate / 2**20:.0f} MiB/s, {layout.nbytes / 2**20:.1f} MiB an expert, {num_layers} layers; "
        )
        print(f"{num_tokens} tokens after {num_warm}, every token by all ways in turn, medians (quartiles)")
        print("\n| slots | policy | reads ahead | ms/token | / LFU | stall ms | MiB | useful | late | wasted | hits |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for share in shares:
            num_slots = int(share * num_layers * E)

            def way(policy: str | Policy, guess: Guess | None, num_slots: int = num_slots) -> Replay:
                return Replay(store, dense, ExpertCache(store, num_slots, policy=policy, num_readers=2), guess)

            ways = {
                "LRU|nothing": way("lru", None),
                "LFU|nothing": way("lfu", None),
                "Belady|nothing": way(Belady(num_layers * E, accesses), None),
                "LFU|transition": way("lfu", transition()),
                "LFU|next layer known": way("lfu", known()),
                "all resident|nothing": way("lfu", None, num_layers * E),
            }
            ways["all resident|nothing"].cache.preload()
            generator = torch.Generator().manual_seed(1)
            for number, token in enumerate(torch.from_numpy(ids)):
                x = torch.randn(1, site.hidden_size, generator=generator)
                outputs = []
                names = list(ways)
                for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always first
                    if number == num_warm:
                        ways[name].forget()
                    outputs.append(ways[name].step(x, token))
                assert all(torch.equal(y, outputs[0]) for y in outputs), f"token {number}: outputs differ"
            baseline = np.array(ways["LFU|nothing"].seconds)
            for name, way_of in ways.items():
                way_of.cache.close()
                way_of.cache.check()
                row, policy, ahead = way_of.figures(), *name.split("|")
                ratio = float(np.median(np.array(way_of.seconds) / baseline))
                low, high = np.quantile(way_of.seconds, (0.25, 0.75)) * 1e3
                results.append(
                    {"routing": domain, "share": share, "policy": policy, "ahead": ahead, "ratio": ratio} | row
                )
                print(
                    f"| {share:.0%} | {policy} | {ahead} | {row['wall_ms']:.0f} ({low:.0f}-{high:.0f}) | {ratio:.2f} "
                    f"| {row['stall_ms']:.1f} | {row['mib_read']:.0f} | {row['useful_mib']:.0f} "
                    f"| {row['late_mib']:.0f} | {row['wasted_mib']:.0f} | {row['hit']:.0%} |",
                    flush=True,
                )
        store.close()
    return results


def recall_of(llm: LLM) -> Callable[[], tuple[float, float]]:
    """From now on guesses are compared with what the next layer does: (found of what was wanted, right of guessed)."""
    lookahead = llm.engine.experts.lookahead
    guess, coming, sums = lookahead.guess, {}, np.zeros(3)

    def of(layer: int, x: Tensor, ids: np.ndarray) -> np.ndarray | None:
        if layer in coming:
            wanted = np.zeros(len(coming[layer]), bool)
            wanted[ids[ids >= 0]] = True
            said = coming.pop(layer) >= LEAST_EXPECTED
            sums[:] += (said & wanted).sum(), wanted.sum(), said.sum()
        said = guess(layer, x, ids)
        if said is not None:
            coming[layer + 1] = said
        return said

    lookahead.guess = of
    return lambda: (sums[0] / max(1, sums[1]), sums[0] / max(1, sums[2]))


def demo(num_tokens: int) -> list[dict[str, Any]]:
    lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    prompts = prompts[:: max(1, len(prompts) // 6)][:6]
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    results = []
    print(
        "| slots | reads ahead | found | right | tokens/s | stall ms | KiB a token | useful | late | wasted | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        blueprint = read_blueprint(ROOT / "examples" / "tinymoe")
        packed = pack(blueprint.checkpoint, blueprint.index, Path(scratch) / "packed")
        for budget in ("0.25", "0.5"):
            said, rows = {}, {}
            for _ in range(3):
                for name in ("off", "transition", "router", "transition, judged"):
                    prefetch, _, judged = name.partition(",")
                    config = EngineConfig(
                        dtype="float32",
                        threads=1,
                        offload=OffloadConfig(budget=budget, direct=True, prefetch=prefetch),
                    )
                    with LLM(packed, config) as llm:
                        lookahead = llm.engine.experts.lookahead
                        if lookahead is not None and not judged:
                            lookahead.prefetcher._trial = None
                        recall = recall_of(llm) if lookahead is not None else lambda: (0.0, 0.0)
                        said[name] = [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts]
                        assert said[name] == said["off"], f"{name}: other tokens"
                        steps, stats = llm.engine.stats, llm.engine.layer_stats()
                        count = steps.decode_tokens + steps.prefill_tokens
                        row = {"found": recall()[0], "right": recall()[1]}
                        row["rate"] = steps.pure_decode_tokens / steps.decode_seconds
                        row["stall_ms"] = 1e3 * sum(s.stall_seconds for s in stats) / count
                        for key in ("bytes_read", "useful_bytes", "late_bytes", "wasted_bytes"):
                            row[key] = sum(getattr(s, key) for s in stats) / count / 1024
                        row["verdict"] = "" if lookahead is None else lookahead.prefetcher.verdict or ""
                        rows.setdefault(name, []).append(row)
            for name, several in rows.items():
                verdict = several[-1]["verdict"]
                row = {k: statistics.median(r[k] for r in several) for k in several[0] if k != "verdict"}
                results.append({"slots": budget, "ahead": name, "verdict": verdict} | row)
                print(
                    f"| {budget} | {name} | {row['found']:.0%} | {row['right']:.0%} | {row['rate']:.1f} "
                    f"({min(r['rate'] for r in several):.0f}-{max(r['rate'] for r in several):.0f}) "
                    f"| {row['stall_ms']:.2f} | {row['bytes_read']:.0f} | {row['useful_bytes']:.0f} "
                    f"| {row['late_bytes']:.0f} | {row['wasted_bytes']:.0f} | {verdict} |",
                    flush=True,
                )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("guess", "replay", "demo"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--routing", choices=DOMAINS, default="intent")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"python {' '.join(sys.argv)}\n")
    if arguments.part == "guess":
        results = guess(arguments.folder)
    elif arguments.part == "replay":
        results = replay(arguments.folder, arguments.routing, arguments.tokens or 60, arguments.shares)
    else:
        results = demo(arguments.tokens or 120)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
