"""Copies into slots while others compute: nothing is read before it arrived, or overwritten while it is read."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cache import make_store

import moe.offload.cache as cache_module
from moe.llm import LLM
from moe.offload.cache import ExpertCache
from moe.offload.copies import SlotCopies
from moe.offload.lanes import LaneEvent, LaneStreams
from tests.moe.moe_cases import TINYMOE, config, greedy

SLOTS, NBYTES, STEPS = 3, 64, 40


class Unordered(LaneStreams):
    """Without one of the two events: what the tests must see."""

    def __init__(self, seed, forgets):
        super().__init__(seed, compute=True)
        self.forgets = forgets

    def copy(self, after, target, source, *, ahead=False):
        return super().copy(() if self.forgets == "reader before overwrite" else after, target, source, ahead=ahead)

    def wait(self, event):
        if self.forgets != "copy before use":
            super().wait(event)


def wrong_reads(streams, seed):
    """Fills slots by two readers, or from where experts lie, and reads them by a computing queue; nothing else keeps
    the order."""
    rng = random.Random(seed)
    found = []
    held = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, NBYTES)
    with closing(streams), ThreadPoolExecutor(2) as readers:
        slab = torch.zeros(SLOTS, NBYTES, dtype=torch.uint8)
        copies = SlotCopies(*slab.shape, streams)
        for step in range(STEPS):
            slots = np.array(rng.sample(range(SLOTS), rng.randint(1, 2)), np.int32)
            values = [1 + (2 * step + n) % 250 for n in range(len(slots))]
            if step % 3:
                reads = [
                    readers.submit(copies.fill, s, slab[s], lambda out, v=v: len(out.fill_(v)), ahead=v % 4 == 0)
                    for s, v in zip(slots, values)
                ]
            else:
                reads = [readers.submit(copies.send, np.array([s]), slab[s], held[v]) for s, v in zip(slots, values)]
            for read in reads:
                read.result()
            copies.before_use(slots)
            for slot, value in zip(slots.tolist(), values):
                streams.run(lambda slot=slot, value=value: found.append((slab[slot] == value).all().item()))
            copies.after_use(slots)
        streams.run((end := LaneEvent()).come)
        end.synchronize()
    return len(found) - sum(found), len(found)


@pytest.mark.parametrize("seed", range(3))
def test_every_read_sees_its_own_copy(seed):
    wrong, all_reads = wrong_reads(LaneStreams(seed, compute=True), seed)
    assert all_reads >= STEPS
    assert wrong == 0


@pytest.mark.parametrize("forgets", ["reader before overwrite", "copy before use"])
def test_a_missing_event_is_seen(forgets):
    assert sum(wrong_reads(Unordered(seed, forgets), seed)[0] for seed in range(3)) > 0


class Elsewhere:
    """A store that must be read, whatever the one behind it holds."""

    def __init__(self, store):
        self.layouts, self.num_experts, self.read_into, self.close = (
            store.layouts,
            store.num_experts,
            store.read_into,
            store.close,
        )


def over_lanes(monkeypatch, lanes=None):
    """Caches that are made from now on copy by `lanes`."""
    monkeypatch.setattr(
        cache_module,
        "filling_of",
        lambda device, *sizes: SlotCopies(*sizes, lanes or LaneStreams(most_seconds=0.0005)),
    )
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)


def check_waves(cache, store, layer, wanted):
    """All of `wanted`, once, with the bytes that the store has."""
    nbytes, seen = store.layouts[layer].nbytes, []
    for wave in cache.acquire(layer, wanted):
        for expert, slot in zip(wave.experts.tolist(), wave.slots.tolist()):
            assert torch.equal(cache.slab.of_layer(layer)[slot, :nbytes], store.blobs[layer][expert])
            seen.append(expert)
    assert sorted(seen) == sorted(wanted)
    cache.check()


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("is_mixed", [True, False])
def test_a_cache_over_streams_gives_the_right_bytes(is_held, is_mixed, monkeypatch):
    """By buffers, and from where they lie in host memory; with reads ahead."""
    over_lanes(monkeypatch)
    store, rng = make_store(is_mixed=is_mixed), random.Random(0)
    with closing(ExpertCache(store if is_held else Elsewhere(store), 6, num_readers=3)) as cache:
        assert (cache.from_host is not None) == is_held
        for _ in range(30):
            layer, ahead = rng.randrange(3), rng.randrange(3)
            cache.prefetch(ahead, rng.sample(range(store.num_experts[ahead]), 2))
            check_waves(cache, store, layer, rng.sample(range(store.num_experts[layer]), rng.randint(1, 3)))


class CountedLanes(LaneStreams):
    """How many copies of each kind there were, and how many ahead at a time."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.sizes, self.ahead, self.most_ahead = [], [], 0

    def copy(self, after, target, source, *, ahead=False):
        event = super().copy(after, target, source, ahead=ahead)
        if ahead:
            self.ahead = [one for one in self.ahead if not one.has_come()] + [event]
            self.most_ahead = max(self.most_ahead, len(self.ahead))
        else:
            self.sizes.append(source.shape[0])
        return event


def test_neighbours_travel_together_and_hits_first(monkeypatch):
    lanes = CountedLanes()
    over_lanes(monkeypatch, lanes)
    store = make_store()
    with closing(ExpertCache(store, 16)) as cache:
        assert [len(memory) for memory in lanes.locked] == store.num_experts
        cache.preload()
        assert lanes.sizes == store.num_experts  # one copy a layer
    lanes = CountedLanes()
    over_lanes(monkeypatch, lanes)
    with closing(ExpertCache(store, 8)) as cache:
        check_waves(cache, store, 1, [6, 2, 5, 1])
        assert sorted(lanes.sizes) == [2, 2]
        waves = [(wave.experts.tolist(), list(lanes.sizes)) for wave in cache.acquire(1, [1, 7, 6, 0])]
        assert waves[0] == ([1, 6], [2, 2, 1, 1])  # the others are on their way while these are computed
        assert sorted(waves[1][0]) == [0, 7]


def test_one_copy_ahead_at_a_time(monkeypatch):
    lanes = CountedLanes(most_seconds=0.01)
    over_lanes(monkeypatch, lanes)
    store = make_store()
    with closing(ExpertCache(store, 16, num_readers=4)) as cache:
        cache.prefetch(1, [0, 1, 2, 3, 4, 5])
        while cache.ahead.coming:
            cache.ahead.collect_one()
        assert lanes.most_ahead == 1
        assert lanes.sizes == []
        check_waves(cache, store, 1, [0, 3, 5])


def test_a_read_that_fails_leaves_the_buffers_whole():
    with closing(LaneStreams()) as streams:
        slab = torch.zeros(2, 8, dtype=torch.uint8)
        copies = SlotCopies(*slab.shape, streams)

        def fail(out):
            raise OSError("gone")

        for slot in (0, 1, 0):
            with pytest.raises(OSError, match="gone"):
                copies.fill(slot, slab[slot], fail)
            assert copies.fill(slot, slab[slot], lambda out, slot=slot: int(out.fill_(slot + 5)[0])) == slot + 5
        copies.before_use(np.array([0, 1], np.int32))
        assert slab.tolist() == [[5] * 8, [6] * 8]


@pytest.mark.parametrize(("budget", "store"), [("48", "file"), ("12", "file"), ("12", "ram")])
def test_tokens_are_those_of_reads_straight_into_slots(budget, store, monkeypatch):
    with LLM(TINYMOE, config(budget)) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(["The old man", "A"], greedy(6))]
    over_lanes(monkeypatch)
    one = config(budget)
    one = replace(one, offload=replace(one.offload, store=store))
    with LLM(TINYMOE, one) as llm:
        assert (llm.engine.experts.cache.from_host is not None) == (store == "ram")
        assert [o.outputs[0].token_ids for o in llm.generate(["The old man", "A"], greedy(6))] == wanted
