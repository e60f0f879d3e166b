"""What every expert kernel takes: weights addressed by slot, and the activation between the two GEMMs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from moe.kernels.formats import Coding

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


class ExpertWeights(NamedTuple):
    """Views of a slab of S slots; a slot holds one expert of any layer.

    gate_up: [S, N, H], N = 2I when gated, else I; down: [S, H, I]; biases [S, N] and [S, H] or None.
    The last dimension is contiguous; the slot stride is larger than the expert (one slot is one aligned blob).
    Storage dtype float32, bfloat16 or float16; it need not be the dtype of the activations. A matrix with a `Coding`
    is stored as codes (kernels/formats.py), whose last dimension counts bytes; biases are then of any of the three.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Activation
    gate_up_coding: Coding | None = None
    down_coding: Coding | None = None

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.gate_up.shape[1] // (2 if self.activation.gated else 1)

    @property
    def stored(self) -> str:
        """How both matrices are stored, in words."""
        pairs = ((self.gate_up, self.gate_up_coding), (self.down, self.down_coding))
        first, second = (str(t.dtype)[6:] if coding is None else coding.name for t, coding in pairs)
        return first if first == second else f"{first}, {second}"

    @property
    def formats(self) -> frozenset[str]:
        """What a kernel must be able to read: names of codes, and "float"."""
        return frozenset("float" if c is None else c.code for c in (self.gate_up_coding, self.down_coding))
