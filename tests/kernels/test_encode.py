"""Rounding to codes: the error is what the number of levels allows, exact where the weights are codes already."""

import pytest
import torch

from moe.kernels.encode import encode
from moe.kernels.formats import E2M1, Coding, decode


def round_trip(w, code, block, scale_dtype):
    codes, scale = encode(w, code, block, scale_dtype)
    return decode(codes, Coding(code, block, scale[None, None]), w.shape[1], 0)


@pytest.mark.parametrize(
    ("code", "block", "scale_dtype", "bound"),
    [
        ("int8", (1, 1 << 30), torch.float32, 0.012),
        ("int8", (1, 16), torch.float32, 0.006),
        ("int4", (1, 32), torch.float16, 0.11),
        ("int4", (1, 7), torch.bfloat16, 0.08),
        ("e2m1", (1, 32), torch.float8_e8m0fnu, 0.14),
        ("e4m3", (128, 128), torch.float32, 0.03),
    ],
)
def test_error_of_normal_weights(code, block, scale_dtype, bound):
    """Bounds: what was seen on normal weights, plus a tenth; a wrong level or scale gives several times as much."""
    w = torch.randn(37, 101, generator=torch.Generator().manual_seed(1))
    w[3] = 0
    got = round_trip(w, code, block, scale_dtype)
    error = float((got - w).norm() / w.norm())
    assert bound / 3 < error < bound
    assert not got[3].any()


@pytest.mark.parametrize(("code", "levels"), [("int4", range(-8, 8)), ("e2m1", E2M1), ("int8", range(-127, 128))])
def test_what_is_representable_stays(code, levels):
    """Every block holds the largest level, so that its scale is known."""
    values = torch.tensor([float(v) for v in levels])
    w = values[torch.randint(0, len(values), (9, 64), generator=torch.Generator().manual_seed(2))]
    w[:, 0::32] = max(values, key=abs)
    block = (1, 32)
    assert torch.equal(round_trip(w * 0.25, code, block, torch.float32), w * 0.25)


def test_tiny_huge_and_not_finite():
    for size in (1e-37, 1e30):
        w = torch.tensor([[1.0, -3.0, 0.5, 6.0]]) * size
        got = round_trip(w, "e2m1", (1, 32), torch.float8_e8m0fnu)
        assert float((got - w).double().norm() / w.double().norm()) < 0.2  # a step of two powers
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.tensor([[torch.inf]]), "int4", (1, 32), torch.float16)
    with pytest.raises(ValueError, match="cannot be encoded as lut4"):
        encode(torch.ones(1, 4), "lut4", (1, 32), torch.float16)
