"""Hit rates of the eviction policies on recorded routing, beside the oracle that knows the future.

Limit: `Belady`, the least number of misses any policy can have. Misses become bytes and stall only with an expert's
size and a disk, so read this beside bench_stores.py. Routing: the .npz files of a folder, each with `expert_ids`
[tokens, layers, K]; a step has `--batch` tokens that follow each other, as of a prompt in chunks; 1: decoding. All
slots are shared by all layers; "per layer" is LRU with the slots divided among the layers, which cannot follow a layer
that needs more; where a step wants more than a layer has, its misses follow each other through the same slots, which
keeps more than reading them side by side can. "By demand" is the default with slots of its own for every layer, as many
as saved most misses on the tokens before (PLEC).

    python bench/bench_policies.py TRACES_FOLDER [--first 1000] [--tokens 400] [--batch 1]
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

from moe.offload.policy import Access, Belady, Keys, Lfu, Lru, Policy, simulate, smallest


class RatesAlone(Lfu):
    """The default without the turns of layers."""

    def victims(self, keys: Keys, count: int) -> Keys:
        return smallest(self.scores[:, keys].sum(0), count)


def misses_per_layer(accesses: list[Access], num_layers: int, num_experts: int, num_slots: int) -> int:
    each = [[a._replace(layer=0) for a in accesses if a.layer == layer] for layer in range(num_layers)]
    per_layer = max(1, num_slots // num_layers)
    return sum(simulate(Lru([num_experts] * num_layers), steps, per_layer) for steps in each)


def misses_by_demand(before: np.ndarray, ids: np.ndarray, num_experts: int, num_slots: int, step: int = 3) -> int:
    """ids [tokens, L, K]. Every layer has K slots; `step` more go where they saved most on `before`."""
    _, num_layers, top_k = ids.shape

    def of(rows: np.ndarray, layer: int, slots: int) -> int:
        return simulate(Lfu([num_experts]), [Access(0, row.astype(np.int64)) for row in rows[:, layer]], slots)

    sizes = range(top_k, num_experts + 1, step)
    curves = np.array([[of(before, layer, size) for size in sizes] for layer in range(num_layers)])
    have = np.zeros(num_layers, int)
    for _ in range((num_slots - top_k * num_layers) // step):
        more = np.minimum(have + 1, len(sizes) - 1)
        rows = np.arange(num_layers)
        have[(curves[rows, have] - curves[rows, more]).argmax()] += 1
    return sum(of(ids, layer, sizes[n]) for layer, n in enumerate(have.clip(max=len(sizes) - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--batch", type=int, default=1, help="tokens of a step")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"python {' '.join(sys.argv)}\n")
    part = slice(arguments.first, arguments.first + arguments.tokens)
    traces = {p.stem: np.load(p)["expert_ids"][part] for p in sorted(arguments.folder.glob("deepseek*.npz"))}
    earlier = slice(max(0, part.start - arguments.tokens), part.start)
    before = {p.stem: np.load(p)["expert_ids"][earlier] for p in sorted(arguments.folder.glob("deepseek*.npz"))}
    third = arguments.tokens // len(traces)
    traces["all, one after another"] = np.concatenate([ids[:third] for ids in traces.values()])
    before["all, one after another"] = np.concatenate([ids[:third] for ids in before.values()])
    num_layers, num_experts = traces["all, one after another"].shape[1], 64
    sizes = [num_experts] * num_layers
    print("hit rate %\n")
    print("| routing | slots % | LRU | LRU per layer | rates alone | default | by demand | oracle |")
    print("|---" * 8 + "|")
    rows = []
    for name, ids in traces.items():
        steps = np.split(ids, range(arguments.batch, len(ids), arguments.batch))
        accesses = [
            Access(layer, np.unique(step[:, layer]).astype(np.int64) + num_experts * layer)
            for step in steps
            for layer in range(num_layers)
        ]
        total = sum(len(access.keys) for access in accesses)
        for share in (0.125, 0.25, 0.5):
            num_slots = int(share * num_experts * num_layers)
            policies: dict[str, Policy] = {
                "lru": Lru(sizes),
                "rates_alone": RatesAlone(sizes),
                "default": Lfu(sizes),
                "oracle": Belady(sum(sizes), accesses),
            }
            misses = {key: simulate(policy, accesses, num_slots) for key, policy in policies.items()}
            assert misses["oracle"] == min(misses.values()), misses
            misses["lru_per_layer"] = misses_per_layer(accesses, num_layers, num_experts, num_slots)
            if arguments.batch == 1:
                misses["by_demand"] = misses_by_demand(before[name], ids, num_experts, num_slots)
            rate = {key: 100 * (1 - count / total) for key, count in misses.items()}
            order = ("lru", "lru_per_layer", "rates_alone", "default", "by_demand", "oracle")
            told = " | ".join(f"{rate[key]:.1f}" if key in rate else "" for key in order)
            print(f"| {name} | {100 * share:g} | {told} |", flush=True)
            rows.append({"routing": name, "share": share} | rate)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
