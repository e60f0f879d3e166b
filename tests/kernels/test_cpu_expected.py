"""The compiled guesses of what a router, or a forecast of one, would choose, against their twins in torch."""

import numpy as np
import pytest
import torch

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_expected import CpuChoice, CpuExpected, can_expect, choose_reference, chooser
from moe.layer.lookahead import expected_by_forecast, expected_by_router, foretell
from moe.layer.ridge import Regression
from moe.offload.prefetch import LEAST_EXPECTED

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is not there")


def distinct_scores(num_experts, width, dtype):
    """A weight whose scores of one-hot tokens are its columns: all distinct, so that no tie is broken otherwise."""
    columns = [torch.randperm(num_experts) for _ in range(width)]
    return (torch.stack(columns, dim=1) - num_experts / 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width"),
    [(1, 64, 4, 48), (0, 8, 2, 8), (3, 5, 5, 7), (2, 1, 1, 4), (7, 200, 1, 16), (500, 129, 8, 33)],
)
def test_it_says_what_its_twin_says(dtype, tokens, num_experts, top_k, width):
    torch.manual_seed(tokens + num_experts)
    weight = distinct_scores(num_experts, width, dtype)
    x = torch.eye(width)[torch.randint(width, (tokens,))] * torch.tensor([0.5, 1, 2])[torch.randint(3, (tokens, 1))]
    got = CpuExpected(weight, top_k, LEAST_EXPECTED)(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected_by_router(weight, x, top_k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width"),
    [(1, 64, 4, 48), (0, 8, 2, 8), (3, 5, 5, 7), (2, 1, 1, 4), (7, 200, 1, 16), (500, 129, 8, 33)],
)
def test_a_forecast_says_what_its_twin_says(dtype, tokens, num_experts, top_k, width):
    torch.manual_seed(tokens + num_experts)
    spread = torch.rand(num_experts) + 0.01  # up to a hundred of them from the cut
    regression, x = Regression(torch.randn(width + 1, num_experts), spread), torch.randn(tokens, width).to(dtype)
    foretold = foretell(regression, top_k)
    assert isinstance(foretold, CpuExpected)
    right = expected_by_forecast(regression, x, top_k)
    # Scores of 33 products differ by 1e-6, a hundredth of which is the least spread.
    np.testing.assert_allclose(foretold(x), right, rtol=1e-4, atol=1e-4 * max(1, tokens) ** 0.5)


def test_a_forecast_far_from_the_cut_is_sure():
    regression = Regression(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.full((3,), 1e-6))
    found = foretell(regression, 1)(torch.ones(2, 1))
    assert found[2] == 2
    assert found[:2].max() < 1e-30
    nobody = Regression(torch.full((2, 4), torch.nan), torch.ones(4))
    assert foretell(nobody, 2)(torch.ones(3, 1)).tolist() == [0] * 4


def test_scores_that_are_no_numbers_are_nobodys_choice():
    weight = torch.tensor([[1.0], [float("nan")], [3.0], [float("-inf")]])
    expected = CpuExpected(weight, 2, LEAST_EXPECTED)(torch.ones(2, 1))
    assert expected[[1, 3]].tolist() == [0, 0]
    assert CpuExpected(torch.full((4, 1), torch.nan), 2, LEAST_EXPECTED)(torch.ones(1, 1)).tolist() == [0] * 4


def test_what_it_cannot_read_is_left_to_torch():
    assert can_expect(torch.zeros(4, 6))
    assert not can_expect(torch.zeros(6, 4).T)
    assert not can_expect(torch.zeros(4, 6, dtype=torch.float64))
    assert not can_expect(torch.zeros(4, 6, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width", "among"),
    [
        (1, 64, 4, 48, 9),
        (0, 8, 2, 8, 4),
        (3, 5, 5, 7, None),
        (2, 1, 1, 4, 1),
        (500, 129, 100, 33, 128),
        (7, 9, 2, 5, 2),
    ],
)
def test_a_choice_is_its_twins(dtype, tokens, num_experts, top_k, width, among):
    """By a router of x's dtype and by a forecast in fp32; among all and among some; a row alone chooses the same."""
    torch.manual_seed(tokens + num_experts)
    x = torch.randn(tokens, width).to(dtype)
    some = None if among is None else torch.stack([torch.randperm(num_experts)[:among] for _ in range(tokens + 1)])[:-1]
    for weight in (torch.randn(num_experts, width).to(dtype), torch.randn(num_experts, width)):
        bias = torch.randn(num_experts).to(weight.dtype)
        for normalize in (False, True):
            choose = chooser(weight, bias)
            assert isinstance(choose, CpuChoice)
            ids, weights = choose(x, top_k, some, normalize)
            _, right = choose_reference(weight, bias, x, top_k, some, normalize)
            np.testing.assert_allclose(weights, right, rtol=2e-2 if weight.dtype == torch.bfloat16 else 1e-4, atol=1e-7)
            logits = torch.nn.functional.linear(x.to(weight.dtype), weight, bias).float()
            softmax = logits.softmax(-1).gather(1, ids)  # of the very experts that were chosen
            right = softmax / softmax.sum(-1, keepdim=True) if normalize else softmax
            np.testing.assert_allclose(weights, right, rtol=2e-2 if weight.dtype == torch.bfloat16 else 1e-4, atol=1e-7)
            assert all(len(set(row)) == top_k for row in ids.tolist())
            assert some is None or all(set(row) <= set(of) for row, of in zip(ids.tolist(), some.tolist()))
            if tokens:
                alone = choose(x[-1:], top_k, None if some is None else some[-1:], normalize)
                assert all(torch.equal(a[0], b[-1]) for a, b in zip(alone, (ids, weights)))


@pytest.mark.parametrize("among", [None, [[2, 0, 3, 1]]])
def test_scores_that_are_infinite_come_first_and_those_that_are_no_numbers_last(among):
    """Each expert once, whatever the scores are."""
    inf, nan = torch.inf, torch.nan
    for scores, best in (
        ([nan, 1.0, nan, 2.0], [3, 1]),
        ([1.0, inf, inf, 2.0], [1, 2]),
        ([-inf, inf, nan, 2.0], [1]),
        ([-inf] * 4, []),
        ([nan] * 4, []),
    ):
        choose = CpuChoice(torch.tensor(scores)[:, None], None)
        ids, _ = choose(torch.ones(1, 1), 4, None if among is None else torch.tensor(among), True)
        assert sorted(ids[0].tolist()) == [0, 1, 2, 3]
        assert sorted(ids[0, : len(best)].tolist()) == sorted(best)
