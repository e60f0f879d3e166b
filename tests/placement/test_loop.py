"""The loop that re-balances a running job, without ranks: when it turns, what it may move, what it measures."""

import os
import time

import numpy as np
import pytest

from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.loop import ENOUGH, PATIENCE, RESTS, OnlineLoop, SolverAtOnce, SolverProcess, Trigger
from moe.placement.loop_options import LoopOptions
from moe.placement.plan import Plan
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.turn import Machine, Question, Turn, Verdict, Window, judge, take_turn
from moe.placement.wire_format import WireFormat
from tests.placement.windows import EXPERTS, LAYERS, MACHINE, OPTIONS, RANKS, SIZES, TOP_K, even, routing


def run(loop: OnlineLoop, window: Window, per_step: int = 16) -> list[tuple[int, Plan]]:
    """Feeds a window step by step; (tokens so far, plan) after each state of each migration."""
    taken = []
    for begin in range(0, len(window.ids), per_step):
        part = window.part(slice(begin, begin + per_step))
        for rank in range(RANKS):
            ids = part.ids[part.home == rank]
            loop.observe(ids, rank, len(ids), 0)
        migration = loop.step()
        if migration is not None:
            taken += [(begin + per_step, state) for state in migration.states()]
    return taken


def test_the_trigger_is_patient_and_rests_until_calm():
    trigger = Trigger(LoopOptions(window=100, imbalance=1.3, calm=1.1), patience=50)
    assert [trigger.fires(1.4, alike, 30) for alike in (10, 40, 50)] == [False, False, True]
    assert not trigger.fires(1.4, 50, 30, chance=1.45), "so much may be chance"
    trigger.took(has_moved=False)
    assert not any(trigger.fires(1.4, 100, 40) for _ in range(10))
    assert not trigger.fires(1.2, 100, 40)
    assert not any(trigger.fires(1.4, 100, 40) for _ in range(3)), "1.2 is not calm"
    assert not trigger.fires(1.05, 100, 40)
    assert trigger.fires(1.4, 100, 30)
    trigger.took(has_moved=True)
    assert trigger.fires(1.4, 60, 60)
    trigger.took(has_moved=False)
    assert any(trigger.fires(1.4, 100, 100) for _ in range(9)), "it tries again, if seldom"


def traffic_of_sequences(sequences: int, length: int, seed: int) -> Window:
    """Each sequence has a topic of its own, so that its tokens are alike; 32 run at once."""
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0.0, 0.7, (LAYERS, EXPERTS))
    topics = weight * rng.lognormal(0.0, 0.8, (sequences, 1, LAYERS, EXPERTS))
    keys = rng.exponential(size=(sequences, length, LAYERS, EXPERTS)) / topics
    ids = np.argsort(keys, axis=3)[..., :TOP_K].astype(np.int16)
    at_once = ids.reshape(-1, 32, length, LAYERS, TOP_K).swapaxes(1, 2).reshape(-1, LAYERS, TOP_K)
    return Window(at_once, np.arange(len(at_once)) % RANKS)


@pytest.mark.parametrize("seed", range(3))
def test_unchanged_traffic_moves_nothing(seed):
    """The plan is of half of the sequences, the run of the others."""
    window = traffic_of_sequences(128, 60, seed)
    half = len(window.ids) // 2
    trace = RoutingTrace(expert_ids=window.ids[:half], sequence_lengths=np.array([half], np.int32),
                         num_experts=EXPERTS, model="m", sizes=SIZES)  # fmt: skip
    plan = solve_copies(trace, RANKS, options=CopyOptions(rounds=20))
    loop = OnlineLoop(plan, MACHINE, LoopOptions(), SolverAtOnce())
    assert run(loop, window.part(slice(half, None)), per_step=32) == []
    assert not any(turn.migration is not None for turn, _, _ in loop.history)
    assert loop.stats.placement_load > 1.0, "it has looked"


def test_the_loop_moves_after_a_change_and_not_without_one():
    start = Plan.contiguous(LAYERS, EXPERTS, RANKS)
    options = LoopOptions(window=512, most_moved=0.5, bytes_per_step=4000)
    loop = OnlineLoop(start, MACHINE, options, SolverAtOnce())
    assert run(loop, even(2000, seed=4)) == []
    assert loop.history == []
    changed = routing(2000, 0, seed=5)
    taken = run(loop, changed)
    assert taken
    assert len(loop.history) == 1
    assert ENOUGH * 512 <= taken[0][0] <= 512, "so much of the new traffic, and little more"
    turn, before, after = loop.history[0]
    rates = MACHINE.rates(TOP_K)
    assert after is not None
    assert after.imbalance < before.imbalance
    assert changed.part(slice(1000, None)).imbalance(loop.plan, rates) < 1.15
    assert abs(after.imbalance - turn.after.imbalance) < 0.1, "what was predicted is what was measured"


class Remembers(SolverAtOnce):
    """What it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Question] = []

    def ask(self, question: Question) -> None:
        super().ask(question)
        self.asked.append(question)


@pytest.mark.parametrize("late", [0, 5, 11, 16])
def test_moves_are_found_on_the_new_traffic_alone_and_on_all_of_it(late):
    """late: tokens of the first step with new traffic that are still of the old; they come from rank 0 first."""
    solver, options = Remembers(), LoopOptions(window=512, most_moved=0.5, bytes_per_step=4000)
    loop = OnlineLoop(Plan.contiguous(LAYERS, EXPERTS, RANKS), MACHINE, options, solver)
    old, new = even(800 + late, seed=4), routing(2000, 0, seed=5)
    run(loop, Window(*map(np.concatenate, zip(old, new, strict=True))))
    judged, asked = solver.asked[:2]
    assert judged.verdict is None
    assert not asked.verdict.reason
    for question, share in ((judged, PATIENCE), (asked, ENOUGH)):
        tokens = len(question.window.ids)
        assert share * 512 - 16 <= tokens <= share * 512 + 3 * 32, "soon after there are so many"
        told = {row.tobytes() for row in question.window.ids}
        assert len(told & {row.tobytes() for row in old.ids}) <= 2, "but for what both have by chance"


def test_a_verdict_on_traffic_that_has_gone_decides_nothing():
    solver, options = Remembers(), LoopOptions(window=512, most_moved=0.5, bytes_per_step=4000)
    loop = OnlineLoop(Plan.contiguous(LAYERS, EXPERTS, RANKS), MACHINE, options, solver)
    for window in (even(800, seed=4), routing(330, 0, seed=5), even(1200, seed=6)):
        assert run(loop, window) == []
    assert [question.verdict for question in solver.asked] == [None], "it was judged, and then it was over"
    assert not loop.is_waiting


def test_traffic_that_few_moves_do_not_help_is_asked_about_once():
    class Refuses(SolverAtOnce):
        def ask(self, question: Question) -> None:
            super().ask(question)
            assert isinstance(self._answer, Verdict), "no moves are asked for"
            self._answer = self._answer._replace(reason="in vain")

    options = LoopOptions(window=512, most_moved=0.5, bytes_per_step=4000)
    loop = OnlineLoop(Plan.contiguous(LAYERS, EXPERTS, RANKS), MACHINE, options, Refuses())
    assert run(loop, routing(2000, 0, seed=5)) == []
    assert [turn.reason for turn, _, _ in loop.history] == ["in vain"]


def test_what_may_move_is_shared_by_all_turns_until_traffic_changes_or_long_after():
    """What moves after a change is what one turn may move, though the load stays high."""
    options = LoopOptions(window=256, imbalance=1.0, calm=1.0, most_moved=0.17, bytes_per_step=10**6)
    most = int(0.17 * LAYERS * EXPERTS)
    loop = OnlineLoop(Plan.contiguous(LAYERS, EXPERTS, RANKS), MACHINE, options, SolverAtOnce())
    run(loop, routing(RESTS * 256 - 600, 0, seed=5))
    assert 0 < loop.stats.moved_experts <= most
    assert loop.stats.placement_load > 1.1, "there is more to be gained"
    before = loop.stats.moved_experts
    run(loop, routing(1000, 8, seed=6))
    assert before < loop.stats.moved_experts <= before + most, "a change"
    before = loop.stats.moved_experts
    run(loop, routing(RESTS * 256 + 600, 8, seed=7))
    assert before < loop.stats.moved_experts <= before + most, "long after"


def decoded(trace: RoutingTrace, streams: int, ranks: int) -> Window:
    """The trace's tokens as so many sequences at once decode them, each at its own place; homes in turn."""
    steps = trace.num_tokens // streams
    order = (np.arange(steps)[:, None] + steps * np.arange(streams)).ravel()
    return Window(trace.expert_ids[order], np.arange(len(order)) % ranks)


@pytest.mark.heavy
@pytest.mark.parametrize("slots", [None, 9])
@pytest.mark.parametrize("domain", ["intent", "translation", "summary"])
def test_recorded_text_that_was_held_out_moves_nothing_and_another_domain_does(shared_data, domain, slots):
    name = shared_data / "traces" / f"deepseek_v2_lite_{domain}.npz"
    other = name.with_name(name.name.replace(domain, "intent" if domain == "translation" else "translation"))
    fit, held = from_deepseek_esft_npz(name).split(0.6)
    plan = solve_copies(fit, 8, slots_per_rank=slots, options=CopyOptions(rounds=5))
    machine = Machine(sizes=fit.sizes, wire=WireFormat(), topology=Topology.preset("h200x8"))
    loop = OnlineLoop(plan, machine, LoopOptions(bytes_per_step=1 << 30), SolverAtOnce())
    for traffic, moves in ((held, False), (from_deepseek_esft_npz(other).split(0.6)[1], True)):
        window = decoded(traffic, 32, 8)
        for at in range(0, len(window.ids), 32):
            for rank in range(8):
                ids = window.ids[at : at + 32][window.home[at : at + 32] == rank]
                loop.observe(ids, rank, len(ids), 0)
            loop.step()
        assert (loop.stats.moved_experts > 0) == moves
    assert loop.stats.moved_experts <= 0.15 * plan.hosted.sum()


def test_what_is_measured_is_of_the_turn_that_moved():
    """Another turn, in vain, ends before the window after the moves is full."""

    class MovesOnce(SolverAtOnce):
        def ask(self, question: Question) -> None:
            super().ask(question)
            if self.has_moved:
                assert isinstance(self._answer, Verdict)
                self._answer = self._answer._replace(reason="in vain")
            self.has_moved |= isinstance(self._answer, Turn)

        has_moved = False

    options = LoopOptions(window=256, imbalance=1.0, calm=1.0, most_moved=0.15, bytes_per_step=10**6)
    loop = OnlineLoop(Plan.contiguous(LAYERS, EXPERTS, RANKS), MACHINE, options, MovesOnce())
    assert run(loop, routing(900, 0, seed=5))
    (moved, _, after), (vain, _, nothing) = loop.history
    assert (moved.migration is not None, vain.reason) == (True, "in vain")
    assert after is not None
    assert nothing is None
    assert loop.stats.measured_load == after.imbalance
    assert loop.stats.moved_experts == moved.num_moved  # nothing had to trade places twice


def test_the_process_answers_as_the_thread_does_and_a_dead_one_is_told():
    question = Question(Plan.contiguous(LAYERS, EXPERTS, RANKS), routing(256, 0, seed=2), MACHINE, OPTIONS)
    question = question._replace(verdict=judge(question))
    cores = {max(os.sched_getaffinity(0))} if hasattr(os, "sched_getaffinity") else set()
    solver = SolverProcess(cores)
    try:
        solver.ask(question)
        while (turn := solver.poll()) is None:
            time.sleep(0.01)
        expected = take_turn(question)
        assert turn.migration is not None
        assert turn.migration.steps == expected.migration.steps
        assert (turn.before, turn.after) == (expected.before, expected.after)
        assert not cores or os.sched_getaffinity(solver._process.pid) == cores
        solver._process.kill()
        loop = OnlineLoop(question.present, MACHINE, OPTIONS, solver)
        taken = run(loop, routing(600, 0, seed=5))
        assert taken == []
        while loop._is_asked and not loop.is_over:
            loop.step()
            time.sleep(0.01)
        assert loop.is_over
    finally:
        solver.close()
