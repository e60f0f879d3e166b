"""Policies against the oracle, and the oracle against every possible choice."""

from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.offload.policy import Access, Belady, Lfu, Lru, simulate, smallest

NUM_EXPERTS = [3, 4]


def accesses_of(steps) -> list[Access]:
    return [Access(layer, np.array(keys, np.int64) + [0, 3][layer]) for layer, keys in steps]


STEPS = st.lists(
    st.integers(0, 1).flatmap(
        lambda layer: st.tuples(st.just(layer), st.lists(st.integers(0, NUM_EXPERTS[layer] - 1), unique=True))
    ),
    max_size=40,
).map(accesses_of)
SHORT = st.lists(
    st.integers(0, 1).flatmap(
        lambda layer: st.tuples(
            st.just(layer), st.lists(st.integers(0, NUM_EXPERTS[layer] - 1), unique=True, max_size=3)
        )
    ),
    max_size=7,
).map(accesses_of)


class Random:
    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def used(self, layer, keys):
        pass

    def victims(self, keys, count):
        return self.random.permutation(len(keys))[:count]


def least_misses(accesses, num_slots) -> int:
    """Every order of the misses and every choice of victims (the slow twin of Belady)."""

    def after(resident, wanted, busy):
        """All states after `wanted` were brought in as `simulate` does it."""
        if not wanted:
            yield resident
            return
        evictable = resident - busy
        take = min(len(wanted), num_slots - len(resident) + len(evictable))
        evict = max(0, take - (num_slots - len(resident)))
        for now in {frozenset(p[:take]) for p in permutations(wanted)}:
            for gone in combinations(sorted(evictable), evict):
                yield from after((resident - set(gone)) | now, wanted - now, frozenset())

    @cache
    def best(time, resident):
        if time == len(accesses):
            return 0
        keys = frozenset(accesses[time].keys.tolist())
        states = set(after(resident, keys - resident, keys & resident))
        return len(keys - resident) + min(best(time + 1, state) for state in states)

    return best(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(accesses=SHORT, num_slots=st.integers(3, 6))  # no access is larger
def test_belady_is_the_least_possible(accesses, num_slots):
    assert simulate(Belady(7, accesses), accesses, num_slots) == least_misses(accesses, num_slots)


@settings(max_examples=200, deadline=None)
@given(accesses=STEPS, num_slots=st.integers(4, 7), seed=st.integers(0, 100))  # no access is larger
def test_no_policy_misses_less_than_belady(accesses, num_slots, seed):
    oracle = simulate(Belady(7, accesses), accesses, num_slots)
    distinct = len({int(k) for a in accesses for k in a.keys})
    total = sum(len(a.keys) for a in accesses)
    for policy in (Lru(NUM_EXPERTS), Lfu(NUM_EXPERTS), Random(seed)):
        misses = simulate(policy, accesses, num_slots)
        assert distinct <= oracle <= misses <= total
    if num_slots == 7:
        assert oracle == distinct


def test_lru_order():
    policy = Lru(NUM_EXPERTS)
    for access in accesses_of([(0, [0, 1]), (1, [0]), (0, [0])]):
        policy.used(*access)
    assert policy.victims(np.array([0, 1, 3, 2]), 4).tolist() == [3, 1, 2, 0]  # 2 was never used


def test_lfu_counts_visits_of_the_own_layer_and_ages():
    policy = Lfu(NUM_EXPERTS, half_life=4, recency=0)
    for access in accesses_of([(0, [0, 1]), (0, [0]), (0, [0])]):
        policy.used(*access)
    assert policy.victims(np.array([0, 1, 2]), 2).tolist() == [2, 1]
    for access in accesses_of([(1, [0])] * 50):  # other layers' visits do not age these
        policy.used(*access)
    assert policy.victims(np.array([0, 1]), 1).tolist() == [1]
    for access in accesses_of([(0, [1])] * 20):
        policy.used(*access)
    assert policy.victims(np.array([0, 1]), 1).tolist() == [0]
    recent = Lfu(NUM_EXPERTS, half_life=1000, recency=0.2)
    for access in accesses_of([(0, [0])] * 3 + [(0, [1])]):
        recent.used(*access)
    assert recent.victims(np.array([0, 1]), 1).tolist() == [0]  # the last visit weighs more than three before


def test_bad_arguments():
    for options in ({"half_life": 0}, {"half_life": float("nan")}, {"recency": -1}):
        with pytest.raises(ValueError, match="half_life"):
            Lfu(NUM_EXPERTS, **options)
    with pytest.raises(ValueError, match=r"num_slots \(0\)"):
        simulate(Lru([1]), [], 0)
    assert simulate(Lru([1]), [], 1) == 0
    assert smallest(np.array([3.0, 1.0, 1.0]), 1).tolist() == [1]
    assert smallest(np.array([3.0, 1.0, 1.0]), 3).tolist() == [1, 2, 0]


def test_on_recorded_routing(shared_data):
    """On a piece of each recorded trace the default beats LRU with an eighth of the experts resident."""
    for name in ("intent", "summary", "translation"):
        ids = np.load(shared_data / "traces" / f"deepseek_v2_lite_{name}.npz")["expert_ids"][1000:1040]
        steps = [Access(layer, ids[t, layer].astype(np.int64) + 64 * layer) for t in range(40) for layer in range(26)]
        oracle = simulate(Belady(1664, steps), steps, 208)
        assert oracle <= simulate(Lfu([64] * 26), steps, 208) < simulate(Lru([64] * 26), steps, 208), name
