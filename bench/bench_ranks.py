"""Two ranks with a quarter of their share of the experts each, against one rank with the same memory for experts.

    python -m bench.bench_ranks                    # the demo model in fp32, experts of 96 KiB
    python -m bench.bench_ranks --walk FOLDER      # a model of 3.6 GB in bf16 made there, experts of 4.5 MiB, packed

With experts from disk (`file`) and from one host copy a node (`ram`); 16 sequences, the same prompts; tokens must be
equal. One rank has a quarter of all experts in slots (--budget), two have a quarter of half of them each. Memory is the
proportional set size (smaps_rollup) at the end of the run, not its peak, summed over the ranks of the node: pages that
ranks share, as the host copy, count once. The resident size that most tools show counts them once per rank.
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
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from bench.compare import packed_of
from bench.walk_model import LARGE, prompts_of, write
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.llm import LLM
from moe.offload.memory import peak_rss_bytes
from moe.params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
NUM_PROMPTS = 16
CANDIDATES = {  # ranks, threads of each, store, dispatcher
    "one rank, file": (1, 1, "file", "all_to_all"),
    "one rank, file, two threads": (1, 2, "file", "all_to_all"),
    "two ranks, file": (2, 1, "file", "all_to_all"),
    "two ranks, file, coherent": (2, 1, "file", "coherent"),
    "one rank, ram": (1, 1, "ram", "all_to_all"),
    "one rank, ram, two threads": (1, 2, "ram", "all_to_all"),
    "two ranks, ram": (2, 1, "ram", "all_to_all"),
}


def proportional_bytes() -> int:
    """This process's memory, shared pages divided by the number of processes that map them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Pss line")


def prompts_for(model: Path, turn: int) -> list[str] | list[list[int]]:
    """Others in each turn."""
    if model == DEMO:
        lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines[turn::14][:NUM_PROMPTS]]
    return prompts_of(model, NUM_PROMPTS, 64, turn)


def worker(model: Path, budget: str, threads: int, store: str, dispatcher: str, num_tokens: int, meet: Path) -> None:
    """One rank: its share of the prompts; prints one JSON line. All ranks are alive when memory is read."""
    config = EngineConfig(
        dtype="float32" if model == DEMO else "bfloat16",
        threads=threads,
        offload=OffloadConfig(budget=budget, store=store),  # type: ignore[arg-type]
        batch=BatchConfig(max_tokens=2048, kv_tokens=4096),
        parallel=ParallelConfig(dispatcher=dispatcher),  # type: ignore[arg-type]
    )
    with process_groups(timeout_s=120) as groups, LLM(model, config, groups=groups) as llm:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        # The first turn meets slots and buffers that nobody has touched yet.
        llm.generate(prompts_for(model, 1)[groups.rank :: groups.world_size], params)
        before, before_layers = replace(llm.engine.stats), [replace(layer) for layer in llm.engine.layer_stats()]
        answers = llm.generate(prompts_for(model, 0)[groups.rank :: groups.world_size], params)
        tokens = [answer.outputs[0].token_ids for answer in answers]
        stats, layers = llm.engine.stats, llm.engine.layer_stats()
        assert llm.engine.experts is not None
        result = {
            "tokens": tokens,
            "prefill_tokens": stats.prefill_tokens - before.prefill_tokens,
            "prefill_seconds": stats.prefill_seconds - before.prefill_seconds,
            "decode_tokens": stats.pure_decode_tokens - before.pure_decode_tokens,
            "decode_seconds": stats.decode_seconds - before.decode_seconds,
            "slots": llm.engine.experts.cache.num_slots,
            "misses": sum(now.misses - then.misses for now, then in zip(layers, before_layers)),
            "hits": sum(now.hits - then.hits for now, then in zip(layers, before_layers)),
        }
        (meet / str(groups.rank)).touch()
        while len(list(meet.iterdir())) < groups.world_size:  # not by a collective, which would add buffers
            time.sleep(0.01)
        result |= {"pss": proportional_bytes(), "peak_rss": peak_rss_bytes()}
        print(json.dumps(result), flush=True)


def run_ranks(
    model: Path,
    budget: str,
    world_size: int,
    threads: int,
    store: str,
    dispatcher: str,
    num_tokens: int,
    port: int,
) -> list[dict]:
    with tempfile.TemporaryDirectory() as meet:
        command = [sys.executable, "-m", "bench.bench_ranks", "--worker", str(model), budget, str(threads), store]
        command += [dispatcher, meet, "--tokens", str(num_tokens)]
        ranks = []
        for rank in range(world_size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": threads,
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            full = os.environ | {key: str(value) for key, value in environment.items()}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=full, stdout=subprocess.PIPE, text=True))
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise OSError(f"a rank of {command} failed")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def rates_of(runs: list[list[dict]], kind: str) -> list[float]:
    return [sum(r[f"{kind}_tokens"] for r in run) / max(r[f"{kind}_seconds"] for r in run) for run in runs]


def summary(name: str, runs: list[list[dict]]) -> dict:
    rates, prefill = rates_of(runs, "decode"), rates_of(runs, "prefill")
    first = runs[0]
    return {
        "candidate": name,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_spread": [min(prefill), max(prefill)],
        "slots_per_rank": [r["slots"] for r in first],
        "hit_rate": sum(r["hits"] for r in first) / sum(r["hits"] + r["misses"] for r in first),
        "misses": sum(r["misses"] for r in first),
        "pss_mib_per_rank": [r["pss"] / 2**20 for r in first],
        "pss_mib_of_node": statistics.median(sum(r["pss"] for r in run) for run in runs) / 2**20,
        "peak_rss_mib_per_rank": [r["peak_rss"] / 2**20 for r in first],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| candidate | slots a rank | decode tokens/s (range) | × one rank | prefill tokens/s (range) "
        "| × one rank | expert hits "
        "| memory of the node, shared pages once | of each rank | peak resident size of each rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        store = row["candidate"].split(", ")[1]
        alone = next(r for r in rows if r["candidate"] == f"one rank, {store}")
        rate, prefill = row["tokens_per_second"], row["prefill_tokens_per_second"]
        lines.append(
            f"| {row['candidate']} | {', '.join(map(str, row['slots_per_rank']))} | {rate:.0f} "
            f"({row['spread'][0]:.0f} to {row['spread'][1]:.0f}) | {rate / alone['tokens_per_second']:.2f} | "
            f"{prefill:.0f} ({row['prefill_spread'][0]:.0f} to {row['prefill_spread'][1]:.0f}) | "
            f"{prefill / alone['prefill_tokens_per_second']:.2f} | "
            f"{row['hit_rate']:.0%} | {row['pss_mib_of_node']:.0f} MiB | "
            f"{', '.join(f'{n:.0f}' for n in row['pss_mib_per_rank'])} | "
            f"{', '.join(f'{n:.0f}' for n in row['peak_rss_mib_per_rank'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--walk", type=Path, help="where the larger model is made, or was")
    parser.add_argument("--experts", choices=("int8", "int4"), help="what those of the larger model are rounded to")
    parser.add_argument("--budget", default="0.25", help="share of the experts in slots")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        model, budget, threads, store, dispatcher, meet = args.worker
        worker(Path(model), budget, int(threads), store, dispatcher, args.tokens, Path(meet))
        return 0
    model = DEMO if args.walk is None else packed_of(write(args.walk, LARGE), args.experts)
    runs: dict[str, list[list[dict]]] = {name: [] for name in CANDIDATES}
    for turn in range(args.rounds):  # interleaved: noise of the machine meets all of them
        for index, (name, candidate) in enumerate(CANDIDATES.items()):
            runs[name].append(
                run_ranks(model, args.budget, *candidate, args.tokens, 29600 + turn * len(CANDIDATES) + index)
            )
    expected = runs["one rank, file"][0][0]["tokens"]
    for name, of_name in runs.items():
        for run in of_name:
            for rank, one in enumerate(run):
                assert one["tokens"] == expected[rank :: len(run)], (name, rank)
    rows = [summary(name, of_name) for name, of_name in runs.items()]
    options = (" --walk FOLDER" if args.walk else "") + (f" --experts {args.experts}" if args.experts else "")
    head = (
        f"`python -m bench.bench_ranks{options} --budget {args.budget} --rounds {args.rounds} --tokens {args.tokens}`: "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; "
        f"{'12 layers of 64 experts of 4.5 MiB in bf16, 4 a token' if args.walk else 'the demo model in fp32'}, "
        f"{NUM_PROMPTS} sequences, one thread a rank where not said, medians"
    )
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        args.out.with_suffix(".md").write_text(f"# One rank and two with the same memory\n\n{head}\n\n{table(rows)}\n")
        args.out.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
