"""Reading ahead in virtual time: a live model's routing and forecasts, a disk and a processor of stated speed.

Wall time says nothing on a shared machine, so a model's decoding is recorded once: what every layer asked for, and what
the next router and a lookahead file said of the next one, two and three layers. Then `moe.offload.virtual_time` replays
it with the LFU's slots, one read after another, misses first. Reads at --mib-per-s; a layer's work is the CPU time of
this thread where all experts are resident, less what its experts cost at --gb-per-s of memory.

on demand          nothing is read ahead
router             the next layer's own router is asked
learned d          the lookahead file, 1 .. d layers ahead, what is due sooner first
oracle d           the same with the truth: the bound of d layers of foresight
Belady             the best eviction, nothing ahead
all                every expert of the next layer is read, whatever is expected and whatever was wasted
ring               the same, and what goes is what lies farthest ahead in the cycle of layers: SE-MoE's ring of sections
restrict:M, d      lossy, another run: the router chooses among the forecast's best M, all of which are read, and what
                   is likely 2 .. d layers ahead behind them; with Belady's evictions: a bound. Its `x` is over the best
                   exact way that foresees no more than a program can

    python bench/bench_ahead.py PACKED --lookahead FILE --texts FOLDER [--batches 1 4 16] [--tokens 48]
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_lookahead import texts
from torch import Tensor

from moe.config import BatchConfig, EngineConfig, OffloadConfig, RoutingConfig
from moe.layer.ridge import Forecast
from moe.layer.routers import PlainRouter, plain_routers
from moe.layer.routing import Routing, StepContext
from moe.llm import LLM
from moe.offload.policy import Access, Belady, Keys, Lfu, smallest
from moe.offload.virtual_time import Costs, Guess, Replay, replay
from moe.params import SamplingParams

FAR = 3


class Ring:
    """Evicts what its layer's next visit is farthest for: a policy over `num_layers` layers of E experts each."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts, self.now = num_layers, num_experts, 0

    def used(self, layer: int, keys: Keys) -> None:
        self.now = layer

    def victims(self, keys: Keys, count: int) -> Keys:
        return smallest(-((keys // self.num_experts - self.now - 1) % self.num_layers).astype(np.float64), count)


class Visit(NamedTuple):
    layer: int
    keys: Keys
    tokens: int
    router: Guess  # of the next layer
    learned: tuple[Guess, ...]  # of the next, the one after, …


class Recorder:
    """An observer of decoding steps: what each layer asks for, and what is said of those to come."""

    def __init__(self, routers: list[PlainRouter], forecast: Forecast, num_experts: list[int], width: int) -> None:
        self.routers, self.forecast, self.num_experts, self.width = routers, forecast, num_experts, width
        self.first = np.concatenate([[0], np.cumsum(num_experts)])
        self.visits: list[Visit] = []

    def begin(self, step: StepContext) -> None:
        self.is_decode = bool(step.spans) and all(s.end - s.start == 1 for s in step.spans)

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        if not self.is_decode:
            return
        n, last = routing.layer, len(self.num_experts) - 1
        by_router = Guess.joined([])
        if n < last:
            chosen = self.routers[n + 1].logits(x).topk(self.routers[n + 1].top_k).indices
            by_router = self._likely(n + 1, torch.bincount(chosen.flatten(), minlength=self.num_experts[n + 1]).float())
        learned = tuple(
            self._likely(n + d, self.forecast.probability(n, d, x).sum(0)) for d in range(1, FAR + 1) if n + d <= last
        )
        if self.width and n < last:  # the next layer's is known; what is said of those behind stays a guess
            scores = self.forecast.scores(n, 1, x)
            counts = torch.bincount(scores.topk(self.width).indices.flatten(), minlength=scores.shape[1])
            learned = (self._likely(n + 1, counts.float()), *learned[1:])
        keys = np.unique(routing.topk_ids.numpy()).astype(np.int64) + self.first[n]
        self.visits.append(Visit(n, keys, len(x), by_router, learned))

    def _likely(self, layer: int, expected: Tensor) -> Guess:
        return Guess.of(expected.numpy(), self.first[layer])


def record(args: argparse.Namespace, batch: int, pregate: str = "off") -> tuple[list[Visit], Costs, int, int]:
    """(visits, costs, experts in all, bytes of one)."""
    config = EngineConfig(
        threads=1,
        offload=OffloadConfig(budget="1.0", direct=True),
        batch=BatchConfig(max_sequences=batch),
        routing=RoutingConfig(lookahead=str(args.lookahead), pregate=pregate),
    )
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    some = list(texts(args.texts).values())
    count = max(batch, len(some))
    prompts = [some[n % len(some)][400 * (n // len(some)) :][:120] for n in range(count)]
    with LLM(args.model, config) as llm:
        sites = llm.engine.blueprint.index.sites
        num_experts = [site.num_experts for site in sites]
        routers = plain_routers(llm.engine.model, sites)
        assert routers is not None
        forecast = Forecast.load(args.lookahead, num_experts, sites[0].hidden_size)
        recorder = Recorder(routers, forecast, num_experts, 0 if pregate == "off" else int(pregate.partition(":")[2]))
        llm.engine.experts.routing.observers.append(recorder)
        llm.generate(prompts, params, use_tqdm=False)
        llm.engine.experts.routing.observers.remove(recorder)
        for prompt in prompts[:batch]:
            llm.add(llm.encode(prompt), params)
        times = []
        while llm.engine.has_work:
            before, steps = time.thread_time(), llm.engine.stats.pure_decode_steps
            llm.step()
            if llm.engine.stats.pure_decode_steps > steps:
                times.append(time.thread_time() - before)
        nbytes = llm.engine.blueprint.index.in_files.layouts[0].nbytes
    expert = nbytes / (args.gb_per_s * 1e9)
    asked = np.mean([len(v.keys) for v in recorder.visits])
    layer = max(0.0, float(np.median(times)) / len(sites) - asked * expert)
    return (
        recorder.visits,
        Costs(nbytes / (args.mib_per_s * 2**20), layer, expert, args.guess_us * 1e-6),
        sum(num_experts),
        nbytes,
    )


def ways_of(visits: list[Visit], num_layers: int) -> dict[str, list[Guess] | None]:
    def truth(n: int, far: int) -> Guess:
        ahead = [visits[n + d].keys for d in range(1, far + 1) if visits[n].layer + d < num_layers]
        return Guess.joined([Guess.sure(keys) for keys in ahead])

    ways: dict[str, list[Guess] | None] = {"on demand": None, "router": [v.router for v in visits]}
    ways |= {f"learned {d}": [Guess.joined(v.learned[:d]) for v in visits] for d in range(1, FAR + 1)}
    return ways | {f"oracle {d}": [truth(n, d) for n in range(len(visits))] for d in range(1, FAR + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lookahead", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--restrict", nargs="*", default=[], metavar="restrict:M")
    parser.add_argument("--guess-us", type=float, default=150.0, help="of a layer: guessing, and asking for it")
    parser.add_argument("--mib-per-s", type=float, default=1500.0)
    parser.add_argument("--gb-per-s", type=float, default=10.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread; {args.model.name}\n")
    heads = "batch | slots | way | tokens/s | x on demand | of the gap | stall | experts a token: on demand, ahead"
    print(f"| {heads} | useful | late | wasted | hits |\n" + "|---" * 12 + "|")
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        visits, costs, total, nbytes = record(args, batch)
        restricted = {name: record(args, batch, name)[0] for name in args.restrict}
        num_layers = 1 + max(v.layer for v in visits)
        num_experts = [total // num_layers] * num_layers
        accesses = [Access(v.layer, v.keys) for v in visits]
        warm = len(visits) // 4 // num_layers * num_layers
        count = sum(v.tokens for v in visits[warm:] if v.layer == 0)
        said = f"{nbytes / 2**20:.2f} MiB an expert in {1e3 * costs.read:.2f} ms, a layer {1e3 * costs.layer:.2f} ms"
        print(f"\nbatch {batch}: {said} and {1e3 * costs.expert:.3f} ms for each expert; {count} tokens\n")
        for share in args.shares:
            num_slots = int(share * total)
            if num_slots < max(len(v.keys) for v in visits):
                continue
            found: dict[str, Replay] = {
                name: replay(accesses, guesses, Lfu(num_experts), num_slots, costs, warm=warm)
                for name, guesses in ways_of(visits, num_layers).items()
            }
            found["Belady"] = replay(accesses, None, Belady(total, accesses), num_slots, costs, warm=warm)
            per_layer = total // num_layers
            coming = [v.layer + 1 for v in visits]
            every = [Guess.sure(np.arange(n * per_layer, (n + 1) * per_layer * (n < num_layers))) for n in coming]
            for name, policy in (("all", Lfu(num_experts)), ("ring", Ring(num_layers, per_layer))):
                found[name] = replay(accesses, every, policy, num_slots, costs, warm=warm)
            gap = found["on demand"].seconds / found["oracle 1"].seconds - 1
            best = min(found[name].seconds for name in ("on demand", "router", "learned 1"))
            for name, lossy in restricted.items():
                own = [Access(v.layer, v.keys) for v in lossy]
                for far in range(1, FAR + 1):
                    guesses = [Guess.joined(v.learned[:far]) for v in lossy]
                    of = f"{name}, {far} ahead"
                    found[of] = replay(own, guesses, Lfu(num_experts), num_slots, costs, warm=warm)
                bound = Belady(total, own)
                found[f"{name}, 1 ahead, Belady"] = replay(
                    own, [Guess.joined(v.learned[:1]) for v in lossy], bound, num_slots, costs, warm=warm
                )
            for name, r in found.items():
                is_lossy = name.startswith("restrict")
                base = best if is_lossy else found["on demand"].seconds
                x, waste = base / r.seconds, r.wasted / max(1, r.read + r.ahead)
                closed = (
                    ""
                    if name == "on demand" or is_lossy
                    else "nothing to win"
                    if gap < 0.05
                    else f"{(x - 1) / gap:.0%}"
                )
                hit = r.hits / (r.hits + r.misses)
                row = {"batch": batch, "share": share, "way": name, "x": x, "gap": gap, "waste": waste, "hit": hit}
                rows.append(row | {"tokens_per_s": count / r.seconds, "stall_share": r.stall / r.seconds})
                print(
                    f"| {batch} | {share:.1%} | {name} | {count / r.seconds:.0f} | {x:.2f} | {closed} "
                    f"| {r.stall / r.seconds:.0%} | {r.read / count:.2f}, {r.ahead / count:.2f} "
                    f"| {r.useful / count:.2f} | {r.late / count:.2f} | {r.wasted / count:.2f} ({waste:.0%}) "
                    f"| {hit:.0%} |",
                    flush=True,
                )
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
