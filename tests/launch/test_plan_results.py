"""The committed table of the planner follows from the probe's figures beside it, and says where it was too far off."""

import json
from pathlib import Path

import pytest

from bench.bench_plan import CHOSEN, predict, table
from moe.placement.machine import Machine

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
        assert rate == pytest.approx(row["predicted"])
        assert row["measured"] == pytest.approx(row["use"]["sequences"] / min(row["rounds"]))
        (line,) = [line for line in lines if line.startswith(f"| {row['name']} |")]
        assert ("beyond the bound" in line) == (abs(rate / row["measured"] - 1) > chosen["bound"])
