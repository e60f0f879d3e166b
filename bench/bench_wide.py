"""An offline batch, layer by layer: one step for all prompts reads an expert once for all of them.

The same prompts with batch.max_sequences 16 and as many as there are prompts, an eighth of the experts in slots, page
cache bypassed, in turn; greedy tokens must be equal. Bytes bind: what a step reads is shared by all of its tokens.

    python bench/bench_wide.py PACKED --texts FOLDER [--prompts 256] [--tokens 8] [--share 0.125] [--repeats 1]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from bench_lookahead import texts

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.params import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    some = list(texts(args.texts).values())
    prompts = [some[n % len(some)][60 * (n // len(some)) :][:60] for n in range(args.prompts)]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    rows: dict[int, list[dict[str, float]]] = {}
    said = None
    load = f"load {os.getloadavg()[0]:.1f} at start"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}, torch {torch.__version__}, one thread\n")
    for _ in range(args.repeats):
        for size in (16, args.prompts):
            config = EngineConfig(
                threads=1,
                offload=OffloadConfig(budget=str(args.share), direct=True, io="preadv", readers=2, prefetch="off"),
                batch=BatchConfig(max_sequences=size, max_tokens=512, kv_tokens=64 * args.prompts),
            )
            with LLM(args.model, config) as llm:
                began, cpu = time.perf_counter(), time.thread_time()
                answers = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
                wall, cpu = time.perf_counter() - began, time.thread_time() - cpu
                stats = llm.engine.layer_stats()
            said = answers if said is None else said
            assert said == answers, "tokens differ"
            row = {"tokens_per_s": args.prompts * args.tokens / wall, "cpu_s": cpu}
            row["stall_s"] = sum(s.stall_seconds for s in stats)
            row["mib"] = sum(s.bytes_read for s in stats) / 2**20
            rows.setdefault(size, []).append(row)
    print("| sequences a step | tokens/s | x | CPU s of the main thread | stall s | MiB read |\n" + "|---" * 6 + "|")
    for size, runs in rows.items():
        ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(runs, rows[16]))
        mid = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"| {size} | {mid['tokens_per_s']:.1f} | {ratio:.2f} | {mid['cpu_s']:.1f} | {mid['stall_s']:.1f} "
              f"| {mid['mib']:.0f} |")  # fmt: skip
    print(json.dumps({str(size): runs for size, runs in rows.items()}))


if __name__ == "__main__":
    main()
