"""How fast a running job is balanced again after its traffic changes: recorded domains one after another on 8 ranks.

DeepSeek-V2-Lite's recorded routing goes, step by step, through the loop of a running job (placement/loop.py); only the
model is left out. A domain's tokens are one tape cut into as many streams as there are sequences at once, so that
sequences are at different places. The first plan is solved on the first domain. The solver's answer is held back for
the steps that its CPU time takes at --step-ms each, and ranks tell as moe/engine/online.py lets them: two steps after
rank 0 has asked, which it does as seldom as its share of the steps' time buys. Baseline: the first plan for ever.

Load: busiest rank's pairs over the mean, mean over layers, of all tokens of the domain from --within after the change
on, under the plan that is in force there. What limits: few tokens say little of 64 experts, moved experts cost bytes.

    python bench/bench_drift.py /path/to/traces [--replicas 0.125] [--places 4]
"""

import argparse
import json
import logging
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.loop import OnlineLoop
from moe.placement.loop_options import LoopOptions
from moe.placement.migrate import Migration
from moe.placement.plan import Plan
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.turn import Machine, Question, Turn, Verdict, Window, answer
from moe.placement.wire_format import WireFormat

RANKS = 8
DOMAINS = "intent,translation,summary,intent"


class SolverLater:
    """Answers after as many polls (steps) as its CPU time takes."""

    def __init__(self, step_seconds: float) -> None:
        self.step_seconds, self.left = step_seconds, 0
        self.found: Verdict | Turn | None = None
        self.spent = 0.0  # CPU seconds that are another process's

    def ask(self, question: Question) -> None:
        began = time.thread_time()
        self.found = answer(question)
        took = time.thread_time() - began
        self.spent += took
        self.left = int(np.ceil(took / self.step_seconds))

    def poll(self) -> Verdict | Turn | None:
        self.left -= 1
        if self.left > 0:
            return None
        found, self.found = self.found, None
        return found

    def close(self) -> None:
        pass


class Asking:
    """When what was routed is heard. share: as `placement.share`, of steps of `step_seconds`."""

    def __init__(self, loop: OnlineLoop, solver: SolverLater) -> None:
        self.loop, self.solver, self.bought = loop, solver, loop.options.share * solver.step_seconds
        self.owed, self.is_asked = 0.0, False
        self.routed, self.told = list[Window](), list[Window]()  # since the latest were told; told, not heard yet

    def step(self, coming: Window) -> Migration | None:
        """Between the agreement on a step, which brings what was told and asked for in the one before, and the step,
        whose tokens come."""
        self.owed = max(0.0, self.owed - self.bought)
        began = time.thread_time() - self.solver.spent
        heard, self.told = self.told, []
        for rank in range(RANKS) if heard else ():
            part = Window.joined(heard)
            ids = part.ids[part.home == rank]
            self.loop.observe(ids, rank, len(ids), 0)
        migration = self.loop.step()
        if heard:
            self.owed += time.thread_time() - self.solver.spent - began
        if self.is_asked:
            self.told, self.routed = self.routed, []
        self.routed.append(coming)
        enough = sum(len(part.ids) for part in self.routed) >= self.loop.wanted
        self.is_asked = enough and (not self.owed or self.loop.is_waiting)
        return migration


def stream(trace: RoutingTrace, batch: int, begin: float = 0.0) -> Window:
    """The trace's tokens as `batch` sequences at once decode them, each at its own place, from a share of its length
    on and then from its beginning; homes in turn."""
    steps = trace.num_tokens // batch
    step = (np.arange(steps) + int(steps * begin)) % steps
    order = (step[:, None] + steps * np.arange(batch)).ravel()
    return Window(trace.expert_ids[order], np.arange(len(order)) % RANKS)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each domain, from each place at which streams begin."""
    traces = {n: from_deepseek_esft_npz(args.traces / f"deepseek_v2_lite_{n}.npz") for n in set(args.domains)}
    first = traces[args.domains[0]]
    slots = int(first.num_experts * (1 + args.replicas)) // RANKS if args.replicas else None
    options = CopyOptions(seconds=args.seconds, rounds=args.rounds)
    start = solve_copies(first, RANKS, slots_per_rank=slots, options=options)
    return [row for place in range(args.places) for row in of_place(args, traces, start, place)]


def of_place(
    args: argparse.Namespace, traces: dict[str, RoutingTrace], start: Plan, place: int
) -> list[dict[str, Any]]:
    first = traces[args.domains[0]]
    sizes = first.sizes
    assert sizes is not None
    machine = Machine(sizes=sizes, wire=WireFormat(), topology=Topology.preset("h200x8"))
    options = LoopOptions(window=args.window, bytes_per_step=args.bytes_per_step)
    rates = machine.rates(first.top_k)
    solver = SolverLater(args.step_ms / 1e3)
    loop = OnlineLoop(start, machine, options, solver)
    rows, present, coming, asking = [], start, list[Plan](), Asking(loop, solver)
    for number, domain in enumerate(args.domains):
        window = stream(traces[domain], args.batch, place / args.places)
        turns, moved, most_bytes, last = len(loop.history), 0, 0, 0
        begins: list[tuple[int, Plan]] = [(0, present)]
        began = time.perf_counter()
        for at in range(0, len(window.ids), args.batch):
            if coming:
                state = coming.pop(0)
                came = int((state.hosted & ~present.hosted).sum())
                moved, most_bytes, present, last = moved + came, max(most_bytes, came * sizes.expert_bytes), state, at
                begins.append((at, state))
            migration = asking.step(window.part(slice(at, at + args.batch)))
            coming += [] if migration is None else list(migration.states())
        early = [plan for at, plan in begins if at <= args.within][-1]
        later = window.part(slice(args.within, None))
        taken = loop.history[turns:]
        rows.append(
            {
                "place": place,
                "change": domain if not number else f"{args.domains[number - 1]} -> {domain}",
                "never": later.imbalance(start, rates),
                "before": later.imbalance(begins[0][1], rates),
                "loop": later.imbalance(early, rates),
                "settled": later.imbalance(present, rates),
                "turns": len(taken),
                "last_token": last,
                "moved": moved / start.hosted.sum(),
                "most_bytes_per_step": most_bytes,
                "solve_s": [round(turn.seconds, 3) for turn, _, _ in taken],
                "predicted": [[turn.before.imbalance, turn.after.imbalance] for turn, _, _ in taken],
                "measured": [[before.imbalance, after and after.imbalance] for _, before, after in taken],
                "wall_s": round(time.perf_counter() - began, 1),
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    told = " ".join(
        f"{p[0]:.2f} -> {p[1]:.2f} / {m[0]:.2f} -> {'?' if m[1] is None else format(m[1], '.2f')}"
        for p, m in zip(row["predicted"], row["measured"], strict=True)
    )
    cells = [
        row["place"], row["change"], f"{row['never']:.3f}", f"{row['before']:.3f}", f"**{row['loop']:.3f}**",
        f"{row['settled']:.3f}", row["turns"],
        row["last_token"], f"{row['moved']:.1%}", f"{row['most_bytes_per_step'] / 2**20:.0f}",
        ", ".join(map(str, row["solve_s"])), told,
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="folder with deepseek_v2_lite_*.npz")
    parser.add_argument("--domains", type=lambda text: text.split(","), default=DOMAINS.split(","))
    parser.add_argument("--replicas", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=32, help="sequences at once, on all ranks")
    parser.add_argument("--bytes-per-step", type=int, default=1 << 30)
    parser.add_argument("--window", type=int, default=LoopOptions().window, help="tokens, as placement.window")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of a step, to tell how many a solve takes")
    parser.add_argument("--places", type=int, default=1, help="at which streams begin, evenly spread over a domain")
    parser.add_argument("--rounds", type=int, default=12, help="of the first plan")
    parser.add_argument("--within", type=int, default=1000, help="tokens after a change until the load is judged")
    parser.add_argument("--seconds", type=float, default=600.0, help="limit on the first plan")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    command = " ".join(Path(word).name if index == 0 or "/" in word else word for index, word in enumerate(sys.argv))
    print(f"`{command}` on {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}\n")
    print(
        "| place | traffic | load, first plan for ever | load, plan before | load, loop | at its end | turns "
        "| last state at token | moved | MiB of the fullest step | solver, CPU s | predicted / measured load |\n|"
        + "---|"
        * 12
    )
    rows = run(args)
    loads = [row["loop"] for number, row in enumerate(rows) if number % len(args.domains)]
    late = sum(row["last_token"] > args.within for row in rows)
    print(
        f"\nAfter {len(loads)} changes: {np.mean(loads):.3f} in the mean, {max(loads):.3f} at most; "
        f"{late} ended after token {args.within}."
    )
    print("\n" + json.dumps({"bench": "drift", "replicas": args.replicas, "rows": rows}))


if __name__ == "__main__":
    main()
