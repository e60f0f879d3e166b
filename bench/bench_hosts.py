"""Tokens per second over a slow link between two nodes of two ranks, by plan and dispatcher.

    python -m bench.bench_hosts                 # as root: makes four hosts in network namespaces
    python -m bench.bench_hosts --top-k 1       # the same model told to use one expert a token, as ExFlow's models
    python -m bench.bench_hosts --combine       # parallel.combine=exact against partial, on links of a rate alone

The demo model in fp32, each rank with its share of the experts in memory and four sequences; greedy tokens must equal
one process. Plans are solved on routing recorded from other prompts than those that are served. "vanilla" is what
systems without these ideas do: contiguous experts, all-to-all there and back by gloo's collectives with the counts
ahead. (Even so a token travels once per rank, not once per expert: that is ours.) The other candidates change one thing
after the other: messages without a handshake, the solved plan, two-step and coherent dispatch.

The link binds: beside each rate stands the limit of its decode steps, tokens / (rounds that cross x one way + bytes of
the busier direction / rate), from the delay and the rate that the link was measured to give. The last step of a run,
in which ranks only agree that all is done, counts among its steps. Both cores are shared by
four ranks, which is why the unshaped rows say nothing about a network.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
import transformers

from bench.hosts import HOSTS_PER_NODE, NUM_HOSTS, Measured, Shape, hosts, run_ranks, trunk_bytes, why_not
from bench.hosts import measure as measure_link
from moe.comm.defaults import EAGER_BYTES
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, ParallelConfig
from moe.llm import LLM
from moe.params import SamplingParams
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.wire_format import CombineMode

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
NUM_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """plan: contiguous, or solved for all_to_all ("solved") or for coherent decode ("followed")."""

    name: str
    plan: str
    dispatcher: str
    eager_bytes: int = EAGER_BYTES
    combine: CombineMode = "exact"


VANILLA = Candidate("vanilla: contiguous, all_to_all by collectives", "contiguous", "all_to_all", 0)
CANDIDATES = (
    VANILLA,
    Candidate("contiguous, all_to_all", "contiguous", "all_to_all"),
    Candidate("solved, hierarchical", "solved", "hierarchical"),
    Candidate("solved, coherent", "followed", "coherent"),
    Candidate("solved, coherent by collectives", "followed", "coherent", 0),
)
COMBINES = tuple(
    Candidate(f"{plan}, {dispatcher}, {combine}", plan, dispatcher, combine=combine)
    for plan, dispatcher in (("contiguous", "all_to_all"), ("solved", "hierarchical"))
    for combine in get_args(CombineMode)
)
ALL = CANDIDATES + COMBINES
SHAPES = (Shape(1000, 1.0), Shape(100, 5.0), Shape())
RATES = (Shape(100), Shape(10), Shape())


def prompts(first: int, count: int) -> list[str]:
    lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[first::7][:count]]


def params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def worker(folder: Path, order: list[int], num_tokens: int) -> None:
    """One rank: the candidates in this order; prints a JSON line for each."""
    for candidate in (ALL[i] for i in order):
        plan = None if candidate.plan == "contiguous" else str(folder / f"{candidate.plan}.json")
        parallel = ParallelConfig(
            plan=plan,
            dispatcher=candidate.dispatcher,
            combine=candidate.combine,
            broadcast_tokens=0,
            eager_bytes=candidate.eager_bytes,
        )
        config = EngineConfig(dtype="float32", threads=1, batch=BatchConfig(max_tokens=2048), parallel=parallel)
        with process_groups(timeout_s=120, eager_bytes=candidate.eager_bytes) as groups:
            with LLM(folder / "model", config, groups=groups) as llm:
                share = prompts(0, NUM_PROMPTS)[groups.rank :: NUM_HOSTS]
                own = [llm.add(llm.encode(p), params(num_tokens)) for p in share]
                llm.engine.start()
                while not all(g.request.num_output for g in own):
                    llm.step()
                traffic = llm.engine.traffic
                for part in traffic:
                    part.reset()
                before = llm.engine.stats.steps
                while llm.engine.has_work:
                    llm.step()
                stats = llm.engine.stats
                foreground = [t.collectives for t in traffic[:2]]  # the third is K/V, behind the layers
                result = {
                    "tokens": [g.token_ids for g in own],
                    "decode_tokens": stats.pure_decode_tokens,
                    "decode_seconds": stats.decode_seconds,
                    "steps": stats.steps - before,
                    "rounds": sum(foreground),
                    "bytes_to": [sum(n) for n in zip(*(t.bytes_to for t in traffic))],
                    "control_bytes_to": [sum(n) for n in zip(*(t.control_bytes_to for t in traffic))],
                }
                print(json.dumps(result), flush=True)


def prepare(folder: Path, top_k: int, num_tokens: int) -> list[list[int]]:
    """The model and two plans for 2 x 2 ranks in `folder`. Returns what one process says."""
    (folder / "model").mkdir()
    for file in DEMO.iterdir():
        (folder / "model" / file.name).symlink_to(file)
    config = json.loads((DEMO / "config.json").read_text()) | {"num_experts_per_tok": top_k}
    (folder / "model" / "config.json").unlink()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    with LLM(folder / "model", EngineConfig(dtype="float32", threads=1)) as llm:
        recorder = llm.engine.record()
        llm.generate(prompts(1, 32) + prompts(2, 32), SamplingParams(max_tokens=32))
        trace = recorder.trace()
    for name, coherent in (("solved", False), ("followed", True)):
        nodes = tuple(r // HOSTS_PER_NODE for r in range(NUM_HOSTS))
        # The link between the nodes is what counts.
        options = CopyOptions(seconds=10.0, nodes=nodes, node_weight=4.0, coherent=coherent)
        solve_copies(trace, NUM_HOSTS, options=options).save(folder / f"{name}.json")
    with LLM(folder / "model", EngineConfig(dtype="float32", threads=1)) as llm:
        return [a.outputs[0].token_ids for a in llm.generate(prompts(0, NUM_PROMPTS), params(num_tokens))]


def measure(
    rounds: int, num_tokens: int, top_k: int, candidates: Sequence[Candidate], shapes: Sequence[Shape]
) -> list[dict]:
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = prepare(folder, top_k, num_tokens)
        for shape in shapes:
            reason = why_not(shape)
            if reason is not None:
                rows.append(asdict(shape) | {"skipped": reason})
                print(rows[-1], flush=True)
                continue
            n = len(candidates)
            order = [
                ALL.index(candidates[(i + r) % n]) for r in range(rounds) for i in range(n)
            ]  # interleaved: noise meets all of them
            command = ["-m", "bench.bench_hosts", "--worker", name, "--order", json.dumps(order)]
            with hosts(shape) as names:
                link, before = measure_link(names), trunk_bytes(names)
                printed = [out.splitlines() for out in run_ranks(names, [*command, f"--tokens={num_tokens}"], 900)]
                crossed = trunk_bytes(names) - before
            for candidate in candidates:
                runs = [[json.loads(p[i]) for p in printed] for i, o in enumerate(order) if ALL[o] == candidate]
                for run in runs:
                    for rank, one in enumerate(run):
                        assert one["tokens"] == expected[rank::NUM_HOSTS], (candidate, rank)
                rows.append(summary(shape, link, candidate, runs) | {"trunk_bytes_of_all": crossed})
                print(rows[-1], flush=True)
    return rows


def summary(shape: Shape, link: Measured, candidate: Candidate, runs: list[list[dict]]) -> dict:
    """One candidate on one link: decode rate, and what a step sends across."""
    rates = [sum(r["decode_tokens"] for r in run) / max(r["decode_seconds"] for r in run) for run in runs]
    first = runs[0]
    (steps,) = {r["steps"] for r in first}
    nodes = range(NUM_HOSTS // HOSTS_PER_NODE)

    def across(key: str, node: int) -> float:
        """Bytes a step from this node to the other."""
        own = range(node * HOSTS_PER_NODE, (node + 1) * HOSTS_PER_NODE)
        return sum(n for r in own for to, n in enumerate(first[r][key]) if to not in own) / steps

    payload = [across("bytes_to", node) for node in nodes]
    control = [across("control_bytes_to", node) for node in nodes]
    crossing = first[0]["rounds"] / steps
    crossing = crossing / 2 if candidate.dispatcher == "hierarchical" else crossing  # half of its hops are inside nodes
    crossing += 1  # the agreement on a step
    tokens = sum(r["decode_tokens"] for r in first) / steps
    row = asdict(shape) | {
        "link_round_trip_ms": link.round_trip_ms,
        "link_mbit": link.mbit,
        "candidate": candidate.name,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "tokens_per_step": tokens,
        "rounds_across_per_step": crossing,
        "cross_node_bytes_per_token": sum(payload) / tokens,
        "cross_node_count_bytes_per_token": sum(control) / tokens,
        "link_bytes": [r["bytes_to"] for r in first],
    }
    if shape.mbit is not None:
        seconds = max(p + c for p, c in zip(payload, control)) * 8 / (link.mbit * 1e6)
        row["limit_tokens_per_second"] = tokens / (crossing * link.round_trip_ms / 2e3 + seconds)
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| link (round trip and rate measured) | candidate | decode tokens/s (range) | × the first "
        "| rounds across, a step | bytes across, a token | limit, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        link = "unshaped" if row["mbit"] is None else f"{row['mbit']} Mb/s, {row['delay_ms']:g} ms each way"
        if "skipped" in row:
            lines.append(f"| {link} | not measured: {row['skipped']} | | | | | |")
            continue
        link += f" ({row['link_round_trip_ms']:.2f} ms, {row['link_mbit']:.0f} Mb/s)"
        vanilla = next(r for r in rows if (r["mbit"], r["delay_ms"]) == (row["mbit"], row["delay_ms"]))
        limit = row.get("limit_tokens_per_second")
        share = "-" if limit is None else f"{limit:.0f} ({row['tokens_per_second'] / limit:.0%} reached)"
        lines.append(
            f"| {link} | {row['candidate']} | {row['tokens_per_second']:.1f} ({row['spread'][0]:.1f} to "
            f"{row['spread'][1]:.1f}) | {row['tokens_per_second'] / vanilla['tokens_per_second']:.2f} | "
            f"{row['rounds_across_per_step']:.1f} | {row['cross_node_bytes_per_token']:.0f} | {share} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--order", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--combine", action="store_true", help="exact against partial")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.order, args.tokens)
        return 0
    reason = why_not()
    if reason is not None:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 2
    candidates, shapes = (COMBINES, RATES) if args.combine else (CANDIDATES, SHAPES)
    rows = measure(args.rounds, args.tokens, args.top_k, candidates, shapes)
    shown = [a for i, a in enumerate(sys.argv[1:], 1) if not a.startswith("--out") and sys.argv[i - 1] != "--out"]
    head = (
        f"`{' '.join(['python -m bench.bench_hosts', *shown])}`: {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, 2 nodes x 2 ranks in network namespaces, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; the demo model, 6 layers of 16 experts, "
        f"top-{args.top_k}, {NUM_PROMPTS} sequences, {args.tokens} tokens each, medians of {args.rounds}"
    )
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        args.out.with_suffix(".md").write_text(f"# Four hosts, a slow link\n\n{head}\n\n{table(rows)}\n")
        args.out.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
