"""What a router, or a forecast of one, would choose of a layer's tokens, in one compiled call on CPUs (cpu_expected.c).

A guess is made in every layer of every step: torch's ten operations took 0.13 ms of a layer's 1.1 at one sequence, this
0.03. The slow twins are `expected_by_router` and `expected_by_forecast` of moe/layer/lookahead.py.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_struct import KINDS, pack_matrix


def can_expect(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in KINDS and weight.stride(1) == 1 and load_helper() is not None


class CpuExpected:
    """Expected tokens by expert, for one router's weight [E, H], fp32, bf16 or fp16; it is held.

    A token counts for each of the `top_k` experts that score best: `at_cut` for one that scores as the best of the
    others does, nearly 1 for one far above it, measured by the spread of the token's scores. With a forecast's `spread`
    (fp32 [E], standard deviations of scores) it counts for every expert, as much as it is likely that the expert scores
    better than halfway between the last of the best and the best of the others; bias: [E], added to its scores.
    """

    def __init__(
        self,
        weight: Tensor,
        top_k: int,
        at_cut: float = 0.0,
        *,
        bias: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> None:
        helper = load_helper()
        assert helper is not None
        assert can_expect(weight)
        assert spread is None or (spread.is_contiguous() and spread.dtype == torch.float32), spread
        self.weight, self.top_k, self.at_cut, self.bias, self.spread = weight, top_k, at_cut, bias, spread
        added = None if bias is None else bias[None]
        self._run, self._matrix = helper.moe_cpu_expected, pack_matrix(weight[None], added, None, weight.shape[1])

    def __call__(self, x: Tensor) -> npt.NDArray[np.float32]:
        """x: [T, H], rounded to the weight's dtype. fp32 [E]. Raises MemoryError."""
        num_experts, width = self.weight.shape
        x = x.to(self.weight.dtype).contiguous()
        assert x.shape[1] == width, (x.shape, width)
        expected = torch.zeros(num_experts)
        at = x.data_ptr(), width * x.itemsize, KINDS[x.dtype], len(x), self.top_k, self.at_cut
        spread = None if self.spread is None else self.spread.data_ptr()
        if self._run(self._matrix, *at, spread, expected.data_ptr(), torch.get_num_threads(), 0):
            raise MemoryError(f"no memory for the scores of {len(x)} tokens")
        found: npt.NDArray[np.float32] = expected.numpy()
        return found
