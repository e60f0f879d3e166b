"""Laws of the slot map under any order of transitions; more slots later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.offload.slot_map import SlotMap, State

NUM_EXPERTS = (3, 5)
STEPS = st.lists(st.tuples(st.sampled_from(["take", "fill", "drop", "evict", "hold", "release"]), st.integers(0, 30)))


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, num_slots=st.integers(1, 8))
def test_any_order_keeps_the_law(steps, num_slots):
    slots = SlotMap(NUM_EXPERTS, num_slots, 8)
    waves = []
    for step, number in steps:
        loading = np.flatnonzero(slots.state == State.LOADING)
        absent = np.flatnonzero(slots.slot_of < 0)
        there = np.flatnonzero(slots.slot_of >= 0)
        if step == "take" and slots.num_free:
            assert 0 <= slots.take() < num_slots
        elif step == "fill" and len(loading) and len(absent):
            slots.fill(int(loading[number % len(loading)]), int(absent[number % len(absent)]))
        elif step == "drop" and len(loading):
            slots.drop(int(loading[number % len(loading)]))
        elif step == "evict":
            keys = np.flatnonzero(slots.evictable())
            slots.evict(keys[: number % (len(keys) + 1)])
        elif step == "hold" and len(there):
            waves.append(slots.slot_of[there[: 1 + number % len(there)]].copy())
            slots.hold(waves[-1])
        elif step == "release" and waves:
            slots.release(waves.pop(number % len(waves)))
        slots.check()
        held = {s for wave in waves for s in wave.tolist()}
        assert set(np.flatnonzero(slots.state == State.HELD)) == held
        assert not slots.evictable()[slots.key_of[list(held)]].any()


def _evict_held(slots):
    slots.hold(np.array([0], np.int32))
    slots.evict(np.array([6]))


WRONG = {
    "fill a free slot": lambda slots: slots.fill(1, 1),
    "evict a held expert": _evict_held,
    "drop a resident slot": lambda slots: slots.drop(0),
    "an expert twice": lambda slots: slots.fill(slots.take(), 6),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_transition_is_refused(wrong):
    slots = SlotMap(NUM_EXPERTS, 4, 4)
    slots.fill(slots.take(), 6)
    with pytest.raises(AssertionError):
        WRONG[wrong](slots)


def test_the_check_finds_a_broken_map():
    slots = SlotMap(NUM_EXPERTS, 4, 4)
    slots.fill(slots.take(), 2)
    slots.check()
    slots.state[1] = State.RESIDENT
    with pytest.raises(AssertionError):
        slots.check()


def test_more_slots_later():
    slots = SlotMap(NUM_EXPERTS, 2, 8)
    for key in (0, 4):
        slots.fill(slots.take(), key)
    assert not slots.num_free
    slots.raise_limit(5)
    slots.check()
    assert (slots.num_free, slots.take()) == (3, 2)
    for wrong in (4, 9):
        with pytest.raises(ValueError, match=f"number of slots \\({wrong}\\) must be between"):
            slots.raise_limit(wrong)
