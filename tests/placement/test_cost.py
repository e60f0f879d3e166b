"""The model of cost against sums by hand: every term, what hides behind what, and the slowest rank."""

from dataclasses import replace

import numpy as np
import pytest

from moe.placement.cost import Sizes, Use, Visits, decode_step, prefill_step
from moe.placement.machine import Attention, Exchange, Machine, Overhead, Rate, Reads
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
    overhead=Overhead(1.0, 0.5, 0.1, 0.01, waves=0.05, miss=0.2, miss_row=0.0, wave=0.3, wave_row=0.0),
    copy_bytes_per_s=250.0,
    disks={"d": (Reads("direct", 1000, 1, 500.0), Reads("direct", 1000, 2, 1000.0))},
)
USE = Use(sequences=1, context=4, slots=16, disk="d")


def visits(distinct, misses, pairs, foreseen=(0, 0)):
    return Visits(*(np.array([one]) for one in (distinct, misses, pairs, foreseen)))


def test_all_resident():
    step = decode_step(SIZES, MACHINE, USE, visits([2, 2], [0, 0], [2, 2]))
    assert step.overhead == pytest.approx(1.5 + 2 * 0.11)
    assert step.dense == pytest.approx(1.0)
    assert step.attention == pytest.approx(4 * 50 / 100)
    assert step.experts == pytest.approx(2 * 2 * 100 * 1e-2)
    assert (step.waiting, step.exchange) == (0, 0)
    assert step.binds == "experts"
    assert step.total == pytest.approx(sum(step))


def test_layers_are_called_apart_where_experts_come_and_go_or_ranks_share_them():
    over = MACHINE.overhead._replace(apart=0.02, apart_sequence=0.001)
    machine, asked = replace(MACHINE, overhead=over), visits([2, 2], [0, 0], [2, 2])
    few, ranks = replace(USE, slots=15), replace(USE, ranks=2, sequences=2, link=Link(1e9, 0.0))

    def added(use):
        return decode_step(SIZES, machine, use, asked).overhead - decode_step(SIZES, MACHINE, use, asked).overhead

    assert added(USE) == 0
    assert added(few) == pytest.approx(2 * 0.021)
    assert added(ranks) == pytest.approx(2 * 0.021)
    assert added(replace(few, sequences=3)) == pytest.approx(2 * 0.023)
    prompts = [prefill_step(SIZES, one, few, 4).overhead for one in (machine, MACHINE)]
    assert prompts[0] - prompts[1] == pytest.approx(2 * 0.021)


def test_reads_hide_behind_all_but_the_last_expert():
    one = decode_step(SIZES, MACHINE, USE, visits([2, 2], [1, 0], [2, 2]))  # 2 s of reading, 1 s of computing meanwhile
    assert one.waiting == pytest.approx((2 - 1) / 2 * 2)
    assert one.overhead == pytest.approx(1.72 + 0.2)
    two = decode_step(SIZES, MACHINE, USE, visits([2, 2], [2, 2], [2, 2]))  # both by two readers, 1 s each
    assert two.waiting == pytest.approx(2 * (2 - 1))
    assert two.overhead == pytest.approx(1.72 + 2 * 0.5)
    quick = replace(MACHINE, disks={"d": (Reads("direct", 1000, 1, 1e6),)})
    assert decode_step(SIZES, quick, USE, visits([2, 2], [1, 1], [2, 2])).waiting == 0


def test_experts_that_arrive_while_others_are_computed_share_a_wave():
    sizes, asked = replace(SIZES, num_experts=8), visits([8, 8], [8, 0], [8, 8])

    def further(bytes_per_s):  # waves, of 0.3 s each; an expert is computed for 1 s
        machine = replace(MACHINE, disks={"d": (Reads("direct", 1000, 1, bytes_per_s),)})
        none, some = (decode_step(sizes, machine, USE, visits([8, 8], [n, 0], [8, 8])).overhead for n in (1, 8))
        return round((some - none) / 0.3, 6)

    assert decode_step(sizes, MACHINE, USE, asked).overhead > 1.72
    assert further(250.0) == 7  # 4 s each: every one alone
    assert further(1e6) == 1  # all others are there when the first is done
    # One every 0.5 s: 1 at 0.5, done at 1.5 when 2 more are there, done at 3.8 with 4 more, at 8.1 with the last
    assert further(2000.0) == 3


def test_more_rows_cost_more_only_beyond_the_measured_ones():
    few = decode_step(SIZES, MACHINE, replace(USE, sequences=2), visits([2, 2], [0, 0], [4, 4]))
    assert few.experts == pytest.approx(8.0)  # two rows each: in proportion beyond the one that was measured
    assert few.dense == pytest.approx(2.0)


def test_the_slowest_rank_counts_and_rows_travel():
    use = replace(USE, sequences=2, ranks=2, link=Link(100.0, 0.5))
    none = np.zeros((2, 2), int)
    both = Visits(np.array([[1, 3], [3, 1]]), none, np.array([[1, 3], [3, 1]]), none)
    step = decode_step(SIZES, MACHINE, use, both)
    assert step.experts == pytest.approx(2 * 3.0)
    assert step.exchange == pytest.approx(2 * 2 * (0.5 + 1 * 2 * 0.5 * 20 / 100))
    with pytest.raises(ValueError, match="2 ranks need a link"):
        decode_step(SIZES, MACHINE, replace(use, link=None), both)


def test_ranks_of_one_machine_share_cores_and_memory():
    none = np.zeros((2, 2), int)
    both = Visits(np.array([[1, 3], [3, 1]]), none, np.array([[1, 3], [3, 1]]), none)
    use = replace(USE, sequences=2, ranks=2)
    machine = replace(MACHINE, cores=2, memory={1: 1e6, 2: 1e6}, exchange=(Exchange(2, 5.0, 0.25, 0.25, 0.01),))
    step = decode_step(SIZES, machine, use, both)
    assert step.exchange == pytest.approx(5 + 2 * (0.5 + 2 * 20 * 0.01))
    assert step.experts == pytest.approx(6.0)
    one_core = decode_step(SIZES, replace(machine, cores=1), use, both)
    assert one_core == pytest.approx([2 * term for term in step])
    slow = decode_step(SIZES, replace(machine, memory={2: 500.0}), use, both)  # 10 bytes a weight, 250 of them a second
    assert slow.experts == pytest.approx(2 * 3 * 100 * 10 / 250)
    more = decode_step(SIZES, machine, replace(use, sequences=4, ranks=4), Visits(*(np.repeat(x, 2, 0) for x in both)))
    assert more.exchange == pytest.approx(2 * 3 * (5 + 2 * 0.5) + 2 * 2 * 2 * 30 * 0.01)  # 3 peers, 4 ranks on 2 cores
    replica = decode_step(SIZES, replace(machine, cores=1), replace(USE, beside=2), visits([2, 2], [0, 0], [2, 2]))
    assert replica == pytest.approx(
        [2 * term for term in decode_step(SIZES, machine, USE, visits([2, 2], [0, 0], [2, 2]))]
    )
    far = decode_step(SIZES, machine, replace(use, link=Link(100.0, 0.5)), both)
    assert far.exchange == pytest.approx(5 + 2 * 0.5 + 2 * 2 * (0.5 + 0.2))


def test_foreseen_reads_hide_only_in_the_time_that_the_layer_before_leaves():
    use, asked = replace(USE, slots=8, ahead=1.0), ([2, 2], [2, 2], [2, 2])
    plain, none = (decode_step(SIZES, MACHINE, one, visits(*asked)).waiting for one in (replace(use, ahead=0.0), use))
    assert plain == none == pytest.approx(2 * (2 - 1))
    # 2.36 s of the layer's own and 2 s of experts, in which its 2 reads take 2 s: 1.18 reads of 2 s fit before the next
    told = decode_step(SIZES, MACHINE, use, visits(*asked, foreseen=(2, 2))).waiting
    assert told == pytest.approx(2 * (0.82 * 2 - 1))
    half = decode_step(SIZES, MACHINE, replace(use, ahead=0.5), visits(*asked, foreseen=(2, 2))).waiting
    assert half == pytest.approx((plain + told) / 2)


def test_copies_and_more_reads_take_longer():
    asked = visits([2, 2], [1, 0], [2, 2])
    copied = decode_step(replace(SIZES, copied_bytes=1000), MACHINE, replace(USE, slots=8), asked)
    assert copied.waiting == pytest.approx((2 + 1000 / 250 - 1) / 2 * 2)
    assert copied.overhead == pytest.approx(1.72 + 0.2 + 2 * 0.05)
    small = replace(MACHINE, disks={"d": (*MACHINE.disks["d"], Reads("direct", 100, 1, 50.0))})
    parts = decode_step(replace(SIZES, reads=10), small, USE, asked)
    assert parts.waiting == pytest.approx((20 - 1) / 2 * 2)


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
