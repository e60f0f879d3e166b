"""Second moments of ranks, by their definition: what each rank serves in each piece, squared."""

import numpy as np
import pytest

from moe.placement.solve.evenness import PIECE, expected_moments_of, moments_of, moments_of_ranks


def test_moments_are_of_what_ranks_serve_in_pieces():
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 9, (5 * PIECE, 2))
    pieces = np.stack([(ids == e).reshape(5, -1).sum(axis=1) for e in range(9)])  # [E, 5]
    mean = pieces.sum(axis=0) / 3
    once = np.arange(9)[:, None] % 3 == np.arange(3)
    twice = once | (np.arange(9) < 4)[:, None] & ((np.arange(9) + 1)[:, None] % 3 == np.arange(3))
    for hosted in (once, twice):
        served = (hosted / hosted.sum(axis=1, keepdims=True)).T @ pieces  # [G, 5]
        expected = (served**2 / mean).sum(axis=1)
        assert moments_of_ranks(moments_of(ids, 9, 3), hosted) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [0, 1, PIECE - 1])
def test_few_tokens_are_one_piece(tokens):
    ids = np.zeros((tokens, 1), int)
    moments = moments_of(ids, 2, 2)
    assert moments[0, 0] == pytest.approx(tokens**2 / max(tokens / 2, 1))
    assert not moments[1].any()


def topics(rng, tokens):
    """Tokens of two experts: of one of three topics of three experts mostly, which lasts for some pieces."""
    topic = np.repeat(rng.integers(0, 3, tokens // PIECE + 1), PIECE)[:tokens]
    near = 3 * topic[:, None] + np.argsort(rng.random((tokens, 3)), axis=1)[:, :2]
    return np.where(rng.random((tokens, 1)) < 0.5, near, np.argsort(rng.random((tokens, 9)), axis=1)[:, :2])


def test_what_halves_agree_on_is_kept():
    """Of topics nearly all, of chance nearly nothing; an expert with itself has what it had."""
    rng = np.random.default_rng(1)
    apart, same = ~np.eye(9, dtype=bool), np.arange(9)[:, None] // 3 == np.arange(9) // 3
    ids = topics(rng, 60 * PIECE)
    seen, expected = moments_of(ids, 9, 3), expected_moments_of(ids, 9, 3)
    load = np.bincount(ids.reshape(-1), minlength=9)
    alone = np.outer(load, load) / (load.sum() / 3)
    assert expected[apart & same] - alone[apart & same] == pytest.approx((seen - alone)[apart & same], rel=0.1)
    np.testing.assert_allclose(expected.diagonal(), seen.diagonal())
    chance = np.argsort(rng.random((60 * PIECE, 9)), axis=1)[:, :2]
    load = np.bincount(chance.reshape(-1), minlength=9)
    alone = np.outer(load, load) / (load.sum() / 3)
    left = expected_moments_of(chance, 9, 3) - alone
    assert np.abs(left[apart]).max() < 0.7 * np.abs(moments_of(chance, 9, 3) - alone)[apart].max()
