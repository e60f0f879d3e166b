"""What choosing a copy of each expert (placement/replicas.py) costs of a decoding step, on real ranks of the CPU.

    python -m bench.bench_serving_rule --out bench/results/serving_rule

The demo model on two and four gloo ranks of this machine, all experts in slots, with a plan that gives every layer
replicas (25 % more slots). Every call of the rule is timed inside the run, so that its share is of the very steps that
it is part of. Baselines: the one index that a layer without replicas costs, timed alike in a run of a plan without; and
the slow twin in numpy, on ids of the same shape. Tokens must be those of one process. All ranks share the cores of this
machine, which makes their steps longer; beside the share of a step stands the share of a step of one process, which
waits for nobody and does all of the work.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.bench_ranks import DEMO, ROOT
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.helper import load_helper
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_in_numpy, choose_replicas

LAYERS, EXPERTS, TOP_K, SPARE = 6, 16, 2, 0.25
RANKS, SEQUENCES = (2, 4), (1, 4, 16)  # sequences of a rank


def load(plan: Path | None, sequences: int, groups: Any = None) -> LLM:
    config = EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="1.0"),
        batch=BatchConfig(max_tokens=2048, max_sequences=sequences, kv_tokens=8192),
        parallel=ParallelConfig(plan=None if plan is None else str(plan), dispatcher="all_to_all"),
    )
    return LLM(DEMO, config, groups=groups)


def prompts(count: int) -> list[str]:
    lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def plan_of(ranks: int, spare: float) -> Plan:
    """Contiguous, and in each layer copies of other ranks' experts in the spare places."""
    hosted = Plan.contiguous(LAYERS, EXPERTS, ranks).hosted.copy()
    for rank in range(ranks if spare else 0):
        first = (rank + 1) % ranks * EXPERTS // ranks
        hosted[:, first : first + max(1, int(spare * EXPERTS / ranks)), rank] = True
    return Plan.from_hosted(hosted)


def decode(llm: LLM, own: list[str], num_tokens: int, timed: list[float] | None) -> tuple[list[list[int]], float, int]:
    """Tokens, seconds and number of the decoding steps; `timed` gets the seconds of every call of the rule in them."""
    asked = [llm.add(llm.encode(p), params(num_tokens)) for p in own]
    engine = llm.engine
    engine.start()
    while not all(one.request.num_output for one in asked):
        llm.step()
    if timed is not None:
        parallel = engine.parallel
        assert parallel is not None
        rule = parallel.physical

        def physical(layer: int, topk_ids: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            chosen = rule(layer, topk_ids)
            timed.append(time.perf_counter() - started)
            return chosen

        parallel.physical = physical  # type: ignore[method-assign]
    before, started = engine.stats.steps, time.perf_counter()
    while engine.has_work:
        llm.step()
    return [one.token_ids for one in asked], time.perf_counter() - started, engine.stats.steps - before


def worker(folder: Path, sequences: int, num_tokens: int) -> None:
    """One rank: with replicas, then without."""
    told = {}
    for name in ("replicas", "plain"):
        with process_groups(timeout_s=120) as groups, load(folder / f"{name}.json", sequences, groups) as llm:
            own, timed = prompts(sequences * groups.world_size)[groups.rank :: groups.world_size], list[float]()
            tokens, seconds, steps = decode(llm, own, num_tokens, timed)
            told[name] = {"tokens": tokens, "seconds": seconds, "steps": steps, "rule": timed}
            rank = groups.rank
    (folder / f"{rank}.out").write_text(json.dumps(told))


def alone_us(sequences: int, ranks: int, rounds: int = 200) -> tuple[float, float]:
    """Microseconds of a layer's rule, compiled and in numpy: medians over random ids."""
    rng = np.random.default_rng(0)
    table = ServingTable.of(plan_of(ranks, SPARE), 0)
    ids = np.argsort(rng.random((rounds, sequences, EXPERTS)), axis=2)[:, :, :TOP_K]
    seconds: dict[str, list[float]] = {"compiled": [], "numpy": []}
    for one in ids:
        for name, choose in (("compiled", choose_replicas), ("numpy", choose_in_numpy)):
            started = time.perf_counter()
            choose(one, 0, table, home_first=True)
            seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["compiled"]) * 1e6, statistics.median(seconds["numpy"]) * 1e6


def told_by_ranks(module: str, folder: Path, ranks: int, sequences: int, num_tokens: int) -> list[dict[str, Any]]:
    """What each rank of `python -m module --worker FOLDER` under torchrun wrote to FOLDER/RANK.out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command += ["-m", module, "--worker", str(folder), "--sequences", str(sequences), "--tokens", str(num_tokens)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads((folder / f"{rank}.out").read_text()) for rank in range(ranks)]


def measure(ranks: int, sequences: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    with load(None, sequences * ranks) as llm:
        expected, seconds, steps = decode(llm, prompts(sequences * ranks), num_tokens, None)
    own_step = seconds / steps
    found: dict[str, list[float]] = {"replicas": [], "plain": [], "step": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plan_of(ranks, SPARE).save(folder / "replicas.json")
            plan_of(ranks, 0).save(folder / "plain.json")
            told = told_by_ranks("bench.bench_serving_rule", folder, ranks, sequences, num_tokens)
        for rank, one in enumerate(told):
            for of_plan in ("replicas", "plain"):
                assert one[of_plan]["tokens"] == expected[rank::ranks], (of_plan, rank)
                found[of_plan] += one[of_plan]["rule"]
            found["step"].append(one["replicas"]["seconds"] / one["replicas"]["steps"])
    compiled, in_numpy = alone_us(sequences, ranks)
    layer_us, step_us = statistics.median(found["replicas"]) * 1e6, statistics.median(found["step"]) * 1e6
    return {
        "ranks": ranks,
        "sequences": sequences,
        "layer_us": layer_us,
        "index_us": statistics.median(found["plain"]) * 1e6,
        "rule_alone_us": compiled,
        "numpy_us": in_numpy,
        "step_us": step_us,
        "share": LAYERS * layer_us / step_us,
        "own_step_us": own_step * 1e6,
        "share_of_own": LAYERS * layer_us / (own_step * 1e6),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | sequences a rank | rule, us a layer | alone | without replicas | slow twin, numpy "
        "| step of the ranks, us | share | step of one process, us | share |",
        "|" + "---|" * 10,
    ]
    lines += [
        f"| {r['ranks']} | {r['sequences']} | {r['layer_us']:.1f} | {r['rule_alone_us']:.1f} | {r['index_us']:.1f} "
        f"| {r['numpy_us']:.0f} | {r['step_us']:.0f} | {r['share']:.1%} | {r['own_step_us']:.0f} "
        f"| {r['share_of_own']:.1%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.sequences, args.tokens)
        return
    assert load_helper() is not None, "the compiled rule is what is measured; install it"
    rows = [measure(ranks, sequences, args.tokens, args.rounds) for ranks in RANKS for sequences in SEQUENCES]
    head = (
        f"`python -m bench.bench_serving_rule --tokens {args.tokens} --rounds {args.rounds}`: "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} shared cores, one thread a rank, torch "
        f"{torch.__version__}; the demo model in fp32, {LAYERS} layers of {EXPERTS} experts, top-{TOP_K}, medians"
    )
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        args.out.with_suffix(".md").write_text(f"# What the serving rule costs\n\n{head}\n\n{table(rows)}\n")
        args.out.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
