"""Two ranks with a quarter of their share of the experts each, against one rank with the same memory for experts.

    python -m bench.bench_ranks

The demo model in fp32 with experts from disk (`file`) and from one host copy a node (`ram`); the same prompts; tokens
must be equal. One rank has a quarter of all experts in slots, two have a quarter of half of them each. Memory is the
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
from pathlib import Path

import torch
import transformers

from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.engine import peak_rss_bytes
from moe.llm import LLM
from moe.params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
CANDIDATES = {  # ranks, store, dispatcher
    "one rank, file": (1, "file", "all_to_all"),
    "two ranks, file": (2, "file", "all_to_all"),
    "two ranks, file, coherent": (2, "file", "coherent"),
    "one rank, ram": (1, "ram", "all_to_all"),
    "two ranks, ram": (2, "ram", "all_to_all"),
}


def proportional_bytes() -> int:
    """This process's memory, shared pages divided by the number of processes that map them."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no Pss line")


def worker(store: str, dispatcher: str, num_tokens: int, meet: Path) -> None:
    """One rank: its share of the prompts; prints one JSON line. All ranks are alive when memory is read."""
    config = EngineConfig(
        dtype="float32",
        threads=1,
        offload=OffloadConfig(budget="0.25", store=store),  # type: ignore[arg-type]
        batch=BatchConfig(max_tokens=2048, kv_tokens=4096),
        parallel=ParallelConfig(dispatcher=dispatcher),  # type: ignore[arg-type]
    )
    with process_groups(timeout_s=120) as groups, LLM(DEMO, config, groups=groups) as llm:
        lines = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
        own = [json.loads(line)["prompt"] for line in lines[::14][:16]][groups.rank :: groups.world_size]
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        tokens = [a.outputs[0].token_ids for a in llm.generate(own, params)]
        stats, layers = llm.engine.stats, llm.engine.layer_stats()
        assert llm.engine.experts is not None
        result = {
            "tokens": tokens,
            "decode_tokens": stats.pure_decode_tokens,
            "decode_seconds": stats.decode_seconds,
            "slots": llm.engine.experts.cache.num_slots,
            "misses": sum(layer.misses for layer in layers),
            "hits": sum(layer.hits for layer in layers),
        }
        (meet / str(groups.rank)).touch()
        while len(list(meet.iterdir())) < groups.world_size:  # not by a collective, which would add buffers
            time.sleep(0.01)
        result |= {"pss": proportional_bytes(), "peak_rss": peak_rss_bytes()}
        print(json.dumps(result), flush=True)


def run_ranks(world_size: int, store: str, dispatcher: str, num_tokens: int, port: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as meet:
        command = [sys.executable, "-m", "bench.bench_ranks", "--worker", store, dispatcher, meet]
        command += ["--tokens", str(num_tokens)]
        ranks = []
        for rank in range(world_size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            full = os.environ | {key: str(value) for key, value in environment.items()}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=full, stdout=subprocess.PIPE, text=True))
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise OSError(f"a rank of {command} failed")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def summary(name: str, runs: list[list[dict]]) -> dict:
    rates = [sum(r["decode_tokens"] for r in run) / max(r["decode_seconds"] for r in run) for run in runs]
    first = runs[0]
    return {
        "candidate": name,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "slots_per_rank": [r["slots"] for r in first],
        "hit_rate": sum(r["hits"] for r in first) / sum(r["hits"] + r["misses"] for r in first),
        "misses": sum(r["misses"] for r in first),
        "pss_mib_per_rank": [r["pss"] / 2**20 for r in first],
        "pss_mib_of_node": statistics.median(sum(r["pss"] for r in run) for run in runs) / 2**20,
        "peak_rss_mib_per_rank": [r["peak_rss"] / 2**20 for r in first],
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| candidate | slots a rank | decode tokens/s (range) | × one rank | expert hits "
        "| memory of the node, shared pages once | of each rank | peak resident size of each rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        store = row["candidate"].split(", ")[1]
        alone = next(r for r in rows if r["candidate"] == f"one rank, {store}")["tokens_per_second"]
        lines.append(
            f"| {row['candidate']} | {', '.join(map(str, row['slots_per_rank']))} | {row['tokens_per_second']:.0f} "
            f"({row['spread'][0]:.0f} to {row['spread'][1]:.0f}) | {row['tokens_per_second'] / alone:.2f} | "
            f"{row['hit_rate']:.0%} | {row['pss_mib_of_node']:.0f} MiB | "
            f"{', '.join(f'{n:.0f}' for n in row['pss_mib_per_rank'])} | "
            f"{', '.join(f'{n:.0f}' for n in row['peak_rss_mib_per_rank'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    if args.worker:
        store, dispatcher, meet = args.worker
        worker(store, dispatcher, args.tokens, Path(meet))
        return 0
    runs: dict[str, list[list[dict]]] = {name: [] for name in CANDIDATES}
    for turn in range(args.rounds):  # interleaved: noise of the machine meets all of them
        for index, (name, candidate) in enumerate(CANDIDATES.items()):
            runs[name].append(run_ranks(*candidate, args.tokens, 29600 + turn * len(CANDIDATES) + index))
    expected = runs["one rank, file"][0][0]["tokens"]
    for name, of_name in runs.items():
        for run in of_name:
            for rank, one in enumerate(run):
                assert one["tokens"] == expected[rank :: len(run)], (name, rank)
    rows = [summary(name, of_name) for name, of_name in runs.items()]
    head = (
        f"`python -m bench.bench_ranks --rounds {args.rounds} --tokens {args.tokens}`: "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a rank, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; the demo model in fp32, 16 sequences, medians"
    )
    print(f"\n{head}\n\n{table(rows)}\n")
    if args.out:
        args.out.with_suffix(".md").write_text(f"# One rank and two with the same memory\n\n{head}\n\n{table(rows)}\n")
        args.out.with_suffix(".json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
