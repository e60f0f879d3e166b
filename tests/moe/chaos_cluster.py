"""Chaos: a batch file on a cluster whose hosts are killed and stopped at random; every line is compared.

A seed draws one fault and the token at which it comes; 200 lines, half of them sampled, are served through it, and the
file is compared with one process's: no line lost, doubled or different. As a program it runs many seeds and goes on
where it was ended:

    python -m tests.moe.chaos_cluster --seeds 30 seen.jsonl [--table bench/results/chaos.md]
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "tinymoe"
NUM_LINES, NUM_HOSTS = 200, 3
SETTINGS = [
    "dtype=float32", "threads=1", "offload.budget=0.25", "batch.kv_tokens=4096", "batch.max_sequences=4",
    "cluster.cpus_per_host=0.5", "cluster.gpus_per_host=0", "cluster.spares=1", "cluster.silence_s=3",
    "cluster.max_losses=10000",
]  # fmt: skip
FAULTS = (
    "kill rank 0", "kill the only holder", "kill two at once", "kill a spare", "kill, kill again in recovery",
    "stop", "stop and kill in recovery", "stop, resumed after it was given up", "kill all", "kill one, stop one",
)  # fmt: skip


def write_lines(path: Path, count: int = NUM_LINES) -> int:
    """Prompts of 3 to 39 tokens, answers of 12 to 36; the same for every seed. Returns the tokens of all answers."""
    rng, total = random.Random(0), 0
    with path.open("w") as file:
        for number in range(count):
            prompt = [rng.randrange(1, 2048) for _ in range(rng.randrange(3, 40))]
            tokens = rng.randrange(12, 37)
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.7 * (number % 2), "seed": number}
            body |= {"ignore_eos": True, "logprobs": 0}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
            total += tokens
    return total


def answers(path: Path) -> dict[str, tuple[str, list[str], str]]:
    """custom_id -> text, tokens and end of each line. Raises AssertionError for one that is doubled or failed."""
    found: dict[str, tuple[str, list[str], str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert row["error"] is None, row
        assert row["custom_id"] not in found, f"{row['custom_id']} is there twice"
        (choice,) = row["response"]["body"]["choices"]
        found[row["custom_id"]] = choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]
    return found


@dataclass(slots=True)
class Seen:
    """What became of one seed, in seconds. gap: the longest between tokens of one request."""

    seed: int
    dispatcher: str
    fault: str
    at: int  # the token at which it struck
    wrong: int = 0
    missing: int = 0
    seconds: float = 0.0
    detection: float | None = None
    settle: float | None = None
    gap: float = 0.0
    replayed: int = 0
    blamed: int = 0  # hosts that were given up though nothing was done to them
    notes: list[Any] = field(default_factory=list)


class Watch:
    """Called between steps: strikes once when `at` tokens have come, and measures gaps."""

    def __init__(self, llm: Any, at: int, strike: Callable[[], None]) -> None:
        self.llm, self.at, self.strike = llm, at, strike
        self.struck: float | None = None
        self.gap = 0.0
        self._last: dict[int, tuple[int, float]] = {}
        self._before = llm.engine.stats.decode_tokens

    def __call__(self, _: object) -> None:
        now = time.monotonic()
        for number, one in self.llm._open.items():
            said = len(one.token_ids)
            known, since = self._last.get(number, (0, now))
            if said != known or known == 0:
                self.gap = max(self.gap, now - since if known else 0.0)
                self._last[number] = said, now
        if self.struck is None and self.llm.engine.stats.decode_tokens - self._before >= self.at:
            self.struck = time.time()
            self.strike()


class Chaos:
    """The faults of one seed on an engine of hosts."""

    def __init__(self, engine: Any, fault: str, rng: random.Random) -> None:
        self.engine, self.fault, self.rng = engine, fault, rng
        self.timers: list[threading.Timer] = []
        self.withheld: list[int] = []
        self.struck: set[int] = set()  # numbers of hosts

    def pid(self, host: Any) -> int:
        return int(host.info.pid)

    def strike(self) -> None:
        crew, rng = self.engine.crew, self.rng
        hosts = list(crew.alive)
        victim, other = rng.sample(hosts, 2) if len(hosts) > 1 else (hosts[0], hosts[0])
        match self.fault:
            case "kill rank 0":
                self.send(hosts[0], signal.SIGKILL)
            case "kill the only holder":
                alone = crew.plan.replicas == 1
                holders = [h for rank, h in enumerate(hosts) if (crew.plan.hosted[:, :, rank] & alone).any()]
                self.send(rng.choice(holders), signal.SIGKILL)
            case "kill two at once":
                for one in (victim, other):
                    self.send(one, signal.SIGKILL)
            case "kill a spare":
                for one in crew.spare[:1]:
                    self.send(one, signal.SIGKILL)
            case "kill, kill again in recovery":
                self.send(victim, signal.SIGKILL)
                self.later(rng.uniform(0.0, 0.6), other)
            case "stop":
                self.send(victim, signal.SIGSTOP)
            case "stop and kill in recovery":
                self.send(victim, signal.SIGSTOP)
                self.later(rng.uniform(2.8, 4.0), other)
            case "stop, resumed after it was given up":
                self.stop_and_resume(victim)
            case "kill all":
                for one in hosts:
                    self.send(one, signal.SIGKILL)
            case "kill one, stop one":
                self.send(victim, signal.SIGKILL)
                self.send(other, signal.SIGSTOP)
            case _:
                raise AssertionError(self.fault)

    def send(self, host: Any, number: int) -> None:
        self.struck.add(host.number)
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile: an earlier fault's doing
            os.kill(self.pid(host), number)

    def later(self, seconds: float, host: Any) -> None:
        timer = threading.Timer(seconds, self.send, (host, signal.SIGKILL))
        timer.start()
        self.timers.append(timer)

    def stop_and_resume(self, host: Any) -> None:
        """As behind a partition: the kill does not reach it, and it runs again when others serve in its place."""
        fleet, crew = self.engine.crew.fleet, self.engine.crew
        kill, generation = fleet.kill, crew.generation

        def withhold(one: Any) -> None:
            if one is not host:
                kill(one)

        def resume() -> None:
            while crew.generation == generation and time.monotonic() < limit:
                time.sleep(0.02)
            self.send(host, signal.SIGCONT)

        limit = time.monotonic() + PATIENCE_S
        fleet.kill = withhold
        self.withheld = [self.pid(host)]
        self.kill_at_last = lambda: (setattr(fleet, "kill", kill), kill(host))
        self.send(host, signal.SIGSTOP)
        timer = threading.Timer(0.0, resume)
        timer.start()
        self.timers.append(timer)

    def finish(self) -> None:
        for timer in self.timers:
            timer.join()
        if self.withheld:
            assert self.withheld[0] not in [h.info.pid for h in self.engine.crew.alive], "it is not fenced"
            self.kill_at_last()


def until_whole(engine: Any, limit_s: float) -> None:
    """Waits until as many hosts serve as shall, and a spare waits."""
    crew, deadline = engine.crew, time.monotonic() + limit_s
    while len(crew.alive) != crew.target or not crew.spare:
        engine.step()
        assert time.monotonic() < deadline, crew.noted[-12:]


@contextlib.contextmanager
def told_after_every_step(llm: Any) -> Iterator[None]:
    """As if somebody read the tokens of a batch one by one: a fault strikes at the token that it is to strike at."""
    llm.add = lambda *args, is_awaited, **more: type(llm).add(llm, *args, **more)
    try:
        yield
    finally:
        del llm.add


def one_seed(llm: Any, seed: int, folder: Path, right: dict[str, Any], total: int) -> Seen:
    """Serves folder/in.jsonl, whose answers have `total` tokens, through the fault of the seed."""
    from moe.batch import run_batch

    rng, crew = random.Random(seed), llm.engine.crew
    fault = FAULTS[seed % len(FAULTS)]
    seen = Seen(seed, crew.config.parallel.dispatcher, fault, int(total * rng.uniform(0.05, 0.7)))
    until_whole(llm.engine, 400)
    noted, replayed = len(crew.noted), crew.counts.replayed_requests
    chaos = Chaos(llm.engine, fault, rng)
    watch = Watch(llm, seen.at, chaos.strike)
    target = folder / f"seed-{seed}.jsonl"
    target.unlink(missing_ok=True)
    started = time.monotonic()
    with told_after_every_step(llm):
        run_batch(llm, folder / "in.jsonl", target, watch)
    seen.seconds = time.monotonic() - started
    assert watch.struck is not None, "the fault never came"
    chaos.finish()
    found = answers(target)
    seen.missing = len(right) - len(found)
    seen.wrong = sum(found[name] != right[name] for name in found)
    seen.gap, seen.replayed = watch.gap, crew.counts.replayed_requests - replayed
    after = [n for n in crew.noted[noted:] if n.at >= watch.struck]
    seen.notes = [[n.at - watch.struck, n.what, list(n.hosts), n.generation, n.seconds] for n in after]
    seen.blamed = len({host for n in after if n.what == "lost" for host in n.hosts} - chaos.struck)
    serves = [n for n in after if n.what == "serves"]
    if serves:
        seen.settle = serves[0].seconds["settle"]
        seen.detection = serves[0].at - seen.settle - watch.struck
    return seen


def first_steps(rows: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    """(run, generation) -> seconds to form its groups and to its first step, the slowest host's, as they say it when
    they leave; the run of a row is the seed at which its cluster was started."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for row in rows:
        for _, _, _, generation, seconds in row["notes"]:
            if "first step" in seconds:
                form, step = seconds["meet"] + seconds["join"], seconds["first step"]
                known = found.get((row["run"], generation), (0.0, 0.0))
                found[row["run"], generation] = max(known[0], form), max(known[1], step)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    steps = first_steps(rows)
    lines = [
        "| seed | dispatcher | fault | at token | wrong | missing | blamed | detection | settle | form | first step |"
        " longest gap | replays |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda one: one["seed"]):
        served = [n for n in row["notes"] if n[1] == "serves"]
        form, step = steps.get((row["run"], served[0][3]), (None, None)) if served else (None, None)
        cells = [row["seed"], row["dispatcher"], row["fault"], row["at"], row["wrong"], row["missing"], row["blamed"]]
        cells += [shown(v) for v in (row["detection"], row["settle"], form, step, row["gap"])]
        lines.append("| " + " | ".join(map(str, [*cells, row["replayed"]])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seen", type=Path, help="a line per seed; seeds that are there are not run again")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--only", type=int, nargs="+", help="these seeds, instead of the first --seeds")
    parser.add_argument("--table", action="store_true", help="print the table of what was seen, and end")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.seen.read_text().splitlines()] if args.seen.exists() else []
    if args.table:
        print(table(rows), end="")
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray starts actors at 15: whatever else runs would come first
    import ray

    from moe.batch import run_batch
    from moe.config import EngineConfig
    from moe.llm import LLM

    session = f"/tmp/moe-{secrets.token_hex(3)}"  # a path of sockets must be short
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_lines(folder / "in.jsonl")
        with LLM(DEMO, EngineConfig.load(None, SETTINGS)) as llm:
            run_batch(llm, folder / "in.jsonl", folder / "right.jsonl")
        right = answers(folder / "right.jsonl")
        assert len(right) == NUM_LINES
        ray.init(num_cpus=8, include_dashboard=False, _temp_dir=session, object_store_memory=100 << 20)
        try:
            for dispatcher in ("all_to_all", "coherent"):
                done = {row["seed"] for row in rows}
                todo = [
                    s
                    for s in args.only or range(args.seeds)
                    if s not in done and (s % 20 >= 10) == (dispatcher == "coherent")
                ]
                if not todo:
                    continue
                config = EngineConfig.load(None, [*SETTINGS, f"parallel.dispatcher={dispatcher}"])
                with LLM(DEMO, config, hosts=NUM_HOSTS) as llm:
                    for seed in todo:
                        seen = one_seed(llm, seed, folder, right, total)
                        rows.append(asdict(seen) | {"run": todo[0], "at_time": time.time()})
                        with args.seen.open("a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
                        print(f"seed {seed}: {seen.fault}, wrong {seen.wrong}, {seen.seconds:.0f} s", flush=True)
        finally:
            ray.shutdown()
            shutil.rmtree(session, ignore_errors=True)


if __name__ == "__main__":
    main()
