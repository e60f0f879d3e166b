"""What Ray's control path costs: one batch file by hosts of a cluster, and by as many ranks as torchrun starts them.

    python -m bench.bench_cluster [--hosts 2] [--rounds 12] [--model FOLDER]

The driver needs a core beside those of the hosts: with as many hosts as cores it takes one from them.

Both compute with the same engine, dispatcher and slots; the ranks deal lines by number and write through rank 0, the
hosts are dealt requests by the driver and tell it every token. Rounds alternate; whoever does not run is stopped (an
idle host steps two hundred times a second). Answers must be equal. Seconds are of the whole file; CPU seconds are of
all processes that take part: the driver and the hosts, or the ranks.
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from moe.batch import run_batch
from moe.comm.membership import process_groups
from moe.config import EngineConfig
from moe.llm import LLM

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
SETTINGS = [
    "threads=1", "offload.budget=1.0", "batch.kv_tokens=8192", "batch.max_sequences=8",
    "parallel.dispatcher=all_to_all", "cluster.cpus_per_host=0.5", "cluster.silence_s=100000",
]  # fmt: skip


def write_lines(path: Path, count: int) -> None:
    prompts = (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()
    with path.open("w") as file:
        for number in range(count):
            words = json.loads(prompts[number % len(prompts)])["prompt"].split(" ")
            turned = number // len(prompts)  # no prompt begins as another did
            body = {"prompt": " ".join(words[turned:] + words[:turned]), "max_tokens": 48, "temperature": 0}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body | {"ignore_eos": True}}) + "\n")


def texts(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}


def config_for(model: Path) -> EngineConfig:
    return EngineConfig.load(None, [*SETTINGS, *(["dtype=float32"] if model == DEMO else [])])


def rank(model: Path, source: Path) -> None:
    """One rank: serves the file again for every name of an output file that comes in; prints when it is done."""
    with process_groups(timeout_s=600) as groups, LLM(model, config_for(model), groups=groups) as llm:
        print("ready", flush=True)
        for name in sys.stdin:
            run_batch(llm, source, Path(name.strip()))
            print("done", flush=True)


class Ranks:
    """Processes with the environment of torchrun."""

    def __init__(self, model: Path, source: Path, size: int) -> None:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
        self._store = store
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.bench_cluster", "--rank", str(source), "--model", str(model)],
                cwd=ROOT, text=True,
                env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for r in range(size)
        ]  # fmt: skip
        self._wait("ready")

    def _wait(self, word: str) -> None:
        for process in self.processes:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            assert said == word, said

    def serve(self, target: Path) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{target}\n")
            process.stdin.flush()
        self._wait("done")

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait(60)


def cpu_seconds(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(one.user + one.system for one in times)


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--lines", type=int, default=96)
    parser.add_argument("--model", type=Path, default=DEMO, help="a folder with a tokenizer")
    args = parser.parse_args()
    if args.rank is not None:
        rank(args.model, args.rank)
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray starts actors at 15: whatever else runs would come first
    import ray

    session = f"/tmp/moe-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.jsonl"
        write_lines(source, args.lines)
        ranks = Ranks(args.model, source, args.hosts)
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=session, object_store_memory=100 << 20)
        try:
            with LLM(args.model, config_for(args.model), hosts=args.hosts) as llm:
                rows = measure(llm, ranks, source, args.rounds)
        finally:
            ranks.close()
            ray.shutdown()
            shutil.rmtree(session, ignore_errors=True)
    report(rows, args)


def measure(llm: Any, ranks: Ranks, source: Path, rounds: int) -> list[dict[str, float]]:
    hosts = [host.pid for host in llm.engine.status().hosts]
    members = {"hosts": [*hosts, os.getpid()], "ranks": [p.pid for p in ranks.processes]}
    rows: list[dict[str, float]] = []
    right: dict[str, str] | None = None
    for number in range(-1, rounds):  # the first warms up
        row = {}
        for who in ("hosts", "ranks") if number % 2 else ("ranks", "hosts"):
            target = source.parent / f"{who}-{number}.jsonl"
            for pid in hosts:
                os.kill(pid, signal.SIGCONT if who == "hosts" else signal.SIGSTOP)
            started, cpu = time.perf_counter(), cpu_seconds(members[who])
            if who == "hosts":
                run_batch(llm, source, target)
            else:
                ranks.serve(target)
            row[who] = time.perf_counter() - started
            row[f"{who} cpu"] = cpu_seconds(members[who]) - cpu
            right = right or texts(target)
            assert texts(target) == right, f"{who} answer otherwise"
        for pid in hosts:
            os.kill(pid, signal.SIGCONT)
        if number >= 0:
            rows.append(row)
    return rows


def report(rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, torch {torch.__version__}")
    model = "" if args.model == DEMO else " --model FOLDER"
    options = f"--hosts {args.hosts} --rounds {args.rounds} --lines {args.lines}{model}"
    print(f"command: python -m bench.bench_cluster {options}\n")
    print("| | hosts of Ray | ranks | hosts / ranks |\n|---|---|---|---|")
    for kind, suffix in (("seconds", ""), ("CPU seconds", " cpu")):
        hosts, ranks = [r[f"hosts{suffix}"] for r in rows], [r[f"ranks{suffix}"] for r in rows]
        ratios = [a / b for a, b in zip(hosts, ranks)]
        print(f"| {kind} of the file | {quartiles(hosts)} | {quartiles(ranks)} | {quartiles(ratios)} |")
    print("\nmedian (quartiles)")
    print(json.dumps({"bench": "cluster", "rounds": rows}))


if __name__ == "__main__":
    main()
