"""Laws of the slots: exactly once, the right bytes, pinned while used, whole after errors, for any number of slots."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe.offload.cache as cache_module
import moe.offload.readers as readers_module
from moe.offload.cache import ExpertCache
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.policy import Access, Lfu, Lru, simulate
from moe.offload.readers import Batch, Job
from moe.offload.slot_map import State
from moe.offload.stores import RamStore
from tests.patience import PATIENCE_S, until

NUM_EXPERTS = [5, 8, 3]


def make_store(num_experts=tuple(NUM_EXPERTS), has_bias=True, is_mixed=False) -> RamStore:
    """Experts of random bytes; is_mixed: of another size in each layer."""
    sites = [
        ExpertSite(
            module=str(n),
            num_experts=count,
            hidden_size=12,
            intermediate_size=7 + 100 * n * is_mixed,
            has_bias=has_bias,
        )
        for n, count in enumerate(num_experts)
    ]
    layouts = [ExpertLayout.of(site, MatrixFormat(torch.float32)) for site in sites]
    assert len({layout.nbytes for layout in layouts}) == (len(sites) if is_mixed else 1)
    generator = torch.Generator().manual_seed(0)
    blobs = [
        torch.randint(0, 256, (site.num_experts, layout.nbytes), dtype=torch.uint8, generator=generator)
        for site, layout in zip(sites, layouts)
    ]
    return RamStore(layouts, blobs)


class Slow:
    """A store whose reads take their time, in a random order of completion; counts them."""

    def __init__(self, store, seconds=0.002):
        self.store, self.layouts, self.num_experts = store, store.layouts, store.num_experts
        self.seconds, self.reads, self.running, self.lock = seconds, [], 0, threading.Lock()

    def read_into(self, layer, expert, out):
        with self.lock:
            self.reads.append((layer, expert))
        time.sleep(self.seconds * (1 + (expert * 7) % 3))
        return self.store.read_into(layer, expert, out)

    def close(self):
        pass


class Broken(Slow):
    """Fails for the experts in `bad`."""

    def __init__(self, store, bad):
        super().__init__(store, 0)
        self.bad = bad

    def read_into(self, layer, expert, out):
        out.fill_(255)  # a read that fails half way has written something
        if (layer, expert) in self.bad:
            raise OSError(5, "the disk is gone", "shard-7")
        return super().read_into(layer, expert, out)


@pytest.fixture(params=["inline", "readers"])
def threads(request, monkeypatch):
    """Small blobs are read in the calling thread unless the limit is lowered."""
    if request.param == "readers":
        monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    return request.param


def check_wave(cache, store, layer, wave):
    cache.check()
    nbytes = store.layouts[layer].nbytes
    blobs = (store if isinstance(store, RamStore) else store.store).blobs[layer]
    assert len(wave.experts) == len(wave.slots) > 0
    assert len(set(wave.slots.tolist())) == len(wave.slots)
    for expert, slot in zip(wave.experts, wave.slots):
        assert torch.equal(cache.slab.of_layer(layer)[slot, :nbytes], blobs[expert]), (layer, expert, slot)
        assert cache.resident_slots(layer)[expert] == slot


def run(cache, store, accesses):
    for layer, experts in accesses:
        got = []
        for wave in cache.acquire(layer, experts):
            check_wave(cache, store, layer, wave)
            got += wave.experts.tolist()
        assert sorted(got) == sorted(experts)  # each exactly once
        cache.check()
        assert not cache.map.is_held.any()


ACCESSES = st.lists(
    st.integers(0, 2).flatmap(
        lambda layer: st.tuples(
            st.just(layer), st.lists(st.integers(0, NUM_EXPERTS[layer] - 1), unique=True, max_size=NUM_EXPERTS[layer])
        )
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(accesses=ACCESSES, num_slots=st.integers(1, 16), policy=st.sampled_from(["lru", "lfu"]), is_mixed=st.booleans())
def test_any_accesses_any_slots(accesses, num_slots, policy, is_mixed):
    store = make_store(is_mixed=is_mixed)
    cache = ExpertCache(store, num_slots, policy=policy)
    run(cache, store, accesses)
    first = [0, 5, 13]
    keys = [Access(layer, np.array(experts, np.int64) + first[layer]) for layer, experts in accesses if experts]
    expected = 0
    for slots in cache.slab.runs:  # sizes do not compete with each other
        twin = {"lru": Lru, "lfu": Lfu}[policy](NUM_EXPERTS)
        expected += simulate(twin, [access for access in keys if access.layer in slots.layers], slots.num_slots)
    assert sum(s.misses for s in cache.stats) == expected
    assert sum(s.hits + s.misses for s in cache.stats) == sum(len(experts) for _, experts in accesses)


@settings(max_examples=25, deadline=None)
@given(accesses=ACCESSES, num_slots=st.integers(1, 16), num_readers=st.integers(1, 4), is_mixed=st.booleans())
def test_any_accesses_with_reader_threads(accesses, num_slots, num_readers, is_mixed):
    limit, cache_module.INLINE_READ_BYTES = cache_module.INLINE_READ_BYTES, 0
    try:
        store = Slow(make_store(is_mixed=is_mixed), 0.0001)
        cache = ExpertCache(store, num_slots, num_readers=num_readers)
        assert len(cache._readers.threads) == num_readers
        run(cache, store, accesses)
        cache.close()
    finally:
        cache_module.INLINE_READ_BYTES = limit


@pytest.mark.parametrize("num_slots", [1, 2, 5, 8, 15, 16])
def test_everything_in_every_layer(num_slots, threads):
    store = make_store()
    cache = ExpertCache(store, num_slots)
    run(cache, store, [(layer, list(range(n))) for layer, n in enumerate(NUM_EXPERTS)] * 3)
    if num_slots == 16:
        assert [s.misses for s in cache.stats] == NUM_EXPERTS
        assert not cache.map.num_free(0)
    cache.close()


class Stuck(Slow):
    """Its reads end when it is told."""

    def __init__(self, store):
        super().__init__(store, 0)
        self.answers = threading.Event()

    def read_into(self, layer, expert, out):
        self.answers.wait(PATIENCE_S)
        return super().read_into(layer, expert, out)


def test_a_disk_that_does_not_answer_is_told_and_left_behind(monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    monkeypatch.setattr(readers_module, "_SAY_S", 0.05)
    monkeypatch.setattr(readers_module, "_CLOSE_S", 0.05)
    store = Stuck(make_store())
    cache = ExpertCache(store, 4)
    words = "waits for experts since 0.1 s: the disk, or its file system, does not answer"  # the second
    told = threading.Thread(target=lambda: (until(lambda: words in caplog.text), store.answers.set()))
    told.start()
    run(cache, store, [(0, [1, 2])])  # all is as ever when it answers
    told.join(PATIENCE_S)
    store.answers.clear()
    cache._readers.put([Job(0, 3, cache.map.take(0), Batch())])
    cache.close()
    assert "a read has not ended after 0.05 s, and is left behind" in caplog.text
    store.answers.set()
    for thread in cache._readers.threads:
        thread.join(PATIENCE_S)


def test_hits_come_first_while_misses_are_read(monkeypatch):
    batches = []
    monkeypatch.setattr(cache_module, "Batch", lambda: batches.append(Batch()) or batches[-1])
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    store = Slow(make_store(), 0.02)
    cache = ExpertCache(store, 16)
    run(cache, store, [(1, [1, 4])])
    waves = cache.acquire(1, [0, 1, 2, 3, 4, 5])
    first = next(waves)
    assert first.experts.tolist() == [1, 4]
    until(lambda: batches[-1].done.qsize() == 4)  # in "the GEMM" all four misses arrive
    second = next(waves)
    assert sorted(second.experts.tolist()) == [0, 2, 3, 5]
    assert next(waves, None) is None
    assert cache.stats[1].waves == 3 or cache.stats[1].waves == 4  # 1 or 2 of the first acquire, then two
    assert cache.stats[1].hits == 2
    assert cache.stats[1].misses == 6
    assert cache.stats[1].bytes_read == 6 * store.layouts[1].nbytes
    assert cache.stats[1].stall_seconds > 0
    cache.close()


def test_pinned_slots_survive_everything_else(threads):
    """While a wave of layer 0 is in use, acquires of other layers cannot take its slots."""
    store = make_store()
    cache = ExpertCache(store, 4)
    run(cache, store, [(0, [2, 3])])
    held = cache.acquire(0, [2, 3])
    wave = next(held)
    partother = [e for w in cache.acquire(1, list(range(8))) for e in w.experts.tolist()]
    assert sorted(partother) == list(range(8))
    check_wave(cache, store, 0, wave)
    held.close()
    assert not cache.map.is_held.any()
    cache.close()


def test_closing_early_leaves_the_cache_whole(threads):
    store = Slow(make_store(), 0.003)
    for taken in (0, 1, 2):
        cache = ExpertCache(store, 6)
        run(cache, store, [(1, [0, 1])])
        waves = cache.acquire(1, [0, 1, 2, 3, 4, 5, 6])
        for _ in range(taken):
            next(waves)
        waves.close()
        cache.check()
        assert not cache.map.is_held.any()
        assert not (cache.map.state == State.LOADING).any()
        run(cache, store, [(2, [0, 1, 2]), (1, list(range(8)))])
        cache.close()


@pytest.mark.parametrize("num_slots", [1, 3, 6, 16])
def test_a_failed_read_is_named_and_leaves_the_cache_whole(num_slots, threads):
    store = Broken(make_store(), {(1, 3)})
    cache = ExpertCache(store, num_slots)
    run(cache, store, [(0, [0, 1, 2])])
    for _ in range(3):
        with pytest.raises(OSError, match=r"expert 3 of layer 1: .*the disk is gone.*shard-7"):
            run(cache, store, [(1, [0, 1, 2, 3, 4, 5])])
        cache.check()
        assert not cache.map.is_held.any()
        assert not (cache.map.state == State.LOADING).any()
        assert cache.resident_slots(1)[3] == -1
    run(cache, store, [(1, [0, 1, 2, 4]), (0, [0, 4])])  # the others still work
    store.bad = set()
    run(cache, store, [(1, [3])])
    cache.close()


def test_bad_calls():
    store = make_store()
    for bad in (0, -1, 17):
        with pytest.raises(ValueError, match=rf"num_slots \({bad}\) must be between 1 and .* \(16\)"):
            ExpertCache(store, bad)
    with pytest.raises(ValueError, match="policy"):
        ExpertCache(store, 3, policy="fifo")
    cache = ExpertCache(store, 3)
    with pytest.raises(ValueError, match=r"layer 0: experts \[1, 2, 1\] must be distinct"):
        list(cache.acquire(0, [1, 2, 1]))
    for bad in (-1, 5):
        with pytest.raises(IndexError):
            list(cache.acquire(0, [0, bad]))
    assert list(cache.acquire(0, [])) == []
    open_one = cache.acquire(0, [0, 1, 2, 3])
    next(open_one)
    with pytest.raises(ValueError, match="another acquire is still open"):
        list(cache.acquire(1, [0]))
    open_one.close()
    run(cache, store, [(1, [0, 1, 2, 3])])


def test_views_are_the_pieces_of_the_blobs():
    store = make_store()
    cache = ExpertCache(store, 16)
    cache.preload()
    assert not cache.map.num_free(0)
    assert sum(s.misses + s.hits for s in cache.stats) == 0
    for layer, count in enumerate(NUM_EXPERTS):
        slots = cache.resident_slots(layer)
        assert slots.dtype == torch.int32
        layout = store.layouts[layer]
        views = cache.views(layer)
        assert [*views] == ["gate_up", "down", "gate_up_bias", "down_bias"]
        for view, piece in zip(views.values(), layout.pieces):
            assert view.shape == (16, *piece.shape)
            assert view.untyped_storage().data_ptr() == cache.slab.memory.untyped_storage().data_ptr()
            expected = layout.view(store.blobs[layer], piece)
            assert torch.equal(view[slots.long()].view(torch.int32), expected.view(torch.int32))
        assert len(set(slots.tolist())) == count
    assert cache.slab.memory.data_ptr() % 4096 == 0
    assert [*ExpertCache(make_store(has_bias=False), 1).views(1)] == ["gate_up", "down"]


def test_preload_fills_only_free_slots():
    store = make_store()
    cache = ExpertCache(store, 7)
    run(cache, store, [(2, [1])])
    cache.preload()
    cache.check()
    assert not cache.map.num_free(0)
    assert cache.resident_slots(2)[1] >= 0
    assert cache.pin() is None
    cache.preload()
    assert [s.misses for s in cache.stats] == [0, 0, 1]
    cache.reset_stats()
    assert [s.misses for s in cache.stats] == [0, 0, 0]


def test_preload_of_some_makes_room_but_not_of_what_is_held():
    store = make_store()
    cache = ExpertCache(store, 6)
    run(cache, store, [(1, [0, 1, 2, 3]), (2, [0, 1])])
    own = [[1], [3, 4], [1, 2]]
    with closing(cache.acquire(2, [0])) as held:
        next(held)
        cache.preload(own)
        cache.check()
        assert cache.resident_slots(2)[0] >= 0
    for layer, which in enumerate(own):
        assert (cache.resident_slots(layer)[which] >= 0).all()
    before = [cache.resident_slots(layer).clone() for layer in range(3)]
    cache.preload(own)
    assert all(torch.equal(a, cache.resident_slots(layer)) for layer, a in enumerate(before))
    cache.close()


def test_all_resident_reads_nothing_more():
    store = Slow(make_store(), 0)
    cache = ExpertCache(store, 16)
    cache.preload()
    assert len(store.reads) == 16
    before = [cache.resident_slots(layer).clone() for layer in range(3)]
    run(cache, store, [(layer, list(range(n))) for layer, n in enumerate(NUM_EXPERTS)] * 5)
    assert len(store.reads) == 16
    assert all(torch.equal(a, cache.resident_slots(layer)) for layer, a in enumerate(before))
    assert all(s.waves == 5 for s in cache.stats)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_more_slots_later_serve_more(is_mixed):
    store = make_store(is_mixed=is_mixed)
    cache = ExpertCache(store, 6)
    everything = [(layer, list(range(n))) for layer, n in enumerate(NUM_EXPERTS)]
    run(cache, store, everything)
    before = cache.slot_bytes
    with pytest.raises(ValueError, match="must be between"):
        cache.limit.raise_to(17)
    cache.limit.raise_to(16)
    assert cache.slot_bytes == sum(n * layout.nbytes for n, layout in zip(NUM_EXPERTS, store.layouts)) > before
    run(cache, store, everything)
    assert cache.empty_bytes == 0
    cache.close()


@pytest.mark.parametrize("is_mixed", [False, True])
def test_fewer_slots_keep_what_the_policy_keeps_and_give_memory_back(is_mixed):
    store = make_store(is_mixed=is_mixed)
    cache = ExpertCache(store, 16)
    everything = [(layer, list(range(n))) for layer, n in enumerate(NUM_EXPERTS)]
    run(cache, store, everything)
    for num_slots in (11, 4, 4):
        cache.limit.lower_to(num_slots)
        assert cache.num_slots == num_slots
        cache.check()
        for layer, slot_of in enumerate(cache.map.of_layer):  # what stays is whole, wherever it went
            for expert in np.flatnonzero(slot_of >= 0):
                blob = store.blobs[layer][expert]
                assert torch.equal(cache.slab.of_layer(layer)[slot_of[expert], : len(blob)], blob)
        assert (cache.map.slot_of >= 0).sum() == num_slots
        first = 0
        for part, used, room in zip(cache.slab.runs, cache.map.slots_of_run, cache.map.rooms):
            assert not cache.slab.of_layer(part.layers[0])[first + used : first + room].any()
            first += room
        run(cache, store, everything)
    cache.limit.raise_to(16)
    run(cache, store, everything)
    assert cache.empty_bytes == 0
    if is_mixed:
        with pytest.raises(ValueError, match="must give each of 3 sizes of experts a slot"):
            cache.limit.lower_to(2)
    cache.close()


def test_which_experts_go_when_there_are_fewer_slots():
    store = make_store()
    cache = ExpertCache(store, 15, policy="lru")
    run(cache, store, [(layer, list(range(n))) for layer, n in enumerate(NUM_EXPERTS)])
    run(cache, store, [(0, [4]), (2, [0, 2]), (1, [7])])
    cache.limit.lower_to(4)
    assert [np.flatnonzero(slot_of >= 0).tolist() for slot_of in cache.map.of_layer] == [[4], [7], [0, 2]]
    cache.close()
