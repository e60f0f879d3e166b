"""What `placement.online` costs a decoding step where nothing moves, and what it wins where ranks are uneven, on real
ranks of the CPU.

    python -m bench.bench_online --out bench/results/online

The demo model on gloo ranks of this machine, all experts in slots. Blocks of decoding steps with the loop and without
it take turns inside one run, the same on all ranks: in a block without, nobody observes, tells or looks. A trigger that
cannot fire keeps the plan as it is. Baseline: the blocks without. In CPU time of rank 0's stepping thread, which does
most of it, since other jobs share the cores; twice, as the difference of whole steps is noisy: what its calls take,
timed one by one (timers included; of the agreement what it takes more in steps with lines), and whole blocks against
their neighbours. What limits: rank 0 asks as seldom as keeps its own work to a share of that time
(moe/engine/online.py); beside it are a call per layer and the round in which all tell. Tokens must be those of one
process.

Then the same requests with the loop and without it, in turn, from the plan that a run has if none is given (contiguous
blocks) and with the settings that it has by itself: the demo model's prompts of one domain after another, on four
ranks; once each, and of two domains eight times each, sampled with a seed of its own. A step is as long as that of the
rank that computes most: mean over the later half of the steps of the greatest CPU time among ranks, which is what a
step takes where each rank has a core of its own; ranks that wait take none.
Baseline: the runs without. What limits: what a step computes that is no expert's work, which is the same on all ranks.
Tokens must be the same.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.bench_ranks import DEMO, ROOT
from bench.bench_serving_rule import params, prompts, told_by_ranks
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig, PlacementConfig
from moe.engine.modes import Ranks
from moe.engine.online import OnlinePlacement
from moe.llm import LLM

BLOCK = 16  # steps
DOMAINS = ("stories", "mathematics", "shakespeare", "code")
UNEVEN_RANKS, PAIRS = 4, 3
UNEVEN = [(domain, 1, 300) for domain in DOMAINS] + [(domain, 8, 100) for domain in DOMAINS[::3]]  # times, tokens
NEVER = PlacementConfig(online=True, imbalance=1e6, calm=1e6)  # it observes, and moves nothing


def load(sequences: int, groups: Any = None, placement: PlacementConfig = NEVER) -> LLM:
    config = EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="1.0"),
        batch=BatchConfig(max_tokens=2048, max_sequences=sequences, kv_tokens=65536),
        parallel=ParallelConfig(dispatcher="all_to_all"),
        placement=PlacementConfig() if groups is None else placement,
    )
    return LLM(DEMO, config, groups=groups)


def switch(llm: LLM, online: OnlinePlacement, is_on: bool) -> None:
    """Whether this rank takes part in the loop; all ranks in the same step."""
    mode, observers = llm.engine.place.mode, online.routing.observers
    assert isinstance(mode, Ranks)
    mode.online = online if is_on else None
    if is_on and online.latest not in observers:
        online._last = time.thread_time()  # time without the loop buys nothing
        observers.append(online.latest)
    elif not is_on and online.latest in observers:
        observers.remove(online.latest)


class Calls:
    """CPU seconds of calls."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any) -> Any:
            started = time.thread_time()
            result = call(*args)
            self.seconds.append(time.thread_time() - started)
            return result

        return timed_call


def telling(agree: Calls, with_lines: list[bool]) -> float:
    """Seconds: of agreements with lines what is above the mean of those without."""
    plain = [one for one, lines in zip(agree.seconds, with_lines, strict=True) if not lines]
    return sum(one - statistics.mean(plain) for one, lines in zip(agree.seconds, with_lines, strict=True) if lines)


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
        blocks, listing, step, agree, with_lines = list[float](), Calls(), Calls(), Calls(), list[bool]()
        online.latest.begin = listing.timed(online.latest.begin)  # type: ignore[method-assign]
        online.latest.routed = listing.timed(online.latest.routed)  # type: ignore[method-assign]
        online.step = step.timed(online.step)  # type: ignore[method-assign]
        online.control.agree = agree.timed(online.control.agree)  # type: ignore[method-assign]
        for block in range((num_tokens - 8) // BLOCK // 2 * 2):
            switch(llm, online, block % 2 == 0)
            started = time.thread_time()
            for _ in range(BLOCK):
                llm.step()
                with_lines.append(any(rank.told for rank in online.control.agreement.ranks))
            blocks.append(time.thread_time() - started)
        calls = [sum(listing.seconds), sum(step.seconds), telling(agree, with_lines)]
        switch(llm, online, True)
        while engine.has_work:
            llm.step()
        told = {"tokens": [one.token_ids for one in asked], "blocks": blocks, "load": online.stats.placement_load}
        told["calls"] = [of / (len(blocks) // 2 * BLOCK) for of in calls]
        (folder / f"{groups.rank}.out").write_text(json.dumps(told))


def uneven_worker(folder: Path) -> None:
    """One rank: CPU seconds of every step of each case, by run: without the loop and with it, in turn."""
    told: list[list[dict[str, Any]]] = [[] for _ in UNEVEN]
    for case, is_on in itertools.product(range(len(UNEVEN)), PAIRS * (False, True)):
        domain, times, num_tokens = UNEVEN[case]
        asked_for = [(prompt, seed) for seed in range(times) for prompt in prompts_of(domain)]
        with (
            process_groups(timeout_s=120) as groups,
            load(len(asked_for), groups, PlacementConfig(online=is_on)) as llm,
        ):
            own = asked_for[groups.rank :: groups.world_size]
            wanted = [replace(params(num_tokens), temperature=float(times > 1), seed=seed) for _, seed in own]
            asked, engine = [llm.add(llm.encode(p), one) for (p, _), one in zip(own, wanted)], llm.engine
            engine.start()
            steps = list[float]()
            while engine.has_work:
                started = time.thread_time()
                llm.step()
                steps.append(time.thread_time() - started)
            run = {"tokens": [one.token_ids for one in asked], "steps": steps}
            if engine.online is not None:
                run["moved"] = engine.online.stats.moved_experts
                if engine.online.loop is not None:
                    loop = engine.online.loop
                    run["turns"] = [(b.imbalance, a and a.imbalance) for _, b, a in loop.history]
            told[case].append(run)
            rank = groups.rank
    (folder / f"{rank}.out").write_text(json.dumps(told))


def prompts_of(domain: str) -> list[str]:
    lines = [json.loads(line) for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]
    return [line["prompt"] for line in lines if line["domain"] == domain]


def measure_uneven() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        told = told_by_ranks("bench.bench_online", Path(name), UNEVEN_RANKS, 0, 0)
    rows = []
    for case, (domain, _, num_tokens) in enumerate(UNEVEN):
        runs = [[rank[case][number] for rank in told] for number in range(2 * PAIRS)]
        for run in runs:
            assert [r["tokens"] for r in run] == [r["tokens"] for r in runs[0]], domain
        later = [[max(at) for at in list(zip(*(r["steps"] for r in run)))[num_tokens // 2 :]] for run in runs]
        means = [statistics.mean(one) for one in later]
        with_loop = [run[0] for run in runs[1::2]]
        rows.append(
            {
                "domain": domain,
                "sequences": sum(len(rank["tokens"]) for rank in runs[0]),
                "moved": [one["moved"] for one in with_loop],
                "turns": [one["turns"] for one in with_loop],
                "without_us": [mean * 1e6 for mean in means[::2]],
                "with_us": [mean * 1e6 for mean in means[1::2]],
                "cost": [b / a - 1 for a, b in zip(means[::2], means[1::2], strict=True)],
            }
        )
    return rows


def measure(ranks: int, sequences: int, num_tokens: int) -> dict[str, Any]:
    with load(sequences * ranks) as llm:
        answers = llm.generate(prompts(sequences * ranks), params(num_tokens))
        expected = [one.outputs[0].token_ids for one in answers]
    with tempfile.TemporaryDirectory() as name:
        told = told_by_ranks("bench.bench_online", Path(name), ranks, sequences, num_tokens)
    for rank, one in enumerate(told):
        assert one["tokens"] == expected[rank::ranks], rank
    assert told[0]["load"] >= 1, "rank 0 has looked at a window"
    blocks = told[0]["blocks"][2:]  # the first ones warm up
    pairs = [(a / b - 1) for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
    quarter = statistics.quantiles(pairs, n=4)
    return {
        "ranks": ranks,
        "sequences": sequences,
        "pairs": len(pairs),
        "step_us": statistics.mean(blocks[1::2]) / BLOCK * 1e6,
        "with_us": statistics.mean(blocks[::2]) / BLOCK * 1e6,
        "calls_us": [of * 1e6 for of in told[0]["calls"]],
        "share": sum(told[0]["calls"]) * BLOCK / statistics.mean(blocks[1::2]),
        "cost": sum(blocks[::2]) / sum(blocks[1::2]) - 1,
        "quartiles": [quarter[0], quarter[2]],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | sequences a rank | step without the loop, CPU us "
        "| the loop's calls, CPU us: listing ids + looking + lines told | share "
        "| pairs of blocks | whole steps with it (quartiles of the pairs) |",
        "|" + "---|" * 7,
    ]
    lines += [
        f"| {r['ranks']} | {r['sequences']} | {r['step_us']:.0f} | {sum(r['calls_us']):.0f}: "
        f"{' + '.join(f'{of:.0f}' for of in r['calls_us'])} | {r['share']:.1%} | {r['pairs']} "
        f"| {r['cost']:+.1%} ({r['quartiles'][0]:+.1%} to {r['quartiles'][1]:+.1%}) |"
        for r in rows
    ]
    return "\n".join(lines)


def uneven_table(rows: list[dict[str, Any]]) -> str:
    """Loads: means of the runs, measured before the first turn and after the last."""
    lines = [
        "| domain, sequences | load, before and after | turns | experts moved of 96 "
        "| step without, CPU us of the fullest rank | with the loop | change, pair by pair |",
        "|" + "---|" * 7,
    ]
    for r in rows:
        before = statistics.mean(turns[0][0] for turns in r["turns"])
        after = statistics.mean([after for _, after in turns if after is not None][-1] for turns in r["turns"])
        lines.append(
            f"| {r['domain']}, {r['sequences']} | {before:.2f} -> {after:.2f} "
            f"| {', '.join(str(len(turns)) for turns in r['turns'])} "
            f"| {', '.join(map(str, r['moved']))} | {statistics.mean(r['without_us']):.0f} "
            f"| {statistics.mean(r['with_us']):.0f} | {', '.join(f'{cost:+.1%}' for cost in r['cost'])} |"
        )
    return "\n".join(lines)


def document(head: str, rows: list[dict[str, Any]], uneven: list[dict[str, Any]]) -> str:
    return (
        f"# The loop of `placement.online` on real ranks\n\n{head}\n\n## What it costs where nothing moves\n\n"
        f"{table(rows)}\n\n## What it wins where ranks are uneven\n\n{UNEVEN_RANKS} ranks, contiguous blocks, "
        f"300 tokens of each prompt, all prompts of a domain at once, or 100 of each eight times\n\n"
        f"{uneven_table(uneven)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker and not args.sequences:
        uneven_worker(args.worker)
        return
    if args.worker:
        worker(args.worker, args.sequences, args.tokens)
        return
    rows = [measure(2, sequences, args.tokens) for sequences in (1, 4, 16)]
    head = (
        f"`python -m bench.bench_online --tokens {args.tokens}`: {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} shared cores, one thread a rank, torch {torch.__version__}; the demo model in fp32"
    )
    uneven = measure_uneven()
    text = document(head, rows, uneven)
    print(f"\n{text}")
    if args.out:
        args.out.with_suffix(".md").write_text(text)
        found = {"head": head, "rows": rows, "uneven": uneven}
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"rows": rows, "uneven": uneven}))


if __name__ == "__main__":
    main()
