"""From the command to its answer: imports, `moe info`, and the first token of a model that is not in memory yet.

    python -m bench.bench_start [--before FOLDER]                   imports and commands, all files in the page cache
    python -m bench.bench_start --peers --work .peers --rounds 5    first token beside llama.cpp by mmap, model cold

Binds: the processor, which runs what torch and transformers do when they are imported; beside peers also the disk. With
--peers every start has a process and a memory limit of its own, which counts the page cache, and the model's files are
not in it; the model is bench/walk_model.py's, whose right token is known. --before: another checkout, in turns.
--touch: so much memory is touched before each start. A virtual machine's host takes back what was not used for seconds,
and gives it again page by page: 1 to 2 s per GB here, for memory that is not the page cache's.
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
from collections.abc import Sequence
from pathlib import Path

from bench.compare import BASE_BYTES, ENVIRONMENT, Candidate, Worker, offload_candidates, processor
from bench.compare import _with_files as with_files
from bench.containers import container, read_ahead, why_no_limits
from bench.walk_model import LARGE, answers_to, prompts_of, write

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "examples" / "tinymoe")
SAMPLED = ("--max-tokens", "1", "--temperature", "0")
STARTS: dict[str, Sequence[str]] = {
    "from moe import LLM": ("-c", "from moe import LLM"),
    "moe info": ("-m", "moe", "info", MODEL),
    "moe generate, one token": ("-m", "moe", "generate", MODEL, "--prompt", "Once", *SAMPLED),
}
TOUCH = """
import mmap, sys
pages = mmap.mmap(-1, int(sys.argv[1]) or 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages.madvise(mmap.MADV_HUGEPAGE)  # as slots
pages[::4096] = bytes(len(pages) // 4096)
"""
PEERS = ("ours default", "llama.cpp f16")


def seconds_of(folder: Path, words: Sequence[str], home: Path) -> tuple[float, float]:
    """By the clock and of the processor, until the process has ended. folder: the checkout that it imports."""
    begin, before = time.perf_counter(), os.times()
    environment = {**ENVIRONMENT, "HOME": str(home)}
    subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True, env=environment)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, used


def measure_starts(folders: dict[str, Path], rounds: int) -> str:
    seconds: dict[str, dict[str, list[tuple[float, float]]]] = {what: {n: [] for n in folders} for what in STARTS}
    for number in range(-1, rounds):
        for name, folder in folders.items():
            with tempfile.TemporaryDirectory() as home:  # where nothing is kept of any model
                for what, words in STARTS.items():
                    taken = seconds_of(folder, words, Path(home))
                    if number >= 0:  # the first fills the page cache
                        seconds[what][name].append(taken)
    text = ["| command | checkout | s until it has ended | CPU s |", "|---|---|---|---|"]
    text += [
        f"| {what} | {name} | {spread([wall for wall, _ in taken])} | {spread([used for _, used in taken])} |"
        for what, by_name in seconds.items()
        for name, taken in by_name.items()
    ]
    return "\n".join([*text, "", json.dumps(seconds)])


def measure_peers(work: Path, share: float, lengths: Sequence[int], rounds: int, touched: int) -> str:
    """Raises RuntimeError for a wrong token."""
    folder = write(work / f"walk-{LARGE.experts}x{LARGE.hidden}-large", LARGE)
    limit = BASE_BYTES + int(share * LARGE.expert_bytes)
    candidates = [with_files(work, one) for one in offload_candidates(work, folder, share) if one.name in PEERS]
    seconds: dict[int, dict[str, list[tuple[float, float]]]] = {n: {c.name: [] for c in candidates} for n in lengths}
    with read_ahead(128):
        for number in range(rounds):
            for length in lengths:
                for one in candidates[number % len(candidates) :] + candidates[: number % len(candidates)]:
                    prompts = prompts_of(folder, 1, length, number)
                    right = answers_to(folder, prompts, 1)
                    subprocess.run([sys.executable, "-c", TOUCH, str(touched)], check=True)
                    seconds[length][one.name].append(first_token(one, work, limit, prompts, right))
    text = [
        "| prompt | engine | to the first token, s | ours ÷ it | of them until it can be asked |",
        "|---|---|---|---|---|",
    ]
    for length, by_name in seconds.items():
        for name, taken in by_name.items():
            ratios = [a / b for (a, _), (b, _) in zip(by_name["ours default"], taken)]
            text.append(
                f"| {length} tokens | {name} | {spread([a for a, _ in taken])} | {spread(ratios)} "
                f"| {spread([b for _, b in taken])} |"
            )
    title = f"{share:.0%} of {LARGE.expert_bytes / 1e9:.2f} GB of experts, limit {limit >> 20} MiB, cold"
    title += f", {touched >> 30} GiB of memory touched before each\n" if touched else ", memory as the host gives it\n"
    return "\n".join([title, *text, "", json.dumps(seconds)])


def forget(model: Path) -> None:
    """Takes a file, or a folder's files, out of the page cache. What the engines' programs are made of stays in it."""
    os.sync()
    for path in model.iterdir() if model.is_dir() else [model]:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def first_token(
    candidate: Candidate, work: Path, limit: int, prompts: Sequence[Sequence[int]], right: list[list[int]]
) -> tuple[float, float]:
    """Seconds from the process's start to its first token, and to where it has loaded."""
    with container("start") as inside:
        inside.limit(limit)
        forget(Path(candidate.options.get("file", candidate.options["folder"])))
        begin = time.perf_counter()
        worker = Worker(candidate, 1, work, inside)
        try:
            loaded = time.perf_counter() - begin
            answer = worker.run(prompts, 1)
            taken = time.perf_counter() - begin
        finally:
            worker.close()
    if answer["tokens"] != right:
        raise RuntimeError(f"{candidate.name} gave {answer['tokens']}, right is {right}")
    return taken, loaded


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--peers", action="store_true", help="the first token beside llama.cpp, in place of the rest")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that the limit leaves room for")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 64], help="tokens of the prompt")
    parser.add_argument("--touch", type=int, default=0, metavar="GiB", help="of memory, before each start beside peers")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="as bench.compare's")
    args = parser.parse_args()
    print(f"`python -m bench.bench_start {' '.join(sys.argv[1:])}`\n")
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}\n", flush=True)
    if not args.peers:
        before = {} if args.before is None else {"before": args.before.resolve()}
        print(measure_starts({**before, "now": ROOT}, args.rounds))
    elif (reason := why_no_limits()) is not None:
        print(f"cannot run: {reason}")
    else:
        print(measure_peers(args.work.resolve(), args.share, args.lengths, args.rounds, args.touch << 30))


if __name__ == "__main__":
    main()
