"""Which expert is in which slot, and what each slot is doing: one array of states, one function that changes them.

    FREE ─take─▶ LOADING ─fill─▶ RESIDENT ⇄ HELD          drop: LOADING ─▶ FREE, evict: RESIDENT ─▶ FREE

An expert of a layer has a key, numbered through the model. The law that `check` asserts: every slot is in one state, a
slot has a key if and only if it is RESIDENT or HELD, and both maps are inverse to each other. Its twin on the device,
for code that must not ask the host, is device_slots.py.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Keys = npt.NDArray[np.int64]


class State(IntEnum):
    """Of a slot. LOADING: a read may still write to it. HELD: a wave uses it or it is pinned, it may not be evicted."""

    FREE = 0
    LOADING = 1
    RESIDENT = 2
    HELD = 3


_MOVES = {
    (State.FREE, State.LOADING),
    (State.LOADING, State.FREE),
    (State.LOADING, State.RESIDENT),
    (State.RESIDENT, State.HELD),
    (State.HELD, State.RESIDENT),
    (State.RESIDENT, State.FREE),
}


class SlotMap:
    """Slots 0 .. num_slots - 1 of a slab that has room for `room`; keys of all layers, num_experts[l] each.

    One thread changes it. Costs a few bytes per slot and expert.
    """

    def __init__(self, num_experts: Sequence[int], num_slots: int, room: int) -> None:
        self.num_slots, self.room = num_slots, room
        self.first_key: Keys = np.concatenate([[0], np.cumsum(num_experts)]).astype(np.int64)
        self.state = np.full(room, State.FREE, np.int8)
        self.key_of: Keys = np.full(room, -1, np.int64)
        self.slot_of: Ids = np.full(int(self.first_key[-1]), -1, np.int32)
        self.of_layer = [self.slot_of[a:b] for a, b in zip(self.first_key[:-1], self.first_key[1:])]
        self._holds = np.zeros(room, np.int16)  # waves that use a slot
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_loading = 0
        self.num_fills = 0  # so far: what is resident has changed if this has

    @property
    def num_free(self) -> int:
        return len(self._free)

    def key(self, layer: int, expert: int) -> int:
        return int(self.first_key[layer]) + expert

    def layer_of(self, key: int) -> int:
        return int(np.searchsorted(self.first_key, key, side="right")) - 1

    def take(self) -> int:
        """A free slot, LOADING from now on. There must be one."""
        slot = self._free.pop()
        self._move(slot, State.FREE, State.LOADING)
        self._num_loading += 1
        return slot

    def fill(self, slot: int, key: int) -> None:
        """What was read into the slot is there: the expert `key` is RESIDENT."""
        assert self.slot_of[key] < 0, (slot, key)
        self._move(slot, State.LOADING, State.RESIDENT)
        self._num_loading -= 1
        self.num_fills += 1
        self.slot_of[key], self.key_of[slot] = slot, key

    def drop(self, slot: int) -> None:
        """Nothing came of the read: the slot is FREE."""
        self._move(slot, State.LOADING, State.FREE)
        self._num_loading -= 1
        self._free.append(slot)

    def evict(self, keys: Keys) -> None:
        """These experts' slots are FREE. None may be held."""
        slots = self.slot_of[keys]
        self._move(slots, State.RESIDENT, State.FREE)
        self.slot_of[keys], self.key_of[slots] = -1, -1
        self._free += slots.tolist()

    def hold(self, slots: Ids) -> None:
        """A wave begins to use distinct slots that have experts."""
        first = slots[self._holds[slots] == 0]
        self._move(first, State.RESIDENT, State.HELD)
        self._holds[slots] += 1

    def release(self, slots: Ids) -> None:
        """The wave that held them has ended."""
        self._holds[slots] -= 1
        last = slots[self._holds[slots] == 0]
        self._move(last, State.HELD, State.RESIDENT)

    def evictable(self) -> npt.NDArray[np.bool_]:
        """Of all keys, those that are RESIDENT and not held."""
        can = self.slot_of >= 0
        can[self.key_of[self.state == State.HELD]] = False
        return can

    def raise_limit(self, num_slots: int) -> None:
        """More slots, as far as the slab has room. Raises ValueError for fewer, or for more than there is room for."""
        if not self.num_slots <= num_slots <= self.room:
            raise ValueError(
                f"the number of slots ({num_slots}) must be between what there are ({self.num_slots}) and what was "
                f"reserved ({self.room})"
            )
        self._free = [*range(num_slots - 1, self.num_slots - 1, -1), *self._free]
        self.num_slots = num_slots

    def check(self) -> None:
        """Asserts the law above; nothing is in a slot beyond the limit."""
        in_use = self.state[: self.num_slots]
        counts = np.bincount(in_use, minlength=4)
        has_key = np.flatnonzero(self.key_of >= 0)
        assert counts.sum() == self.num_slots, counts
        assert (self.state[self.num_slots :] == State.FREE).all(), "a slot beyond the limit is used"
        assert sorted(self._free) == np.flatnonzero(in_use == State.FREE).tolist(), "the list of free slots"
        assert counts[State.LOADING] == self._num_loading, (counts, self._num_loading)
        assert (np.flatnonzero(in_use >= State.RESIDENT) == has_key).all(), "a slot without an expert, or a full one"
        assert (self.slot_of[self.key_of[has_key]] == has_key).all(), "slot -> key -> slot"
        assert (self.slot_of >= 0).sum() == len(has_key), ((self.slot_of >= 0).sum(), len(has_key))
        assert ((self._holds > 0) == (self.state == State.HELD)).all(), "holds and states"

    def _move(self, slots: int | Ids, before: State, after: State) -> None:
        """The only place where a state changes."""
        assert (before, after) in _MOVES, (before, after)
        assert np.all(self.state[slots] == before), (slots, self.state[slots], before, after)
        self.state[slots] = after
