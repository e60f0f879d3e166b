"""Replaces a model's RMS norms and linear layers by compiled ones on the CPU, where they give the same.

A linear layer of 16 bits is computed by `CpuLinear`, so that a row's bits depend on it alone; one of fp32 computes few
rows (decoding) by it and many by torch, which is a quarter faster there. What a norm computes
is seen from what it does: each is called on random rows, and replaced only if the compiled norm with its weight agrees.
Norms that add one to the weight (Gemma) stay as they are.
"""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_block import norm_reference
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.cpu_norm import can_rms_norm, rms_norm

# Up to so many rows CpuLinear is faster than torch, or as fast, for all weights of 128 x 128 to 2048 x 2048 (Zen 4). In
# bf16 it is at any number, 1.3 to 1.8 x (Emerald Rapids, 16 to 512 rows of 1024 to 4096 columns).
MOST_ROWS: dict[torch.dtype, float] = {torch.float32: 32, torch.bfloat16: inf, torch.float16: inf}


class CompiledRmsNorm(nn.Module):
    """x [..., n] -> [..., n]; keeps the weight and the names of the norm that it stands for."""

    def __init__(self, weight: nn.Parameter, eps: float, round_once: bool) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.round_once = weight, eps, round_once

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, round_once=self.round_once)


class CompiledLinear(nn.Linear):
    """x [..., K] -> [..., N]; shares weight and bias with the layer that it stands for."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._compiled = CpuLinear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self._most = MOST_ROWS[linear.weight.dtype] * linear.in_features

    def forward(self, input: Tensor) -> Tensor:
        return self._compiled(input) if input.numel() <= self._most else super().forward(input)


def compile_dense(model: nn.Module) -> int:
    """Puts compiled modules in place of those of `model`, which is on the CPU and has its weights. Returns how many."""
    found = [(name, new) for name, module in model.named_modules() if (new := _compiled(module)) is not None]
    for name, new in found:
        model.set_submodule(name, new)
    return len(found)


def _compiled(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear:  # not what inherits from it and may compute something else
        can = load_helper() is not None and module.weight.dtype in MOST_ROWS and module.weight.is_contiguous()
        return CompiledLinear(module) if can and module.in_features else None
    return _compiled_norm(module)


def _compiled_norm(module: Any) -> CompiledRmsNorm | None:
    has_weight_alone = [name for name, _ in module.named_parameters()] == ["weight"] and not list(module.buffers())
    is_norm = type(module).__name__.endswith("RMSNorm") and has_weight_alone
    if not is_norm or not can_rms_norm(module.weight.dtype):
        return None
    once = rounds_once(module)
    return None if once is None else CompiledRmsNorm(module.weight, module.variance_epsilon, once)


@torch.inference_mode()
def rounds_once(norm: Any) -> bool | None:
    """Whether an RMS norm rounds after its weight alone, not before it too (fp32 does not tell); None if it is none.

    Found by trying some rows; its sum may have another order.
    """
    if isinstance(norm, CompiledRmsNorm):
        return norm.round_once
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x[1] *= 1e-3  # eps counts here
    right = norm(x)
    for once in (False, True):
        mine = norm_reference(x, weight, eps, once)
        if right.dtype != mine.dtype or right.shape != mine.shape:
            return None
        # A sum of another order seldom moves a rounding; another place of rounding moves a third of them.
        is_wide = weight.dtype == torch.float32
        if torch.allclose(mine, right, rtol=2e-6, atol=0) if is_wide else (mine != right).float().mean() < 0.02:
            return once
    return None
