"""RMS norm on CPUs through the compiled helper (cpu_norm.c): one call where torch takes six.

A decoding step of a small model spent an eighth of its time in torch's norms, of which nearly all is the cost of
calling torch. The slow twin is the forward of the norm that is replaced.
"""

import torch
from torch import Tensor

from moe.kernels.cpu import load_helper

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def can_rms_norm(dtype: torch.dtype) -> bool:
    return dtype in _KINDS and load_helper() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, round_once: bool = False) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)), in fp32, rounded to x's dtype before the weight and after, or after alone.

    x: [..., n] and weight: [n], both fp32 or both bf16, on the CPU. A row's result does not depend on other rows.
    Raises ValueError for anything else.
    """
    helper = load_helper()
    if helper is None or x.dtype not in _KINDS or x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu):
        raise ValueError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}; both must be float32 or bfloat16 "
            "on cpu, and the compiled helper must be there"
        )
    n = x.shape[-1]
    if weight.shape != (n,):
        raise ValueError(f"weight is {tuple(weight.shape)}; rows of x have {n} elements")
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if n:
        rows = x.numel() // n
        to = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        helper.moe_cpu_rms_norm(*to, rows, n, _KINDS[x.dtype], eps, round_once)
    return out
