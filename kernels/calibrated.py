"""Codes that change what a matrix computes least, on inputs that were seen: GPTQ (Frantar et al., arXiv 2210.17323).

Columns are rounded from left to right, and what each loses is put into those to its right, as far as the inputs cannot
tell them apart. The scale of a group is the best of `encode.py`'s candidates for the weights as they are by then, where
a column counts by its mean square. Lossy; wins over rounding to nearest where inputs are correlated.
"""

# mypy: allow-untyped-calls

import torch
from torch import Tensor

from moe.kernels.encode import Encoded, best_scale, encode, nearest, pack_codes
from moe.kernels.formats import CodeName

DAMPING = 0.01  # of the mean square of all columns; keeps few or dependent inputs from being trusted
_STEP = 128  # columns between two updates of all that follow


def encode_calibrated(w: Tensor, code: CodeName, columns: int, scale_dtype: torch.dtype, x: Tensor) -> Encoded:
    """w: [n, k] fp32; columns: that share a scale, may exceed k; x: [T, k] fp32, inputs, none = rounds to nearest.

    code: int8, int4 or e2m1. Raises ValueError for weights that are not finite. Costs k^3 + n k^2 operations, and k^2
    numbers of memory.
    """
    if not len(x):
        return encode(w, code, (1, columns), scale_dtype)
    if not bool(w.isfinite().all()):
        raise ValueError("some expert weights are not finite; their block would have no scale")
    k = w.shape[1]
    columns = min(columns, k)
    square = x.T @ x / len(x)  # [k, k]
    importance = square.diagonal().clone()
    onward = spread(square)
    w, stored = w.clone(), torch.empty_like(w)
    scales = []
    for start in range(0, k, columns):
        group = slice(start, min(start + columns, k))
        scale = best_scale(w[:, None, group], code, scale_dtype, importance[group]).squeeze(1)  # [n]
        scales.append(scale)
        for first in range(start, group.stop, _STEP):
            _round(w, stored, slice(first, min(first + _STEP, group.stop)), scale.float(), onward, code)
    return Encoded(pack_codes(stored, code), torch.stack(scales, 1))


def spread(square: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse: row j says how the loss of column j is spread over those after it."""
    dead = square.diagonal() == 0
    square = square.double()
    square.diagonal().add_(DAMPING * square.diagonal().mean().clamp(min=1e-30))
    square.diagonal()[dead] = square.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return (upper / upper.diagonal()[:, None]).float()


def _round(w: Tensor, stored: Tensor, step: slice, scale: Tensor, onward: Tensor, code: CodeName) -> None:
    """Rounds these columns into `stored`, and moves the losses to the columns of `w` that follow."""
    divisor = torch.where(scale == 0, 1.0, scale)
    losses = torch.empty_like(w[:, step])
    for j in range(step.start, step.stop):
        stored[:, j] = nearest(w[:, j] / divisor, code)
        losses[:, j - step.start] = loss = w[:, j] - stored[:, j] * divisor
        w[:, j + 1 : step.stop] -= loss[:, None] * onward[j, j + 1 : step.stop]
    w[:, step.stop :] -= losses @ onward[step, step.stop :]
