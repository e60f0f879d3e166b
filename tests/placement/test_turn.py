"""One turn of the loop: moves within their budgets, judged on tokens that they were not found on."""

import pytest

from moe.placement.loop_options import LoopOptions
from moe.placement.plan import Plan
from moe.placement.solve.few_moves import few_moves
from moe.placement.turn import Machine, Question, answer, judge, take_turn, whole_steps
from moe.placement.wire_format import ModelSizes, WireFormat
from tests.placement.windows import EXPERTS, LAYERS, MACHINE, OPTIONS, RANKS, SIZES, TOP_K, even, replicated, routing


@pytest.mark.parametrize("present", [Plan.contiguous(LAYERS, EXPERTS, RANKS), replicated()], ids=["plain", "replicas"])
def test_a_turn_moves_what_pays_within_its_budgets(present):
    window, most = routing(256, 0, seed=2), int(0.25 * present.hosted.sum())
    turn = take_turn(Question(present, window, MACHINE, OPTIONS))
    assert turn.migration is not None, turn.reason
    assert 0 < turn.num_moved <= most
    whole, older = (
        few_moves(part.layers(MACHINE.rates(TOP_K, LAYERS)), present.hosted, most)
        for part in (window, window.part(slice(0, 128)))
    )
    loads = [window.imbalance(p, MACHINE.rates(TOP_K)) for p in (turn.migration.target, Plan.from_hosted(whole))]
    assert loads[0] == loads[1], "the whole window decides what moves"
    assert loads[0] < window.imbalance(Plan.from_hosted(older), MACHINE.rates(TOP_K))
    assert turn.after.imbalance < turn.before.imbalance - 0.1
    table = present.phy2log
    for state in turn.migration.states():
        came = (state.hosted & ~Plan(num_experts=EXPERTS, num_ranks=RANKS, phy2log=table).hosted).sum()
        assert came * SIZES.expert_bytes <= OPTIONS.bytes_per_step
        table = state.phy2log
    assert (table == turn.migration.target.phy2log).all()


def test_a_turn_stays_where_nothing_is_to_be_gained_or_it_never_pays():
    present = Plan.contiguous(LAYERS, EXPERTS, RANKS)
    turn = take_turn(Question(present, even(256, seed=3), MACHINE, OPTIONS))
    assert turn.migration is None
    assert "were not found on" in turn.reason
    dear = Machine(sizes=ModelSizes(hidden_size=64, dtype="bfloat16", expert_bytes=10**12), wire=WireFormat(),
                   topology=MACHINE.topology)  # fmt: skip
    options = LoopOptions(window=256, bytes_per_step=10**15, payback=1000)
    turn = take_turn(Question(present, routing(256, 0, seed=2), dear, options))
    assert turn.migration is None
    assert "never pays back" in turn.reason


def test_experts_that_miss_fast_memory_are_in_the_prediction():
    present, window = Plan.contiguous(LAYERS, EXPERTS, RANKS), routing(256, 0, seed=2)
    few = Machine(sizes=SIZES, wire=WireFormat(), topology=MACHINE.topology, fast_slots=2)
    assert (
        take_turn(Question(present, window, few, OPTIONS)).before.seconds
        > take_turn(Question(present, window, MACHINE, OPTIONS)).before.seconds
    )


def test_a_loop_is_answered_by_a_verdict_and_then_by_moves_that_rest_on_it():
    question = Question(Plan.contiguous(LAYERS, EXPERTS, RANKS), routing(256, 0, seed=2), MACHINE, OPTIONS)
    verdict, turn = judge(question), take_turn(question)
    assert answer(question)._replace(seconds=verdict.seconds) == verdict
    assert (turn.before, turn.after) == (verdict.before, verdict.after)
    later = question._replace(window=routing(300, 0, seed=3), verdict=verdict)
    found = answer(later)
    assert (found.before, found.after) == (verdict.before, verdict.after), "it is not judged again"
    assert found.migration.steps == take_turn(later._replace(verdict=None)).migration.steps
    refused = answer(later._replace(verdict=verdict._replace(reason="no")))
    assert (refused.migration, refused.reason) == (None, "no")


def test_moves_fill_their_steps():
    """No step is begun for less than a tenth of what it may move."""
    assert [whole_steps(most, 62) for most in (5, 62, 63, 68, 69, 249, 255)] == [5, 62, 62, 62, 69, 248, 255]
    assert whole_steps(7, 0) == 7  # no expert fits: that is told where moves are scheduled
