"""Replaces a model's RMS norms by the compiled one, where it gives the same.

What a norm computes is seen from what it does: each is called on random rows, and replaced only if the compiled norm
with its weight agrees. Norms that add one to the weight (Gemma) or round elsewhere (GPT-OSS in bf16) stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe.kernels.cpu_norm import can_rms_norm, rms_norm


class CompiledRmsNorm(nn.Module):
    """x [..., n] -> [..., n]; keeps the weight and the names of the norm that it stands for."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def compile_norms(model: nn.Module) -> int:
    """Puts compiled norms in place of those of `model`, which is on the CPU and has its weights. Returns how many."""
    found = [(name, norm) for name, module in model.named_modules() if (norm := _compiled(module)) is not None]
    for name, norm in found:
        model.set_submodule(name, norm)
    return len(found)


@torch.inference_mode()
def _compiled(module: Any) -> CompiledRmsNorm | None:
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float)
    if not is_norm or [name for name, _ in module.named_parameters()] != ["weight"] or list(module.buffers()):
        return None
    weight = module.weight
    if weight.dim() != 1 or not can_rms_norm(weight.dtype):
        return None
    norm = CompiledRmsNorm(weight, module.variance_epsilon)
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    x[1] *= 1e-3  # eps counts here
    right, mine = module(x), norm(x)
    if right.dtype != mine.dtype or right.shape != mine.shape:
        return None
    if weight.dtype == torch.float32:
        return norm if torch.allclose(mine, right, rtol=2e-6, atol=0) else None  # sums of another order
    # a sum of another order seldom moves a rounding; another place of rounding moves a third of them
    return norm if (mine != right).float().mean() < 0.02 else None
