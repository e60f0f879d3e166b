"""The slot map's twin on the device: says what the map says, counts what is asked, keeps its experts in place."""

import numpy as np
import pytest
import torch

from moe.offload.cache import ExpertCache
from moe.offload.device_slots import DeviceSlots
from tests.host_syncs import HostSyncs
from tests.offload.test_cache import NUM_EXPERTS, make_store

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (63, 3)])
def test_says_what_the_map_says(shape):
    """Layers of unequal numbers of experts, experts without a slot, -1."""
    rng = np.random.default_rng(0)
    of_layer = [rng.permutation(n + 4)[:n].astype(np.int32) for n in (5, 1, 3)]
    of_layer[0][2] = -1
    twin = DeviceSlots(of_layer, CPU)
    for layer, slots in enumerate(of_layer):
        ids = rng.integers(-1, len(slots), shape)
        found = twin.look_up(layer, torch.from_numpy(ids))
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found, np.append(slots, -1)[ids])


def test_counts_distinct_experts_of_each_visit():
    """Also where layers come again and again, and inside inference mode as outside of it; reading changes nothing."""
    rng, twin = np.random.default_rng(1), DeviceSlots([np.arange(n, dtype=np.int32) for n in (7, 4)], CPU)
    visits, experts = [0, 0], [0, 0]
    for number, layer in enumerate([0, 1, 0, 0, 1, 1, 1, 0]):
        ids = rng.integers(-1, (7, 4)[layer], (number % 4, 3))
        with torch.inference_mode(bool(number % 2)):
            twin.look_up(layer, torch.from_numpy(ids))
        visits[layer] += 1
        experts[layer] += len(set(ids.flatten().tolist()) - {-1})
        for _ in range(2):
            assert [tuple(c) for c in twin.counts()] == [*zip(visits, experts)]
    twin.reset()
    assert [tuple(c) for c in twin.counts()] == [(0, 0)] * 2


def test_pinned_experts_stay_and_count_as_hits():
    store = make_store()
    cache = ExpertCache(store, 9)
    own = [[0, 2], [1], [2, 0]]
    assert cache.pin(own) is None  # they are not there
    cache.preload(own)
    twin = cache.pin(own)
    cache.check()
    where = [cache.resident_slots(layer)[which].tolist() for layer, which in enumerate(own)]
    assert cache.map.is_held.sum() == 5
    for layer, which in enumerate(own):
        assert twin.look_up(layer, torch.tensor([which])).tolist() == [where[layer]]
    assert [(s.hits, s.waves, s.misses) for s in cache.stats] == [(2, 1, 0), (1, 1, 0), (2, 1, 0)]
    for layer, count in enumerate(NUM_EXPERTS):  # four slots are left for all others
        for _ in cache.acquire(layer, [e for e in range(count) if e not in own[layer]]):
            cache.check()
    assert [cache.resident_slots(layer)[which].tolist() for layer, which in enumerate(own)] == where
    hits = [s.hits for s in cache.stats]
    cache.unpin()
    cache.check()
    assert [s.hits for s in cache.stats] == hits
    assert not cache.map.is_held.any()
    cache.unpin()
    cache.reset_stats()
    assert [s.hits for s in cache.stats] == [0, 0, 0]


def test_nothing_waits_for_the_host():
    twin = DeviceSlots([np.arange(5, dtype=np.int32)] * 3, CPU)
    ids = torch.tensor([[4, -1], [0, 2]])
    with HostSyncs() as found:
        for _ in range(3):
            for layer in range(3):
                twin.look_up(layer, ids)
    assert found.names == []
    with HostSyncs() as found:
        twin.counts()
    assert found.names == ["torch.Tensor.tolist"]
