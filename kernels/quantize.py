"""Experts in 8 bits, by rounding alone: lossy, half the bytes of bf16, and only for who asks for it.

Wins where reading weights is the limit (few tokens, or experts that come from slower memory). What it costs the model
is not known here: compare the answers (`moe verify`) before using it.
"""

# mypy: allow-untyped-calls

from typing import Literal

import torch
from torch import Tensor

from moe.kernels.formats import Coding
from moe.kernels.reference import check_expert_weights
from moe.kernels.weights import ExpertWeights

FP8_MAX = 448.0  # of float8_e4m3fn


def quantize_experts(
    weights: ExpertWeights, to: Literal["fp8", "int8"], block: tuple[int, int] | None = None
) -> ExpertWeights:
    """`weights` stored in 8 bits beside float32 scales; biases and activation stay as they are. A pure function.

    fp8: float8_e4m3fn, scale = max |w| of a block / 448. |error| <= max(|w| / 16, scale / 1024): relative to each
    weight, but no finer than 2**-10 of the scale. block: of weights that share a scale, None = (128, 128).
    int8: scale = max |w| of a block / 127. |error| <= scale / 2. block: None = one row of the matrix.
    Both bounds hold before the scale's own rounding in float32. Raises ValueError for weights that are not finite or
    are in 8 bits already. Costs a copy in float32 of all of them.
    """
    check_expert_weights(weights)
    if weights.gate_up_coding is not None:
        raise ValueError(f"the experts are in {weights.gate_up.dtype} already; quantize the original weights")
    hidden, inter = weights.down.shape[1:]
    if block is None:
        block = (128, 128) if to == "fp8" else (1, max(hidden, inter))
    act = weights.activation
    is_interleaved = act.gated and act.interleaved
    if not act.gated:
        halves = weights.gate_up[:, None]
    elif is_interleaved:
        halves = weights.gate_up.unflatten(1, (inter, 2)).transpose(1, 2)
    else:
        halves = weights.gate_up.unflatten(1, (2, inter))
    stored, first_scale = _quantize(halves, to, block)
    down, down_scale = _quantize(weights.down, to, block)
    gate_up = (stored.transpose(1, 2) if is_interleaved else stored).flatten(1, 2)
    code: Literal["e4m3", "int8"] = "e4m3" if to == "fp8" else "int8"
    return weights._replace(
        gate_up=gate_up.contiguous(),
        down=down,
        gate_up_coding=Coding(code, block, first_scale),
        down_coding=Coding(code, block, down_scale[:, None]),
    )


def _quantize(w: Tensor, to: Literal["fp8", "int8"], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """w: [..., n, k]. Returns it in 8 bits, and the scales [..., ceil(n / rows), ceil(k / columns)]."""
    w = w.float()
    if not bool(w.isfinite().all()):
        raise ValueError("some expert weights are not finite; their block would have no scale")
    n, k = w.shape[-2:]
    rows, columns = min(block[0], n), min(block[1], k)
    padded = torch.nn.functional.pad(w, (0, -k % columns, 0, -n % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(
        -3, (-1, rows)
    )  # [..., n / rows, rows, k / columns, columns]
    largest = blocks.abs().amax(dim=(-3, -1))
    scale = largest / (FP8_MAX if to == "fp8" else 127.0)
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = (blocks / scale[..., :, None, :, None]).flatten(-2, -1).flatten(-3, -2)[..., :n, :k]
    if to == "fp8":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous(), scale
    return scaled.round().clamp(-127, 127).to(torch.int8).contiguous(), scale
