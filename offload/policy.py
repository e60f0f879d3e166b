"""Which experts to evict: LRU, the foreseen next use, and the oracle that knows the future.

A key is an expert of a layer, numbered through the whole model. An access is what one layer needs in one step: all its
keys are wanted at once, those that are resident are served first. All slots are shared by all layers, and layers are
visited in a cycle, so LRU tends to evict just what the coming layers need. Rates counted in visits of the key's own
layer do not have that fault; but where many tokens want nearly every expert, rates are nearly equal, and what counts is
whose layer comes last. On recorded routing (bench/bench_policies.py, docs/offload.md) both together are never worse
than rates alone, and near the oracle with many tokens.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]


class Access(NamedTuple):
    layer: int
    keys: Keys  # distinct


class Policy(Protocol):
    """Sees every access and chooses victims; knows nothing of slots."""

    def used(self, layer: int, keys: Keys) -> None:
        """`layer` needs `keys` now, resident or not."""

    def victims(self, keys: Keys, count: int) -> Keys:
        """Indices in `keys` (resident, not in use) of the `count` to evict, 1 <= count <= len(keys)."""


def smallest(scores: npt.NDArray[np.float64], count: int) -> Keys:
    """Indices of the `count` smallest scores, ties in favour of the first."""
    if count == 1:
        return np.array([scores.argmin()])
    return np.argsort(scores, kind="stable")[:count]


class Lru:
    """Evicts the keys whose last use is longest ago. kernels/slot_lookup.py follows scores, layer_of, rule and now."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self.scores, self.layer_of = np.zeros((2, sum(num_experts))), _layers_of(num_experts)
        self._last = self.scores[0]
        self.rule, self.now = (1.0, 1.0, 0.0, 0.0, 1.0), 0.0

    def used(self, layer: int, keys: Keys) -> None:
        self.now += 1
        self._last[keys] = self.now

    def victims(self, keys: Keys, count: int) -> Keys:
        return smallest(self._last[keys], count)


class Lfu:
    """Evicts the keys whose next use is foreseen last, by an aged count of uses and by when their layer comes next.

    If a key's layer comes after a part `far` of a cycle over all layers (0: next), and each visit uses the key with
    likelihood p, that is in far + 1/p - 1 cycles. p is the rate of use, where a visit of the layer loses half its
    weight in `half_life` visits, plus `recency` x 2^-(visits since the last use), as tokens that follow each other
    share experts more than their rates say, at most 1. Counts of evicted keys are kept. `used` costs O(experts of the
    layer). scores, layer_of, rule, now: as of `Lru`.
    """

    def __init__(self, num_experts: Sequence[int], *, half_life: float = 64.0, recency: float = 0.2) -> None:
        if not (half_life > 0 and recency >= 0):
            raise ValueError(f"half_life ({half_life}) must be > 0 visits and recency ({recency}) >= 0")
        first = [0, *np.cumsum(num_experts).tolist()]
        self.scores = scores = np.zeros((2, first[-1]))
        self._rates, self._recent = scores
        self.layer_of, self._num_layers, self._at = _layers_of(num_experts), len(num_experts), 0
        self._of_layer = [scores[:, a:b] for a, b in pairwise(first)]
        aged = 0.5 ** (1.0 / half_life)
        self._ageing = np.array([[aged], [0.5]])
        self._gain, self._recency = 1.0 - aged, recency
        self.rule, self.now = (aged, 0.5, self._gain, recency, 0.0), 0.0

    def used(self, layer: int, keys: Keys) -> None:
        self._at = layer
        scores = self._of_layer[layer]
        np.multiply(scores, self._ageing, out=scores)
        self._rates[keys] += self._gain
        self._recent[keys] = self._recency

    def victims(self, keys: Keys, count: int) -> Keys:
        likely = np.minimum(self._rates[keys] + self._recent[keys], 1.0)
        far = (self.layer_of[keys] - (self._at + 1)) % self._num_layers / self._num_layers
        return smallest(likely / (1.0 + likely * far), count)  # 1 / (far + 1 / likely)


def _layers_of(num_experts: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.repeat(np.arange(len(num_experts), dtype=np.int32), num_experts)


def named_policy(name: str, num_experts: Sequence[int]) -> Policy:
    """ "lru" or "lfu"; ValueError for another."""
    if name not in ("lru", "lfu"):
        raise ValueError(f"policy ({name!r}) must be 'lru' or 'lfu'")
    return Lru(num_experts) if name == "lru" else Lfu(num_experts)


class Belady:
    """Evicts the keys that are needed again last; knows all accesses beforehand, and must then see each of them."""

    def __init__(self, num_keys: int, accesses: Sequence[Access]) -> None:
        self._accesses = accesses
        self._next = np.full(num_keys, len(accesses), np.float64)
        self._next_of = [self._next] * len(accesses)
        for time in range(len(accesses) - 1, -1, -1):
            self._next_of[time] = self._next[accesses[time].keys]
            self._next[accesses[time].keys] = time
        self._now = 0

    def used(self, layer: int, keys: Keys) -> None:
        assert np.array_equal(keys, self._accesses[self._now].keys), self._now
        self._next[keys] = self._next_of[self._now]
        self._now += 1

    def victims(self, keys: Keys, count: int) -> Keys:
        return smallest(-self._next[keys], count)


def simulate(policy: Policy, accesses: Sequence[Access], num_slots: int) -> int:
    """Misses of `policy` over `accesses` with `num_slots` slots that are empty at first: the sum of `misses_of`."""
    return sum(misses_of(policy, accesses, num_slots))


def misses_of(policy: Policy, accesses: Sequence[Access], num_slots: int) -> list[int]:
    """Misses of each access.

    Follows `ExpertCache` without reader threads: hits are in use while as many misses as fit beside them are read; what
    is left evicts any of these. With `Belady` it is the least number of misses that any policy can have, provided that
    no access is larger than `num_slots`.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots ({num_slots}) must be >= 1")
    num_keys = 1 + max((int(a.keys.max()) for a in accesses if len(a.keys)), default=0)
    is_resident, in_use = np.zeros(num_keys, bool), np.zeros(num_keys, bool)
    num_resident = 0
    misses: list[int] = []
    for layer, keys in accesses:
        policy.used(layer, keys)
        hit = is_resident[keys]
        wanted = keys[~hit]
        misses.append(len(wanted))
        busy = keys[hit]
        while len(wanted):
            in_use[busy] = True
            evictable = np.flatnonzero(is_resident & ~in_use)
            in_use[busy] = False
            take = min(len(wanted), num_slots - num_resident + len(evictable))
            evict = take - (num_slots - num_resident)
            if evict > 0:
                is_resident[evictable[policy.victims(evictable, evict)]] = False
                num_resident -= evict
            is_resident[wanted[:take]] = True
            busy, wanted = busy[:0], wanted[take:]
            num_resident += take
    return misses
