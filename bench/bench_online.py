"""What `placement.online` costs a decoding step where nothing moves, on real ranks of the CPU.

    python -m bench.bench_online --out bench/results/online

The demo model on gloo ranks of this machine, all experts in slots. Blocks of decoding steps with the loop and without
it take turns inside one run, the same on all ranks: in a block without, nobody observes, tells or looks. A trigger that
cannot fire keeps the plan as it is. Baseline: the blocks without; compared are pairs of neighbours, in CPU time of rank
0, which does most of it, since other jobs share the cores. What limits: telling what was routed, 2 bytes an expert, and
on rank 0 a look at the window every sixteenth of it. Tokens must be those of one process.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.bench_ranks import DEMO
from bench.bench_serving_rule import params, prompts, told_by_ranks
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig, PlacementConfig
from moe.engine.modes import Ranks
from moe.engine.online import OnlinePlacement
from moe.llm import LLM

BLOCK = 8  # steps


def window_of(sequences: int) -> int:
    """The default, or with few tokens a smaller one, which is looked at more often for each."""
    return min(PlacementConfig().window, 128 * sequences)


def load(sequences: int, groups: Any = None) -> LLM:
    config = EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="1.0"),
        batch=BatchConfig(max_tokens=2048, max_sequences=sequences, kv_tokens=32768),
        parallel=ParallelConfig(dispatcher="all_to_all"),
        placement=PlacementConfig(online=groups is not None, window=window_of(sequences), imbalance=1e6, calm=1e6),
    )
    return LLM(DEMO, config, groups=groups)


def switch(llm: LLM, online: OnlinePlacement, is_on: bool) -> None:
    """Whether this rank takes part in the loop; all ranks in the same step."""
    mode, observers = llm.engine.place.mode, online.routing.observers
    assert isinstance(mode, Ranks)
    mode.online = online if is_on else None
    if is_on and online.forwards not in observers:
        observers.append(online.forwards)
    elif not is_on and online.forwards in observers:
        observers.remove(online.forwards)


def worker(folder: Path, sequences: int, num_tokens: int) -> None:
    """One rank: seconds of its blocks of decoding steps, with the loop and without, in turn."""
    with process_groups(timeout_s=120) as groups, load(sequences, groups) as llm:
        own = prompts(sequences * groups.world_size)[groups.rank :: groups.world_size]
        asked, engine = [llm.add(llm.encode(p), params(num_tokens)) for p in own], llm.engine
        engine.start()
        online = engine.online
        assert online is not None
        while not all(one.request.num_output for one in asked):
            llm.step()
        blocks: list[float] = []
        for block in range((num_tokens - 8) // BLOCK):
            switch(llm, online, block % 2 == 0)
            started = time.process_time()
            for _ in range(BLOCK):
                llm.step()
            blocks.append(time.process_time() - started)
        switch(llm, online, True)
        while engine.has_work:
            llm.step()
        told = {"tokens": [one.token_ids for one in asked], "blocks": blocks, "load": online.stats.placement_load}
        (folder / f"{groups.rank}.out").write_text(json.dumps(told))


def measure(ranks: int, sequences: int, num_tokens: int) -> dict[str, Any]:
    with load(sequences * ranks) as llm:
        answers = llm.generate(prompts(sequences * ranks), params(num_tokens))
        expected = [one.outputs[0].token_ids for one in answers]
    with tempfile.TemporaryDirectory() as name:
        told = told_by_ranks("bench.bench_online", Path(name), ranks, sequences, num_tokens)
    for rank, one in enumerate(told):
        assert one["tokens"] == expected[rank::ranks], rank
    assert told[0]["load"] >= 1, "rank 0 has looked at a window"
    blocks = told[0]["blocks"][4:]  # the first ones warm up
    pairs = [(a / b - 1) for a, b in zip(blocks[::2], blocks[1::2], strict=False)]
    quarter = statistics.quantiles(pairs, n=4)
    return {
        "ranks": ranks,
        "sequences": sequences,
        "window": window_of(sequences),
        "pairs": len(pairs),
        "step_us": statistics.median(blocks[1::2]) / BLOCK * 1e6,
        "with_us": statistics.median(blocks[::2]) / BLOCK * 1e6,
        "cost": statistics.median(pairs),
        "quartiles": [quarter[0], quarter[2]],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | sequences a rank | window | pairs of blocks | step without the loop, CPU us | with it "
        "| cost, median (quartiles) |",
        "|" + "---|" * 7,
    ]
    lines += [
        f"| {r['ranks']} | {r['sequences']} | {r['window']} | {r['pairs']} | {r['step_us']:.0f} | {r['with_us']:.0f} | "
        f"{r['cost']:+.1%} ({r['quartiles'][0]:+.1%} to {r['quartiles'][1]:+.1%}) |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.sequences, args.tokens)
        return
    rows = [measure(2, sequences, args.tokens) for sequences in (1, 4, 16)]
    head = (
        f"`python -m bench.bench_online --tokens {args.tokens}`: {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} shared cores, one thread a rank, torch {torch.__version__}; the demo model in fp32"
    )
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        text = f"# What the loop costs where nothing moves\n\n{head}\n\n{table(rows)}\n"
        args.out.with_suffix(".md").write_text(text)
        args.out.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
