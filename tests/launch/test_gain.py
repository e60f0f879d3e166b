"""What `moe analyze` says of reading ahead: gains in their order, from figures of the machine or from none."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe.launch.analyze import trace_of_model
from moe.launch.gain import Gain, costs_of, even_costs, gains, rows_of_gains
from moe.placement.machine import Rate
from moe.placement.trace import RoutingTrace
from moe.placement.wire_format import ModelSizes
from tests.launch.test_measure import figures

TINYMOE = Path(__file__).resolve().parents[2] / "examples" / "tinymoe"
SIZES = ModelSizes(hidden_size=64, dtype="bfloat16", expert_bytes=1 << 18)


def trace_of(ids, num_experts, sizes=None):
    return RoutingTrace(
        expert_ids=ids.astype(np.int16),
        sequence_lengths=np.array([len(ids)], np.int32),
        num_experts=num_experts,
        model="m",
        sizes=sizes,
    )


def followed(num_tokens=1600, num_experts=16, seed=0):
    """Expert e of a layer is always followed by e + 1; which comes first is anyone's guess."""
    first = np.random.default_rng(seed).integers(0, num_experts, num_tokens)
    return (first[:, None, None] + np.arange(4)[None, :, None]) % num_experts


def test_what_can_be_foretold_is_won_and_what_cannot_is_not():
    found = gains(trace_of(followed(), 16), even_costs(1))
    assert [g.slots for g in found] == [32, 16, 8]
    for gain in found:
        assert 0 < gain.stall < 1
        assert gain.known > 1.05
        assert gain.transition == pytest.approx(gain.known, rel=0.1)
        assert gain.found > 0.8
    random = np.random.default_rng(1).integers(0, 16, (200, 4, 1))
    for gain in gains(trace_of(random, 16), even_costs(1)):
        assert gain.known > 1.05
        assert abs(gain.transition - 1) < 0.05
        assert str(gain).endswith(f"% of {gain.known - 1:.0%}")


def test_nothing_to_win_is_said():
    assert str(Gain(8, 1.0, 0.5, 0.01, 1.0, 1.02, 1.01)) == "nothing to win"
    assert str(Gain(8, 1.0, 0.5, 0.3, 1.1, 1.2, 1.1)) == "50% of 20%"
    assert gains(trace_of(np.zeros((60, 3, 1)), 8), even_costs(1)) == []  # what is asked for is always there
    assert gains(trace_of(followed(1), 16), even_costs(1)) == []
    dense = followed()
    dense[:, 0] = -1  # a layer without experts
    assert len(gains(trace_of(dense, 16), even_costs(1))) == 3


def test_costs_are_the_machines():
    machine = figures(1e9, {1: 5e8})
    assert costs_of(trace_of(followed(), 16), machine) is None
    assert costs_of(trace_of(followed(), 16, SIZES), None) is None
    assert costs_of(trace_of(followed(), 16, SIZES), machine) is None  # no dense layer was measured
    machine = replace(machine, rates=(*machine.rates, Rate("dense", "bfloat16", 1, 1, 1e-9)))
    found = costs_of(trace_of(followed(), 16, SIZES), machine)
    assert found.read == pytest.approx((1 << 18) / 5e8)
    assert found.expert == pytest.approx((1 << 17) * 1e-10)
    assert found.layer == pytest.approx(machine.overhead.layer + 4 * 64 * 64 * 1e-9)


def test_a_short_trace_is_said_and_a_models_answers_are_long_enough(tmp_path):
    long, short = trace_of(followed(), 16), trace_of(followed(200), 16)
    assert "tokens recorded" not in rows_of_gains(long)[1]
    assert rows_of_gains(short)[1].endswith("; 200 tokens recorded, fewer than the 1600 that transitions learn from")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\n" * 16)
    recorded = trace_of_model(Namespace(trace=TINYMOE, prompts=prompts))
    assert recorded.num_tokens >= 1600
