"""Laws of reading ahead: it changes when bytes move, never which; each is useful, late, wasted or still unused."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.offload.cache as cache_module
from moe.offload.cache import ExpertCache
from moe.offload.slot_map import State
from tests.offload.test_cache import NUM_EXPERTS, Broken, Slow, check_wave, make_store
from tests.patience import PATIENCE_S


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
            if end < nbytes:
                yield end
        return nbytes


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
            assert not cache.map.is_held.any()
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
        assert self.permits.acquire(timeout=PATIENCE_S)
        return self.store.read_into(layer, expert, out)

    def let(self, count):
        self.permits.release(count)

    def wait_begun(self, count=1):
        for _ in range(count):
            assert self.begun.acquire(timeout=PATIENCE_S)


def cache_of(store, monkeypatch):
    """And a cache of three slots with one reader, whose reads the test lets through."""
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    cache = ExpertCache(store, 3, num_readers=1)
    yield store, cache
    store.let(100)
    cache.close()


@pytest.fixture
def gated(monkeypatch):
    """A store whose reads the test lets through, and its cache."""
    yield from cache_of(Gated(), monkeypatch)


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


def test_fewer_slots_do_not_wait_for_what_has_not_begun(gated):
    store, cache = gated
    cache.prefetch(1, [4, 2, 0])
    store.wait_begun()
    let_after(store, 1, cache.ahead, "_give_up")
    cache.limit.lower_to(1)
    assert store.reads == [(1, 4)]
    cache.check()
    check_law(cache)


class GatedParts(Gated):
    """Experts that are read ahead come in three parts; each waits for a permit."""

    def read_parts(self, layer, expert, out):
        for nbytes in (100, 200, len(out)):
            with self.lock:
                self.reads.append((layer, expert, nbytes))
            self.begun.release()
            assert self.permits.acquire(timeout=PATIENCE_S)
            out.copy_(self.store.blobs[layer][expert])
            if nbytes < len(out):
                yield nbytes
        return len(out)


@pytest.fixture
def parts(monkeypatch):
    """The same, of a store that reads in parts."""
    yield from cache_of(GatedParts(), monkeypatch)


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
