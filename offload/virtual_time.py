"""Reading ahead in virtual time: what slots, a disk of one rate and guesses would take, without running a model.

    a layer's visit:  attention │ routing known │ hits computed │ misses as they arrive ─▶ next layer
    the disk:         what was guessed … │ misses first │ what is guessed now, best first

The twin of the cache for questions of time on a machine that is not idle, or before there is a model: one reader, reads
one after another, a read that has begun is finished. What the real cache does beside it (threads, waves) costs what
`guess` says and no more, so it is a bound for it, not a promise.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe.offload.policy import Access, Keys, Policy
from moe.offload.predictor import Floats
from moe.offload.prefetch import WasteBudget, likely


class Costs(NamedTuple):
    """Seconds: to read one expert; of a layer before its routing is known; to compute one expert that is there.

    guess: to guess and to ask for what was guessed, before the layer's experts. first: share of an expert, of its bytes
    and of its work, that could be computed while the rest is read; the cache waits for all of it, which is 0.
    """

    read: float
    layer: float
    expert: float
    guess: float = 0.0
    first: float = 0.0


class Guess(NamedTuple):
    """Distinct keys that coming layers will want, best first. expected: how many tokens will want each, it seems.

    What infinitely many want is read ahead whatever was wasted before.
    """

    keys: Keys
    expected: Floats

    @staticmethod
    def of(expected: Floats, first_key: int) -> "Guess":
        """What the cache would be asked for at most. expected: of one layer, [E]; first_key: of its experts."""
        experts = likely(expected).astype(np.int64)
        return Guess(experts + first_key, expected[experts])

    @staticmethod
    def sure(keys: Keys) -> "Guess":
        return Guess(keys, np.full(len(keys), np.inf, np.float32))

    @staticmethod
    def joined(guesses: "Sequence[Guess]") -> "Guess":
        """Of several layers, what is due sooner first; of none too."""
        none = Guess.sure(np.zeros(0, np.int64))
        return Guess(*(np.concatenate(parts) for parts in zip(none, *guesses)))


@dataclass(slots=True)
class Replay:
    """What it took. Counts are of experts. read: on demand; ahead: before anyone asked."""

    seconds: float = 0.0
    stall: float = 0.0
    read: int = 0
    ahead: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    hits: int = 0
    misses: int = 0


class _Disk:
    """One read at a time. arrived: what has come and nobody has collected; pending: guesses that have not begun."""

    def __init__(self, read: float) -> None:
        self.read, self.free_at = read, 0.0
        self.pending: deque[tuple[int, float]] = deque()  # key, asked for at
        self.coming: dict[int, float] = {}  # key -> when it arrives; read ahead

    def begin_until(self, now: float) -> int:
        """Starts what is asked for and has its turn before `now`; returns how many."""
        before = len(self.pending)
        while self.pending and max(self.free_at, self.pending[0][1]) < now:
            key, asked = self.pending.popleft()
            self.free_at = max(self.free_at, asked) + self.read
            self.coming[key] = self.free_at
        return before - len(self.pending)


class _Slots:
    """Who has a slot: resident, or being read into it."""

    def __init__(self, policy: Policy, num_keys: int, num_slots: int) -> None:
        self.policy, self.num_free = policy, num_slots
        self.is_resident = np.zeros(num_keys, bool)
        self.unused: set[int] = set()  # read ahead, not asked for yet

    def arrived(self, key: int) -> None:
        """It was read ahead."""
        self.is_resident[key] = True
        self.unused.add(key)

    def take(self, count: int, busy: Keys, replay: Replay) -> int:
        """Makes room for up to `count`; `busy` keys stay. Returns how many slots were had."""
        if count > self.num_free:
            can = self.is_resident.copy()
            can[busy] = False
            keys = np.flatnonzero(can)
            evict = min(count - self.num_free, len(keys))
            if evict:
                victims = keys[self.policy.victims(keys, evict)]
                self.is_resident[victims] = False
                self.num_free += evict
                gone = self.unused.intersection(victims.tolist())
                replay.wasted += len(gone)
                self.unused -= gone
        had = min(count, self.num_free)
        self.num_free -= had
        return had


def replay(
    accesses: Sequence[Access],
    guesses: Sequence[Guess] | None,
    policy: Policy,
    num_slots: int,
    costs: Costs,
    *,
    warm: int = 0,
) -> Replay:
    """All visits in order; what is returned is of those from number `warm` on.

    guesses: by visit, known when its routing is; they take slots that no other guess of the same visit and no key in
    use has, and waste no more than the cache's budget lets them. No access may be larger than num_slots.
    """
    every = [*(keys for _, keys in accesses), *(guess.keys for guess in guesses or ())]
    num_keys = 1 + max((int(keys.max()) for keys in every if len(keys)), default=0)
    slots, disk = _Slots(policy, num_keys, num_slots), _Disk(costs.read)
    total, before, now, budget = Replay(), Replay(), 0.0, WasteBudget(1)
    for visit, (layer, keys) in enumerate(accesses):
        if visit == warm:
            before = Replay(**{name: getattr(total, name) for name in Replay.__slots__})
            before.seconds = now
        if visit and layer <= accesses[visit - 1].layer:  # a forward begins
            budget.judge(total.read + total.ahead, total.wasted, len(slots.unused))
        now += costs.layer
        total.ahead += disk.begin_until(now)
        slots.num_free += len(disk.pending)  # what has not begun gives its slot back
        disk.pending.clear()
        for key in [key for key, at in disk.coming.items() if at <= now]:
            del disk.coming[key]
            slots.arrived(key)
        policy.used(layer, keys)
        there = slots.is_resident[keys]
        hits, absent = keys[there], keys[~there].tolist()
        late = [key for key in absent if key in disk.coming]
        missing = [key for key in absent if key not in disk.coming]
        served = slots.unused.intersection(hits.tolist())
        slots.unused -= served
        total.useful, total.late = total.useful + len(served), total.late + len(late)
        total.hits, total.misses = total.hits + len(hits), total.misses + len(absent)
        arrivals = [disk.coming.pop(key) for key in late]
        had = slots.take(len(missing), keys, total)
        while had < len(missing):  # wrong guesses are being read into all that is left
            key = min(disk.coming, key=disk.coming.__getitem__)
            total.stall += max(0.0, disk.coming[key] - now)
            now = max(now, disk.coming.pop(key))
            slots.arrived(key)
            had += slots.take(len(missing) - had, keys, total)
        for _ in missing:
            disk.free_at = max(disk.free_at, now) + costs.read
            arrivals.append(disk.free_at)
        total.read += len(missing)
        if guesses is not None:
            now += costs.guess
            guess, expected = guesses[visit]
            _ask(guess[expected >= budget.least], keys, slots, disk, total, now)
        now += len(hits) * costs.expert
        for at in sorted(arrivals):
            for come, work in ((at - (1 - costs.first) * costs.read, costs.first), (at, 1 - costs.first)):
                if work:
                    total.stall += max(0.0, come - now)
                    now = max(now, come) + work * costs.expert
        slots.is_resident[absent] = True
    total.seconds = now
    return Replay(**{name: getattr(total, name) - getattr(before, name) for name in Replay.__slots__})


def _ask(guess: Keys, keys: Keys, slots: _Slots, disk: _Disk, total: Replay, now: float) -> None:
    """Queues what of a guess is neither there nor coming, as far as slots go."""
    coming = np.fromiter(disk.coming, np.int64, len(disk.coming))
    asked = {*keys.tolist(), *disk.coming}
    wanted = [int(k) for k in guess if not slots.is_resident[k] and k not in asked]
    had = slots.take(len(wanted), np.concatenate([keys, guess, coming]), total)
    disk.pending.extend((key, now) for key in wanted[:had])
