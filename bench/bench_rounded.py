"""Whole engine: what rounded weights win, and what their bytes foretell, beside llama.cpp's Q8_0 and Q4_0.

    python -m bench.bench_rounded [--rounds 5] [--work .peers]

One random Qwen3-MoE (bench/walk_model.py: it walks a known permutation, so every engine must give the same tokens) in
bf16, and with experts and dense layers rounded to int8 and int4 (`dense=packed`), all in memory and with a quarter of
the experts in slots, read directly. All take turns in every round. The step of the model in bf16 is divided into its
compiled calls for experts and for dense layers, the waits for reads, and the rest; a rounded model's step is foretold
from these alone: each part in proportion to its bytes, the rest as it is.

    step' = experts · b'/b + dense · d'/d + waits · r'/r + rest

Binds: the memory's rate and, with slots for a quarter, the disk.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.compare import Candidate, Job, Worker, gguf_of, packed_of, processor
from bench.walk_model import LARGE, TINY, answers_to, prompts_of, write

JOBS = (Job("1 sequence", 1, 64, 48), Job("8 sequences", 8, 64, 24))
KINDS = ("bf16", "int8", "int4")
PEERS = {"llama.cpp f16": "f16", "llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
SETTINGS = ["batch.kv_tokens=2048", "offload.prefetch=off"]  # what is read ahead would be in the waits of some alone


def candidates(work: Path, folder: Path, budget: str, with_peers: bool) -> Iterator[Candidate]:
    for kind in KINDS:
        path = packed_of(folder, None if kind == "bf16" else kind)
        more = ["offload.keep=stored"] if kind == "bf16" else ["dense=packed"]
        told = [f"offload.budget={budget}", "offload.direct=true", *SETTINGS, *more]
        yield Candidate(kind, "ours", {"kind": "ours", "folder": str(path), "set": told, "profile": True})
    for name, kind in PEERS.items() if with_peers else ():
        yield Candidate(name, "llama.cpp", {"kind": "llama.cpp", "file": gguf_of(work, folder, kind), "gguf": kind})


def measure(args: argparse.Namespace, folder: Path, budget: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures of one step each, by job, candidate and round."""
    rows: dict[str, dict[str, list[dict[str, float]]]] = {job.name: {} for job in JOBS}
    all_of_them = list(candidates(args.work, folder, budget, with_peers=budget == "1.0" and not args.tiny))
    workers = {one.name: Worker(one, 1, args.work, None) for one in all_of_them}
    try:
        for number in range(args.rounds):
            for job in JOBS:
                prompts = prompts_of(folder, job.num_prompts, job.length, number)
                right = answers_to(folder, prompts, job.new)
                names = list(workers)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    answer = workers[name].run(prompts, job.new)
                    assert answer["tokens"] == right, f"{name} gives other tokens"
                    rows[job.name].setdefault(name, []).append(per_step(answer, job))
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def per_step(answer: dict[str, Any], job: Job) -> dict[str, float]:
    steps = job.new - 1
    figures = {name: value / steps for name, value in answer["notes"].items()}
    return figures | {"step": answer["decode"]["wall"] / steps}


def foretold(plain: dict[str, float], rounded: dict[str, float]) -> float:
    """Seconds of a step, from the profile of the plain model and bytes alone."""

    def ratio(name: str) -> float:
        return rounded[name] / plain[name] if plain[name] else 1.0

    parts = plain["expert_seconds"], plain["dense_seconds"], plain["stall_seconds"]
    scaled = parts[0] * ratio("expert_bytes") + parts[1] * ratio("dense_bytes") + parts[2] * ratio("bytes_read")
    return scaled + plain["step"] - sum(parts)


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def table(rows: dict[str, dict[str, list[dict[str, float]]]]) -> Iterator[str]:
    parts = "experts | dense | waits | rest | MB experts, dense, read"
    yield f"| sequences | weights | step ms | {parts} | foretold ms | measured ÷ it |\n" + "|---" * 10 + "|"
    for job, by_name in rows.items():
        for name, rounds in by_name.items():
            one, step = median_of(rounds), f"{statistics.median(r['step'] for r in rounds) * 1e3:.2f}"
            if "expert_seconds" not in one:
                yield f"| {job} | {name} | {step} |  |  |  |  |  |  |  |"
                continue
            parts = [one["expert_seconds"], one["dense_seconds"], one["stall_seconds"]]
            shown = " | ".join(f"{part * 1e3:.2f}" for part in [*parts, one["step"] - sum(parts)])
            nbytes = ", ".join(f"{one[key] / 1e6:.1f}" for key in ("expert_bytes", "dense_bytes", "bytes_read"))
            said = ["", ""]
            if name != "bf16":
                pairs = [(foretold(plain, own), own["step"]) for plain, own in zip(by_name["bf16"], rounds)]
                ratios = sorted(measured / before for before, measured in pairs)
                said[0] = f"{statistics.median(before for before, _ in pairs) * 1e3:.2f}"
                said[1] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            yield f"| {job} | {name} | {step} | {shown} | {nbytes} | {said[0]} | {said[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a toy model without peers: checks that everything runs")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="models and environments, kept between runs")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(exist_ok=True)
    model = TINY if args.tiny else LARGE
    folder = write(args.work / f"walk-{model.experts}x{model.hidden}{'' if args.tiny else '-large'}", model)
    text = [
        "# Rounded weights in the whole engine\n",
        f"`python -m bench.bench_rounded --rounds {args.rounds}` on {processor()}, {os.cpu_count()} cores, one "
        f"thread, torch {torch.__version__}; {model.expert_bytes / 1e9:.2f} GB of experts in bf16, parts of a step in "
        "ms, medians; ratios of the same rounds\n",
    ]
    everything = {}
    for budget, title in (("1.0", "All in memory"), ("0.25", "A quarter of the experts in slots, read directly")):
        everything[budget] = measure(args, folder, budget)
        text += [f"## {title}\n", *table(everything[budget]), ""]
    text.append(json.dumps({"bench": "rounded", "rows": everything}))
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
