"""Experts in 8 bits: the error of storing them, and every kernel against the reference that dequantises."""

import pytest
import torch
from kernels_experts import DTYPES, fused_experts, random_ids, random_weights, relative_error

from moe.kernels.combine import combine
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.quantize import quantize_experts
from moe.kernels.reference import check_expert_weights, combine_reference, dequantized, experts_reference
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation

# y differs by the order of fp32 sums and scalings; where that tips the rounding of an intermediate, by an ulp of it.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
LAYOUTS = {
    "gated": Activation(),
    "interleaved": Activation(kind="gpt_oss", interleaved=True, limit=1.0),
    "plain": Activation(kind="relu2", gated=False),
}


def in_slots_apart(weights):
    """The same experts with slots further apart than they are long, in order from the last slot; gaps are NaN."""

    def spread(t):
        slab = torch.full((len(t), t[0].numel() + 16), torch.nan).to(t.dtype)
        view = slab[:, : t[0].numel()].view(t.shape)
        view.copy_(t)
        return view

    return rescaled(weights._replace(gate_up=spread(weights.gate_up), down=spread(weights.down)), spread)


def rescaled(weights, change):
    """`weights` with `change` applied to the scales of both matrices."""
    first, second = weights.gate_up_coding, weights.down_coding
    return weights._replace(
        gate_up_coding=first._replace(scale=change(first.scale)),
        down_coding=second._replace(scale=change(second.scale)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("to", "block"), [("fp8", None), ("fp8", (3, 16)), ("int8", None), ("int8", (2, 32))])
def test_error_is_within_what_is_documented(layout, to, block):
    weights = random_weights(2, 40, 20, activation=LAYOUTS[layout])
    weights.gate_up[0, 3] = 0  # a row without a largest weight
    weights.down[1, 2, 5] = 100  # an outlier, which makes its neighbours small
    stored = quantize_experts(weights, to, block)
    check_expert_weights(stored)
    rows, columns = stored.gate_up_coding.block
    largest = 0.0
    for slot in range(2):
        for w, got, scale in zip(
            (weights.gate_up[slot], weights.down[slot]),
            dequantized(stored, slot),
            dequantized(
                stored._replace(gate_up=torch.ones_like(stored.gate_up), down=torch.ones_like(stored.down)), slot
            ),
            strict=True,
        ):
            error = (got - w).abs()
            bound = torch.maximum(w.abs() / 16, scale / 1024) if to == "fp8" else scale / 2
            assert (error <= bound * (1 + 1e-5) + 1e-30).all()
            largest = max(largest, float((error / bound).max()))
    assert largest > 0.9  # the bound is no looser than it must be
    assert (block or (rows, columns)) == (rows, columns)


def test_scales_are_those_of_each_half():
    """Block boundaries begin anew at up's first row, and interleaved rows belong to their own half."""
    weights = random_weights(1, 16, 20)
    weights.gate_up[:, 20:] *= 1000
    stored = quantize_experts(weights, "fp8", (16, 16))
    scale = stored.gate_up_coding.scale
    assert scale.shape == (1, 2, 2, 1)
    assert (scale[0, 1] > 100 * scale[0, 0]).all()
    assert relative_error(dequantized(stored, 0)[0], weights.gate_up[0]) < 0.03
    rows = torch.arange(40).view(2, 20).T.flatten()
    woven = weights._replace(gate_up=weights.gate_up[:, rows], activation=Activation(interleaved=True))
    again = quantize_experts(woven, "fp8", (16, 16))
    assert torch.equal(again.gate_up_coding.scale, scale)
    assert torch.equal(dequantized(again, 0)[0], dequantized(stored, 0)[0][rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("to", "block", "tokens", "top_k", "slots", "hidden", "inter", "skew"),
    [
        ("fp8", None, 0, 2, 4, 32, 32, "none"),
        ("fp8", None, 1, 8, 64, 40, 24, "none"),
        ("fp8", (24, 32), 63, 2, 5, 72, 40, "holes"),  # several blocks each way, none a multiple of a tile
        ("int8", None, 1, 1, 1, 32, 32, "none"),
        ("int8", None, 63, 2, 6, 33, 17, "one"),
    ],
)
def test_grouped_equals_reference(dtype, to, block, tokens, top_k, slots, hidden, inter, skew):
    weights = in_slots_apart(quantize_experts(random_weights(slots, hidden, inter), to, block))
    x, ids = torch.randn(tokens, hidden).to(dtype), random_ids(tokens, top_k, slots, skew=skew)
    y, want = grouped_experts(x, ids, weights), experts_reference(x, ids, weights)
    assert y.shape == want.shape
    assert relative_error(y, want) <= BOUND[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("to", "block"), [("fp8", (16, 32)), ("int8", None)])
def test_layouts_and_biases(layout, to, block):
    weights = random_weights(3, 40, 20, torch.bfloat16, activation=LAYOUTS[layout], biases=True)
    weights = quantize_experts(weights, to, block)
    assert weights.gate_up_bias.dtype == torch.bfloat16
    weights = rescaled(weights, torch.Tensor.bfloat16)
    x, ids = torch.randn(9, 40), random_ids(9, 2, 3)
    assert relative_error(grouped_experts(x, ids, weights), experts_reference(x, ids, weights)) <= 1e-6


@pytest.mark.parametrize(("to", "block"), [("fp8", (16, 32)), ("int8", None)])
def test_single_launch_is_bit_equal_to_the_grouped_path(to, block):
    config = TileConfig(16, 128, 128, 128, 4, 1)  # what both pick for so few rows
    weights = in_slots_apart(quantize_experts(random_weights(5, 40, 24), to, block))
    x, ids, topk_weights = torch.randn(7, 40).bfloat16(), random_ids(7, 2, 5, skew="holes"), torch.rand(7, 2)
    out = fused_experts(x, ids, topk_weights, torch.arange(5), weights)
    assert torch.equal(out, combine(grouped_experts(x, ids, weights, config=config), topk_weights, x.dtype))
    want = combine_reference(experts_reference(x, ids, weights), topk_weights, x.dtype)
    assert relative_error(out, want) <= 4e-3  # an output may round the other way


def test_wrong_scales_are_noticed():
    """A control: the comparisons above see a scale in the wrong place."""
    weights = quantize_experts(random_weights(3, 64, 32), "fp8", (16, 32))
    weights.gate_up_coding.scale[:, :, :, 1] *= 2
    x, ids = torch.randn(9, 64), random_ids(9, 2, 3)
    coding = weights.gate_up_coding
    flipped = weights._replace(gate_up_coding=coding._replace(scale=coding.scale.flip(-1)))
    assert relative_error(grouped_experts(x, ids, flipped), experts_reference(x, ids, weights)) > 0.1


def test_bad_input():
    weights = random_weights(3, 40, 20)
    stored = quantize_experts(weights, "fp8", (16, 24))
    x, ids = torch.randn(4, 40), random_ids(4, 2, 3)
    with pytest.raises(ValueError, match=r"experts stored as torch.float8_e4m3fn need a coding"):
        grouped_experts(x, ids, stored._replace(gate_up_coding=None))
    with pytest.raises(ValueError, match=r"gate_up is torch.float32; codes of e4m3 are torch.float8_e4m3fn"):
        check_expert_weights(weights._replace(gate_up_coding=stored.gate_up_coding))
    with pytest.raises(ValueError, match=r"blocks of 16 x 40 need \(3, 2, 2, 1\) of float32, bfloat16"):
        check_expert_weights(stored._replace(gate_up_coding=stored.gate_up_coding._replace(block=(16, 40))))
    with pytest.raises(ValueError, match="already; quantize the original"):
        quantize_experts(stored, "int8")
    weights.down[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        quantize_experts(weights, "int8")
