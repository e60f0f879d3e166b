"""An offline batch in one memory: 16 sequences a step, and what batch.schedule=layer_major makes of it.

The memory is an eighth of the experts (--share) and the KV of 16 sequences; all ways have these bytes for KV and slots
together, page cache bypassed, and greedy tokens must be equal. Bytes bind: what a step reads is shared by all of its
tokens. "stays" is the split that was chosen beforehand, kept; the last way moves it while it runs. --foretold F:
requests may say F times --tokens, and end after 1 to twice --tokens, which nobody knows beforehand. --widen F fills
every expert with zeros to F times its size: the same tokens and routing in experts whose size, beside that of a
sequence's KV, is that of larger models.

    python bench/bench_wide.py MODEL --texts FOLDER [--widen 8] [--foretold 4] [--prompts 256] [--tokens 32]
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench_lookahead import texts
from safetensors.torch import load_file, save_file

import moe.engine.moving_split as moving_split
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.layer_major import USUAL, Sizes, Uniform, Workload, left_of, read_bytes, sizes_of
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.params import SamplingParams

_EXPERT = re.compile(r"\.experts\.\d+\.(w[123])\.weight$")


def widened(model: Path, out: Path, times: int) -> Path:
    """Its Mixtral experts with `times` their intermediate size, zeros from the old one on."""
    weights = load_file(model / "model.safetensors")
    for name, old in weights.items():
        if kind := _EXPERT.search(name):
            dim = 1 if kind[1] == "w2" else 0
            zeros = torch.zeros([n * (times - 1) if d == dim else n for d, n in enumerate(old.shape)], dtype=old.dtype)
            weights[name] = torch.cat([old, zeros], dim)
    for path in model.iterdir():
        if path.suffix == ".json":
            (out / path.name).write_bytes(path.read_bytes())
    told = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(told | {"intermediate_size": times * told["intermediate_size"]}))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def packed(model: Path, folder: Path, times: int) -> Path:
    """A folder that can be read past the page cache."""
    if times > 1:
        (folder / "wide").mkdir()
        model = widened(model, folder / "wide", times)
    blueprint = read_blueprint(model)
    if blueprint.checkpoint.packed:
        return model
    pack(blueprint.checkpoint, blueprint.index, folder / "packed")
    return folder / "packed"


def ways(
    model: Path, prompts: Sequence[str], num_new: int, share: float
) -> tuple[dict[str, EngineConfig], Workload, Sizes]:
    """Both with the same bytes for KV and slots."""
    offload = OffloadConfig(budget=str(share), direct=True, io="preadv", readers=2, prefetch="off")
    with LLM(model, EngineConfig(threads=1, offload=offload, batch=BatchConfig(kv_tokens=1024))) as llm:
        loaded = llm.engine.loaded
        sizes = sizes_of(loaded.read.blueprint, BatchConfig(), loaded.dense.tried.kv_bytes, loaded.dense.vocabulary)
        work = Workload([len(llm.encode(prompt)) for prompt in prompts], [num_new] * len(prompts))
        num_slots = llm.engine.state().slots
    block = sizes.block_size
    longest = sorted((-(-(tokens + num_new) // block) * block for tokens in work.prompts), reverse=True)
    kv_tokens = sum(longest[:USUAL])
    memory = sizes.slab(num_slots) + kv_tokens * sizes.kv_bytes
    usual = EngineConfig(
        threads=1, offload=replace(offload, budget=f"{num_slots} experts"), batch=BatchConfig(kv_tokens=kv_tokens)
    )
    chosen = EngineConfig(
        threads=1, offload=replace(offload, budget=f"{memory}B"), batch=BatchConfig(schedule="layer_major")
    )
    return {f"{USUAL} sequences": usual, "layer_major, stays": chosen, "layer_major": chosen}, work, sizes


def served(llm: LLM, prompts: Sequence[str], params: SamplingParams, lengths: Sequence[int]) -> list[list[int]]:
    """The answers, each ended after its length."""
    asked = [llm.add(llm.encode(prompt), params) for prompt in prompts]
    length_of = {id(one): length for one, length in zip(asked, lengths)}
    while llm.engine.has_work:
        for event in llm.step():
            if len(event.generation.token_ids) == length_of[id(event.generation)] and event.finish is None:
                llm.abort([event.generation])
    return [one.token_ids for one in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--widen", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--foretold", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    some = list(texts(args.texts).values())
    prompts = [some[n % len(some)][60 * (n // len(some)) :][:60] for n in range(args.prompts)]
    params = SamplingParams(temperature=0, max_tokens=args.foretold * args.tokens, ignore_eos=True)
    lengths = [args.tokens] * args.prompts
    if args.foretold > 1:
        lengths = random.Random(0).choices(range(1, 2 * args.tokens + 1), k=args.prompts)
    least_gain = moving_split.LEAST_GAIN
    load = f"load {os.getloadavg()[0]:.1f} at start"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}, torch {torch.__version__}, one thread")
    print(f"python {' '.join(sys.argv)}\n")
    rows: dict[str, list[dict[str, float]]] = {}
    said = None
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        model = packed(args.model, Path(folder), args.widen)
        configs, work, sizes = ways(model, prompts, args.foretold * args.tokens, args.share)
        for _ in range(args.repeats):
            for name, config in configs.items():
                moving_split.LEAST_GAIN = 1.0 if name.endswith("stays") else least_gain
                with LLM(model, config, workload=work) as llm:
                    before = llm.engine.state()
                    began, cpu = time.perf_counter(), time.thread_time()
                    answers = served(llm, prompts, params, lengths)
                    wall, cpu = time.perf_counter() - began, time.thread_time() - cpu
                    stats, state = llm.engine.layer_stats(), llm.engine.state()
                    batch, split = llm.engine.config.batch, llm.engine.loaded.split
                said = answers if said is None else said
                assert said == answers, "tokens differ"
                row = {"tokens_per_s": sum(lengths) / wall, "cpu_s": cpu}
                row |= {"sequences": batch.max_sequences, "step_tokens": batch.max_tokens}
                row["splits"] = 0 if split is None else split.stats.splits
                row["stall_s"] = sum(s.stall_seconds for s in stats)
                row["mib"] = sum(s.bytes_read for s in stats) / 2**20
                foretold = read_bytes(
                    left_of(work, sizes), Uniform(sizes), batch.max_sequences, batch.max_tokens, before.slots
                )
                row["expected_mib"] = foretold / 2**20
                for when, one in (("", before), ("last_", state)):
                    row[f"{when}kv_mib"] = one.blocks * sizes.block_size * sizes.kv_bytes / 2**20
                    row[f"{when}slots"], row[f"{when}slots_mib"] = one.slots, one.slot_bytes / 2**20
                rows.setdefault(name, []).append(row)
    heads = "way | sequences, tokens a step | KV MiB: first, last | slots: first, last | moved | MiB read | expected"
    print(f"| {heads} | tokens/s | x | CPU s | stall s |\n" + "|---" * 11 + "|")
    first = next(iter(rows.values()))
    for name, runs in rows.items():
        ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs, first))
        mid = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        cells = [
            name,
            f"{mid['sequences']:.0f}, {mid['step_tokens']:.0f}",
            f"{mid['kv_mib']:.1f}, {mid['last_kv_mib']:.1f}",
            f"{mid['slots']:.0f}, {mid['last_slots']:.0f}",
            *(f"{mid[key]:.0f}" for key in ("splits", "mib", "expected_mib", "tokens_per_s")),
            f"{ratio:.2f}",
            *(f"{mid[key]:.1f}" for key in ("cpu_s", "stall_s")),
        ]
        print(f"| {' | '.join(cells)} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
