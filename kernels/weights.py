"""What every expert kernel takes: weights addressed by slot, and the activation between the two GEMMs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOW_BIT_DTYPES = (torch.float8_e4m3fn, torch.int8)

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss", "custom"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """The non-linearity of an expert.

    `gated`: the first projection has 2I rows and h = act(gate) * up; otherwise it has I rows and h = act(up).
    `interleaved`: rows are gate0, up0, gate1, up1, …; otherwise all gate rows stand before all up rows.
    `gpt_oss`: gate clamped to (-inf, limit], up to [-limit, limit]; h = (up + 1) * gate * sigmoid(alpha * gate).
    `custom`: `function` maps [R, 2I or I] to [R, I]; only the torch reference can run it.
    """

    kind: ActivationKind = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0
    function: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        assert (self.kind == "custom") == (self.function is not None), self.kind


class Scales(NamedTuple):
    """Scales of weights stored in 8 bits: weight[n, k] = stored[n, k] * scale[n // rows, k // columns] in float32.

    float32, bfloat16 or float16. gate_up: [S, 2 or 1, ceil(I / rows), ceil(H / columns)], gate's blocks then up's when
    gated (each of the two is a matrix of its own, however their rows are stored); down: [S, ceil(H / rows), ceil(I /
    columns)]. Contiguous but for the slot stride. block: (rows, columns); a block may be larger than the matrix. (128,
    128) is the `weight_scale_inv` of DeepSeek-V3's and Qwen3's fp8 checkpoints, (1, at least H and I) one scale per
    output channel.
    """

    gate_up: Tensor
    down: Tensor
    block: tuple[int, int]


class ExpertWeights(NamedTuple):
    """Views of a slab of S slots; a slot holds one expert of any layer.

    gate_up: [S, N, H], N = 2I when gated, else I; down: [S, H, I]; biases [S, N] and [S, H] or None.
    The last dimension is contiguous; the slot stride is larger than the expert (one slot is one aligned blob).
    Storage dtype float32, bfloat16 or float16; it need not be the dtype of the activations. float8_e4m3fn and int8 are
    lossy storage with `scales`, for who asks for it (`kernels.quantize`); biases are then of any of the three above.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    scales: Scales | None = None
