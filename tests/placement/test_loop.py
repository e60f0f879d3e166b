"""The loop that re-balances a running job, without ranks: window, trigger, few moves, turns."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest

from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.loop import RESTS, OnlineLoop, SolverAtOnce, SolverProcess, Trigger
from moe.placement.loop_options import LoopOptions
from moe.placement.plan import Plan
from moe.placement.recent import PARTS, Recent, imbalance_of_chance, newest_alike
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.few_moves import LayerWindow, _after_swaps, _misses_after, few_moves, smooth_max
from moe.placement.solve.swaps import CopyOptions
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.turn import Machine, Question, Window, predict, take_turn
from moe.placement.wire_format import ModelSizes, WireFormat

LAYERS, EXPERTS, RANKS, TOP_K = 3, 16, 4, 3
SIZES = ModelSizes(hidden_size=64, dtype="bfloat16", expert_bytes=1000)
MACHINE = Machine(sizes=SIZES, wire=WireFormat(), topology=Topology.preset("h200x4"))
OPTIONS = LoopOptions(window=256, imbalance=1.25, calm=1.15, most_moved=0.25, bytes_per_step=4000)


def routing(tokens: int, hot: int, seed: int) -> Window:
    """Experts `hot`, `hot` + 1, ... are chosen most: contiguous ones, so that a contiguous plan is uneven."""
    rng = np.random.default_rng(seed)
    weight = np.roll(np.r_[np.full(4, 5.0), np.ones(EXPERTS - 4)], hot)
    keys = rng.exponential(size=(tokens, LAYERS, EXPERTS)) / weight
    return Window(np.argsort(keys, axis=2)[:, :, :TOP_K].astype(np.int16), rng.integers(0, RANKS, tokens))


def even(tokens: int, seed: int) -> Window:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    return Window(ids.astype(np.int16), rng.integers(0, RANKS, tokens))


def replicated() -> Plan:
    """Contiguous, with a copy of expert e + 4 in a fifth place of each rank."""
    hosted = np.repeat(Plan.contiguous(LAYERS, EXPERTS, RANKS).hosted, 1, axis=0).copy()
    for rank in range(RANKS):
        hosted[:, (4 * rank + 4) % EXPERTS, rank] = True
    return Plan.from_hosted(hosted)


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


@pytest.mark.parametrize("present", [Plan.contiguous(LAYERS, EXPERTS, RANKS), replicated()], ids=["plain", "replicas"])
@pytest.mark.parametrize("most", [0, 1, 5, 100])
def test_few_moves_keep_counts_and_never_cost_more(present, most):
    window = routing(300, 2, seed=most)
    layers = window.layers(MACHINE.rates(TOP_K))
    hosted = few_moves(layers, present.hosted, most)
    assert (hosted & ~present.hosted).sum() <= most
    assert (hosted.sum(axis=1) == present.hosted.sum(axis=1)).all()
    assert hosted.any(axis=2).all()
    for layer, old, new in zip(layers, present.hosted, hosted, strict=True):
        costs = [layer.cost(layer.served(h), RANKS).seconds for h in (old, new)]
        assert costs[1] <= costs[0]
    if most == 100:
        assert window.imbalance(Plan.from_hosted(hosted), MACHINE.rates(TOP_K)) < 1.1


def test_what_a_layer_costs_is_what_the_serving_rule_serves():
    """Against pairs counted one by one, with a token that has no expert."""
    ids = np.array([[0, 5, -1], [4, 5, 6], [15, 1, 2], [-1, -1, -1]], np.int16)
    home = np.array([0, 1, 2, 3])
    layer = LayerWindow(ids, home, MACHINE.rates(TOP_K))
    plan = Plan.contiguous(1, EXPERTS, RANKS)
    cost = layer.cost(layer.served(plan.hosted[0]), RANKS)
    rows, results = 1 + 0 + 2, 1 + 0 + 3  # to rank 1; none; to ranks 3 and 0
    rates = MACHINE.rates(TOP_K)
    assert cost.num_bytes == rows * rates.row + results * rates.result
    assert cost.imbalance == 4 / (8 / RANKS)  # rank 1 serves 5, 4, 5, 6


@pytest.mark.parametrize("looks", [1, 4, 100])
@pytest.mark.parametrize("present", [Plan.contiguous(LAYERS, EXPERTS, RANKS), replicated()], ids=["plain", "replicas"])
def test_recent_counts_each_of_so_many_tokens_once(present, looks):
    """Against tokens counted anew; looks: additions between two."""
    recent, whole = Recent(50, Plan.contiguous(LAYERS, EXPERTS, RANKS), is_exact=True), routing(203, 0, seed=1)
    whole.ids[5, 1] = -1
    assert recent.parts() == []
    for number, begin in enumerate(range(0, 203, 7), 1):
        recent.add(whole.part(slice(begin, begin + 7)))
        recent.add(whole.part(slice(0, 0)))
        assert min(50, begin + 7) <= recent.num_tokens < 50 + 7
        if number % looks == 0:
            recent.parts()
        if begin == 105:
            recent.use(present)
    parts = recent.parts()
    kept = Window.joined([part.window for part in parts])
    assert len(kept.ids) == recent.num_tokens < 50 + 7
    assert (kept.ids == whole.ids[-len(kept.ids) :]).all()
    assert (kept.home == whole.home[-len(kept.ids) :]).all()
    served = [one.served(h) for one, h in zip(kept.layers(MACHINE.rates(TOP_K)), present.hosted, strict=True)]
    begin, has_copies = 0, (present.replicas > 1).any()
    for window, counts, busy in parts:
        assert counts.sum() == busy.sum() == (window.ids >= 0).sum()
        for layer in range(LAYERS):
            assert (counts[layer] == [(window.ids[:, layer] == e).sum() for e in range(EXPERTS)]).all()
            mine = served[layer][begin : begin + len(window.ids)]
            if not has_copies:  # copies are dealt in the batches that came
                assert (busy[layer] == [(mine == rank).sum() for rank in range(RANKS)]).all()
        begin += len(window.ids)
    recent.use(present)  # now all are dealt as one batch
    for layer, ranks in enumerate(served):
        busy = sum(part.busy[layer] for part in recent.parts())
        assert (busy == [(ranks == rank).sum() for rank in range(RANKS)]).all()
    recent.add(whole)
    assert recent.num_tokens == 50


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


@pytest.mark.parametrize("new", [0, 1, 48, 100, 200, 256])
def test_the_newest_tokens_of_one_traffic_are_told_apart_from_those_before(new):
    ids = np.concatenate([routing(256 - new, 2, seed=7).ids, routing(new, 9, seed=8).ids])
    found = alike_of(ids)
    if new in (0, 1, 256):
        assert found == 256, "one traffic, or too little of another to be told"
    else:
        assert abs(found - new) <= 256 // PARTS
    ids[5] = -1  # a token that has no expert counts nowhere
    assert abs(alike_of(ids) - found) <= 256 // PARTS
    assert alike_of(ids[:1]) == 1


def alike_of(ids: np.ndarray) -> int:
    recent = Recent(256, Plan.contiguous(LAYERS, EXPERTS, RANKS), is_exact=True)
    recent.add(Window(ids, np.zeros(len(ids), np.int64)))
    parts = recent.parts()
    newest = newest_alike(np.stack([part.counts for part in parts]), len(ids))
    return sum(len(part.window.ids) for part in parts[-newest:])


def test_chance_is_what_even_traffic_shows_at_most():
    rng = np.random.default_rng(0)
    for ranks, pairs in ((2, 500), (8, 2000), (32, 2000)):
        loads = rng.multinomial(pairs, np.full(ranks, 1 / ranks), size=300).max(axis=1) / (pairs / ranks)
        assert loads.mean() < imbalance_of_chance(pairs, ranks) < 1.25 * loads.mean()


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


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_every_swap_is_costed_with_the_misses_that_it_makes(slots):
    """The table of all swaps against placements that are costed one by one."""
    rng = np.random.default_rng(slots)
    rank, uses = rng.permutation(np.arange(14) % RANKS), rng.integers(0, 9, 14)
    missed, _, here = _misses_after(uses, rank, RANKS, slots)

    def slow(ranks: np.ndarray) -> np.ndarray:
        return np.array([np.sort(uses[ranks == g])[::-1][slots:].sum() for g in range(RANKS)])

    assert (missed == slow(rank)).all()
    norm = _after_swaps(missed, rank, here)
    for i, j in zip(*np.nonzero(rank[:, None] != rank), strict=True):
        after = rank.copy()
        after[[i, j]] = rank[[j, i]]
        assert slow(after)[rank[i]] == here[i, j]
        assert norm[i, j] == pytest.approx(float(smooth_max(slow(after))))


def test_moves_that_only_save_misses_are_found_and_the_simulator_agrees():
    """Ranks serve the same number of pairs, but those of rank 0 go to six experts and those of rank 1 to two."""
    tokens = np.arange(960)
    ids = np.where(tokens % 2, 8 + tokens // 2 % 2, tokens // 2 % 6)[:, None, None].astype(np.int16)
    window = Window(ids, tokens // 12 % 2)  # as many at home as away, wherever experts are
    present = Plan.contiguous(1, EXPERTS, 2)
    topology = Topology.uniform(1, 2)
    few = Machine(sizes=replace(SIZES, expert_bytes=10**6), wire=WireFormat(), topology=topology, fast_slots=2)
    hosted = few_moves(window.layers(few.rates(1, 1)), present.hosted, 8)
    before, after = (predict(window, plan, few) for plan in (present, Plan.from_hosted(hosted)))
    assert before.imbalance == 1.0
    assert after.seconds < before.seconds
    rich = replace(few, fast_slots=None).rates(1, 1)
    assert (few_moves(window.layers(rich), present.hosted, 8) == present.hosted).all(), "nothing else is to be gained"


def test_the_loop_moves_after_a_change_and_not_without_one():
    start = Plan.contiguous(LAYERS, EXPERTS, RANKS)
    options = LoopOptions(window=256, most_moved=0.5, bytes_per_step=4000)
    loop = OnlineLoop(start, MACHINE, options, SolverAtOnce())
    assert run(loop, even(2000, seed=4)) == []
    assert loop.history == []
    changed = routing(2000, 0, seed=5)
    taken = run(loop, changed)
    assert taken
    assert len(loop.history) == 1
    assert 0.6 * 256 <= taken[0][0] <= 256, "so much of the new traffic, and little more"
    turn, before, after = loop.history[0]
    rates = MACHINE.rates(TOP_K)
    assert after is not None
    assert after.imbalance < before.imbalance
    assert changed.part(slice(1000, None)).imbalance(loop.plan, rates) < 1.15
    assert abs(after.imbalance - turn.after.imbalance) < 0.1, "what was predicted is what was measured"


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
            if self.asked:
                self._turn = self._turn._replace(migration=None, reason="in vain")
            self.asked = True

        asked = False

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
