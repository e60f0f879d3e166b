"""Kills a random rank of a torchrun batch at a random moment, runs the same command again, and looks at everything.

    python -m tests.launch.kill_ranks --runs 200 --log kills.jsonl --out bench/results/kills.md

Right means: the job ends by itself within the time limit, no traceback passes through this project's files, at most one
sentence tells of the loss and it names the rank that was killed, the output holds whole lines and none twice, and a
second run (of one process) completes it with the answers of an undisturbed run. A third of the
kills come while a job starts, the others after a random number of finished lines. Seeds that the log has are not run
again, and several processes may share one.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from moe.batch import run_batch
from moe.config import EngineConfig
from moe.llm import LLM

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "examples" / "tinymoe"
NUM_LINES = 24
TIME_LIMIT_S = 300.0  # many times what a job takes, on a machine that others use, too


class Case(NamedTuple):
    seed: int
    ranks: int
    dispatcher: str
    budget: str
    after_lines: int | None  # None: no line need be finished
    wait: float  # then, seconds; without lines, a share of an undisturbed run

    @property
    def moment(self) -> str:
        return (
            f"{self.wait:.0%} of a run" if self.after_lines is None else f"{self.after_lines} lines + {self.wait:.2f} s"
        )


class Seen(NamedTuple):
    case: Case
    victim: int  # -1: it had not started yet, or ended already
    lines_before: int
    seconds_to_end: float  # from the kill to the end of the job
    sentence: str  # the last that this project said about the loss
    faults: tuple[str, ...]


def case_of(seed: int) -> Case:
    draw = random.Random(seed)
    dispatcher = draw.choice(("all_to_all", "hierarchical", "coherent"))
    ranks = 4 if dispatcher == "hierarchical" else draw.choice((2, 3, 4))
    budget = draw.choice(("0.25", "0.5", "1.0"))
    if draw.random() < 1 / 3:
        return Case(seed, ranks, dispatcher, budget, None, draw.random())
    return Case(seed, ranks, dispatcher, budget, draw.randrange(NUM_LINES), 0.05 * draw.random())


def write_requests(path: Path, num_long: int = 0) -> None:
    """NUM_LINES of growing length, then some as long as the model's context."""
    with path.open("w") as file:
        for i in range(NUM_LINES + num_long):
            body = {"prompt": "Once upon a time " + "there was " * (i % 5)}
            body |= {"max_tokens": 4 + 4 * i if i < NUM_LINES else 900}
            body |= {"temperature": 0, "ignore_eos": True}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def start(case: Case, requests: Path, output: Path, monitor_s: float = 0.1) -> subprocess.Popen[str]:
    """A job in a session of its own, so that nothing outlives it unseen. monitor_s: how often torchrun looks at it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    command += ["--monitor-interval", str(monitor_s)]
    command += ["-m", "moe.launch.torchrun", str(DEMO), str(requests), str(output)]
    command += ["--experts-in-memory", case.budget, "--set", f"parallel.dispatcher={case.dispatcher}"]
    command += ["--set", "dtype=float32"]
    command += ["--set", "parallel.ranks_per_node=2"] if case.dispatcher == "hierarchical" else []
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(job.pid).children(recursive=True):
        try:
            if "moe.launch.torchrun" in child.cmdline():
                found.append((int(child.environ().get("RANK", -1)), child))
        except psutil.NoSuchProcess:
            continue
    return [process for rank, process in sorted(found, key=lambda one: one[0]) if rank >= 0]


def answers(output: Path) -> tuple[dict[str, str], list[str]]:
    """Texts by id, and what is wrong with the file."""
    texts: dict[str, str] = {}
    faults = []
    for number, line in enumerate(output.read_text().splitlines() if output.exists() else ()):
        try:
            row = json.loads(line)
        except ValueError:
            faults.append(f"line {number + 1} is not whole")
            continue
        if row["custom_id"] in texts:
            faults.append(f"{row['custom_id']} is there twice")
        texts[row["custom_id"]] = row["response"]["body"]["choices"][0]["text"]
    return texts, faults


def seconds_undisturbed(ranks: int, folder: Path) -> float:
    begin = time.monotonic()
    job = start(Case(-1, ranks, "all_to_all", "1.0", None, 1.0), folder / "in.jsonl", folder / f"whole_{ranks}.jsonl")
    said, _ = job.communicate(timeout=TIME_LIMIT_S)
    assert job.returncode == 0, said
    return time.monotonic() - begin


def right_answers(llm: LLM, folder: Path) -> dict[str, str]:
    run_batch(llm, folder / "in.jsonl", folder / "whole.jsonl")
    right, faults = answers(folder / "whole.jsonl")
    assert len(right) == NUM_LINES, faults
    return right


def wait_for_moment(case: Case, job: subprocess.Popen[str], output: Path, undisturbed_s: float) -> None:
    if case.after_lines is None:
        time.sleep(case.wait * undisturbed_s)
        return
    end = time.monotonic() + TIME_LIMIT_S
    while job.poll() is None and time.monotonic() < end:
        if output.exists() and output.read_bytes().count(b"\n") >= case.after_lines:
            break
        time.sleep(0.005)
    time.sleep(case.wait)


def end_without_torchrun(job: subprocess.Popen[str], ranks: list[psutil.Process]) -> bool:
    """Waits for the ranks, which torchrun must not be looking at, and ends it. False: they did not end in time."""
    end = time.monotonic() + TIME_LIMIT_S
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    job.terminate()
    return True


def one_kill(
    case: Case, folder: Path, llm: LLM, right: dict[str, str], undisturbed_s: float, *, heard: bool = False
) -> Seen:
    """heard: survivors end by themselves, so that what they say is always heard; torchrun may end them before."""
    output = folder / "out.jsonl"
    output.unlink(missing_ok=True)
    job = start(case, folder / "in.jsonl", output, TIME_LIMIT_S if heard else 0.1)
    wait_for_moment(case, job, output, undisturbed_s)
    ranks = ranks_of(job) if job.poll() is None else []
    victim = random.Random(case.seed + 1).randrange(case.ranks)
    if victim < len(ranks) and ranks[victim].is_running():
        ranks[victim].kill()
    else:
        victim = -1
    killed = time.monotonic()
    faults: list[str] = []
    try:
        limit_s = TIME_LIMIT_S if not heard or end_without_torchrun(job, ranks) else 0
        said, _ = job.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        faults.append(f"the job had not ended after {TIME_LIMIT_S:.0f} s")
        for process in psutil.Process(job.pid).children(recursive=True):
            process.kill()
        job.kill()
        said, _ = job.communicate()
    seconds = time.monotonic() - killed
    told = [line for line in said.splitlines() if "moe.launch.torchrun: " in line]
    faults += [f"{len(told)} sentences"] if len(told) > 1 else []
    faults += [told[-1]] if told and not any(w in told[-1] for w in (f"lost rank {victim} in", "did not come")) else []
    frames = [line for line in said.splitlines() if 'File "' in line and str(ROOT) in line and ".venv" not in line]
    faults += [f"a traceback through {frames[-1].strip()}"] if frames else []
    before, broken = answers(output)
    # A process may die in the middle of its last line: the next run removes it, so only whole lines count here.
    faults += [f for f in broken if "twice" in f]
    if len(before) < NUM_LINES:
        run_batch(llm, folder / "in.jsonl", output)
        after, broken = answers(output)
        faults += broken
        wrong = [name for name in right if after.get(name) != right[name]]
        faults += [f"after the second run {len(wrong)} answers are missing or different"] if wrong else []
    return Seen(case, victim, len(before), seconds, told[-1] if told else "", tuple(faults))


def table(seen: list[Seen]) -> str:
    rows = ["| seed | ranks | dispatcher | budget | moment | killed | lines before | s to the end | faults |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for s in seen:
        c = s.case
        victim = f"rank {s.victim}" if s.victim >= 0 else "none was there"
        faults = "; ".join(s.faults) or "none"
        rows.append(
            f"| {c.seed} | {c.ranks} | {c.dispatcher} | {c.budget} | {c.moment} | {victim} | {s.lines_before} "
            f"| {s.seconds_to_end:.1f} | {faults} |"
        )
    return "\n".join(rows) + "\n"


def summary(seen: list[Seen]) -> str:
    bad = sum(bool(s.faults) for s in seen)
    hit = [s for s in seen if s.victim >= 0]
    inside = sum(0 < s.lines_before < NUM_LINES for s in hit)
    ends = sorted(s.seconds_to_end for s in hit)
    return (
        f"{len(seen)} runs, {bad} with a fault. In {len(hit)} a rank was killed, in {inside} of them between the first "
        f"and the last of {NUM_LINES} lines; the job then ended by itself after {ends[len(ends) // 2]:.1f} s (median), "
        f"at most {ends[-1]:.1f} s."
    )


def read_log(log: Path) -> list[Seen]:
    """The newest of each seed, in order."""
    found = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        case, victim, lines, seconds, sentence, faults = json.loads(line)
        found[case[0]] = Seen(Case(*case), victim, lines, seconds, sentence, tuple(faults))
    return [found[seed] for seed in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--log", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--out", type=Path, help="table of all that the log has")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, LLM(DEMO, EngineConfig(dtype="float32")) as llm:
        folder = Path(name)
        write_requests(folder / "in.jsonl")
        right = right_answers(llm, folder)
        undisturbed_s: dict[int, float] = {}
        for seed in range(args.first_seed, args.first_seed + args.runs):
            if any(s.case.seed == seed for s in read_log(args.log)):
                continue
            case = case_of(seed)
            if case.after_lines is None and case.ranks not in undisturbed_s:
                undisturbed_s[case.ranks] = seconds_undisturbed(case.ranks, folder)
            seen = one_kill(case, folder, llm, right, undisturbed_s.get(case.ranks, 0.0))
            print(seen, flush=True)
            with args.log.open("a") as file:
                file.write(json.dumps(seen) + "\n")
    if args.out:
        seen_all = read_log(args.log)
        head = "# A random rank killed at a random moment\n\nCommand: `python -m tests.launch.kill_ranks`\n\n"
        args.out.write_text(f"{head}{summary(seen_all)}\n\n{table(seen_all)}")


if __name__ == "__main__":
    main()
