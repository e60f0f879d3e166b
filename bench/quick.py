"""What this tree costs, in under three minutes, beside what the last committed one did: `make bench-quick`.

    python -m bench.quick --work .quick [--commit]

A small random model that walks a known permutation: wrong tokens are a failure, not a row. A step's milliseconds are
CPU milliseconds of the stepping thread and its waits for reads. Each round also times a read of memory; a figure has
moved only if it did by more than a tenth, in itself and measured in that read, and no round of one run lies among those
of the other. Growth over sequences, context and prompt is drawn with the planner's curve beside it. Binds: memory speed
(decoding), the kernels' arithmetic (prompts), the disk (a quarter of the experts in slots). --commit writes results.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.compare import packed_of
from bench.curves import Curve, picture
from bench.walk_model import WalkModel, answers_to, prompts_of, write
from moe.config import EngineConfig
from moe.engine.known import this_machine
from moe.launch.measure import dense_rates, expert_rates
from moe.launch.measure_step import measure_attention, measure_overhead
from moe.launch.plan_inputs import sizes_of
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.offload.stores import aligned_bytes
from moe.params import SamplingParams
from moe.placement.cost import Sizes, Use, Visits, decode_step, prefill_step
from moe.placement.machine import Machine

MODEL = WalkModel(layers=4, experts=32, hidden=512, width=512, vocab=1024)
RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS, NEW = 5, 16
SEQUENCES, CONTEXTS, PROMPTS = (1, 2, 4, 8, 16, 32), (64, 256, 1024, 3072), (64, 256, 1024, 3072)
REFERENCE, DISTURBED = "reading 256 MiB, ms", "the clock beside CPU time while reading"
LEAST = 1.1  # times: less is not worth a name
SETTINGS = ["threads=1", "batch.prefix_sharing=false", "batch.max_sequences=32", "batch.kv_tokens=8192"]
SLAB_BYTES = 256 << 20

Rounds = dict[str, list[float]]


class Timed:
    """Milliseconds of one run: the median decoding step, and its prompts. is_right: the tokens are the walk's."""

    def __init__(self, llm: LLM, folder: Path, sequences: int, length: int, seed: int) -> None:
        given = prompts_of(folder, sequences, length, seed)
        params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.0)
        running = [llm.add(p, params).request for p in given]
        steps: dict[bool, list[float]] = {True: [], False: []}
        read = self._read(llm)
        while llm.engine.has_work:
            decodes = all(r.num_output for r in running)
            start = self._now(llm)
            llm.step()
            steps[decodes].append(1e3 * (self._now(llm) - start))
        self.decode, self.prompt = statistics.median(steps[True]), sum(steps[False])
        self.read_mb = (self._read(llm) - read) / 1e6 / max(1, len(steps[True]))
        self.is_right = [r.tokens[length:] for r in running] == answers_to(folder, given, NEW)

    @staticmethod
    def _now(llm: LLM) -> float:
        return time.thread_time() + sum(s.stall_seconds for s in llm.engine.layer_stats())

    @staticmethod
    def _read(llm: LLM) -> float:
        return float(sum(s.bytes_read for s in llm.engine.layer_stats()))


def reference(slab: torch.Tensor) -> tuple[float, float]:
    """CPU milliseconds of reading the slab once, how fast this machine is just now; and the clock's beside them."""
    numbers, vector = slab.view(torch.float32).view(-1, 8192), torch.ones(8192)
    start, cpu = time.perf_counter(), time.thread_time()
    for _ in range(4):
        numbers @ vector
    spent = time.thread_time() - cpu
    return 1e3 * spent / 4, (time.perf_counter() - start) / spent


def measure(work: Path) -> tuple[Rounds, dict[str, list[list[float]]]]:
    """Figures by name, a number a round, and points [x, ms] of every curve. Raises ValueError for wrong tokens."""
    folder = write(work / "walk", MODEL)
    found: Rounds = {}
    curves: dict[str, list[list[float]]] = {}
    slab = aligned_bytes(SLAB_BYTES).fill_(1)

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def timed(llm: LLM, sequences: int, length: int, seed: int) -> Timed:
        one = Timed(llm, folder, sequences, length, seed)
        if not one.is_right:
            raise ValueError(f"{sequences} sequences of {length} tokens were answered otherwise than the model walks")
        return one

    with LLM(folder, EngineConfig.load(None, SETTINGS), experts_in_memory=1.0) as llm:
        timed(llm, 8, 64, 0)
        for number in range(ROUNDS):
            milliseconds, disturbed = reference(slab)
            add(REFERENCE, milliseconds)
            add(DISTURBED, disturbed)
            for sequences in (1, 8):
                add(f"decode, {sequences} sequence(s), ms a step", timed(llm, sequences, 64, number).decode)
            add("prompt of 512, ms", timed(llm, 1, 512, number).prompt)
        for name, cases in {
            "sequences": [(n, n, 64) for n in SEQUENCES],
            "context": [(n, 1, n) for n in CONTEXTS],
        }.items():
            steps = {x: [timed(llm, s, length, seed) for seed in range(3)] for x, s, length in cases}
            curves[name] = [[x, min(one.decode for one in runs)] for x, runs in steps.items()]
            if name == "context":
                curves["prompt"] = [[x, min(one.prompt for one in runs)] for x, runs in steps.items()]
    budget = [*SETTINGS, "offload.budget=0.25", "offload.direct=true", "offload.prefetch=off"]
    with LLM(packed_of(folder), EngineConfig.load(None, budget)) as llm:
        timed(llm, 8, 64, 0)
        for number in range(ROUNDS):
            for sequences in (1, 8):
                one = timed(llm, sequences, 64, number)
                add(f"a quarter in slots, {sequences} sequence(s), ms a step", one.decode)
                add(f"a quarter in slots, {sequences} sequence(s), MB read a step", one.read_mb)
    return found, curves


def theory(work: Path) -> dict[str, list[list[float]]]:
    """The planner's milliseconds at the same points, all experts in slots, from figures measured now."""
    torch.set_num_threads(1)
    slab = aligned_bytes(SLAB_BYTES).fill_(0x3C)
    rates = (*expert_rates(slab, 1), *dense_rates(slab, 1))
    machine = Machine(
        name=this_machine(),
        when="now",
        cores=1,
        memory={1: 1.0},
        rates=rates,
        attention=measure_attention(),
        overhead=measure_overhead(slab),
        copy_bytes_per_s=1.0,
    )
    sizes = sizes_of(read_blueprint(work / "walk"))
    return {
        "sequences": [[n, _step_ms(sizes, machine, n, 64 + NEW // 2)] for n in SEQUENCES],
        "context": [[n, _step_ms(sizes, machine, 1, n + NEW // 2)] for n in CONTEXTS],
        "prompt": [[n, 1e3 * prefill_step(sizes, machine, _use(sizes, 1, 1), n).total] for n in PROMPTS],
    }


def _use(sizes: Sizes, sequences: int, context: int) -> Use:
    return Use(sequences=sequences, context=context, slots=sizes.num_layers * sizes.num_experts)


def _step_ms(sizes: Sizes, machine: Machine, sequences: int, context: int) -> float:
    one = np.ones((1, 1))
    distinct = one * sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** sequences)
    visits = Visits(distinct, 0 * one, one * sequences * sizes.top_k, 0 * one)
    return 1e3 * decode_step(sizes, machine, _use(sizes, sequences, context), visits).total


def moved(old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]]) -> list[str]:
    """A sentence for every figure that changed beyond noise, and for those that one run lacks."""
    said = [f"{name}: no figure {'now' if name in old else 'before'}" for name in sorted(old.keys() ^ new.keys())]
    for name in [n for n in old if n in new and n not in (REFERENCE, DISTURBED)]:
        times = statistics.median(new[name]) / max(1e-9, statistics.median(old[name]))
        speed = statistics.median(new[REFERENCE]) / statistics.median(old[REFERENCE])
        apart = min(new[name]) > max(old[name]) or max(new[name]) < min(old[name])
        by_reference = times / speed if name.endswith(("ms", "ms a step")) else times
        both_up, both_down = min(times, by_reference) > LEAST, max(times, by_reference) < 1 / LEAST
        if apart and (both_up or both_down):
            said.append(f"{name}: {times:.2f} times what it was ({by_reference:.2f} beside a read of memory)")
    return said


def table(body: Mapping[str, Any]) -> str:
    lines = [
        "# The quick bench",
        "",
        f"`make bench-quick`, {body['seconds']:.0f} s on {body['machine']}; medians of rounds (least to most).",
        "",
        "| figure | |",
        "|---|---|",
    ]
    for name, rounds in body["figures"].items():
        lines.append(f"| {name} | {statistics.median(rounds):.3g} ({min(rounds):.3g} to {max(rounds):.3g}) |")
    return "\n".join([*lines, "", "![growth](quick.svg)", ""])


def drawn(body: Mapping[str, Any]) -> str:
    titles = {
        "sequences": ("ms a step, by sequences", "sequences"),
        "context": ("ms a step, by tokens of context", "tokens"),
        "prompt": ("ms of a prompt, by its tokens", "tokens"),
    }
    return picture(
        [
            Curve(title, axis, [*map(tuple, body["measured"][name])], [*map(tuple, body["theory"][name])])
            for name, (title, axis) in titles.items()
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".quick"), help="the model, kept between runs")
    parser.add_argument("--commit", action="store_true", help="these are the results to compare with from now on")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    started = time.monotonic()
    try:
        figures, measured = measure(args.work.resolve())
    except ValueError as error:
        print(error)
        return 1
    body: dict[str, Any] = {"machine": this_machine(), "figures": figures, "measured": measured}
    body |= {"theory": theory(args.work.resolve()), "seconds": time.monotonic() - started}
    body = json.loads(json.dumps(body), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(table(body))
    file = RESULTS / "quick.json"
    before = json.loads(file.read_text()) if file.is_file() else None
    if before is None or before["machine"] != body["machine"]:
        print(f"nothing to compare with: {'no results' if before is None else 'they are of ' + before['machine']}")
    else:
        print("\n".join(moved(before["figures"], figures)) or "nothing moved beyond noise")
    if (times := max(figures[DISTURBED])) > LEAST:
        print(f"other jobs ran: a read took up to {times:.1f} times its CPU time; what moved may be theirs")
    if args.commit:
        file.write_text(json.dumps(body) + "\n")
        file.with_suffix(".md").write_text(table(body))
        file.with_suffix(".svg").write_text(drawn(body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
