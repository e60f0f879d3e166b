"""Transitions learn which experts follow which, as their slow twin does."""

import numpy as np

from moe.offload.predictor import Transitions


def slow_transitions(tokens, num_experts, top_k):
    """The twin of `Transitions`: one token, one layer and one pair at a time, in float64."""
    num_layers = tokens.shape[1]
    start = np.log(top_k / (num_experts - top_k))
    weights = np.zeros((num_layers - 1, num_experts + 1, num_experts))
    weights[:, -1] = start
    squares = np.full(weights.shape, 0.1)
    said = []
    for step in tokens:
        for layer in range(num_layers - 1):
            on = [*(e for e in step[layer] if e >= 0), num_experts]
            p = 1 / (1 + np.exp(-weights[layer, on].sum(axis=0)))
            said.append(p)
            for e in on:
                for to in range(num_experts):
                    gradient = p[to] - (to in step[layer + 1])
                    squares[layer, e, to] += gradient**2
                    weights[layer, e, to] -= Transitions.RATE * gradient / np.sqrt(squares[layer, e, to])
    return said


def test_transitions_are_what_the_slow_twin_computes():
    rng = np.random.default_rng(0)
    tokens = np.stack([[rng.permutation(6)[:3] for _ in range(4)] for _ in range(30)])
    tokens[7, 1, 2] = -1
    predictor = Transitions([6] * 4, 3)
    said = [predictor.expected(layer, step[None, layer]) for step in tokens for layer in range(4)]
    assert all(p is None for p in said[3::4])
    expected = slow_transitions(tokens, 6, 3)
    np.testing.assert_allclose([p for p in said if p is not None], expected, rtol=1e-4)  # float32, 30 steps


def test_transitions_learn_a_rule_from_batches_of_any_size():
    """Expert e is always followed by e + 1 and e + 2 (modulo 8)."""
    rng = np.random.default_rng(0)
    predictor = Transitions([8] * 3, 2)
    for size in [0, 1, 63, 500] * 5:
        first = rng.integers(0, 8, size)
        ids = [np.stack([first + n, first + n + 1], axis=1) % 8 for n in range(3)]
        for layer in range(3):
            said = predictor.expected(layer, ids[layer])
            assert layer == 2 or said.shape == (8,)
    for e in range(8):
        said = predictor.expected(0, np.array([[e, (e + 1) % 8]]))
        assert set(np.argsort(-said)[:2]) == {(e + 1) % 8, (e + 2) % 8}
    many = predictor.expected(0, np.zeros((1000, 2), np.int64))
    np.testing.assert_allclose(many, 1000 * predictor.expected(0, np.zeros((1, 2), np.int64)), rtol=1e-4)


def test_a_forward_that_breaks_off_teaches_nothing():
    predictor = Transitions([4] * 3, 1)
    for ids in ([[1]], [[2]]):  # layer 0 twice: the first forward failed after it
        predictor.expected(0, np.array(ids))
    before = [w.copy() for w in predictor._weights]
    predictor.expected(1, np.array([[3], [0]]))  # another number of tokens
    assert all((a == b).all() for a, b in zip(before, predictor._weights))
