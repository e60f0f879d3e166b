"""What is worth reading ahead: the trial, the budget of what is wasted, and what is less sure is left out first."""

import numpy as np
import pytest

from moe.offload.cache import ExpertCache
from moe.offload.layer_stats import LayerStats
from moe.offload.prefetch import LEAST_EXPECTED, Prefetcher, Trial, WasteBudget
from tests.offload.test_cache import make_store
from tests.offload.test_speculation import settle, take


@pytest.mark.parametrize(("gain", "pays"), [(0.9, True), (1.0, False), (1.1, False)])
def test_the_trial_compares_medians_of_turns(gain, pays):
    trial, decided, turns = Trial(), None, []
    while decided is None:
        turns.append(trial.is_on)
        noise = 50.0 if len(turns) % 10 == 3 else 0.0
        decided = trial.add((gain if trial.is_on else 1.0) + noise)
    assert decided is pays
    assert turns[: 2 * Trial.TURN] == [True] * Trial.TURN + [False] * Trial.TURN
    assert len(turns) <= 2 * Trial.SAMPLES * Trial.TURN / (Trial.TURN - 1) + 1


def read_ahead_of(prefetcher, guess, steps):
    """Forwards over three layers of eight, of which two experts are wanted in turn; what was guessed comes at once.

    guess: (step, the two that the next layer will want) -> expected tokens [8].
    """
    cache = prefetcher.cache
    for step in steps:
        prefetcher.begin_forward()
        wanted = [step % 6, (step + 1) % 6]
        for layer in range(3):
            take(cache, layer, wanted)
            if layer < 2 and prefetcher.is_asking:
                prefetcher.ask(layer + 1, guess(step, wanted))
                settle(cache)


def share_of(before, after):
    wasted, read = (
        sum(getattr(s, name) for s in after) - sum(getattr(s, name) for s in before)
        for name in ("wasted_bytes", "bytes_read")
    )
    return wasted / read


def copy_of(stats):
    return [LayerStats(**{name: getattr(s, name) for name in LayerStats.__slots__}) for s in stats]


@pytest.fixture
def prefetcher():
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    yield Prefetcher(cache, trial=False)
    cache.close()


def right_and_wrong(chance, sure):
    """One of the two that are wanted, and by `chance` one that nobody wants, expected `sure` and 0.9."""
    rng = np.random.default_rng(0)

    def guess(step, wanted):
        expected = np.zeros(8, np.float32)
        expected[wanted[1]] = 0.9
        expected[6 + step % 2] = sure if rng.random() < chance else 0
        return expected

    return guess


def test_what_is_wasted_has_a_budget(prefetcher):
    """Wrong guesses that look as sure as right ones: before, they were read for as long as as many were right."""
    before = copy_of(prefetcher.cache.stats)
    guess, leasts = right_and_wrong(1.0, 0.9), []
    for step in range(600):
        read_ahead_of(prefetcher, guess, [step])
        leasts.append(prefetcher.budget.least)
        assert step < 40 or share_of(before, prefetcher.cache.stats) <= WasteBudget.LIMIT
    assert share_of(before, prefetcher.cache.stats) > 0.8 * WasteBudget.EASY  # it is used
    stopped = np.array(leasts) > 0.9
    assert stopped.sum() > 50
    assert (stopped[:-1] & ~stopped[1:]).sum() > 5  # and it goes on


def test_what_is_less_sure_is_left_out_first(prefetcher):
    before = copy_of(prefetcher.cache.stats)
    read_ahead_of(prefetcher, right_and_wrong(1.0, 0.62), range(600))
    useful = sum(s.useful_bytes for s in prefetcher.cache.stats)
    assert share_of(before, prefetcher.cache.stats) <= WasteBudget.LIMIT
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    certain = Prefetcher(cache, trial=False)
    read_ahead_of(certain, right_and_wrong(0.0, 0.0), range(600))
    assert useful > 0.85 * sum(s.useful_bytes for s in cache.stats)
    cache.close()


def test_the_budget_stops_nothing_that_stays_below_it(prefetcher):
    guess, leasts = right_and_wrong(0.1, 0.9), set()
    for step in range(300):
        read_ahead_of(prefetcher, guess, [step])
        leasts.add(prefetcher.budget.least)
    assert sum(s.wasted_bytes for s in prefetcher.cache.stats) > 0
    assert leasts == {LEAST_EXPECTED}


def test_the_budget_by_hand():
    budget = WasteBudget(1)
    budget.judge(0, 0, 0)
    assert (budget.share, budget.least) == (0, LEAST_EXPECTED)
    budget.judge(100, 10, 4)
    assert (budget.share, budget.least) == (pytest.approx(0.14), LEAST_EXPECTED)
    budget.judge(100, 10, 4.5)
    assert budget.least == pytest.approx(LEAST_EXPECTED + np.log(2))  # half way
    budget.judge(100, 15, 0)
    assert budget.least == np.inf
    budget.judge(104, 15, 0)
    assert budget.share == pytest.approx(0.144, abs=1e-3)
    assert budget.least == np.inf  # not before it is easy
    budget.judge(120, 15, 0)
    assert budget.least == LEAST_EXPECTED
    budget.judge(10, 5, 0)  # counted anew
    assert budget.share == pytest.approx(20 / 130, abs=1e-3)
    budget.judge(10 + 4 * budget.HALF_LIFE, 5, 0)  # what is long ago weighs little
    assert budget.share < 0.001


def test_a_verdict_holds_for_a_term(monkeypatch):
    """Stopped because it was no faster, and tried again; what is wasted does not stop the trial."""
    monkeypatch.setattr(Prefetcher, "TERM", 5)
    monkeypatch.setattr(Trial, "SAMPLES", 0)
    cache = ExpertCache(make_store((8, 8, 8)), 6)
    prefetcher = Prefetcher(cache)
    prefetcher._trial.seconds = {True: [2.0], False: [1.0]}
    stopped = []
    for _ in range(7):
        prefetcher.begin_forward()
        stopped.append(prefetcher.is_stopped)
    assert stopped == [True] * 6 + [False]
    assert prefetcher.verdict.startswith("stopped, it does not pay: ")
    assert prefetcher._trial is not None
    cache.close()
