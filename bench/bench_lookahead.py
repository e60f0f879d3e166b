"""What foretells the next layers' experts, and what it would be worth to know them: recall, time, misses.

Text of four domains through a model, each domain's first part to fit and its last part to judge. `learned` is
moe/layer/ridge.py, fitted to all domains or (cross) to the three others; `router` asks the later layer's router about
this layer's input; `transition` learns from the judged run as it goes; `popular` are a layer's most used experts while
fitting. Recall: of the K experts that a layer takes, how many stand among the first K or 2K foretold.

Misses: the judged tokens one at a time through moe/offload/policy.py, slots empty at first. `next use` evicts what is
expected to be needed last by the LFU's rates, `forecast` the same with what is foretold of the next layers: what a
policy could do with a forecast, without reading ahead. No limit of the machine binds: all are counts, but for the µs.

    python bench/bench_lookahead.py MODEL TEXT_FOLDER [--tokens 2048]
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config import EngineConfig, OffloadConfig
from moe.engine.foresight import empty_fit
from moe.fit import run_observed
from moe.layer.ridge import Forecast, selection
from moe.layer.routers import plain_routers
from moe.layer.routing import Routing, StepContext
from moe.llm import LLM
from moe.offload.policy import Access, Belady, Lfu, Lru, Policy, simulate, smallest
from moe.offload.predictor import Transitions

DOMAINS = ("stories", "plays", "maths", "code")
WINDOW = 256
DISTANCES = 3


class Seen(NamedTuple):
    """Of one domain's part: x [L][T, H] and ids [L][T, K]."""

    x: list[Tensor]
    ids: list[Tensor]


class Keep:
    """An observer that keeps everything."""

    def __init__(self, num_layers: int) -> None:
        self.x: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self.ids: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def begin(self, step: StepContext) -> None:
        pass

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        self.x[routing.layer].append(x.float().clone())
        self.ids[routing.layer].append(routing.topk_ids.long().clone())

    def seen(self) -> Seen:
        return Seen([torch.cat(parts) for parts in self.x], [torch.cat(parts) for parts in self.ids])


def texts(folder: Path) -> dict[str, str]:
    questions = [json.loads(line)["question"] for line in (folder / "gsm8k_test.jsonl").open()]
    prompts = [json.loads(line)["prompt"] for line in (folder / "humaneval.jsonl").open()]
    return {
        "stories": (folder / "tinystories_sample.txt").read_text()[200_000:],
        "plays": (folder / "tinyshakespeare.txt").read_text()[500_000:],
        "maths": " ".join(questions),
        "code": " ".join(prompts),
    }


def watch(llm: LLM, text: str, num_windows: int) -> tuple[Seen, Seen]:
    """What the first and the last of 2 x num_windows windows show."""
    tokens = llm.encode(text[: 8 * 2 * num_windows * WINDOW])
    windows = [tokens[a : a + WINDOW] for a in range(0, len(tokens) - WINDOW, WINDOW)][: 2 * num_windows]
    halves = []
    for part in (windows[: len(windows) // 2], windows[len(windows) // 2 :]):
        keep = Keep(len(llm.engine.blueprint.index.sites))
        for window in part:
            run_observed(llm, [window], keep)
        halves.append(keep.seen())
    return halves[0], halves[1]


def fitted(llm: LLM, parts: list[Seen]) -> Forecast:
    fit = empty_fit(llm.engine.blueprint, llm.engine.model, DISTANCES)
    for part in parts:
        fit.begin(StepContext())
        for layer, (x, ids) in enumerate(zip(part.x, part.ids)):
            fit.routed(x, Routing(layer, ids, torch.empty(0)), StepContext())
    return fit.forecast()


def recall(scores: Tensor, ids: Tensor) -> np.ndarray:
    """[2]: among the first K, among the first 2K."""
    top_k = ids.shape[1]
    ranked = selection(ids, scores.shape[1]).gather(1, scores.argsort(1, descending=True))
    return np.array([float(ranked[:, :n].sum()) / ids.numel() for n in (top_k, 2 * top_k)])


def transition_scores(seen: Seen, num_experts: list[int], top_k: int) -> list[Tensor]:
    """One token at a time, learning as it goes; of layer l + 1."""
    predictor = Transitions(num_experts, top_k)
    rows = [
        [predictor.expected(n, ids[t : t + 1].numpy()) for n, ids in enumerate(seen.ids)]
        for t in range(len(seen.ids[0]))
    ]
    return [torch.from_numpy(np.stack(one)) for one in list(zip(*rows))[:-1]]


class NextUse(Lfu):
    """Evicts what is expected to be needed last: delay to its layer's next visit, then by its chance at each visit.

    told: by access, (keys, probabilities) foretold for the coming visits; None: none, rates alone.
    """

    def __init__(self, num_experts: list[int], told: list[tuple[np.ndarray, np.ndarray]] | None) -> None:
        super().__init__(num_experts)
        self._told, self._now, self._layer = told, -1, 0
        self._num_layers = len(num_experts)
        self._layer_of = np.repeat(np.arange(self._num_layers), num_experts)

    def used(self, layer: int, keys: np.ndarray) -> None:
        super().used(layer, keys)
        self._now, self._layer = self._now + 1, layer

    def victims(self, keys: np.ndarray, count: int) -> np.ndarray:
        later = np.clip(self._rates, 1e-4, 1.0)
        chance = np.clip(self._rates + self._recent, 1e-4, 1.0)
        if self._told is not None:
            which, probability = self._told[self._now]
            chance[which] = probability
        delay = (self._layer_of - self._layer - 1) % self._num_layers + 1
        expected = delay + self._num_layers * (1 - chance) / later
        return smallest(-expected[keys], count)


def misses(forecast: Forecast, seen: Seen, num_experts: list[int], num_slots: int) -> dict[str, int]:
    first = np.concatenate([[0], np.cumsum(num_experts)])
    num_tokens, num_layers = len(seen.ids[0]), len(num_experts)
    accesses = [Access(n, first[n] + seen.ids[n][t].numpy()) for t in range(num_tokens) for n in range(num_layers)]
    said = {key: forecast.probability(*key, seen.x[key[0]]).numpy() for key in forecast.regressions}
    told = []
    for t in range(num_tokens):
        for n in range(num_layers):
            ahead = [d for d in range(1, DISTANCES + 1) if n + d < num_layers]
            which = [np.arange(first[n + d], first[n + d + 1]) for d in ahead]
            probability = [said[n, d][t] for d in ahead]
            told.append((np.concatenate([*which, first[:0]]).astype(int), np.concatenate([*probability, np.zeros(0)])))
    policies: dict[str, Policy] = {
        "LRU": Lru(num_experts),
        "LFU": Lfu(num_experts),
        "next use": NextUse(num_experts, None),
        "forecast": NextUse(num_experts, told),
        "Belady": Belady(int(first[-1]), accesses),
    }
    return {name: simulate(policy, accesses, num_slots) for name, policy in policies.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="of each domain, to fit and to judge each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = EngineConfig(dtype="float32", threads=1, offload=OffloadConfig(budget="1.0"))
    with LLM(args.model, config) as llm:
        sites, top_k = llm.engine.blueprint.index.sites, llm.engine.blueprint.top_k
        num_experts = [site.num_experts for site in sites]
        routers = plain_routers(llm.engine.model, sites)
        assert routers is not None, "this bench compares with plain routers"
        parts = {name: watch(llm, text, args.tokens // WINDOW) for name, text in texts(args.texts).items()}
        start = time.perf_counter()
        whole = fitted(llm, [fit for fit, _ in parts.values()])
        seconds = time.perf_counter() - start
        cross = {name: fitted(llm, [fit for other, (fit, _) in parts.items() if other != name]) for name in parts}
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread; {args.model.name}")
    num_fit = sum(len(fit.ids[0]) for fit, _ in parts.values())
    print(f"{num_fit} tokens fitted in {seconds:.1f} s, {len(sites)} layers of {num_experts[0]} experts, top {top_k}\n")
    results = []
    print(
        "| judged on | layers ahead | learned | learned, cross | router | transition | popular |\n" + "|---" * 7 + "|"
    )
    for name, (fit, judged) in parts.items():
        by_transition = transition_scores(judged, num_experts, top_k)
        for d in range(1, DISTANCES + 1):
            columns: dict[str, list[np.ndarray]] = {}
            for n in range(len(sites) - d):
                ids = judged.ids[n + d]
                used = selection(fit.ids[n + d], num_experts[n + d]).sum(0).expand(len(ids), -1)
                scores = {
                    "learned": whole.scores(n, d, judged.x[n]),
                    "cross": cross[name].scores(n, d, judged.x[n]),
                    "router": routers[n + d].logits(judged.x[n]),
                    "popular": used,
                } | ({"transition": by_transition[n]} if d == 1 else {})
                for way, one in scores.items():
                    columns.setdefault(way, []).append(recall(one, ids))
            means = {way: np.mean(rows, axis=0) for way, rows in columns.items()}
            results.append({"domain": name, "distance": d} | {way: mean.tolist() for way, mean in means.items()})
            cells = [
                f"{means[way][0]:.1%} / {means[way][1]:.1%}" if way in means else ""
                for way in ("learned", "cross", "router", "transition", "popular")
            ]
            print(f"| {name} | {d} | " + " | ".join(cells) + " |", flush=True)
    x = next(iter(parts.values()))[1].x[0][:1]
    times = []
    for _ in range(300):
        start = time.perf_counter()
        whole.probability(0, 1, x)
        times.append(time.perf_counter() - start)
    print(f"\none forecast of one token: {np.median(times) * 1e6:.0f} µs\n")
    print(
        "| judged on | slots | "
        + " | ".join(("LRU", "LFU", "next use", "forecast", "Belady"))
        + " |\n"
        + "|---" * 7
        + "|"
    )
    for name, (_, judged) in parts.items():
        some = Seen([x[:1024] for x in judged.x], [ids[:1024] for ids in judged.ids])
        for share in (0.5, 0.25, 0.125):
            found = misses(whole, some, num_experts, int(share * sum(num_experts)))
            results.append({"domain": name, "slots": share, "misses": found})
            cells = [f"{n} ({n / found['LFU']:.2f})" for n in found.values()]
            print(f"| {name} | {share:.1%} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
