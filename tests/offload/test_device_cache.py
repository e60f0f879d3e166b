"""The device's cache is the host's: the same experts there after every visit, the same counts, scores and bytes."""

from contextlib import closing

import numpy as np
import pytest
import torch
from test_cache import make_store

from moe.offload.cache import ExpertCache
from moe.offload.device_cache import DeviceCache


def skewed(num_experts, visits, top_k, seed):
    """(layer, ids [T, K]): layers in turn, some experts liked more, some places empty, some visits of nobody."""
    rng = np.random.default_rng(seed)
    for visit in range(visits):
        layer = visit % len(num_experts)
        count = num_experts[layer]
        likes = rng.permutation(count) < count // 2
        p = (1.0 + 5 * likes) / (1.0 + 5 * likes).sum()
        tokens = rng.choice([0, 1, 1, 1, 2])
        ids = np.array([rng.choice(count, min(top_k, count), replace=False, p=p) for _ in range(tokens)], np.int64)
        ids = ids.reshape(tokens, min(top_k, count))
        ids[rng.random(ids.shape) < 0.1] = -1
        yield layer, ids


def replay(store, num_slots, policy, visits):
    """Both side by side, from a cache that is part full."""
    host, lent = (ExpertCache(store, num_slots, policy=policy, num_readers=0) for _ in range(2))
    with closing(host), closing(lent):
        for cache in (host, lent):
            for layer in (0, 1):
                for _ in cache.acquire(layer, [1, 2]):
                    pass
        device = lent.lend()
        assert isinstance(device, DeviceCache)
        num_misses = 0
        for layer, ids in visits:
            for _ in host.acquire(layer, np.unique(ids[ids >= 0])):
                pass
            slots = device.look_up(layer, torch.from_numpy(ids))
            assert slots.shape == ids.shape
            assert ((slots.numpy() >= 0) == (ids >= 0)).all()
            keys = device.keys_of_slots()
            assert set(keys[keys >= 0].tolist()) == set(host.map.key_of[host.map.key_of >= 0].tolist())
            rows = lent.slab.of_layer(layer)
            for expert, slot in zip(ids.ravel(), slots.ravel().tolist()):
                if expert >= 0:
                    assert torch.equal(rows[slot, : store.layouts[layer].nbytes], store.blobs[layer][expert])
        for mine, theirs in zip(lent.stats, host.stats, strict=True):
            assert (mine.hits, mine.misses, mine.bytes_read) == (theirs.hits, theirs.misses, theirs.bytes_read)
            num_misses += mine.misses
        with pytest.raises(AssertionError, match="the device keeps"):
            next(iter(lent.acquire(0, [0])))
        before = [(s.hits, s.misses) for s in lent.stats]
        lent.unpin()
        lent.check()
        assert [(s.hits, s.misses) for s in lent.stats] == before
        assert np.array_equal(lent.policy.scores, host.policy.scores)
        for layer in range(len(store.num_experts)):  # and goes on alike
            for cache in (host, lent):
                for _ in cache.acquire(layer, [0, 2]):
                    pass
                cache.check()
            assert set(lent.map.key_of.tolist()) == set(host.map.key_of.tolist())
        return num_misses


@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("num_slots", [8, 11])
def test_it_moves_the_experts_that_the_host_moves(policy, num_slots):
    store = make_store((5, 8, 3, 7))
    assert replay(store, num_slots, policy, skewed(store.num_experts, 60, 3, num_slots)) > 20


def test_on_recorded_routing(shared_data):
    ids = np.load(shared_data / "traces" / "deepseek_v2_lite_intent.npz")["expert_ids"]
    ids = ids[1000:1016, :6].astype(np.int64)
    store = make_store((64,) * ids.shape[1])
    visits = ((layer, token[layer][None]) for token in ids for layer in range(ids.shape[1]))
    assert replay(store, 16 * ids.shape[1], "lfu", visits) > 100


def test_what_it_cannot_keep():
    mixed, even = make_store(is_mixed=True), make_store()
    for store, num_slots, policy in ((mixed, 12, "lfu"), (even, 7, "lfu")):
        with closing(ExpertCache(store, num_slots, policy=policy, num_readers=0)) as cache:
            assert cache.lend() is None
            cache.check()
