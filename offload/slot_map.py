"""Which expert is in which slot, and what each slot is doing: one array of states, one function that changes them.

    FREE ─take─▶ LOADING ─fill─▶ RESIDENT          drop: LOADING ─▶ FREE, evict: RESIDENT ─▶ FREE

What is RESIDENT may be held, by any number of waves; then it may not be evicted. Slots are of several sizes where
experts are (slot_runs.py): a layer's experts go to slots of its own run. An expert of a layer has a key, numbered
through the model. The law that `check` asserts: every slot is in one state, a slot has a key if and only if it is
RESIDENT, what is held is RESIDENT, and both maps are inverse to each other. Its twin on the device, for code that must
not ask the host, is device_slots.py.

A step asks for few experts of a layer: they are looked at one by one, through memoryviews, where an array takes ten
times as long for a number.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Keys = npt.NDArray[np.int64]


class Wave(NamedTuple):
    """Experts of a layer that are in memory now, and their slots: both int32 [n], in the same order."""

    experts: Ids
    slots: Ids

    @classmethod
    def of(cls, experts: Sequence[int], slots: Sequence[int]) -> "Wave":
        return cls(np.array(experts, np.int32), np.array(slots, np.int32))


class State(IntEnum):
    """Of a slot. LOADING: a read may still write to it."""

    FREE = 0
    LOADING = 1
    RESIDENT = 2


# Plain numbers: numpy asks a member of an enum for what it has not, at three times the price of the comparison.
_FREE, _LOADING, _RESIDENT = map(int, State)


class SlotMap:
    """Slots of all runs, numbered through; keys of all layers, num_experts[l] each.

    num_slots: of each run; rooms: for how many it has numbers. run_of_layer: where a layer's experts lie; None: there
    is one run. One thread changes it, and it alone asks what is held. Costs a few bytes per slot and expert.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        rooms: Sequence[int],
        run_of_layer: Sequence[int] | None = None,
    ) -> None:
        self.slots_of_run, self.rooms, self.room = list(num_slots), list(rooms), sum(rooms)
        self._first = np.concatenate([[0], np.cumsum(rooms)]).tolist()
        self._run_of_layer = [0] * len(num_experts) if run_of_layer is None else list(run_of_layer)
        self.num_experts = list(num_experts)
        self._run_of_key = np.repeat(self._run_of_layer, num_experts)
        self._run_of_slot = np.repeat(np.arange(len(rooms)), rooms)
        self.first_key: Keys = np.concatenate([[0], np.cumsum(num_experts)]).astype(np.int64)
        self._first_key: list[int] = self.first_key.tolist()
        self.state = np.full(self.room, _FREE, np.int8)
        self.key_of: Keys = np.full(self.room, -1, np.int64)
        self.slot_of: Ids = np.full(int(self.first_key[-1]), -1, np.int32)
        self.of_layer = [self.slot_of[a:b] for a, b in zip(self.first_key[:-1], self.first_key[1:])]
        self._state: memoryview[int] = memoryview(self.state)  # type: ignore[arg-type]
        self._key_of: memoryview[int] = memoryview(self.key_of)  # type: ignore[arg-type]
        self._slot_of: memoryview[int] = memoryview(self.slot_of)  # type: ignore[arg-type]
        self._waves: dict[int, Ids] = {}  # by identity: slots that are in use
        self._free = [[*range(first + n - 1, first - 1, -1)] for first, n in zip(self._first, num_slots)]
        self._num_loading = 0
        self.num_fills = 0  # so far: what is resident has changed if this has

    @property
    def num_slots(self) -> int:
        return sum(self.slots_of_run)

    @property
    def free_of_run(self) -> list[int]:
        return [len(free) for free in self._free]

    def num_free(self, layer: int) -> int:
        """Slots that experts of `layer` may take."""
        return len(self._free[self._run_of_layer[layer]])

    def in_one_run(self, layer: int, other: int) -> bool:
        """Whether the experts of both layers share slots."""
        return bool(self._run_of_layer[layer] == self._run_of_layer[other])

    def num_lacking(self, experts: Sequence[Sequence[int]] | None = None) -> int:
        """How many of these experts could not be in slots together; by layer, None: all of them."""
        counts = np.diff(self.first_key) if experts is None else np.array([len(of) for of in experts])
        wanted = np.bincount(self._run_of_layer, weights=counts, minlength=len(self._free))
        return int(np.maximum(wanted - np.array(self.slots_of_run), 0).sum())

    def absent(self, most: int, experts: Sequence[Sequence[int]] | None = None) -> Iterator[tuple[int, Ids]]:
        """Up to `most` of these experts that are in no slot, by layer, the last layer first. experts: by layer, in
        order; None: all."""
        if experts is None:
            keys = np.flatnonzero(self.slot_of < 0)
        else:
            of_all = np.concatenate([a + np.asarray(of, np.int64) for a, of in zip(self.first_key, experts)])
            keys = of_all[self.slot_of[of_all] < 0]
        keys = keys[-most:].astype(np.int32)
        layers = np.searchsorted(self.first_key, keys, side="right") - 1
        for layer in np.unique(layers)[::-1].tolist():
            yield layer, keys[layers == layer] - np.int32(self.first_key[layer])

    def tables(self, experts: Sequence[Sequence[int]] | None = None) -> tuple[list[Ids], Ids] | None:
        """Slots of these experts by layer, int32 [E] with -1 for others, and all of them; None if one is not there.

        experts: which, by layer; None: all of them.
        """
        tables, every = [], []
        for layer, slot_of in enumerate(self.of_layer):
            which = np.arange(len(slot_of)) if experts is None else np.asarray(experts[layer], np.int64)
            table = np.full(len(slot_of), -1, np.int32)
            table[which] = slot_of[which]
            tables.append(table)
            every.append(slot_of[which])
        slots = np.concatenate(every)
        return None if (slots < 0).any() else (tables, slots)

    def key(self, layer: int, expert: int) -> int:
        return self._first_key[layer] + expert

    def layer_of(self, key: int) -> int:
        return bisect_right(self._first_key, key) - 1

    def take(self, layer: int) -> int:
        """A free slot for an expert of `layer`, LOADING from now on. There must be one."""
        slot: int = self._free[self._run_of_layer[layer]].pop()
        self._move(slot, _FREE, _LOADING)
        self._num_loading += 1
        return slot

    def fill(self, slot: int, key: int) -> None:
        """What was read into the slot is there: the expert `key` is RESIDENT."""
        assert self._slot_of[key] < 0, (slot, key)
        assert len(self.rooms) == 1 or self._run_of_key[key] == self._run_of_slot[slot], (slot, key)
        self._move(slot, _LOADING, _RESIDENT)
        self._num_loading -= 1
        self.num_fills += 1
        self._slot_of[key], self._key_of[slot] = slot, key

    def drop(self, slot: int) -> None:
        """Nothing came of the read: the slot is FREE."""
        self._move(slot, _LOADING, _FREE)
        self._num_loading -= 1
        self._give_back(slot)

    def evict(self, keys: Keys) -> None:
        """These experts' slots are FREE. None may be held."""
        for key in keys.tolist():
            slot = self._slot_of[key]
            assert not any(slot in wave for wave in self._waves.values()), f"slot {slot} is held"
            self._move(slot, _RESIDENT, _FREE)
            self._slot_of[key] = self._key_of[slot] = -1
            self._give_back(slot)

    def hold(self, slots: Ids) -> None:
        """A wave begins to use slots that have experts: they stay until `release` of this very array."""
        assert id(slots) not in self._waves, "a wave is held already"
        self._waves[id(slots)] = slots

    def release(self, slots: Ids) -> None:
        """The wave that held them has ended."""
        del self._waves[id(slots)]

    @property
    def is_held(self) -> npt.NDArray[np.bool_]:
        """[slots]: whether a wave uses it, or it is pinned."""
        held = np.zeros(self.room, bool)
        for wave in self._waves.values():
            held[wave] = True
        return held

    def lend(self) -> None:
        """Someone else moves experts from now on: no slot is free, none may be evicted. Of a map with one run."""
        assert len(self.rooms) == 1, self.rooms
        assert not self._num_loading, "experts are being read"
        assert not self._waves, "experts are in use"
        self.hold(np.flatnonzero(self.state == _RESIDENT).astype(np.int32))
        for _ in range(self.num_free(0)):
            self.take(0)

    def take_back(self, key_of: Keys) -> None:
        """The slots that were lent have these experts now, -1 = none."""
        (lent,) = self._waves.values()
        self.release(lent)
        self.evict(self.key_of[lent])
        for slot in np.flatnonzero(self.state == _LOADING).tolist():
            self.drop(slot)
        for slot in [self.take(0) for _ in range(self.num_free(0))]:
            key = int(key_of[slot]) if slot < len(key_of) else -1
            if key < 0:
                self.drop(slot)
            else:
                self.fill(slot, key)

    def evictable(self, layer: int) -> npt.NDArray[np.bool_]:
        """Of all keys, those that are RESIDENT and not held, in slots that experts of `layer` may take."""
        can: npt.NDArray[np.bool_] = self.slot_of >= 0
        if len(self.rooms) > 1:
            can &= self._run_of_key == self._run_of_layer[layer]
        for wave in self._waves.values():
            can[self.key_of[wave]] = False
        return can

    def raise_limit(self, num_slots: Sequence[int]) -> None:
        """More slots of each run, as far as it has room. Raises ValueError for fewer, or for more than its room."""
        for run, (now, more, room) in enumerate(zip(self.slots_of_run, num_slots, self.rooms)):
            if not now <= more <= room:
                raise ValueError(
                    f"the number of slots ({more}) must be between what there are ({now}) and those reserved ({room})"
                )
            first = self._first[run]
            self._free[run] = [*range(first + more - 1, first + now - 1, -1), *self._free[run]]
            self.slots_of_run[run] = more

    def lower_limit(self, num_slots: Sequence[int]) -> list[tuple[int, int]]:
        """Fewer slots of each run; experts in slots beyond move to free ones. Returns (from, to) of what is to copy.

        Nothing may be held or loading, and so many of a run's slots must be free as it loses.
        """
        assert not self._num_loading, "experts are being read"
        moves: list[tuple[int, int]] = []
        for run, (now, fewer) in enumerate(zip(self.slots_of_run, num_slots)):
            assert 0 < fewer <= now, (run, now, fewer)
            end, last = self._first[run] + fewer, self._first[run] + now
            beyond = [slot for slot in range(end, last) if self._state[slot] != _FREE]
            self._free[run] = [slot for slot in self._free[run] if slot < end]
            for slot in beyond:
                key = self._key_of[slot]
                to = self.take(self.layer_of(key))
                self._move(slot, _RESIDENT, _FREE)
                self._key_of[slot] = self._slot_of[key] = -1
                self.fill(to, key)
                moves.append((slot, to))
            self.slots_of_run[run] = fewer
        return moves

    def check(self) -> None:
        """Asserts the law above; nothing is in a slot beyond the limit of its run."""
        within = np.arange(self.room) - np.array(self._first)[self._run_of_slot]
        in_use = within < np.array(self.slots_of_run)[self._run_of_slot]
        counts = np.bincount(self.state[in_use], minlength=3)
        assert (self.state[~in_use] == _FREE).all(), "a slot beyond the limit is used"
        has_key = np.flatnonzero(self.key_of >= 0)
        assert counts.sum() == self.num_slots, counts
        for run, free in enumerate(self._free):
            there = (self.state == _FREE) & (self._run_of_slot == run) & in_use
            assert sorted(free) == np.flatnonzero(there).tolist(), f"the list of free slots of run {run}"
        assert counts[_LOADING] == self._num_loading, (counts, self._num_loading)
        assert np.array_equal(np.flatnonzero(self.state == _RESIDENT), has_key), "full slots and those with experts"
        assert (self.slot_of[self.key_of[has_key]] == has_key).all(), "slot -> key -> slot"
        assert (self._run_of_key[self.key_of[has_key]] == self._run_of_slot[has_key]).all(), "a slot of another run"
        assert (self.slot_of >= 0).sum() == len(has_key), ((self.slot_of >= 0).sum(), len(has_key))
        assert (self.state[self.is_held] == _RESIDENT).all(), "a slot is held that has no expert"

    def _give_back(self, slot: int) -> None:
        self._free[int(self._run_of_slot[slot]) if len(self.rooms) > 1 else 0].append(slot)

    def _move(self, slot: int, before: int, after: int) -> None:
        """The only place where a state changes."""
        assert self._state[slot] == before, (slot, self._state[slot], before, after)
        self._state[slot] = after
