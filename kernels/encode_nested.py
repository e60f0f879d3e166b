"""From float weights to planes of nested precision (kernels/nested.py): scales that serve several widths at once."""

# mypy: allow-untyped-calls

from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.calibrated import spread
from moe.kernels.nested import nested_values, pack_plane, residual_scale

# Multiples of a group's root mean square that are tried for the base's scale: small ones serve 2 bits, large ones 4.
_STEPS = tuple(0.42 + 0.03 * i for i in range(16))
_ALONE = {2: 0.118, 3: 0.0345, 4: 0.0095}  # least mean square error of normal weights in so many bits alone (Max, 1960)


def encode_nested(w: Tensor, columns: int, x: Tensor | None = None) -> tuple[Tensor, ...]:
    """The planes of all levels, as `nested_values` reads them. w: [n, k] fp32; columns: that share scales; x: inputs
    [T, k] fp32, None or no rows: rounds to the nearest.

    With inputs the four-bit weights are those of GPTQ (kernels/calibrated.py): what a column loses is moved to those to
    its right, and a group's scale is chosen for the weights as they are by then; the last plane returns to the weights
    as they were. Raises ValueError for weights that are not finite.
    """
    if not bool(w.isfinite().all()):
        raise ValueError("some expert weights are not finite; their group would have no scale")
    n, k = w.shape
    importance = moved = None
    if x is not None and len(x):
        square = x.T @ x / len(x)
        importance, moved = square.diagonal().clone(), spread(square)
    target, stored, scales = w.clone(), torch.empty(3, n, k, dtype=torch.uint8), []
    if moved is None and k % columns == 0:  # all groups at once
        scales.append(_best_scales(w.reshape(-1, columns), None))
        stored = _nearest(w.reshape(-1, columns), scales[0]).reshape(3, n, k)
    else:
        for start in range(0, k, columns):
            group = slice(start, min(start + columns, k))
            scales.append(_best_scales(target[:, group], None if importance is None else importance[group]))
            if moved is None:
                stored[:, :, group] = _nearest(target[:, group], scales[-1])
            else:
                _move_losses(target, stored, group, scales[-1], moved)
    scale, scale3, scale4 = (torch.stack(each, 1).reshape(n, -1) for each in zip(*scales))
    codes = pack_plane(stored[0], 2), pack_plane(stored[1], 1), pack_plane(stored[2], 1)
    planes = (codes[0], scale, codes[1], scale3, codes[2], scale4)
    left = w - nested_values(planes, 4, k, columns)
    padded = torch.nn.functional.pad(left, (0, -k % columns)).unflatten(1, (-1, columns))
    scale8 = (padded.abs().amax(-1) / 7.5).half()
    steps = padded / torch.where(scale8 > 0, scale8.float(), 1.0)[..., None]
    fields = (steps + 7.5).round().clamp(0, 15).to(torch.uint8).flatten(1)[:, :k]
    return *planes, pack_plane(fields, 4), scale8


class _Scales(NamedTuple):
    base: Tensor  # float16 [n]
    third: Tensor  # uint8 [n]
    fourth: Tensor


def _nearest(w: Tensor, scales: _Scales) -> Tensor:
    """The codes of the base and of both sign planes, uint8 [3, n, columns]. w: [n, columns]."""
    scale = scales.base.float()[:, None]
    codes = ((w / torch.where(scale > 0, scale, 1.0) + 3) / 2).round().clamp(0, 3)
    left, found = w - scale * (2 * codes - 3), [codes]
    for stored in (scales.third, scales.fourth):
        found.append(left >= 0)
        left = left - (2 * found[-1].float() - 1) * residual_scale(scale, stored[:, None])
    return torch.stack([each.to(torch.uint8) for each in found])


def _best_scales(w: Tensor, importance: Tensor | None) -> _Scales:
    """Of one group [n, columns]: the base's scale for which 2, 3 and 4 bits lose least, each as bits alone would."""
    weights = torch.ones(w.shape[1]) if importance is None else importance / importance.mean().clamp(min=1e-30)
    mean_square = w.square().mean(1)
    best, least = None, torch.full_like(mean_square, torch.inf)
    for step in _STEPS:
        scale = (mean_square.sqrt() * step).half()
        divisor = torch.where(scale > 0, scale.float(), 1.0)[:, None]
        left = w - scale.float()[:, None] * (2 * ((w / divisor + 3) / 2).round().clamp(0, 3) - 3)
        cost, found = (left.square() * weights).mean(1) / _ALONE[2], [scale]
        for level in (3, 4):
            size = (left.abs() * weights).mean(1, keepdim=True) / weights.mean()
            stored = (size / divisor * 256).round().clamp(0, 255)
            found.append(stored.squeeze(1).to(torch.uint8))
            left = left - torch.where(left >= 0, 1.0, -1.0) * residual_scale(scale.float()[:, None], stored)
            cost = cost + (left.square() * weights).mean(1) / _ALONE[level]
        better = cost < least
        least = torch.where(better, cost, least)
        best = found if best is None else [torch.where(better, a, b) for a, b in zip(found, best)]
    assert best is not None
    return _Scales(*best)


def _move_losses(target: Tensor, stored: Tensor, group: slice, scales: _Scales, moved: Tensor) -> None:
    """Rounds the group's columns into `stored` one by one, and puts what each loses into those that follow."""
    losses = torch.empty_like(target[:, group])
    scale = scales.base.float()
    sizes = (residual_scale(scale, scales.third), residual_scale(scale, scales.fourth))
    for j in range(group.start, group.stop):
        codes = _nearest(target[:, j : j + 1], scales)
        stored[:, :, j] = codes.squeeze(2)
        signs = 2 * codes[1:, :, 0].float() - 1
        rounded = scale * (2 * codes[0, :, 0].float() - 3) + signs[0] * sizes[0] + signs[1] * sizes[1]
        losses[:, j - group.start] = loss = target[:, j] - rounded
        target[:, j + 1 : group.stop] -= loss[:, None] * moved[j, j + 1 : group.stop]
    target[:, group.stop :] -= losses @ moved[group, group.stop :]
