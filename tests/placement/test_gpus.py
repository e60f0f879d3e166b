"""Published figures of GPUs are those of the table beside the benches, and plan as a probe's would."""

import csv
from pathlib import Path

import numpy as np
import pytest

from bench.fit_h200 import fits
from moe.placement.gpus import MIXTRAL, MIXTRAL_US, QWEN3_US, gpus_of, published, rates_of
from moe.placement.topology import H200_EXPERTS, H200_NVLINK, ExpertCost

TABLE = Path(__file__).resolve().parents[2] / "bench" / "data" / "h200_fused_moe.csv"


def rows(layer):
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    found = [r for r in csv.DictReader(lines) if (r["layer"], r["distribution"]) == (layer, "balanced")]
    return {int(r["tokens"]): float(r["us"]) for r in found}


def test_figures_are_the_tables():
    assert tuple((tokens, rows("Mixtral-8x7B")[tokens]) for tokens, _ in MIXTRAL_US) == MIXTRAL_US
    assert tuple((tokens, rows("Qwen3-30B-A3B")[tokens]) for tokens, _ in QWEN3_US) == QWEN3_US


def test_a_layer_costs_what_was_published_at_other_numbers_of_tokens_too():
    machine, table = published("h200"), rows("Mixtral-8x7B")
    for tokens in (1, 16, 64, 1024, 8192):
        distinct = min(MIXTRAL[0], tokens * MIXTRAL[1])
        each = machine.seconds_per_weight("expert", "bfloat16", tokens * MIXTRAL[1] / distinct, 1)
        assert distinct * MIXTRAL[2] * each * 1e6 == pytest.approx(table[tokens], rel=0.2), tokens


def test_balanced_experts_fill_one_after_another():
    assert rates_of([(1, 8.0), (8, 32.0)], (8, 2, 100)) == [(1, 4e-8), (2, 4e-8)]


def test_kinds():
    assert (gpus_of("h200"), gpus_of("4xh200")) == ((1, "h200"), (4, "h200"))
    for wrong in ("", "x", "4x", "xh200", "-1xh200", "2xa100"):
        with pytest.raises(ValueError, match="published figures"):
            gpus_of(wrong)


def test_the_simulators_constants_are_those_of_the_fit_and_its_errors_are_told():
    found = fits()
    assert found["experts"].constants == pytest.approx(H200_EXPERTS, rel=0.01)
    latency, bandwidth = found["nccl"].constants
    assert (H200_NVLINK.latency, H200_NVLINK.bandwidth) == (
        pytest.approx(latency, rel=0.1), pytest.approx(bandwidth, rel=0.02)
    )  # fmt: skip
    assert found["experts"].held_median < 0.06  # of shapes that were left out
    assert found["experts"].held_p90 < 0.4
    assert found["nccl"].held_median < 0.15  # of numbers of GPUs that were left out
    assert found["deepep_normal"].constants[0] == pytest.approx(27e-6, rel=0.02)


def test_experts_cost_reading_when_few_rows_and_computing_when_many():
    cost = ExpertCost(1e-5, 1e12, 1e14, 1e15)
    hidden, each = 1000, 3 * 1000 * 500 * 2
    seconds = cost.seconds(np.array([0, 2, 2]), np.array([0, 2, 100_000]), hidden, each, 2)
    row = (2 * 2 * 1000 + 3 * 2 * 500) / 1e15
    assert seconds == pytest.approx(
        [0.0, 1e-5 + 2 * each / 1e12 + 2 * row, 1e-5 + 2 * 1e5 * each / 2 / 1e14 + 1e5 * row]
    )
