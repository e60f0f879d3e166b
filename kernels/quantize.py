"""Experts in 8 bits, by rounding alone: lossy, half the bytes of bf16, and only for who asks for it.

Wins where reading weights is the limit (few tokens, or experts that come from slower memory). What it costs the model
is not known here: compare the answers (`moe verify`) before using it.
"""

# mypy: allow-untyped-calls

from typing import Literal

import torch

from moe.kernels.encode import encode
from moe.kernels.formats import Coding
from moe.kernels.reference import check_expert_weights
from moe.kernels.weights import ExpertWeights


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
    code: Literal["e4m3", "int8"] = "e4m3" if to == "fp8" else "int8"
    stored, first_scale = encode(halves, code, block, torch.float32)
    down, down_scale = encode(weights.down, code, block, torch.float32)
    gate_up = (stored.transpose(1, 2) if is_interleaved else stored).flatten(1, 2)
    return weights._replace(
        gate_up=gate_up.contiguous(),
        down=down,
        gate_up_coding=Coding(code, block, first_scale),
        down_coding=Coding(code, block, down_scale[:, None]),
    )
