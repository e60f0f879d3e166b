"""The whole engine against transformers with all experts in memory, and against accelerate's disk offload with fewer.

    python bench/bench_engine.py [--rounds 3] [--only resident offload] [--out bench/results/engine]

Two models: examples/tinymoe (real routing), and a random Qwen3-MoE of 8 layers x 64 experts, top 4, written here in
bf16 and, the same values, in fp32. Random weights route almost evenly, so that no cache policy can help there.
Every candidate is a process of its own (bench/engine_worker.py); they take turns, every round, on the same prompts for
the same number of tokens. Tokens are compared first: in fp32 all must be equal to those of transformers eager. TMPDIR
must lie on the disk to measure, with 3 GB free.

Which limit binds: all resident, decode reads the dense weights and the experts that the step's tokens need: memory
bandwidth (`% memory`, measured here), and below it what transformers' modelling code costs per layer. Offloaded and
warm: copies from the page cache, beside decode itself. Cold: the disk; the page cache of all files is dropped before
every step, of both candidates alike.
Seconds are CPU seconds of the process where that is all that counts (all resident, one thread), so that other jobs on
the machine disturb less; wall seconds where reading counts. The last line is one JSON document.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from bench_experts_cpu import measure_limits, processor
from bench_stores import disk_limit
from engine_worker import Candidate
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "tinymoe"
RANDOM = Qwen3MoeConfig(
    vocab_size=4096,
    hidden_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=64,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
PROMPT_TOKENS = 64
OURS, DIRECT = "moe", "moe, O_DIRECT"
BASELINE = "transformers eager"
ACCELERATE = "accelerate"
RESIDENT_NOTE = (
    "`tokens equal` compares with transformers eager in fp32. bf16 tokens of the random model part after some steps "
    "whoever computes them; those of transformers' two implementations part from each other as well. `% memory`: the "
    "weights that a decode step must read, at the measured bandwidth, against the step's time. Peak RSS is beyond what "
    "the process held after its imports, pages of mapped files included."
)
OFFLOAD_NOTE = (
    "accelerate keeps whole layers' experts on disk (`device_map`; as many layers in memory as the share allows, "
    "rounded up; grouped_mm), and plain transformers stands in its rows at 100 %. On a CPU accelerate maps the files "
    "and copies nothing, so that with a warm page cache it runs from memory that the limit should have denied it: see "
    "its peak RSS. Cold is what a machine without that memory does: accelerate's pages are dropped before every step "
    "(outside the clock) and ours are read with O_DIRECT. Random weights route almost evenly, so a cache can do no "
    "better there than its share; the demo model shows real routing, but its experts are 147 kB each and its steps are "
    "mostly Python."
)
Row = dict[str, Any]


def write_random(folder: Path) -> dict[str, Path]:
    """The random model by dtype, with activations of order 1 everywhere, so that its tokens depend on its context."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RANDOM).float().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=1.0 if "embed" in name else weight.shape[-1] ** -0.5)
        weight.copy_(weight.bfloat16())
    folders = {"float32": folder / "float32", "bfloat16": folder / "bfloat16"}
    model.save_pretrained(folders["float32"])
    model.bfloat16().save_pretrained(folders["bfloat16"])
    os.sync()
    return folders


def make_prompts(model: str, count: int) -> list[list[int]]:
    """Prompts of PROMPT_TOKENS tokens: text for the demo model, random ids for the random one."""
    if model == "random":
        generator = torch.Generator().manual_seed(1)
        ids: list[list[int]] = torch.randint(RANDOM.vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()
        return ids
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    lines = [json.loads(line)["prompt"] for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]
    step = len(lines) // count
    return [tokenizer(" ".join(lines[i * step : i * step + 8]))["input_ids"][:PROMPT_TOKENS] for i in range(count)]


class Worker:
    """A candidate's process."""

    def __init__(self, candidate: Candidate) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "engine_worker.py"), json.dumps(asdict(candidate))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.loaded = self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a candidate ended with exit status {self._process.wait()}; its message is above")
        answer: Row = json.loads(line)
        return answer

    def run(self, prompts: list[list[int]], new_tokens: int, cold: bool = False) -> Row:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens, "cold": cold}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def workers(candidates: dict[str, Candidate]) -> Iterator[dict[str, Worker]]:
    running: dict[str, Worker] = {}
    try:
        for name, candidate in candidates.items():
            running[name] = Worker(candidate)
        yield running
    finally:
        for worker in running.values():
            worker.close()


def take_turns(
    running: dict[str, Worker], prompts: list[list[int]], new_tokens: int, rounds: int, cold: bool = False
) -> dict[str, list[Row]]:
    """`rounds` answers of each, after one that warms up."""
    answers: dict[str, list[Row]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name, worker in running.items():
            answer = worker.run(prompts, new_tokens, cold)
            if turn:
                answers[name].append(answer)
    return answers


def equal_tokens(a: Iterable[list[int]], b: Iterable[list[int]]) -> int:
    return sum(x == y for one, other in zip(a, b) for x, y in zip(one, other))


def summary(answers: list[Row], num_prompts: int, reference: list[list[int]]) -> Row:
    """Medians and ranges of rates in tokens per second; counts of the last job."""
    last = answers[-1]
    generated = sum(map(len, last["tokens"]))
    work = {"prefill": num_prompts * PROMPT_TOKENS, "decode": generated - num_prompts}
    row: Row = {"equal": equal_tokens(last["tokens"], reference), "tokens": generated}
    for phase, tokens in work.items():
        for clock in ("wall", "cpu"):
            seconds = [a[phase][clock] for a in answers]
            row[f"{phase}_{clock}"] = tokens / statistics.median(seconds)
            row[f"{phase}_{clock}_range"] = [tokens / max(seconds), tokens / min(seconds)]
    row["job_wall"] = statistics.median(a["prefill"]["wall"] + a["decode"]["wall"] for a in answers)
    names = ("bytes_moved", "bytes_from_disk", "hits", "misses", "stall", "peak_rss", "decode_steps", "decode_experts")
    return row | {name: last[name] for name in names} | last["notes"]


def bench_resident(model: str, folders: dict[str, Path], rounds: int, limits: dict[str, float]) -> list[Row]:
    rows = []
    new_tokens = 48 if model == "demo" else 32
    reference: dict[int, list[list[int]]] = {}
    for dtype, folder in folders.items():
        base: dict[str, Any] = {"folder": str(folder), "dtype": dtype}
        candidates = {
            OURS: Candidate(kind="ours", **base),
            BASELINE: Candidate(kind="transformers", experts="eager", **base),
            "transformers grouped_mm": Candidate(kind="transformers", experts="grouped_mm", **base),
        }
        with workers(candidates) as running:
            for batch in (1, 8):
                answers = take_turns(running, make_prompts(model, batch), new_tokens, rounds)
                right = reference.setdefault(batch, answers[BASELINE][0]["tokens"])  # fp32 comes first
                for name, mine in answers.items():
                    row = summary(mine, batch, right)
                    if dtype == "float32":
                        assert row["equal"] == row["tokens"], (model, batch, name, row["equal"], row["tokens"])
                    if name == OURS:
                        experts = row["decode_experts"] / row["decode_steps"] * row["blob_bytes"]
                        steps_per_s = row["decode_cpu"] / batch
                        read = (row["dense_bytes"] + experts) * steps_per_s
                        row["memory_share"] = read / limits["memory_bytes_per_s"]
                    rows.append({"model": model, "dtype": dtype, "batch": batch, "candidate": name, **row})
                print("measured", model, dtype, batch, flush=True)
    return rows


def bench_offload(model: str, folder: Path, dtype: str, rounds: int, scratch: Path) -> list[Row]:
    rows = []
    prompts, new_tokens = make_prompts(model, 1), 16
    reference: list[list[int]] = []
    for resident in (1.0, 0.5, 0.25, 0.125):
        base: dict[str, Any] = {"folder": str(folder), "dtype": dtype}
        offloaded = scratch / f"{model}-{dtype}-{resident}"
        theirs: dict[str, Any] = {"experts": "grouped_mm", "resident": resident, **base}
        if resident < 1:
            theirs["scratch"] = str(offloaded)
        candidates = {
            OURS: Candidate(kind="ours", resident=resident, direct=False, **base),
            ACCELERATE: Candidate(kind="accelerate" if resident < 1 else "transformers", **theirs),
        }
        if resident < 1:
            candidates[DIRECT] = Candidate(kind="ours", resident=resident, direct=True, **base)
        with workers(candidates) as running:
            states = {"warm": [OURS, ACCELERATE]} | ({"cold": [DIRECT, ACCELERATE]} if resident < 1 else {})
            for state, names in states.items():
                some = {name: running[name] for name in names}
                answers = take_turns(some, prompts, new_tokens, rounds, cold=state == "cold")
                reference = reference or answers[ACCELERATE][0]["tokens"]  # plain transformers comes first
                for name, mine in answers.items():
                    row = summary(mine, 1, reference)
                    if dtype == "float32":
                        assert row["equal"] == row["tokens"], (model, resident, name, row["equal"], row["tokens"])
                    where = {"model": model, "dtype": dtype, "resident": resident, "cache": state, "candidate": name}
                    rows.append(where | row)
                print("measured", model, dtype, resident, state, flush=True)
        shutil.rmtree(offloaded, ignore_errors=True)
    return rows


def resident_table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | dtype | batch | candidate | prefill tok/s | × eager | decode tok/s (range) | × eager "
        "| × eager, wall | tokens equal | % memory | peak RSS MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("model", "dtype", "batch"))]
        base = next(r for r in same if r["candidate"] == BASELINE)
        low, high = row["decode_cpu_range"]
        share = f"{100 * row['memory_share']:.0f}" if "memory_share" in row else ""
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['batch']} | {row['candidate']} | {row['prefill_cpu']:.0f} "
            f"| {row['prefill_cpu'] / base['prefill_cpu']:.2f} | {row['decode_cpu']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {row['decode_cpu'] / base['decode_cpu']:.2f} | {row['decode_wall'] / base['decode_wall']:.2f} "
            f"| {row['equal']}/{row['tokens']} | {share} | {row['peak_rss'] / 1e6:.0f} |"
        )
    return lines


def offload_table(rows: list[Row], limits: dict[str, float]) -> list[str]:
    lines = [
        "| model | dtype | resident | page cache | candidate | decode tok/s (range) | × accelerate | × in CPU time "
        "| tokens equal | hit rate | MB read per job | MB from disk | % disk | stall s | peak RSS MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("model", "dtype", "resident", "cache"))]
        base = next(r for r in same if r["candidate"] == ACCELERATE)
        low, high = row["decode_wall_range"]
        is_ours = row["candidate"] != ACCELERATE
        hit_rate = f"{row['hits'] / max(1, row['hits'] + row['misses']):.2f}" if is_ours else ""
        stall = f"{row['stall']:.2f}" if is_ours else ""
        disk = row["bytes_from_disk"] / row["job_wall"] / (limits["disk_mib_per_s"] * (1 << 20))
        lines.append(
            f"| {row['model']} | {row['dtype']} | {100 * row['resident']:g} % | {row['cache']} | {row['candidate']} "
            f"| {row['decode_wall']:.1f} ({low:.1f} to {high:.1f}) | {row['decode_wall'] / base['decode_wall']:.2f} "
            f"| {row['decode_cpu'] / base['decode_cpu']:.2f} | {row['equal']}/{row['tokens']} "
            f"| {hit_rate} | {row['bytes_moved'] / 1e6:.0f} "
            f"| {row['bytes_from_disk'] / 1e6:.0f} | {100 * disk:.0f} "
            f"| {stall} | {row['peak_rss'] / 1e6:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up")
    parser.add_argument("--only", nargs="+", choices=("resident", "offload"), default=["resident", "offload"])
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    limits = measure_limits(time.thread_time)
    resident: list[Row] = []
    offload: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folders = write_random(Path(name))
        limits["disk_mib_per_s"] = disk_limit(folders["bfloat16"] / "model.safetensors")
        if "resident" in options.only:
            resident += bench_resident("demo", {"float32": DEMO, "bfloat16": DEMO}, options.rounds, limits)
            resident += bench_resident("random", folders, options.rounds, limits)
        if "offload" in options.only:
            offload += bench_offload("demo", DEMO, "float32", options.rounds, Path(name))
            for dtype, folder in folders.items():
                offload += bench_offload("random", folder, dtype, options.rounds, Path(name))
    modules = {"torch": torch, "transformers": transformers, "accelerate": accelerate}
    versions = {"python": platform.python_version()} | {name: m.__version__ for name, m in modules.items()}
    document = {
        "bench": "engine",
        "command": "python bench/bench_engine.py " + " ".join(sys.argv[1:]),
        "processor": processor(),
        "threads": 1,
        "load_average": os.getloadavg(),
        "versions": versions,
        "limits": limits,
        "prompt_tokens": PROMPT_TOKENS,
        "resident": resident,
        "offload": offload,
    }
    lines = [
        "# The engine",
        f"\n`{document['command']}`: {processor()}, 1 thread (OMP_NUM_THREADS=1), load average "
        f"{os.getloadavg()[1]:.1f}; {', '.join(f'{n} {v}' for n, v in versions.items())}. Measured in the run: memory "
        f"{limits['memory_bytes_per_s'] / 1e9:.1f} GB/s, disk {limits['disk_mib_per_s']:.0f} MiB/s. Medians of "
        f"{options.rounds} rounds; prompts of {PROMPT_TOKENS} tokens; × = how many times faster.",
        "\n## All experts in memory\n\nTokens per CPU second; `wall` by the clock on the wall. " + RESIDENT_NOTE + "\n",
        *resident_table(resident),
        "\n## Fewer experts in memory\n\nTokens per second on the wall, batch 1. " + OFFLOAD_NOTE + "\n",
        *offload_table(offload, limits),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
