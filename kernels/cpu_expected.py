"""What a router would choose of a layer's tokens, in one compiled call on CPUs (cpu_expected.c).

A guess is made in every layer of every step: torch's ten operations took 0.13 ms of a layer's 1.1 at one sequence, this
0.03. The slow twin is `moe.layer.lookahead.expected_by_router`.
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
    others does, nearly 1 for one far above it, measured by the spread of the token's scores.
    """

    def __init__(self, weight: Tensor, top_k: int, at_cut: float) -> None:
        helper = load_helper()
        assert helper is not None
        assert can_expect(weight)
        self.weight, self.top_k, self.at_cut = weight, top_k, at_cut
        self._run, self._matrix = helper.moe_cpu_expected, pack_matrix(weight[None], None, None, weight.shape[1])

    def __call__(self, x: Tensor) -> npt.NDArray[np.float32]:
        """x: [T, H], rounded to the weight's dtype. fp32 [E]. Raises MemoryError."""
        num_experts, width = self.weight.shape
        x = x.to(self.weight.dtype).contiguous()
        assert x.shape[1] == width, (x.shape, width)
        expected = np.zeros(num_experts, np.float32)
        at = x.data_ptr(), width * x.itemsize, KINDS[x.dtype], len(x), self.top_k, self.at_cut
        if self._run(self._matrix, *at, expected.ctypes.data, torch.get_num_threads(), 0):
            raise MemoryError(f"no memory for the scores of {len(x)} tokens")
        return expected
