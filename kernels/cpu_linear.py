"""Dense layers on CPUs, through the helper that also computes experts (cpu_linear.c).

While a model decodes, its dense layers read every weight for a handful of rows. torch reads fp32 there at a third of
the memory's speed and bf16 at a sixth; this reads both one and a half to four times as fast (AMD Zen 4). The slow twin
is `torch.nn.functional.linear`.
"""

import torch
from torch import Tensor

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_struct import KINDS, MOST_COLUMNS, pack_matrix
from moe.kernels.formats import Coding
from moe.kernels.reference import check_coded_matrix


class CpuLinear:
    """x W^T + b for one weight, ready to be called. A row's result does not depend on the other rows, bit for bit.

    weight: [N, K]; bias: [N] or None; fp32, bf16 or fp16 on the CPU. fp32 sums; rounded once.
    coding: weight is codes [N, bytes] of K = `columns`, decoded in registers; its tensors are of one slot and one part.
    Then x and bias may be of any of the three. The twin is `F.linear` on what `kernels.formats.decode` gives.
    Holds all tensors; their addresses may not change. `isa`: index into `instruction_sets()`. Raises ValueError for
    what cannot be computed, and for scales, factors or tables that are not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        coding: Coding | None = None,
        columns: int | None = None,
        isa: int = 0,
    ) -> None:
        helper = load_helper()
        fits = helper is not None and weight.dim() == 2 and weight.is_cpu and weight.stride(1) == 1
        fits = fits and (weight.dtype in KINDS or coding is not None)
        if bias is not None:
            dtypes = KINDS if coding is not None else (weight.dtype,)
            fits = fits and bias.shape == weight.shape[:1] and bias.dtype in dtypes and bias.is_contiguous()
        if helper is None or not fits:
            raise ValueError(
                f"a weight of {weight.dtype} {tuple(weight.shape)} on {weight.device}; it must be float32, bfloat16 or "
                "float16 [N, K] on cpu, its bias [N] of the same dtype, and the compiled helper must be there"
            )
        self.weight, self.bias, self.coding = weight, bias, coding
        self._width = weight.shape[1] if columns is None else columns
        if coding is not None:
            check_coded_matrix("weight", weight[None], coding, (1, len(weight), self._width))
            _check_contents(coding)
            if self._width > MOST_COLUMNS:
                raise ValueError(f"the weight has {self._width} columns of codes; at most {MOST_COLUMNS} are possible")
        self._takes = KINDS if coding is not None else (weight.dtype,)
        self._run, self._isa = helper.moe_cpu_linear, isa
        self._matrix = pack_matrix(weight[None], None if bias is None else bias[None], coding, self._width)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., K] in the weight's dtype, of codes in any; the result [..., N] in that of x."""
        num_out, width = len(self.weight), self._width
        if x.shape[-1] != width or x.dtype not in self._takes or not x.is_cpu:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}; the weight takes {self.weight.dtype} {width}"
            )
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], num_out, dtype=x.dtype)
        rows = x.numel() // width if width else 0
        at = x.data_ptr(), width * x.itemsize, KINDS[x.dtype], rows, out.data_ptr()
        if self._run(self._matrix, *at, torch.get_num_threads(), self._isa):
            raise MemoryError(f"no scratch memory, or no thread, for {rows} rows of {width}")
        return out


def _check_contents(coding: Coding) -> None:
    for name in ("scale", "factor", "table"):
        piece: Tensor | None = getattr(coding, name)
        if piece is not None and not bool(piece.float().isfinite().all()):
            raise ValueError(f"the {name} of {coding.code} codes is not finite everywhere; the weights are damaged")
    groups = coding.scale.shape[-1]
    if coding.group_of is not None and not bool(((coding.group_of >= 0) & (coding.group_of < groups)).all()):
        raise ValueError(f"columns are of groups beyond the {groups} that have scales")
