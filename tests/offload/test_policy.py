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


@pytest.mark.parametrize(("layers", "experts", "num_slots"), [(6, 8, 12), (6, 8, 36), (26, 64, 416)])
def test_where_each_visit_wants_all_what_stays_is_nearly_what_the_oracle_keeps(layers, experts, num_slots):
    """Rates are equal then, and LRU's order is the worst: prompts, and batches of many sequences."""
    sizes = [experts] * layers
    accesses = [Access(n, np.arange(n * experts, (n + 1) * experts)) for _ in range(30) for n in range(layers)]
    oracle = simulate(Belady(sum(sizes), accesses), accesses, num_slots)
    assert simulate(Lru(sizes), accesses, num_slots) == 30 * sum(sizes)
    assert simulate(Lfu(sizes), accesses, num_slots) <= 1.02 * oracle


def test_what_is_sure_to_be_wanted_goes_by_its_layers_turn():
    policy = Lfu([2, 2, 2])
    for _ in range(200):
        for layer in range(3):
            policy.used(layer, np.array([2 * layer, 2 * layer + 1]))
    for layer, order in ((2, [4, 2, 0]), (0, [0, 4, 2]), (1, [2, 0, 4])):  # of the layer of now, of the one before, …
        policy.used(layer, np.array([2 * layer]))
        assert policy.victims(np.array([0, 2, 4]), 3).tolist() == [[0, 2, 4].index(key) for key in order]


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


def test_on_recorded_routing_of_many_sequences(shared_data):
    """Steps of 64 tokens: hits are nearly the oracle's with half of the experts resident; LRU hits next to none."""
    ids = np.load(shared_data / "traces" / "deepseek_v2_lite_intent.npz")["expert_ids"][1000 : 1000 + 16 * 64]
    each = ids.reshape(16, 64, 26, -1)
    steps = [
        Access(layer, np.unique(step[:, layer]).astype(np.int64) + 64 * layer) for step in each for layer in range(26)
    ]
    total = sum(len(step.keys) for step in steps)
    lru, ours, oracle = (
        total - simulate(policy, steps, 832) for policy in (Lru([64] * 26), Lfu([64] * 26), Belady(1664, steps))
    )
    assert lru < 0.1 * oracle
    assert ours > 0.9 * oracle
