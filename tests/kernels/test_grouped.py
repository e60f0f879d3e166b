"""The grouped GEMM path and the combine against the torch reference."""

import pytest
import torch
from kernels_experts import DTYPES, random_ids, random_weights, relative_error

from moe.kernels.combine import combine
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation

# y differs by the order of fp32 sums; where that tips the rounding of an intermediate it differs by an ulp of it.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "slots", "hidden", "inter", "skew"),
    [
        (0, 2, 4, 32, 32, "none"),
        (1, 1, 1, 32, 32, "none"),
        (1, 8, 64, 40, 24, "none"),
        (63, 2, 5, 72, 40, "holes"),
        (63, 2, 6, 33, 17, "one"),  # nothing is a multiple of anything
    ],
)
def test_equals_reference(dtype, tokens, top_k, slots, hidden, inter, skew):
    weights = random_weights(slots, hidden, inter, dtype, gap=3)
    x, ids = torch.randn(tokens, hidden).to(dtype), random_ids(tokens, top_k, slots, skew=skew)
    y, want = grouped_experts(x, ids, weights), experts_reference(x, ids, weights)
    assert y.shape == want.shape
    assert y.dtype == dtype
    assert relative_error(y, want) <= BOUND[dtype]


def test_many_tiles_of_every_kind():
    """Small tiles: several row tiles per expert, groups of row tiles, column tails, k tails, no expert at all."""
    weights = random_weights(3, 40, 24)
    x, ids = torch.randn(63, 40), random_ids(63, 2, 3, skew="holes")
    ids[:, 0] = torch.where(ids[:, 0] == 1, 0, ids[:, 0])
    y = grouped_experts(x, ids, weights, config=TileConfig(16, 16, 32, 16, 4, 1))
    assert relative_error(y, experts_reference(x, ids, weights)) <= BOUND[torch.float32]
    assert (y[ids < 0] == 0).all()


KINDS = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]
LAYOUTS = [(kind, layout) for kind in KINDS for layout in ("gated", "interleaved", "plain")]


@pytest.mark.parametrize(("kind", "layout"), [*LAYOUTS, ("gpt_oss", "gated"), ("gpt_oss", "interleaved")])
def test_activations_and_biases(kind, layout):
    activation = Activation(kind=kind, gated=layout != "plain", interleaved=layout == "interleaved", limit=1.0)
    weights = random_weights(3, 24, 20, activation=activation, biases=True)
    x, ids = 2 * torch.randn(9, 24), random_ids(9, 2, 3)
    assert relative_error(grouped_experts(x, ids, weights), experts_reference(x, ids, weights)) <= 1e-6


@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_storage_dtype_differs(x_dtype, w_dtype):
    weights = random_weights(3, 32, 32, w_dtype, biases=True)
    x, ids = torch.randn(9, 32).to(x_dtype), random_ids(9, 2, 3)
    y = grouped_experts(x, ids, weights)
    assert relative_error(y, experts_reference(x, ids, weights)) <= BOUND[x_dtype]


def test_more_rows_than_the_small_routing_takes():
    weights = random_weights(2, 16, 16)
    x, ids = torch.randn(600, 16), random_ids(600, 2, 2)
    assert relative_error(grouped_experts(x, ids, weights), experts_reference(x, ids, weights)) <= 1e-6


def test_bfloat16_rounds_to_nearest():
    """Products that are exact in float32, so that only the rounding of y can differ; truncation would fail."""
    weights = random_weights(2, 16, 16, torch.bfloat16)
    for w in (weights.gate_up, weights.down):
        w.copy_(torch.randint(-3, 4, w.shape))
    weights = weights._replace(activation=Activation(kind="relu"))
    x, ids = torch.randint(-3, 4, (31, 16)).bfloat16(), random_ids(31, 2, 2)
    want = experts_reference(x, ids, weights)
    assert torch.equal(grouped_experts(x, ids, weights), want.bfloat16())
    exact = experts_reference(x.float(), ids, weights)
    assert not torch.equal(exact, exact.bfloat16().float())  # there was something to round


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 33), (63, 8, 40)])
def test_combine_is_bit_equal(dtype, tokens, top_k, hidden):
    y, weights = torch.randn(tokens, top_k, hidden), torch.rand(tokens, top_k)
    assert torch.equal(combine(y, weights, dtype), combine_reference(y, weights, dtype))
    assert torch.equal(combine(y.to(dtype), weights), combine_reference(y.to(dtype), weights))


def test_order_of_the_sum_matters():
    """A control: the bit-equality above would notice another order."""
    y, weights = torch.randn(63, 8, 40), torch.rand(63, 8)
    assert not torch.equal(combine(y, weights), combine_reference(y.flip(1), weights.flip(1)))


def test_bad_input():
    weights = random_weights(3, 8, 8)
    ids = random_ids(4, 2, 3)
    with pytest.raises(ValueError, match="hidden size 9"):
        grouped_experts(torch.zeros(4, 9), ids, weights)
    custom = Activation(kind="custom", function=lambda v: v[:, :8])
    with pytest.raises(ValueError, match="custom activation"):
        grouped_experts(torch.zeros(4, 8), ids, weights._replace(activation=custom))
    with pytest.raises(ValueError, match="topk_weights"):
        combine(torch.zeros(4, 2, 8), torch.zeros(4, 3))
