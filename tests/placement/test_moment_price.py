"""What moments cost: halves of the tokens, how even plans are on the other half, and where the price ends."""

import numpy as np
import pytest

from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_in_numpy
from moe.placement.solve.evenness import PIECE
from moe.placement.solve.moment_price import DOUBLINGS, FIRST, MomentPrice, excess_spread, half_of


def test_halves_are_whole_sequences_drawn_by_seed():
    lengths = np.random.default_rng(0).integers(1, 200, 40)
    sequence = np.repeat(np.arange(40), lengths)
    drawn = [half_of(lengths, seed) for seed in range(8)]
    for half in drawn:
        assert not set(sequence[half]) & set(sequence[~half])
        assert abs(half.sum() - (~half).sum()) <= 2 * lengths.max()
    assert len({half.tobytes() for half in drawn}) == len(drawn)
    np.testing.assert_array_equal(half_of(lengths, 3), drawn[3])


@pytest.mark.parametrize("lengths", [[2 * PIECE], [1, 2 * PIECE], [10 * PIECE, PIECE - 1]])
def test_of_nearly_one_text_the_earlier_tokens_are_a_half(lengths):
    tokens = sum(lengths)
    np.testing.assert_array_equal(half_of(np.array(lengths), 0), np.arange(tokens) < tokens // 2)


@pytest.mark.parametrize("lengths", [[], [1], [PIECE, PIECE - 1]])
def test_too_few_tokens_are_not_halved(lengths):
    assert half_of(np.array(lengths, int), 0) is None


@pytest.mark.parametrize("home_first", [False, True])
def test_the_excess_is_what_its_definition_says(home_first):
    rng = np.random.default_rng(1)
    ids = rng.integers(-1, 9, (300, 2))
    ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
    home = rng.integers(0, 3, 300)
    hosted = np.arange(9)[:, None] % 3 == np.arange(3)
    hosted[2, 0] = hosted[4, 2] = True
    greedy = np.roll(hosted, 1, axis=0)
    plan = Plan.from_hosted(hosted[None])
    chosen = choose_in_numpy(ids, home, ServingTable.of(plan, 0), home_first=home_first)
    served, dealt = np.zeros(3), np.zeros(3)
    for physical in chosen[chosen >= 0]:
        served[physical // plan.physical_per_rank] += 1
    for expert in ids[ids >= 0]:
        dealt += greedy[expert] / greedy[expert].sum()
    expected = (np.std(served) - np.std(dealt)) / np.mean(dealt)
    assert excess_spread(ids, home, hosted, greedy, home_first=home_first) == pytest.approx(expected)
    assert excess_spread(ids[:0], home[:0], hosted, greedy, home_first=home_first) == 0


@pytest.mark.parametrize("even_at", [0.25, 1.0, 3.0, 100.0])
def test_the_price_goes_to_where_ours_is_as_even_as_the_greedy(even_at):
    """Of noisy layers whose excess falls with the price; beyond its range it stays at the end."""
    price, rng = MomentPrice(), np.random.default_rng(2)
    for _ in range(400):
        price.learn(-0.02 * np.log2(price.value / (even_at * FIRST)) + rng.normal(0, 0.03))
    reachable = min(even_at, 2 ** DOUBLINGS[1])
    assert price.value == pytest.approx(reachable * FIRST, rel=0.15)


def test_one_layer_moves_the_price_little():
    price = MomentPrice()
    price.learn(5.0)
    assert FIRST < price.value < 1.6 * FIRST
    price.learn(-5.0)
    assert price.value == pytest.approx(FIRST, rel=0.06)
