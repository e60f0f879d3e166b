"""Calibrated rounding: against a twin without blocks or factors, and what it is worth on correlated inputs."""

import pytest
import torch

from moe.kernels.calibrated import DAMPING, encode_calibrated
from moe.kernels.encode import best_scale, encode, nearest, pack_codes
from moe.kernels.formats import Coding, decode


def decoded(encoded, code, columns, k):
    scale = encoded.scale[None, None]
    return decode(encoded.codes, Coding(code, (1, columns), scale), k, 0)


def inputs(tokens, k, rank):
    """Correlated: most of them lies in a few directions."""
    return torch.randn(tokens, rank) @ torch.randn(rank, k) + 0.1 * torch.randn(tokens, k)


def twin(w, code, columns, dtype, x):
    """Optimal brain surgery, column by column: the inverse of what is left is taken anew for each."""
    square = (x.T @ x / len(x)).double()
    importance = square.diagonal().float().clone()
    square.diagonal().add_(DAMPING * square.diagonal().mean())
    w, k = w.double().clone(), w.shape[1]
    stored, scales = torch.empty_like(w), []
    for j in range(k):
        if j % columns == 0:
            group = slice(j, min(j + columns, k))
            scales.append(best_scale(w[:, None, group].float(), code, dtype, importance[group]).squeeze(1))
        scale = scales[-1].double()
        stored[:, j] = nearest((w[:, j] / scale).float(), code)
        inverse = torch.linalg.inv(square[j:, j:])
        loss = (w[:, j] - stored[:, j] * scale) / inverse[0, 0]
        w[:, j:] -= loss[:, None] * inverse[0]
    return pack_codes(stored.float(), code), torch.stack(scales, 1)


@pytest.mark.parametrize(
    ("code", "k", "columns", "dtype"),
    [("int4", 40, 16, torch.float16), ("int8", 150, 1 << 20, torch.float32), ("e2m1", 64, 32, torch.float8_e8m0fnu)],
)
def test_equals_its_twin(code, k, columns, dtype):
    torch.manual_seed(0)
    w, x = torch.randn(5, k) * k**-0.5, inputs(60, k, 6)
    got = encode_calibrated(w, code, columns, dtype, x)
    codes, scale = twin(w, code, columns, dtype, x)
    assert torch.equal(got.scale.float(), scale.float())
    assert (got.codes != codes).float().mean() < 0.02  # fp32 beside fp64: a tie may fall the other way


@pytest.mark.parametrize(
    ("code", "columns", "dtype"), [("int4", 32, torch.float16), ("e2m1", 32, torch.float8_e8m0fnu)]
)
def test_answers_are_disturbed_less(code, columns, dtype):
    torch.manual_seed(1)
    w, seen, other = torch.randn(48, 96) / 10, *inputs(1000, 96, 8).split(500)
    plain = decoded(encode(w, code, (1, columns), dtype), code, columns, 96)
    made = decoded(encode_calibrated(w, code, columns, dtype, seen), code, columns, 96)
    errors = [float((other @ (again - w).T).norm() / (other @ w.T).norm()) for again in (plain, made)]
    assert errors[1] < 0.6 * errors[0], errors  # on inputs that it was not given
    assert (made - w).norm() > (plain - w).norm()  # the weights themselves lie further away


def test_nothing_to_go_by():
    w = torch.randn(4, 64)
    got = encode_calibrated(w, "int4", 32, torch.float16, torch.zeros(0, 64))
    want = encode(w, "int4", (1, 32), torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    silent = torch.zeros(9, 64)  # inputs that are all zero
    assert torch.isfinite(decoded(encode_calibrated(w, "int4", 32, torch.float16, silent), "int4", 32, 64)).all()
    w[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        encode_calibrated(w, "int4", 32, torch.float16, torch.ones(1, 64))
