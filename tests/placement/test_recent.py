"""The tokens of late: counted once, told apart where traffic changes, uneven beyond chance."""

import numpy as np
import pytest

from moe.placement.plan import Plan
from moe.placement.recent import PARTS, Recent, imbalance_of_chance, in_time, newest_alike, since_change
from moe.placement.turn import Window
from tests.placement.windows import EXPERTS, LAYERS, MACHINE, RANKS, TOP_K, replicated, routing


@pytest.mark.parametrize("looks", [1, 4, 100])
@pytest.mark.parametrize("present", [Plan.contiguous(LAYERS, EXPERTS, RANKS), replicated()], ids=["plain", "replicas"])
def test_recent_counts_each_of_so_many_tokens_once(present, looks):
    """Against tokens counted anew; looks: additions between two."""
    recent, whole = Recent(50, Plan.contiguous(LAYERS, EXPERTS, RANKS), is_exact=True), routing(203, 0, seed=1)
    whole.ids[5, 1] = -1
    assert recent.parts() == []
    for number, begin in enumerate(range(0, 203, 7), 1):
        recent.add(whole.part(slice(begin, begin + 7)))
        recent.add(whole.part(slice(0, 0)))
        assert min(50, begin + 7) <= recent.num_tokens < 50 + 7
        if number % looks == 0:
            recent.parts()
        if begin == 105:
            recent.use(present)
    parts = recent.parts()
    kept = Window.joined([part.window for part in parts])
    assert len(kept.ids) == recent.num_tokens < 50 + 7
    assert (kept.ids == whole.ids[-len(kept.ids) :]).all()
    assert (kept.home == whole.home[-len(kept.ids) :]).all()
    served = [one.served(h) for one, h in zip(kept.layers(MACHINE.rates(TOP_K)), present.hosted, strict=True)]
    begin, has_copies = 0, (present.replicas > 1).any()
    for window, counts, busy in parts:
        assert counts.sum() == busy.sum() == (window.ids >= 0).sum()
        for layer in range(LAYERS):
            assert (counts[layer] == [(window.ids[:, layer] == e).sum() for e in range(EXPERTS)]).all()
            mine = served[layer][begin : begin + len(window.ids)]
            if not has_copies:  # copies are dealt in the batches that came
                assert (busy[layer] == [(mine == rank).sum() for rank in range(RANKS)]).all()
        begin += len(window.ids)
    recent.use(present)  # now all are dealt as one batch
    for layer, ranks in enumerate(served):
        busy = sum(part.busy[layer] for part in recent.parts())
        assert (busy == [(ranks == rank).sum() for rank in range(RANKS)]).all()
    recent.add(whole)
    assert recent.num_tokens == 50


@pytest.mark.parametrize("new", [0, 1, 48, 100, 200, 256])
def test_the_newest_tokens_of_one_traffic_are_told_apart_from_those_before(new):
    ids = np.concatenate([routing(256 - new, 2, seed=7).ids, routing(new, 9, seed=8).ids])
    found = alike_of(ids)
    if new in (0, 1, 256):
        assert found == 256, "one traffic, or too little of another to be told"
    else:
        assert abs(found - new) <= 256 // PARTS
    ids[5] = -1  # a token that has no expert counts nowhere
    assert abs(alike_of(ids) - found) <= 256 // PARTS
    assert alike_of(ids[:1]) == 1


@pytest.mark.parametrize("new", [48, 100, 117, 200])
def test_the_token_at_which_traffic_changed_is_found(new):
    ids = np.concatenate([routing(256 - new, 2, seed=7).ids, routing(new, 9, seed=8).ids])
    recent = Recent(256, Plan.contiguous(LAYERS, EXPERTS, RANKS), is_exact=True)
    recent.add(Window(ids, np.arange(256)))
    parts = recent.parts()
    alike = newest_alike(np.stack([part.counts for part in parts]), 256)
    found = since_change(parts, alike)
    assert abs(len(found.ids) - new) <= 3, "a few tokens may be of either"
    assert (found.home == np.arange(256 - len(found.ids), 256)).all(), "the newest ones"
    assert len(since_change(parts, 1).ids) == len(parts[-1].window.ids), "too few to say more"
    assert len(since_change(parts, len(parts)).ids) == 256


def test_what_ranks_tell_at_once_is_put_in_the_order_of_time():
    whole = routing(60, 0, seed=1)
    told = [Window(whole.ids[rank::3], np.full(20, rank)) for rank in range(3)]
    told.append(Window(np.empty((0, LAYERS, TOP_K), np.int16), np.empty(0, np.int64)))
    joined = in_time(told)
    assert (joined.ids == whole.ids).all()
    assert (joined.home == np.arange(60) % 3).all()


def alike_of(ids: np.ndarray) -> int:
    recent = Recent(256, Plan.contiguous(LAYERS, EXPERTS, RANKS), is_exact=True)
    recent.add(Window(ids, np.zeros(len(ids), np.int64)))
    parts = recent.parts()
    newest = newest_alike(np.stack([part.counts for part in parts]), len(ids))
    return sum(len(part.window.ids) for part in parts[-newest:])


def test_chance_is_what_even_traffic_shows_at_most():
    rng = np.random.default_rng(0)
    for ranks, pairs in ((2, 500), (8, 2000), (32, 2000)):
        loads = rng.multinomial(pairs, np.full(ranks, 1 / ranks), size=300).max(axis=1) / (pairs / ranks)
        assert loads.mean() < imbalance_of_chance(pairs, ranks) < 1.25 * loads.mean()
