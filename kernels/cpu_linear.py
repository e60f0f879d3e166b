"""Dense layers of few rows on CPUs, through the helper that also computes experts (cpu_experts.c).

While a model decodes, its dense layers read every weight for a handful of rows. torch reads fp32 there at a third of
the memory's speed and bf16 at a sixth; this reads both one and a half to four times as fast (AMD Zen 4; the share of
that in a whole step: bench/results/engine.md). The slow twin is `torch.nn.functional.linear`.
"""

import torch
from torch import Tensor

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_struct import KINDS, pack_matrix


class CpuLinear:
    """x W^T + b for one weight, ready to be called. A row's result does not depend on the other rows, bit for bit.

    weight: [N, K]; bias: [N] or None; fp32, bf16 or fp16 on the CPU. Holds both; their addresses may not change.
    fp32 sums; rounded once. `isa`: index into `instruction_sets()`. Raises ValueError for what cannot be computed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, isa: int = 0) -> None:
        helper = load_helper()
        fits = weight.dim() == 2 and weight.is_cpu and weight.dtype in KINDS and weight.stride(1) == 1
        if bias is not None:
            fits = fits and bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_contiguous()
        if helper is None or not fits:
            raise ValueError(
                f"a weight of {weight.dtype} {tuple(weight.shape)} on {weight.device}; it must be float32, bfloat16 or "
                "float16 [N, K] on cpu, its bias [N] of the same dtype, and the compiled helper must be there"
            )
        self.weight, self.bias = weight, bias
        self._run, self._isa = helper.moe_cpu_linear, isa
        self._matrix = pack_matrix(weight[None], None if bias is None else bias[None], None, weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., K] in the weight's dtype; the result [..., N]."""
        num_out, width = self.weight.shape
        if x.shape[-1] != width or x.dtype != self.weight.dtype or not x.is_cpu:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}; the weight takes {self.weight.dtype} {width}"
            )
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype)
        rows = x.numel() // width if width else 0
        at = x.data_ptr(), width * x.itemsize, KINDS[x.dtype], rows, out.data_ptr()
        if self._run(self._matrix, *at, torch.get_num_threads(), self._isa):
            raise MemoryError(f"no scratch memory for {rows} rows of {width}")
        return out
