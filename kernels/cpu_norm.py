"""RMS norm on CPUs through the compiled helper `_cpu_norm` (cpu_norm.c): one call where torch takes six.

A decoding step of a small model spends an eighth of its time in norms, of which nearly all is the cost of calling torch
(bench/results/engine.md). The slow twin is the forward of the norm that is replaced.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


@cache
def load_norm_helper() -> ctypes.CDLL | None:
    """The compiled helper, or None where it is absent; the reason is logged, once."""
    folder = Path(__file__).resolve().parent
    files = sorted(folder.glob("_cpu_norm*.so"))
    try:
        if not files:
            raise OSError(f"no _cpu_norm*.so in {folder}; it is compiled at installation, which needs gcc or clang")
        helper = ctypes.CDLL(str(files[0]))
    except OSError as error:
        log.warning("norms on the CPU run in plain torch: %s", error)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    helper.moe_cpu_rms_norm.argtypes = [pointer, pointer, pointer, integer, integer, integer, ctypes.c_float]
    helper.moe_cpu_rms_norm.restype = None
    return helper


def can_rms_norm(dtype: torch.dtype) -> bool:
    return dtype in _KINDS and load_norm_helper() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x²) + eps)), in fp32, rounded to x's dtype before the weight and after it.

    x: [..., n] and weight: [n], both fp32 or both bf16, on the CPU. A row's result does not depend on other rows.
    Raises ValueError for anything else.
    """
    helper = load_norm_helper()
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
        helper.moe_cpu_rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, n, _KINDS[x.dtype], eps)
    return out
