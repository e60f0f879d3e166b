"""The serving rule in C, numpy and torch: the same integers, for any tables, homes and holes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.layer.replica_choice import DeviceTable, choose_on_device
from moe.placement.helper import load_helper
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_in_numpy, choose_replicas, meetings


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 70), st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_one_rule(seed, tokens, ranks, top_k, home_first):
    rng = np.random.default_rng(seed)
    hosted = rng.random((1, 9, ranks)) < rng.random()
    hosted[0, np.arange(9), rng.integers(0, ranks, 9)] = True
    table = ServingTable.of(Plan.from_hosted(hosted), 0)
    ids = np.argsort(rng.random((tokens, 9)) + rng.random(9), axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < 0.1] = -1
    home = int(rng.integers(ranks))
    slow = choose_in_numpy(ids, home, table, home_first=home_first)
    np.testing.assert_array_equal(choose_replicas(ids, home, table, home_first=home_first), slow)
    on_device = choose_on_device(
        torch.from_numpy(ids), home, DeviceTable.of(table, torch.device("cpu")), home_first=home_first
    )
    np.testing.assert_array_equal(on_device.numpy(), slow)
    homes = rng.integers(0, ranks, tokens)
    many = choose_replicas(ids, homes, table, home_first=home_first)
    np.testing.assert_array_equal(many, choose_in_numpy(ids, homes, table, home_first=home_first))
    if home_first:
        here = np.where(ids >= 0, table.physical[ids, homes[:, None]], -1)
        assert (many[here >= 0] == here[here >= 0]).all()


@pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
def test_the_compiled_rule_is_the_one_that_serves():
    plan = Plan.from_hosted(np.ones((1, 4, 64), bool))
    table = ServingTable.of(plan, 0)
    ids = np.argsort(np.random.default_rng(0).random((50, 4)), axis=1)[:, :2]
    np.testing.assert_array_equal(choose_replicas(ids, 63, table), choose_in_numpy(ids, 63, table))
    wide = ServingTable.of(Plan.from_hosted(np.ones((1, 4, 65), bool)), 0)
    assert wide.masks is None
    assert (choose_replicas(ids, 64, wide) // 4 == 64).sum() > 0


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_two_ranks_meet_once_a_sweep(ranks):
    table = meetings(ranks)
    for g in range(ranks):
        assert sorted(set(table[:, g].tolist()) - {ranks}) == [r for r in range(ranks) if r != g]
        assert all(table[i, other] == g for i, other in enumerate(table[:, g]) if other < ranks)


def test_dealing_levels_the_ranks():
    """On each rank no more than the mean and one, where every rank may serve everything."""
    table = ServingTable.of(Plan.from_hosted(np.ones((1, 8, 4), bool)), 0)
    ids = np.argsort(np.random.default_rng(1).random((200, 8)), axis=1)[:, :1]
    rank = choose_replicas(np.concatenate([ids, ids]), 0, table) // 8
    assert set(rank.ravel().tolist()) == {0}  # home serves all without a visit
    far = np.ones((1, 8, 4), bool)
    far[:, :, 0] = False
    rank = choose_replicas(ids, 0, ServingTable.of(Plan.from_hosted(far), 0)) // 8
    counts = np.bincount(rank.ravel(), minlength=4)
    assert counts[0] == 0
    assert counts[1:].max() - counts[1:].min() <= 2
