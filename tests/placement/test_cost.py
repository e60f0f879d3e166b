"""The model of cost against sums by hand: every term, what hides behind what, and the slowest rank."""

from dataclasses import replace

import numpy as np
import pytest

from moe.placement.cost import Sizes, Use, Visits, decode_step, prefill_step
from moe.placement.machine import Attention, Machine, Overhead, Rate, Reads
from moe.placement.topology import Link

SIZES = Sizes(
    num_layers=2,
    num_experts=8,
    top_k=2,
    hidden_size=10,
    query_size=10,
    dense_weights=1000,
    dense_bytes=2000,
    dtype="bfloat16",
    expert_weights=100,
    expert_bytes=1000,
    expert_format="int8",
    kv_bytes=50,
)
MACHINE = Machine(
    name="paper",
    when="never",
    cores=1,
    memory={1: 1.0},
    rates=(Rate("dense", "bfloat16", 1, 1, 1e-3), Rate("expert", "int8", 1, 1, 1e-2)),
    attention=Attention(100.0, 1000.0),
    overhead=Overhead(step=1.0, step_sequence=0.5, layer=0.1, layer_sequence=0.01, miss=0.2, wave=0.3),
    disks={"d": (Reads("direct", 1000, 1, 500.0), Reads("direct", 1000, 2, 1000.0))},
)
USE = Use(sequences=1, context=4, slots=16, disk="d")


def visits(distinct, misses, pairs):
    return Visits(*(np.array([one]) for one in (distinct, misses, pairs)))


def test_all_resident():
    step = decode_step(SIZES, MACHINE, USE, visits([2, 2], [0, 0], [2, 2]))
    assert step.overhead == pytest.approx(1.5 + 2 * 0.11)
    assert step.dense == pytest.approx(1.0)
    assert step.attention == pytest.approx(4 * 50 / 100)
    assert step.experts == pytest.approx(2 * 2 * 100 * 1e-2)
    assert (step.waiting, step.exchange) == (0, 0)
    assert step.binds == "experts"
    assert step.total == pytest.approx(sum(step))


def test_reads_hide_behind_all_but_the_last_expert():
    one = decode_step(SIZES, MACHINE, USE, visits([2, 2], [1, 0], [2, 2]))  # 2 s of reading, 1 s of computing meanwhile
    assert one.waiting == pytest.approx((2 - 1) / 2 * 2)
    assert one.overhead == pytest.approx(1.72 + 0.2)
    two = decode_step(SIZES, MACHINE, USE, visits([2, 2], [2, 2], [2, 2]))  # both by two readers, 1 s each
    assert two.waiting == pytest.approx(2 * (2 - 1))
    assert two.overhead == pytest.approx(1.72 + 2 * 0.5)
    quick = replace(MACHINE, disks={"d": (Reads("direct", 1000, 1, 1e6),)})
    assert decode_step(SIZES, quick, USE, visits([2, 2], [1, 1], [2, 2])).waiting == 0


def test_more_rows_cost_more_only_beyond_the_measured_ones():
    few = decode_step(SIZES, MACHINE, replace(USE, sequences=2), visits([2, 2], [0, 0], [4, 4]))
    assert few.experts == pytest.approx(8.0)  # two rows each: in proportion beyond the one that was measured
    assert few.dense == pytest.approx(2.0)


def test_the_slowest_rank_counts_and_rows_travel():
    use = replace(USE, sequences=2, ranks=2, link=Link(100.0, 0.5))
    both = Visits(np.array([[1, 3], [3, 1]]), np.zeros((2, 2), int), np.array([[1, 3], [3, 1]]))
    step = decode_step(SIZES, MACHINE, use, both)
    assert step.experts == pytest.approx(2 * 3.0)
    assert step.exchange == pytest.approx(2 * 2 * (0.5 + 1 * 2 * 0.5 * 20 / 100))
    with pytest.raises(ValueError, match="2 ranks need a link"):
        decode_step(SIZES, MACHINE, replace(use, link=None), both)


def test_what_was_not_measured_is_said():
    with pytest.raises(ValueError, match="direct reads of e were not measured"):
        decode_step(SIZES, MACHINE, replace(USE, disk="e"), visits([2, 2], [1, 0], [2, 2]))
    with pytest.raises(ValueError, match="no expert in int4 was measured"):
        decode_step(replace(SIZES, expert_format="int4"), MACHINE, USE, visits([2, 2], [0, 0], [2, 2]))


def test_a_prompt_reads_what_is_not_in_slots():
    whole = prefill_step(SIZES, MACHINE, USE, 4)
    assert whole.waiting == 0
    assert whole.attention == pytest.approx(2 * 16 * 10 / 1000)
    slow = replace(MACHINE, disks={"d": (Reads("direct", 1000, 1, 100.0),)})
    half = prefill_step(SIZES, slow, replace(USE, slots=8), 4)
    assert half.waiting > 0
    assert half.experts == whole.experts
