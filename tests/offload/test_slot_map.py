"""Laws of the slot map under any order of transitions, with slots of one size and of two."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.offload.slot_map import SlotMap, State

NUM_EXPERTS = (3, 5)
ROOMS = {1: (8,), 2: (4, 6)}
STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "fill", "drop", "evict", "hold", "release", "limit"]), st.integers(0, 30))
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, num_slots=st.sampled_from([(1,), (3,), (8,), (1, 1), (2, 4), (3, 5)]))
def test_any_order_keeps_the_law(steps, num_slots):
    slots = SlotMap(NUM_EXPERTS, num_slots, ROOMS[len(num_slots)], range(2) if len(num_slots) == 2 else None)
    waves = []
    for step, number in steps:
        loading = np.flatnonzero(slots.state == State.LOADING)
        absent = np.flatnonzero(slots.slot_of < 0)
        there = np.flatnonzero(slots.slot_of >= 0)
        layer = number % 2
        if step == "take" and slots.num_free(layer):
            begin = 0 if len(num_slots) == 1 else layer * ROOMS[2][0]
            assert begin <= slots.take(layer) < begin + slots.slots_of_run[layer % len(num_slots)]
        elif step == "fill" and len(loading) and len(absent):
            slot = int(loading[number % len(loading)])
            if len(num_slots) == 2:
                absent = absent[(absent >= NUM_EXPERTS[0]) == (slot >= ROOMS[2][0])]
            if len(absent):
                slots.fill(slot, int(absent[number % len(absent)]))
        elif step == "drop" and len(loading):
            slots.drop(int(loading[number % len(loading)]))
        elif step == "evict":
            keys = np.flatnonzero(slots.evictable(layer))
            slots.evict(keys[: number % (len(keys) + 1)])
        elif step == "hold" and len(there):
            waves.append(slots.slot_of[there[: 1 + number % len(there)]].copy())
            slots.hold(waves[-1])
        elif step == "release" and waves:
            slots.release(waves.pop(number % len(waves)))
        elif step == "limit" and not waves and not len(loading):
            resident = [now - free for now, free in zip(slots.slots_of_run, slots.free_of_run)]
            slots.raise_limit([max(1, now, number % room) for now, room in zip(slots.slots_of_run, slots.rooms)])
            before = slots.slot_of.copy()
            fewer = [max(1, kept, number % now) for kept, now in zip(resident, slots.slots_of_run)]
            moves = dict(slots.lower_limit(fewer))
            assert slots.slots_of_run == fewer
            assert [moves.get(slot, slot) for slot in before.tolist()] == slots.slot_of.tolist()
        slots.check()
        held = {s for wave in waves for s in wave.tolist()}
        assert set(np.flatnonzero(slots.is_held)) == held
        assert not slots.evictable(layer)[slots.key_of[list(held)]].any()


def _evict_held(slots):
    slots.hold(np.array([0], np.int32))
    slots.evict(np.array([6]))


WRONG = {
    "fill a free slot": lambda slots: slots.fill(1, 1),
    "evict a held expert": _evict_held,
    "drop a resident slot": lambda slots: slots.drop(0),
    "an expert twice": lambda slots: slots.fill(slots.take(1), 6),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_transition_is_refused(wrong):
    slots = SlotMap(NUM_EXPERTS, [4], [4])
    slots.fill(slots.take(1), 6)
    with pytest.raises(AssertionError):
        WRONG[wrong](slots)


def test_the_check_finds_a_broken_map():
    slots = SlotMap(NUM_EXPERTS, [4], [4])
    slots.fill(slots.take(0), 2)
    slots.check()
    slots.state[1] = State.RESIDENT
    with pytest.raises(AssertionError):
        slots.check()


def test_an_expert_goes_to_slots_of_its_own_size():
    slots = SlotMap(NUM_EXPERTS, [2, 4], [2, 4], [0, 1])
    with pytest.raises(AssertionError):
        slots.fill(slots.take(0), 6)  # an expert of layer 1
    assert [slots.num_lacking(own) for own in (None, [[0, 1], [0, 1, 2, 3, 4]], [[2], [1]])] == [2, 1, 0]


def test_more_slots_later():
    slots = SlotMap(NUM_EXPERTS, [2, 1], [3, 5], [0, 1])
    for layer, key in ((0, 0), (0, 1), (1, 4)):
        slots.fill(slots.take(layer), key)
    assert slots.free_of_run == [0, 0]
    slots.raise_limit([2, 3])
    slots.check()
    assert (slots.num_slots, slots.num_free(0), slots.num_free(1), slots.take(1)) == (5, 0, 2, 4)
    for wrong in ([1, 3], [2, 6]):
        with pytest.raises(ValueError, match=r"number of slots .* must be between"):
            slots.raise_limit(wrong)
