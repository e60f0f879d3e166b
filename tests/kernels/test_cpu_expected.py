"""The compiled guesses of what a router, or a forecast of one, would choose, against their twins in torch."""

import numpy as np
import pytest
import torch

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_expected import CpuExpected, can_expect
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
