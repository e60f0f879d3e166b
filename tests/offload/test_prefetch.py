"""Laws of reading ahead: it changes when bytes move, never which; each is useful, late, wasted or still unused."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.offload.cache as cache_module
from moe.offload.cache import ExpertCache
from moe.offload.layer_stats import LayerStats
from moe.offload.predictor import Transitions
from moe.offload.prefetch import LEAST_EXPECTED, Prefetcher, Trial, WasteBudget
from moe.offload.slot_map import State
from tests.offload.test_cache import NUM_EXPERTS, Broken, Slow, check_wave, make_store


def experts_of(layer):
    return st.lists(st.integers(0, NUM_EXPERTS[layer] - 1), unique=True, max_size=NUM_EXPERTS[layer])


def with_layer(*parts):
    return st.integers(0, 2).flatmap(lambda layer: st.tuples(st.just(layer), *(part(layer) for part in parts)))


# What a layer wants, what is asked of which layer while its first wave is in use, and after how many waves it stops.
STEPS = st.lists(st.tuples(with_layer(experts_of), with_layer(experts_of), st.sampled_from([0, 1, 2, 9, 9, 9])))


def check_law(cache):
    stats = cache.stats
    there = sum(cache.ahead.unused.values())
    assert sum(s.prefetch_bytes for s in stats) == there + sum(
        s.useful_bytes + s.late_bytes + s.wasted_bytes for s in stats
    )
    assert all(s.prefetch_bytes <= s.bytes_read for s in stats)


def settle(cache):
    """Waits for all speculation."""
    while cache.ahead.is_reading:
        cache.ahead.collect_one()
    cache.check()


class InParts(Broken):
    """Fails for the experts in `bad`, in the middle where it reads in parts; other threads may run between two."""

    def read_parts(self, layer, expert, out):
        nbytes = self.store.layouts[layer].nbytes
        whole = self.store.blobs[layer][expert]
        out.fill_(255)
        for begin in range(0, nbytes, 97):
            end = min(begin + 97, nbytes)
            out[begin:end] = whole[begin:end]
            if (layer, expert) in self.bad and begin >= 97:
                raise OSError(5, "the disk is gone", "shard-7")
            time.sleep(0)
            yield end


@pytest.mark.parametrize("kind", [Broken, InParts])
@pytest.mark.parametrize("limit", [0, 1 << 18])  # misses by readers, or in this thread
@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    num_slots=st.integers(1, 16),
    num_readers=st.integers(1, 3),
    bad=st.sets(with_layer(lambda layer: st.integers(0, NUM_EXPERTS[layer] - 1)), max_size=2),
)
def test_any_order_of_acquire_prefetch_and_errors(kind, limit, steps, num_slots, num_readers, bad):
    kept, cache_module.INLINE_READ_BYTES = cache_module.INLINE_READ_BYTES, limit
    try:
        store = kind(make_store(), bad)
        cache = ExpertCache(store, num_slots, num_readers=num_readers)
        asked = 0
        for (layer, wanted), (other, ahead), most in steps:
            got, waves = [], cache.acquire(layer, wanted)
            try:
                for wave in waves:
                    check_wave(cache, store, layer, wave)
                    cache.prefetch(other, ahead)
                    check_wave(cache, store, layer, wave)  # what is in use stays
                    got += wave.experts.tolist()
                    if len(got) >= most:
                        break
                else:
                    assert sorted(got) == sorted(wanted)
                    asked += len(wanted)
            except OSError:
                assert {layer} & {where for where, _ in bad}
            waves.close()
            cache.check()
            check_law(cache)
            assert not (cache.map.state == State.HELD).any()
        assert sum(s.hits + s.misses for s in cache.stats) >= asked
        settle(cache)
        check_law(cache)
        assert not (cache.map.state == State.LOADING).any()
        cache.close()
    finally:
        cache_module.INLINE_READ_BYTES = kept


class Gated(Slow):
    """Reads wait until they are let through, one permit a read; says when one begins."""

    def __init__(self):
        super().__init__(make_store(), 0)
        self.permits, self.begun = threading.Semaphore(0), threading.Semaphore(0)

    def read_into(self, layer, expert, out):
        with self.lock:
            self.reads.append((layer, expert))
        self.begun.release()
        assert self.permits.acquire(timeout=20)
        return self.store.read_into(layer, expert, out)

    def let(self, count):
        self.permits.release(count)

    def wait_begun(self, count=1):
        for _ in range(count):
            assert self.begun.acquire(timeout=20)


@pytest.fixture
def gated(monkeypatch):
    """A cache of three slots with one reader, whose reads the test lets through."""
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    store = Gated()
    cache = ExpertCache(store, 3, num_readers=1)
    yield store, cache
    store.let(100)
    cache.close()


def let_after(store, count, owner, name, *expected):
    """Permits `count` reads once a method of `owner` has been called: in this order however busy the machine is.

    expected: its arguments; none: whatever they are. Other calls pass.
    """
    method = getattr(owner, name)

    def then_let(*args, **kwargs):
        found = method(*args, **kwargs)
        if not expected or args == expected[0]:
            setattr(owner, name, method)
            store.let(count)
        return found

    setattr(owner, name, then_let)


def take(cache, layer, experts):
    return sorted(e for wave in cache.acquire(layer, experts) for e in wave.experts.tolist())


def test_what_arrived_is_a_hit_and_useful(gated):
    store, cache = gated
    store.let(2)
    cache.prefetch(1, [4, 2])
    settle(cache)
    assert take(cache, 1, [2]) == [2]
    stats, nbytes = cache.stats[1], store.layouts[1].nbytes
    assert (stats.hits, stats.misses, stats.useful_bytes, stats.late_bytes) == (1, 0, nbytes, 0)
    assert take(cache, 1, [2]) == [2]
    assert stats.useful_bytes == nbytes  # once
    assert store.reads == [(1, 4), (1, 2)]  # best first
    store.let(3)
    take(cache, 2, [0, 1, 2])
    assert stats.wasted_bytes == nbytes  # expert 4
    check_law(cache)


def test_a_miss_waits_for_the_read_that_is_under_way(gated):
    store, cache = gated
    cache.prefetch(1, [4])
    store.wait_begun()
    let_after(store, 1, cache, "_start_reads")
    assert take(cache, 1, [4]) == [4]
    assert store.reads == [(1, 4)]  # not twice
    stats = cache.stats[1]
    assert (stats.hits, stats.misses, stats.late_bytes) == (0, 1, store.layouts[1].nbytes)
    assert stats.stall_seconds > 0
    check_law(cache)


def test_misses_go_before_speculation(gated):
    store, cache = gated
    cache.prefetch(1, [4, 2])
    store.wait_begun()  # 4 is being read, 2 waits
    waves = cache.acquire(0, [3])
    let_after(store, 2, cache, "_start_reads")
    assert next(waves).experts.tolist() == [3]
    assert store.reads[:2] == [(1, 4), (0, 3)]
    waves.close()
    store.let(1)
    settle(cache)
    assert store.reads == [(1, 4), (0, 3), (1, 2)]


def test_what_has_not_begun_is_dropped_when_the_routing_is_known_or_becomes_a_miss(gated):
    store, cache = gated
    cache.prefetch(1, [4, 2, 0])
    store.wait_begun()
    let_after(store, 3, cache, "_start_reads")
    assert take(cache, 1, [0]) == [0]
    settle(cache)
    assert store.reads == [(1, 4), (1, 0)]
    assert cache.stats[1].prefetch_bytes == store.layouts[1].nbytes  # of 4; 0 was read as a miss
    assert cache.stats[1].late_bytes == 0


class GatedParts(Gated):
    """Experts that are read ahead come in three parts; each waits for a permit."""

    def read_parts(self, layer, expert, out):
        for nbytes in (100, 200, len(out)):
            with self.lock:
                self.reads.append((layer, expert, nbytes))
            self.begun.release()
            assert self.permits.acquire(timeout=20)
            out.copy_(self.store.blobs[layer][expert])
            yield nbytes


@pytest.fixture
def parts(monkeypatch):
    """The same, of a store that reads in parts."""
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    store = GatedParts()
    cache = ExpertCache(store, 3, num_readers=1)
    yield store, cache
    store.let(100)
    cache.close()


def test_a_miss_is_read_between_two_parts_of_speculation(parts):
    store, cache = parts
    cache.prefetch(1, [4])
    store.wait_begun()
    waves = cache.acquire(0, [3])
    let_after(store, 2, cache, "_start_reads")  # a part, and the miss
    assert next(waves).experts.tolist() == [3]
    waves.close()
    store.let(2)
    settle(cache)
    assert store.reads == [(1, 4, 100), (0, 3), (1, 4, 200), (1, 4, store.layouts[1].nbytes)]
    assert take(cache, 1, [4]) == [4]
    assert cache.stats[1].useful_bytes == store.layouts[1].nbytes
    check_law(cache)


def test_a_wrong_read_is_cancelled_between_two_parts_when_its_layer_misses(parts):
    store, cache = parts
    cache.prefetch(1, [4, 2])
    store.wait_begun()
    let_after(store, 2, cache, "_start_reads")  # a part of 4, and the miss
    assert take(cache, 1, [0]) == [0]
    settle(cache)
    assert store.reads == [(1, 4, 100), (1, 0)]
    assert (cache.resident_slots(1)[[4, 2]] < 0).all()
    stats = cache.stats[1]
    assert (stats.prefetch_bytes, stats.wasted_bytes, stats.bytes_read) == (100, 100, 100 + store.layouts[1].nbytes)
    check_law(cache)
    store.let(1)
    assert take(cache, 1, [4]) == [4]  # anew


def test_a_wrong_read_goes_on_where_nothing_is_missed(parts):
    store, cache = parts
    store.let(1)
    assert take(cache, 1, [0]) == [0]
    store.wait_begun()
    cache.prefetch(1, [4])
    store.wait_begun()
    assert take(cache, 1, [0]) == [0]
    store.let(3)
    settle(cache)
    assert cache.resident_slots(1)[4] >= 0
    check_law(cache)


def test_what_is_due_sooner_goes_first_and_a_newer_word_on_a_layer_replaces_the_older(gated):
    store, cache = gated
    store.let(1)
    take(cache, 0, [0])
    store.wait_begun()
    cache.prefetch(2, [1, 0])
    store.wait_begun()  # the reader has (2, 1)
    cache.prefetch(1, [4])
    store.let(1)
    store.wait_begun()  # and now (1, 4), which came last
    cache.prefetch(2, [2, 1])
    store.let(2)
    settle(cache)
    assert store.reads == [(0, 0), (2, 1), (1, 4), (2, 2)]  # and not (2, 0)
    assert cache.resident_slots(1)[4] >= 0


def test_speculation_takes_no_slot_that_is_held_and_gives_way_to_misses(gated):
    store, cache = gated
    store.let(2)
    held = cache.acquire(0, [1, 2])
    wave = next(held)
    while len(wave.experts) < 2:  # both in one wave
        held = cache.acquire(0, [1, 2])
        wave = next(held)
    cache.prefetch(1, [5, 6, 7])
    assert len(cache.ahead.coming) == 1  # the only slot left
    check_wave(cache, store.store, 0, wave)
    held.close()
    cache.prefetch(1, [5, 6, 7])
    assert len(cache.ahead.coming) == 3
    store.wait_begun(3)  # of which two were of layer 0
    let_after(store, 10, cache._readers, "take_back", ())  # of all layers: room for misses
    assert take(cache, 2, [0, 1, 2]) == [0, 1, 2]  # needs all slots
    settle(cache)
    assert (1, 7) not in store.reads
    check_law(cache)


def test_expected_experts_stay_while_others_can_go(gated):
    store, cache = gated
    store.let(100)
    take(cache, 0, [0, 1])
    cache.prefetch(1, [5])
    settle(cache)
    assert take(cache, 0, [2]) == [2]  # plain LFU would evict 5, which was never used
    assert cache.resident_slots(1)[5] >= 0
    take(cache, 1, [0])  # not 5: from here on it goes first
    assert cache.resident_slots(1)[5] < 0
    assert cache.stats[1].wasted_bytes == store.layouts[1].nbytes


def test_a_failed_speculative_read_is_told_by_the_miss(monkeypatch):
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    store = Broken(make_store(), {(1, 3)})
    cache = ExpertCache(store, 3)
    cache.prefetch(1, [3, 4])
    settle(cache)
    assert take(cache, 1, [4]) == [4]
    with pytest.raises(OSError, match=r"expert 3 of layer 1: .*the disk is gone"):
        take(cache, 1, [3])
    store.bad = set()
    assert take(cache, 1, [3]) == [3]
    check_law(cache)
    cache.close()
    with pytest.raises(ValueError, match=r"prefetch needs num_readers \(0\) >= 1"):
        ExpertCache(store, 3, num_readers=0).prefetch(1, [0])


def slow_transitions(tokens, num_experts, top_k):
    """The twin of `Transitions`: one token, one layer and one pair at a time, in float64."""
    num_layers = tokens.shape[1]
    start = np.log(top_k / (num_experts - top_k))
    weights = np.zeros((num_layers - 1, num_experts + 1, num_experts))
    weights[:, -1] = start
    squares = np.full(weights.shape, 0.1)
    said = []
    for step in tokens:
        for layer in range(num_layers - 1):
            on = [*(e for e in step[layer] if e >= 0), num_experts]
            p = 1 / (1 + np.exp(-weights[layer, on].sum(axis=0)))
            said.append(p)
            for e in on:
                for to in range(num_experts):
                    gradient = p[to] - (to in step[layer + 1])
                    squares[layer, e, to] += gradient**2
                    weights[layer, e, to] -= Transitions.RATE * gradient / np.sqrt(squares[layer, e, to])
    return said


def test_transitions_are_what_the_slow_twin_computes():
    rng = np.random.default_rng(0)
    tokens = np.stack([[rng.permutation(6)[:3] for _ in range(4)] for _ in range(30)])
    tokens[7, 1, 2] = -1
    predictor = Transitions([6] * 4, 3)
    said = [predictor.expected(layer, step[None, layer]) for step in tokens for layer in range(4)]
    assert all(p is None for p in said[3::4])
    expected = slow_transitions(tokens, 6, 3)
    np.testing.assert_allclose([p for p in said if p is not None], expected, rtol=1e-4)  # float32, 30 steps


def test_transitions_learn_a_rule_from_batches_of_any_size():
    """Expert e is always followed by e + 1 and e + 2 (modulo 8)."""
    rng = np.random.default_rng(0)
    predictor = Transitions([8] * 3, 2)
    for size in [0, 1, 63, 500] * 5:
        first = rng.integers(0, 8, size)
        ids = [np.stack([first + n, first + n + 1], axis=1) % 8 for n in range(3)]
        for layer in range(3):
            said = predictor.expected(layer, ids[layer])
            assert layer == 2 or said.shape == (8,)
    for e in range(8):
        said = predictor.expected(0, np.array([[e, (e + 1) % 8]]))
        assert set(np.argsort(-said)[:2]) == {(e + 1) % 8, (e + 2) % 8}
    many = predictor.expected(0, np.zeros((1000, 2), np.int64))
    np.testing.assert_allclose(many, 1000 * predictor.expected(0, np.zeros((1, 2), np.int64)), rtol=1e-4)


def test_a_forward_that_breaks_off_teaches_nothing():
    predictor = Transitions([4] * 3, 1)
    for ids in ([[1]], [[2]]):  # layer 0 twice: the first forward failed after it
        predictor.expected(0, np.array(ids))
    before = [w.copy() for w in predictor._weights]
    predictor.expected(1, np.array([[3], [0]]))  # another number of tokens
    assert all((a == b).all() for a, b in zip(before, predictor._weights))


@pytest.mark.parametrize(("gain", "pays"), [(0.9, True), (1.0, False), (1.1, False)])
def test_the_trial_compares_medians_of_turns(gain, pays):
    trial, decided, turns = Trial(), None, []
    while decided is None:
        turns.append(trial.is_on)
        noise = 50.0 if len(turns) % 10 == 3 else 0.0
        decided = trial.add((gain if trial.is_on else 1.0) + noise)
    assert decided is pays
    assert turns[: 2 * Trial.TURN] == [True] * Trial.TURN + [False] * Trial.TURN
    assert len(turns) <= 2 * Trial.SAMPLES * Trial.TURN / (Trial.TURN - 1) + 1


def read_ahead_of(prefetcher, guess, steps):
    """Forwards over three layers of eight, of which two experts are wanted in turn; what was guessed comes at once.

    guess: (step, the two that the next layer will want) -> expected tokens [8].
    """
    cache = prefetcher.cache
    for step in steps:
        prefetcher.begin_forward()
        wanted = [step % 6, (step + 1) % 6]
        for layer in range(3):
            take(cache, layer, wanted)
            if layer < 2 and prefetcher.is_asking:
                prefetcher.ask(layer + 1, guess(step, wanted))
                settle(cache)


def share_of(before, after):
    wasted, read = (
        sum(getattr(s, name) for s in after) - sum(getattr(s, name) for s in before)
        for name in ("wasted_bytes", "bytes_read")
    )
    return wasted / read


def copy_of(stats):
    return [LayerStats(**{name: getattr(s, name) for name in LayerStats.__slots__}) for s in stats]


@pytest.fixture
def prefetcher():
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    yield Prefetcher(cache, trial=False)
    cache.close()


def right_and_wrong(chance, sure):
    """One of the two that are wanted, and by `chance` one that nobody wants, expected `sure` and 0.9."""
    rng = np.random.default_rng(0)

    def guess(step, wanted):
        expected = np.zeros(8, np.float32)
        expected[wanted[1]] = 0.9
        expected[6 + step % 2] = sure if rng.random() < chance else 0
        return expected

    return guess


def test_what_is_wasted_has_a_budget(prefetcher):
    """Wrong guesses that look as sure as right ones: before, they were read for as long as as many were right."""
    before = copy_of(prefetcher.cache.stats)
    guess, leasts = right_and_wrong(1.0, 0.9), []
    for step in range(600):
        read_ahead_of(prefetcher, guess, [step])
        leasts.append(prefetcher.budget.least)
        assert step < 40 or share_of(before, prefetcher.cache.stats) <= WasteBudget.LIMIT
    assert share_of(before, prefetcher.cache.stats) > 0.8 * WasteBudget.EASY  # it is used
    stopped = np.array(leasts) > 0.9
    assert stopped.sum() > 50
    assert (stopped[:-1] & ~stopped[1:]).sum() > 5  # and it goes on


def test_what_is_less_sure_is_left_out_first(prefetcher):
    before = copy_of(prefetcher.cache.stats)
    read_ahead_of(prefetcher, right_and_wrong(1.0, 0.62), range(600))
    useful = sum(s.useful_bytes for s in prefetcher.cache.stats)
    assert share_of(before, prefetcher.cache.stats) <= WasteBudget.LIMIT
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    certain = Prefetcher(cache, trial=False)
    read_ahead_of(certain, right_and_wrong(0.0, 0.0), range(600))
    assert useful > 0.85 * sum(s.useful_bytes for s in cache.stats)
    cache.close()


def test_the_budget_stops_nothing_that_stays_below_it(prefetcher):
    guess, leasts = right_and_wrong(0.1, 0.9), set()
    for step in range(300):
        read_ahead_of(prefetcher, guess, [step])
        leasts.add(prefetcher.budget.least)
    assert sum(s.wasted_bytes for s in prefetcher.cache.stats) > 0
    assert leasts == {LEAST_EXPECTED}


def test_the_budget_by_hand():
    budget = WasteBudget(1)
    budget.judge(0, 0, 0)
    assert (budget.share, budget.least) == (0, LEAST_EXPECTED)
    budget.judge(100, 10, 4)
    assert (budget.share, budget.least) == (pytest.approx(0.14), LEAST_EXPECTED)
    budget.judge(100, 10, 4.5)
    assert budget.least == pytest.approx(LEAST_EXPECTED + np.log(2))  # half way
    budget.judge(100, 15, 0)
    assert budget.least == np.inf
    budget.judge(104, 15, 0)
    assert budget.share == pytest.approx(0.144, abs=1e-3)
    assert budget.least == np.inf  # not before it is easy
    budget.judge(120, 15, 0)
    assert budget.least == LEAST_EXPECTED
    budget.judge(10, 5, 0)  # counted anew
    assert budget.share == pytest.approx(20 / 130, abs=1e-3)
    budget.judge(10 + 4 * budget.HALF_LIFE, 5, 0)  # what is long ago weighs little
    assert budget.share < 0.001


def test_a_verdict_holds_for_a_term(monkeypatch):
    """Stopped because it was no faster, and tried again; what is wasted does not stop the trial."""
    monkeypatch.setattr(Prefetcher, "TERM", 5)
    monkeypatch.setattr(Trial, "SAMPLES", 0)
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    prefetcher = Prefetcher(cache)
    prefetcher._trial.seconds = {True: [2.0], False: [1.0]}
    stopped = []
    for _ in range(7):
        prefetcher.begin_forward()
        stopped.append(prefetcher.is_stopped)
    assert stopped == [True] * 6 + [False]
    assert prefetcher.verdict.startswith("stopped, it does not pay: ")
    assert prefetcher._trial is not None
    cache.close()
