"""The committed table of the planner follows from the probe's figures beside it, and says where it was too far off."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.bench_plan import CHOSEN, kept, median_machine, predict, steps_of_rounds, table
from moe.placement.cost import Sizes, Use, Visits, decode_step
from moe.placement.machine import Machine
from moe.placement.trace import RoutingTrace

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_every_row_is_recomputed_from_figures_alone():
    stored = json.loads((RESULTS / "plan.json").read_text())
    chosen = json.loads(CHOSEN.read_text())
    machine = Machine.of("plan.json", stored["machine"])
    assert {row["name"] for row in stored["rows"]} <= {one["name"] for one in chosen["configurations"]}
    text = (RESULTS / "plan.md").read_text()
    assert text == table(stored, chosen)
    lines = text.splitlines()
    for row in stored["rows"]:
        rate = row["use"]["sequences"] / predict(row, machine).total
        assert rate == pytest.approx(row["predicted"], rel=1e-4)  # six digits are kept
        assert row["measured"] == pytest.approx(row["use"]["sequences"] / min(row["rounds"]), rel=1e-4)
        (line,) = [line for line in lines if line.startswith(f"| {row['name']} |")]
        assert ("beyond the bound" in line) == (abs(rate / row["measured"] - 1) > chosen["bound"])


def test_all_eight_are_within_the_bound():
    stored, chosen = json.loads((RESULTS / "plan.json").read_text()), json.loads(CHOSEN.read_text())
    assert len(stored["rows"]) == len(chosen["configurations"]) == 8
    off = {row["name"]: row["predicted"] / row["measured"] - 1 for row in stored["rows"]}
    assert {name: each for name, each in off.items() if abs(each) > chosen["bound"]} == {}


def test_visits_are_kept_without_those_that_repeat():
    row = json.loads((RESULTS / "plan.json").read_text())["rows"][5]
    machine = Machine.of("plan.json", json.loads((RESULTS / "plan.json").read_text())["machine"])
    rng = np.random.default_rng(0)
    distinct = rng.integers(1, 4, (2, 50))
    visits = Visits(distinct, rng.integers(0, 2, (2, 50)), distinct + 1, np.zeros((2, 50), int))
    use = {**row["use"], "ranks": 2}
    found = predict({**row, "use": use, "visits": json.loads(json.dumps(kept(visits)))}, machine)
    assert found == pytest.approx(decode_step(Sizes(**row["sizes"]), machine, Use(**use), visits))


def test_rounds_are_replayed_as_they_ran():
    phase = np.array([0, 0, 1, 1] * 4, np.int8)
    ids = np.zeros((16, 1, 1), np.int16)
    trace = RoutingTrace(expert_ids=ids, sequence_lengths=np.full(4, 4, np.int32), num_experts=1, model="", phase=phase)
    steps = [(kind, tokens.tolist()) for kind, tokens in steps_of_rounds(trace, 2)]
    first = [(0, [0, 1, 4, 5]), (1, [2, 6]), (1, [3, 7])]
    assert steps == first + [(kind, [8 + t for t in tokens]) for kind, tokens in first]


def test_the_median_of_probes_is_taken_figure_by_figure():
    one = Machine.of("plan.json", json.loads((RESULTS / "plan.json").read_text())["machine"])
    others = [replace(one, copy_bytes_per_s=rate, memory={n: rate * n for n in one.memory}) for rate in (1.0, 2.0, 9.0)]
    middle = median_machine(others)
    assert middle == others[1]
