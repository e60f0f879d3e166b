"""From float weights to codes: round to nearest, with scales that are searched where few levels make it worth it.

Lossy, and only for who asks for it. Scales are rounded to their own dtype first, and the codes fit the rounded ones.

    int8, e4m3  scale = max |w| of a block / 127 or 448
    int4        the best of ten scales, of both signs: the largest weight of a block may take the level -8
    e2m1        the best of three powers of two
"""

# mypy: allow-untyped-calls

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.formats import E2M1, CodeName

FP8_MAX = 448.0  # of float8_e4m3fn
_INT4_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(E2M1[:8]))


class Encoded(NamedTuple):
    codes: Tensor  # [..., n, k] of 8 bits, or uint8 [..., n, ceil(k / 2)]
    scale: Tensor  # [..., ceil(n / rows), ceil(k / columns)]


def encode(w: Tensor, code: CodeName, block: tuple[int, int], scale_dtype: torch.dtype) -> Encoded:
    """w: [..., n, k], any float dtype; block: rows and columns that share a scale, either may exceed the matrix.

    Raises ValueError for weights that are not finite. Costs a few copies of w in float32.
    """
    w = w.float()
    if not bool(w.isfinite().all()):
        raise ValueError("some expert weights are not finite; their block would have no scale")
    n, k = w.shape[-2:]
    rows, columns = min(block[0], n), min(block[1], k)
    padded = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).transpose(-3, -2)  # [..., R, G, rows, cols]
    flat = blocks.flatten(-2)
    scale = best_scale(flat, code, scale_dtype)
    values = nearest(flat / _divisor(scale), code)
    stored = values.view(blocks.shape).transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :n, :k]
    return Encoded(pack_codes(stored, code), scale)


def _divisor(scale: Tensor) -> Tensor:
    scale = scale.float()[..., None]
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def best_scale(flat: Tensor, code: CodeName, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """The scale of each block. flat: [..., weights]; importance: [weights] of their squared errors, None: all alike."""
    if code in ("int8", "e4m3"):
        largest = flat.abs().amax(-1)
        scale = largest / (FP8_MAX if code == "e4m3" else 127.0)
        return torch.where(scale > 0, scale, 1.0).to(dtype)
    candidates = [candidate.to(dtype) for candidate in _candidates(flat, code)]
    best, least = candidates[0], _error(flat, candidates[0], code, importance)
    for candidate in candidates[1:]:
        error = _error(flat, candidate, code, importance)
        better = error < least
        best = torch.where(better, candidate.float(), best.float()).to(dtype)  # exact: both are of dtype
        least = torch.where(better, error, least)
    return best


def _candidates(flat: Tensor, code: CodeName) -> list[Tensor]:
    if code == "int4":
        signed = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return [signed / level * shrink for shrink in _INT4_SHRINK for level in (-8, 7)]
    if code == "e2m1":
        power = flat.abs().amax(-1).clamp(min=2.0**-120).log2().floor() - 2  # 4 <= largest < 8 in units of the scale
        return [torch.exp2(power + more) for more in (0, 1, -1)]
    raise ValueError(f"weights cannot be encoded as {code}; use int8, int4, e4m3 or e2m1")


def _error(flat: Tensor, scale: Tensor, code: CodeName, importance: Tensor | None) -> Tensor:
    """Of each block, relative to its largest weight: squares of huge weights would overflow."""
    divisor, largest = _divisor(scale), _divisor(flat.abs().amax(-1))
    squares = ((nearest(flat / divisor, code).float() * divisor - flat) / largest).square()
    return (squares if importance is None else squares * importance).sum(-1)


def nearest(scaled: Tensor, code: CodeName) -> Tensor:
    """In units of the scale: the value of the nearest code; float8_e4m3fn for e4m3, else float32."""
    if code == "e4m3":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if code == "e2m1":
        level = torch.bucketize(scaled.abs().contiguous(), torch.tensor(_MIDDLES, device=scaled.device))
        return torch.copysign(torch.tensor(E2M1[:8], device=scaled.device)[level], scaled)
    return scaled.round().clamp(*((-127, 127) if code == "int8" else (-8, 7)))


def pack_codes(values: Tensor, code: CodeName) -> Tensor:
    """values: [..., k] as `nearest` returns them. Returns [..., bytes of a row]."""
    if code == "e4m3":
        return values.contiguous()
    if code == "int8":
        return values.to(torch.int8)
    if code == "int4":
        nibbles = (values + 8).to(torch.uint8)
    else:
        level = torch.bucketize(values.abs().contiguous(), torch.tensor(_MIDDLES, device=values.device))
        nibbles = (level + 8 * values.signbit()).to(torch.uint8)
    if values.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
