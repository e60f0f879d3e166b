"""Virtual time: counts are those of `misses_of`, guesses move time and bytes but never what is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.offload.policy import Access, Belady, Lfu, Lru, misses_of
from moe.offload.predictor import Transitions
from moe.offload.prefetch import LEAST_EXPECTED, WasteBudget, likely
from moe.offload.virtual_time import Costs, Guess, replay

E, LAYERS = 5, 3
COSTS = Costs(read=1.0, layer=0.5, expert=0.25)
CHOICES = st.lists(st.lists(st.integers(0, E - 1), min_size=1, max_size=3, unique=True), min_size=1, max_size=40)


def accesses_of(choices):
    return [Access(n % LAYERS, np.array(sorted(c), np.int64) + E * (n % LAYERS)) for n, c in enumerate(choices)]


@settings(max_examples=80, deadline=None)
@given(
    choices=CHOICES, guesses=CHOICES, num_slots=st.integers(3, E * LAYERS), read=st.sampled_from([0.0, 0.1, 1.0, 9.0])
)
def test_laws(choices, guesses, num_slots, read):
    accesses, costs = accesses_of(choices), Costs(read, 0.5, 0.25)
    asked = sum(len(a.keys) for a in accesses)
    for make in (lambda: Lfu([E] * LAYERS), lambda: Lru([E] * LAYERS), lambda: Belady(E * LAYERS, accesses)):
        plain = replay(accesses, None, make(), num_slots, costs)
        assert plain.misses == plain.read == sum(misses_of(make(), accesses, num_slots))
        assert plain.hits + plain.misses == asked
        assert (plain.ahead, plain.useful, plain.late, plain.wasted) == (0, 0, 0, 0)
        work = len(accesses) * costs.layer + asked * costs.expert
        assert plain.seconds == pytest.approx(work + plain.stall)
    some = [Guess.sure(np.array(sorted(g), np.int64) + E * ((n + 1) % LAYERS)) for n, g in enumerate(guesses)]
    some = (some * len(accesses))[: len(accesses)]
    ahead = replay(accesses, some, Lfu([E] * LAYERS), num_slots, costs)
    assert ahead.hits + ahead.misses == asked
    assert ahead.read + ahead.late == ahead.misses
    assert ahead.useful + ahead.late + ahead.wasted <= ahead.ahead
    assert ahead.seconds == pytest.approx(work + ahead.stall)
    assert read > 0 or ahead.stall == 0


def test_by_hand():
    """Two layers, one expert each that changes every time, slots for two: each visit waits a whole read, or a half."""
    accesses = [Access(n % 2, np.array([E * (n % 2) + n // 2], np.int64)) for n in range(8)]
    plain = replay(accesses, None, Lru([E, E]), 2, COSTS)
    assert plain.seconds == pytest.approx(8 * (0.5 + 1.0 + 0.25))
    known = [Guess.sure(a.keys if a.layer else a.keys[:0]) for a in accesses[1:]] + [Guess.joined([])]
    ahead = replay(accesses, known, Lru([E, E]), 2, COSTS)
    # Layer 1's read begins when layer 0's has ended; its expert's 0.25 and layer 1's 0.5 hide three quarters of it.
    assert ahead.late == 4
    assert ahead.seconds == pytest.approx(4 * (0.5 + 1.0 + 0.25) + 4 * (0.5 + 0.25 + 0.25))
    # Two thirds of an expert's 0.25 are computed while its last third is read.
    parts = replay(accesses, None, Lru([E, E]), 2, COSTS._replace(first=2 / 3))
    assert parts.seconds == pytest.approx(8 * (0.5 + 1.0 + 0.25 / 3))
    assert parts.stall == pytest.approx(8 * (1.0 - 0.5 / 3))
    later = replay(accesses, known, Lru([E, E]), 2, COSTS, warm=4)
    assert (later.late, later.seconds) == (2, pytest.approx(ahead.seconds / 2))


def test_a_wrong_guess_costs_bytes_and_what_has_not_begun_is_dropped():
    accesses = [Access(n % 2, np.array([E * (n % 2)], np.int64)) for n in range(6)]
    wrong = [Guess.sure(np.array([E + 2, E + 3], np.int64))] + [Guess.joined([])] * 5
    seen = replay(accesses, wrong, Lfu([E, E]), 4, COSTS)
    assert (seen.ahead, seen.useful, seen.late, seen.misses) == (1, 0, 0, 2)


RECORDED = 64  # experts of a layer of the recorded routing


def guessed_by_transitions(ids, least):
    """Accesses of recorded tokens, and what transitions guess of the next layer."""
    num_layers, top_k = ids.shape[1:]
    predictor = Transitions([RECORDED] * num_layers, top_k)
    accesses, guesses = [], []
    for token in ids:
        for layer, chosen in enumerate(token):
            accesses.append(Access(layer, np.sort(chosen) + RECORDED * layer))
            expected = predictor.expected(layer, chosen[None])
            expected = np.zeros(0, np.float32) if expected is None else expected
            found = likely(expected, least)
            guesses.append(Guess(found + RECORDED * (layer + 1), expected[found]))
    return accesses, guesses


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("domain", ["intent", "translation"])
def test_the_budget_holds_on_recorded_routing(shared_data, domain, share):
    """Guesses down to one in ten waste more than the budget has, and with it no more; sure ones are as they were."""
    ids = np.load(shared_data / "traces" / f"deepseek_v2_lite_{domain}.npz")["expert_ids"][:160, :8].astype(np.int64)
    sizes, num_slots, costs = [RECORDED] * ids.shape[1], int(share * RECORDED * ids.shape[1]), Costs(0.1, 0.5, 0.05)

    def run(least, is_bounded):
        accesses, guesses = guessed_by_transitions(ids, least)
        as_sure = [Guess(k, s + LEAST_EXPECTED - least) if is_bounded else Guess.sure(k) for k, s in guesses]
        found = replay(accesses, as_sure, Lfu(sizes), num_slots, costs)
        return found, found.wasted / (found.read + found.ahead)

    (_, free), (_, held) = run(0.1, False), run(0.1, True)
    assert free > WasteBudget.LIMIT >= held > 0.1
    (plain, share_of_sure), (same, _) = run(0.4, False), run(0.4, True)
    assert share_of_sure < WasteBudget.EASY
    assert same.useful + same.late >= 0.97 * (plain.useful + plain.late)
