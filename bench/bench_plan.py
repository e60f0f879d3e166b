"""The planner against runs: eight configurations that were chosen before its model of cost was written.

    python -m bench.bench_plan FOLDER --out bench/results/plan

Runs each configuration of bench/data/plan_configurations.json in a process of its own (models are made in FOLDER and
kept), probes the machine before, between and after them, and predicts from the median of these figures and the routing
of the run alone. A round's seconds are CPU seconds of the stepping thread and what it waited for reads, so that other
jobs disturb it less; for two ranks, by the clock. The fastest round counts, and it is the one that is predicted. Binds:
each row names the term.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import packed_of
from bench.walk_model import LARGE, SMALL, prompts_of, write
from moe.launch.measure import probe
from moe.launch.plan_inputs import replay, sizes_of
from moe.models.blueprint import read_blueprint
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from moe.placement.cost import Sizes, Terms, Use, Visits, decode_step
from moe.placement.machine import Machine, disk_of
from moe.placement.trace import DECODE, PREFILL, RoutingTrace

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = ROOT / "bench" / "data" / "plan_configurations.json"
PROMPT, NEW, ROUNDS = 64, 24, 3


def folder_of(work: Path, model: str, form: str) -> Path:
    if model == "demo":
        return ROOT / "examples" / "tinymoe"
    folder = write(work / model, {"S": SMALL, "M": LARGE}[model])
    if form == "packed":
        return packed_of(folder)
    target = work / f"{model}-{form}"
    if form == "int8" and not target.exists():
        blueprint = read_blueprint(folder)
        pack(blueprint.checkpoint, blueprint.index, target, experts=target_format("int8", None))
    return folder if form == "original" else target


def prompts(work: Path, model: str, num: int, seed: int) -> list[list[int]]:
    if model != "demo":
        return prompts_of(work / model, num, PROMPT, seed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tinymoe")
    lines = [json.loads(line)["prompt"] for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]
    texts = [" ".join(lines[(seed * num + i) * 4 % 200 :][:12]) for i in range(num)]
    return [tokenizer(text)["input_ids"][:PROMPT] for text in texts]


def worker(work: Path, one: dict[str, Any], trace: Path) -> None:
    """One configuration, alone or as a rank; rank 0 prints its rounds."""
    from moe.comm.membership import process_groups

    if one["ranks"] == 1:
        _rounds(work, one, trace, None)
        return
    with process_groups(timeout_s=300) as groups:
        _rounds(work, one, trace, groups)


def _rounds(work: Path, one: dict[str, Any], trace: Path, groups: Any) -> None:
    from moe.config import EngineConfig
    from moe.llm import LLM
    from moe.params import SamplingParams

    settings = ["threads=1", "batch.prefix_sharing=false", "batch.kv_tokens=4096", *one["set"]]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.0)
    rank, ranks = (0, 1) if groups is None else (groups.rank, groups.world_size)
    config = EngineConfig.load(None, settings)
    rounds: list[float] = []
    with LLM(folder_of(work, one["model"], one["form"]), config, groups=groups) as llm:
        recorder, ahead = None, 0.0
        for number in range(2 * (ROUNDS + 1)):
            if number == ROUNDS + 1:
                recorder, ahead = llm.engine.record(), _share_ahead(llm.engine)
            own = prompts(work, one["model"], one["sequences"], number % (ROUNDS + 1))[rank::ranks]
            if ranks > 1:
                before = llm.engine.stats.decode_seconds
                llm.generate([{"prompt_token_ids": p} for p in own], params, use_tqdm=False)
                rounds.append((llm.engine.stats.decode_seconds - before) / (NEW - 1))
                continue
            running = [llm.add(p, params).request for p in own]
            steps: list[float] = []
            while llm.engine.has_work:
                is_decode = all(r.num_output for r in running)
                stall, cpu = sum(s.stall_seconds for s in llm.engine.layer_stats()), time.thread_time()
                llm.step()
                spent = time.thread_time() - cpu + sum(s.stall_seconds for s in llm.engine.layer_stats()) - stall
                steps += [spent] if is_decode else []
            rounds.append(statistics.fmean(steps))
        assert recorder is not None
        if rank == 0:
            recorder.trace().save(trace)
            num_slots = 0 if llm.engine.experts is None else llm.engine.state().slots
            reads = llm.engine.loaded.experts.slots.cache._readers.threads if llm.engine.experts else []
            said = {"rounds": rounds[1 : ROUNDS + 1], "slots": num_slots, "readers": len(reads), "ahead": ahead}
            print(json.dumps(said))


def _share_ahead(engine: Any) -> float:
    """Of the steps so far, those that read ahead: every other turn until the verdict."""
    lookahead = None if engine.experts is None else engine.experts.lookahead
    if lookahead is None or lookahead.prefetcher.is_stopped:
        return 0.0
    return 1.0 if lookahead.prefetcher.verdict else 0.5


def measured(work: Path, one: dict[str, Any], trace: Path) -> dict[str, Any]:
    command = [sys.executable]
    if one["ranks"] > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={one['ranks']}"]
    command += ["-m", "bench.bench_plan", str(work), "--worker", json.dumps(one), "--trace", str(trace)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def steps_of_rounds(trace: RoutingTrace, sequences: int) -> list[tuple[int, Any]]:
    """As they were run: in every round the prompts at once, then a token of each sequence."""
    starts = trace.sequence_starts
    assert trace.phase is not None
    steps: list[tuple[int, Any]] = []
    for first in range(0, len(starts) - 1, sequences):
        own = [np.arange(a, b) for a, b in pairwise(starts[first : first + sequences + 1])]
        steps.append((PREFILL, np.concatenate([one[trace.phase[one] == PREFILL] for one in own])))
        answers = [one[trace.phase[one] == DECODE] for one in own]
        steps += [(DECODE, np.array(tokens)) for tokens in zip(*answers, strict=True)]
    return steps


def visits_of(trace: RoutingTrace, use: Use, number: int) -> Visits:
    """Of one round of the run."""
    own = use.sequences if use.ranks == 1 else use.sequences // use.ranks
    steps = steps_of_rounds(trace, own)
    all_visits, _ = replay(trace, use, steps)
    per = (NEW - 1) * trace.num_layers
    assert all_visits.distinct.shape[1] == (ROUNDS + 1) * per, all_visits.distinct.shape
    return Visits(*(one[:, number * per : (number + 1) * per] for one in all_visits))


def kept(visits: Visits) -> dict[str, Any]:
    """Different visits, and how often each came: no more is needed to predict."""
    rows, counts = np.unique(np.concatenate(visits), axis=1, return_counts=True)
    return {"times": counts.tolist(), **dict(zip(Visits._fields, (x.tolist() for x in np.split(rows, 4))))}


def median_machine(probes: Sequence[Machine]) -> Machine:
    """Figure by figure, of probes of one machine."""

    def middle(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: middle([v[key] for v in values]) for key in first}
        if isinstance(first, (list, tuple)):
            return [middle(each) for each in zip(*values, strict=True)]
        return statistics.median(values) if isinstance(first, float) else first

    return Machine.of("the median of probes", json.loads(json.dumps(middle([m.stored() for m in probes]))))


def predict(row: dict[str, Any], machine: Machine) -> Terms:
    """From what a row of the results keeps: sizes, use, visits. The test recomputes every row by it."""
    times = row["visits"]["times"]
    visits = Visits(*(np.repeat(np.array(row["visits"][name]), times, axis=1) for name in Visits._fields))
    return decode_step(Sizes(**row["sizes"]), machine, Use(**row["use"]), visits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of configurations, from 0")
    parser.add_argument("--out", type=Path, help="without suffix; writes .json and .md")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.worker:
        worker(args.work, json.loads(args.worker), args.trace)
        return
    chosen = json.loads(CHOSEN.read_text())
    rows: list[dict[str, Any]] = []
    probes: list[Machine] = []
    for number, one in enumerate(chosen["configurations"]):
        if args.only and number not in args.only:
            continue
        folder = folder_of(args.work, one["model"], one["form"])
        if len(rows) in (0, 3, 6):
            probes.append(probe(args.work))
        try:
            rows.append(row_of(args.work, one, folder))
        except RuntimeError as error:
            print(f"{one['name']}: {error}", flush=True)
            continue
        print(f"{one['name']}: {rows[-1]['measured']:.1f} measured", flush=True)
    machine = median_machine([*probes, probe(args.work)])
    for row in rows:
        terms = predict(row, machine)
        row |= {"predicted": row["use"]["sequences"] / terms.total, "terms": terms._asdict()}
    body = {"machine": machine.stored(), "probes": len(probes) + 1, "load": os.getloadavg(), "rows": rows}
    print(table(body, chosen))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(_rounded(body)) + "\n")
        args.out.with_suffix(".md").write_text(table(body, chosen))


def row_of(work: Path, one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a configuration. Raises RuntimeError if its process fails."""
    trace = work / "trace.npz"
    found = measured(work, one, trace)
    sizes = sizes_of(read_blueprint(folder))
    if "dtype=float32" in one["set"]:
        sizes = replace(sizes, dtype="float32", kv_bytes=2 * sizes.kv_bytes)
    use = Use(
        sequences=one["sequences"],
        context=PROMPT + NEW // 2,
        slots=found["slots"] * one["ranks"],
        readers=found["readers"] or 1,
        disk=disk_of(work),
        ranks=one["ranks"],
        ahead=found["ahead"],
    )
    best = min(range(ROUNDS), key=lambda n: found["rounds"][n])
    return {
        "name": one["name"],
        "sizes": asdict(sizes),
        "use": asdict(use),
        "visits": kept(visits_of(RoutingTrace.load(trace), use, best + 1)),
        "rounds": found["rounds"],
        "measured": one["sequences"] / found["rounds"][best],
    }


def _rounded(body: Any) -> Any:
    """Six digits of every figure are more than any is worth."""
    if isinstance(body, dict):
        return {key: _rounded(value) for key, value in body.items()}
    if isinstance(body, (list, tuple)):
        return [_rounded(value) for value in body]
    return float(f"{body:.6g}") if isinstance(body, float) else body


def table(body: dict[str, Any], chosen: dict[str, Any]) -> str:
    """Every chosen configuration, those that did not run included."""
    machine, rows = body["machine"], {row["name"]: row for row in body["rows"]}
    lines = [
        "# The planner against runs",
        "",
        "`python -m bench.bench_plan FOLDER --out bench/results/plan`",
        "",
        f"{machine['name']}, {body['probes']} probes from {machine['when']} on, medians; a shared machine, load "
        f"{body['load'][0]:.1f}, others at low priority. {chosen['said']}",
        "A round's seconds: CPU seconds of the stepping thread and its waits for reads; for two ranks, the clock's.",
        "",
        "| configuration | measured tokens/s (rounds) | predicted | off | binds | terms of a step, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in (one["name"] for one in chosen["configurations"]):
        if name not in rows:
            lines.append(f"| {name} | not run | | | | |")
            continue
        row = rows[name]
        terms, sequences = Terms(**row["terms"]), row["use"]["sequences"]
        off = row["predicted"] / row["measured"] - 1
        parts = ", ".join(f"{term} {1e3 * value:.2f}" for term, value in row["terms"].items() if value)
        mark = "" if abs(off) <= chosen["bound"] else ", beyond the bound"
        spread = f"{sequences / max(row['rounds']):.1f} to {sequences / min(row['rounds']):.1f}"
        figures = f"{row['measured']:.1f} ({spread}) | {row['predicted']:.1f} | {off:+.0%}{mark}"
        lines.append(f"| {name} | {figures} | {terms.binds} | {parts} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
