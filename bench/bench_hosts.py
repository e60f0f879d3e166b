"""Tokens per second over a slow link between two nodes of two ranks, by plan and dispatcher.

    python -m bench.bench_hosts                 # as root: makes four hosts in network namespaces

The demo model, experts shared by four ranks, each with a quarter of its share in memory; greedy tokens must equal one
process. The link between the nodes binds: beside the measured rate stands the one that its bytes alone would allow.
Plans are solved on routing recorded from other prompts than those that are served.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from bench.hosts import Shape, hosts, run_ranks, trunk_bytes, why_not
from moe.comm.groups import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.llm import LLM
from moe.placement.copies import CopyOptions, solve_copies
from moe.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
CANDIDATES = ("contiguous all_to_all", "solved all_to_all", "solved hierarchical")
SHAPES = (Shape(), Shape(1000), Shape(100), Shape(1000, 1.0), Shape(100, 5.0))


def prompts(first: int, count: int) -> list[str]:
    lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[first::7][:count]]


def config_of(plan: str | None, dispatcher: str) -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="0.25"),
        batch=BatchConfig(max_sequences=8),
        parallel=ParallelConfig(plan=plan, dispatcher=dispatcher, timeout_seconds=120, broadcast_tokens=0),
    )


def worker(jobs: list[tuple[str | None, str]], num_tokens: int) -> None:
    """One rank: every (plan, dispatcher) in turn; prints a JSON line for each."""
    with process_groups(timeout_s=120) as groups:
        for plan, dispatcher in jobs:
            with LLM(DEMO, config_of(plan, dispatcher), groups=groups) as llm:
                own = prompts(0, 16)[groups.rank :: groups.world_size]
                answers = llm.generate(own, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
                stats, traffic = llm.engine.stats, llm.engine.parallel.dispatcher.traffic
                result = {
                    "tokens": [a.outputs[0].token_ids for a in answers],
                    "decode_tokens": stats.pure_decode_tokens,
                    "decode_seconds": stats.decode_seconds,
                    "steps": stats.steps,
                    "cross_node_bytes": traffic.cross_node_bytes,
                }
                print(json.dumps(result), flush=True)


def record_plan(folder: Path) -> str:
    """A plan for 2 x 2 ranks from the routing of prompts that are not served."""
    with LLM(DEMO, EngineConfig(dtype="float32", threads=1)) as llm:
        recorder = llm.engine.record()
        llm.generate(prompts(1, 32) + prompts(2, 32), SamplingParams(max_tokens=32))
        trace = recorder.trace()
    options = CopyOptions(seconds=10.0, nodes=(0, 0, 1, 1), node_weight=4.0)  # the link between nodes is what counts
    plan = solve_copies(trace, 4, options=options)
    plan.save(folder / "plan.json")
    return str(folder / "plan.json")


def expected_tokens(num_tokens: int) -> list[list[int]]:
    with LLM(DEMO, EngineConfig(dtype="float32", threads=1)) as llm:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return [a.outputs[0].token_ids for a in llm.generate(prompts(0, 16), params)]


def measure(rounds: int, num_tokens: int) -> list[dict]:
    rows = []
    expected = expected_tokens(num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        plan = record_plan(Path(folder))
        jobs = {c: (None if c.startswith("contiguous") else plan, c.split()[1]) for c in CANDIDATES}
        for shape in SHAPES:
            reason = why_not(shape)
            if reason is not None:
                print(f"link {shape}: not measured, {reason}", flush=True)
                rows.append({"mbit": shape.mbit, "delay_ms": shape.delay_ms, "skipped": reason})
                continue
            with hosts(shape) as names:
                before = trunk_bytes(names)
                order = [list(jobs.values())[(i + r) % len(jobs)] for r in range(rounds) for i in range(len(jobs))]
                command = ["-m", "bench.bench_hosts", "--worker", json.dumps(order), "--tokens", str(num_tokens)]
                printed = [out.splitlines() for out in run_ranks(names, command, 900)]
                crossed = trunk_bytes(names) - before
            for candidate, job in jobs.items():
                runs = [[json.loads(p[i]) for p in printed] for i, o in enumerate(order) if tuple(o) == job]
                for run in runs:
                    for rank, one in enumerate(run):
                        assert one["tokens"] == expected[rank::4], (candidate, rank)
                rows.append(summary(shape, candidate, runs) | {"trunk_bytes_all": crossed})
                print(rows[-1], flush=True)
    return rows


def summary(shape: Shape, candidate: str, runs: list[list[dict]]) -> dict:
    rates = [sum(r["decode_tokens"] for r in run) / max(r["decode_seconds"] for r in run) for run in runs]
    tokens = sum(r["decode_tokens"] for r in runs[0])
    sent = [sum(r["cross_node_bytes"] for r in runs[0][node : node + 2]) for node in (0, 2)]
    row = {
        "mbit": shape.mbit,
        "delay_ms": shape.delay_ms,
        "candidate": candidate,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "cross_node_bytes": sum(sent),
    }
    if shape.mbit is not None:  # all the run's bytes one way, over its decoded tokens: what the rate alone would allow
        row["limit_tokens_per_second"] = tokens / (max(sent) * 8 / (shape.mbit * 1e6))
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| link | candidate | tokens/s (range) | × vanilla | crossed | limit by bytes |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        link = "unshaped" if row["mbit"] is None else f"{row['mbit']} Mb/s"
        link += f", {row['delay_ms']:g} ms" if row["delay_ms"] else ""
        if "skipped" in row:
            lines.append(f"| {link} | not measured: {row['skipped']} | | | | |")
            continue
        vanilla = next(r for r in rows if (r["mbit"], r["delay_ms"]) == (row["mbit"], row["delay_ms"]))
        limit = row.get("limit_tokens_per_second")
        lines.append(
            f"| {link} | {row['candidate']} | {row['tokens_per_second']:.1f} ({row['spread'][0]:.1f} to "
            f"{row['spread'][1]:.1f}) | {row['tokens_per_second'] / vanilla['tokens_per_second']:.2f} | "
            f"{row['cross_node_bytes'] / 1e6:.2f} MB | {'-' if limit is None else f'{limit:.0f}'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        worker([tuple(job) for job in json.loads(args.worker)], args.tokens)
        return 0
    reason = why_not()
    if reason is not None:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 2
    rows = measure(args.rounds, args.tokens)
    head = (
        f"`{' '.join(['python -m bench.bench_hosts', *sys.argv[1:]])}`: {platform.processor() or platform.machine()}, "
    )
    head += f"2 nodes x 2 ranks in network namespaces on one machine, torch {torch.__version__}"
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        args.out.with_suffix(".md").write_text(f"# Four hosts, a slow link\n\n{head}\n\n{table(rows)}\n")
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
