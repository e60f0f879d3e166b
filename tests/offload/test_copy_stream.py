"""Copies into slots while others compute: nothing is read before it arrived, or overwritten while it is read."""

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

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

    def copy(self, after, target, source):
        if self.forgets == "reader before overwrite":
            after = LaneEvent()
            after.come()
        return super().copy(after, target, source)

    def wait(self, event):
        if self.forgets != "copy before use":
            super().wait(event)


def wrong_reads(streams, seed):
    """Fills slots by two readers and reads them by a computing queue, with nothing else to keep the order."""
    rng = random.Random(seed)
    found = []
    with closing(streams), ThreadPoolExecutor(2) as readers:
        slab = torch.zeros(SLOTS, NBYTES, dtype=torch.uint8)
        copies = SlotCopies(*slab.shape, streams)
        for step in range(STEPS):
            slots = np.array(rng.sample(range(SLOTS), rng.randint(1, 2)), np.int32)
            values = [1 + (2 * step + n) % 250 for n in range(len(slots))]
            reads = [
                readers.submit(copies.fill, s, slab[s], lambda out, v=v: len(out.fill_(v)))
                for s, v in zip(slots, values)
            ]
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


def test_a_cache_over_streams_gives_the_right_bytes(monkeypatch):
    monkeypatch.setattr(
        cache_module, "filling_of", lambda device, *sizes: SlotCopies(*sizes, LaneStreams(most_seconds=0.001))
    )
    monkeypatch.setattr(cache_module, "INLINE_READ_BYTES", 0)
    store, rng = make_store(), random.Random(0)
    cache = ExpertCache(store, 4)
    with closing(cache):
        for _ in range(30):
            layer = rng.randrange(3)
            wanted = rng.sample(range(store.num_experts[layer]), rng.randint(1, store.num_experts[layer]))
            nbytes, seen = store.layouts[layer].nbytes, []
            for wave in cache.acquire(layer, wanted):
                for expert, slot in zip(wave.experts.tolist(), wave.slots.tolist()):
                    assert torch.equal(cache.slab.of_layer(layer)[slot, :nbytes], store.blobs[layer][expert])
                    seen.append(expert)
            assert sorted(seen) == sorted(wanted)
            cache.check()


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


@pytest.mark.parametrize("budget", ["48", "12"])
def test_tokens_are_those_of_reads_straight_into_slots(budget, monkeypatch):
    with LLM(TINYMOE, config(budget)) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(["The old man", "A"], greedy(6))]
    monkeypatch.setattr(
        cache_module, "filling_of", lambda device, *sizes: SlotCopies(*sizes, LaneStreams(most_seconds=0.0003))
    )
    with LLM(TINYMOE, config(budget)) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(["The old man", "A"], greedy(6))] == wanted
