"""What a router, or a forecast of one, chooses for a layer's tokens, in one compiled call on CPUs (cpu_expected.c).

A guess is made in every layer of every step: torch's ten operations took 0.13 ms of a layer's 1.1 at one sequence, this
0.03. The slow twins are `expected_by_router` and `expected_by_forecast` of moe/layer/lookahead.py, and
`choose_reference`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_struct import CHOICE, KINDS, pack_matrix


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
        x = _as_taken(x, self.weight)
        assert x.shape[1] == width, (x.shape, width)
        expected = torch.zeros(num_experts)
        at = x.data_ptr(), width * x.itemsize, KINDS[x.dtype], len(x), self.top_k, self.at_cut
        spread = None if self.spread is None else self.spread.data_ptr()
        if self._run(self._matrix, *at, spread, expected.data_ptr(), torch.get_num_threads(), 0):
            raise MemoryError(f"no memory for the scores of {len(x)} tokens")
        found: npt.NDArray[np.float32] = expected.numpy()
        return found


# (x [T, H], top_k, among: int64 [T, W], None = all, normalize) -> ids int64 [T, top_k], best first, and their weights.
Choose = Callable[[Tensor, int, Tensor | None, bool], tuple[Tensor, Tensor]]


def chooser(weight: Tensor, bias: Tensor | None) -> Choose:
    """Of a router, or of a forecast of its logits. weight: [E, H]; bias: [E]."""
    return CpuChoice(weight, bias) if can_expect(weight) else partial(choose_reference, weight, bias)


def choose_reference(
    weight: Tensor, bias: Tensor | None, x: Tensor, top_k: int, among: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in fp32, of those in `among` the best, made to sum to 1 if `normalize`."""
    logits = nn.functional.linear(x.to(weight.dtype), weight, bias).float()
    if among is None:
        ids = logits.topk(top_k).indices
    else:
        ids = among.gather(1, logits.gather(1, among).topk(top_k).indices)
    weights = logits.softmax(-1).gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) if normalize else weights


class CpuChoice:
    """`choose_reference` in one call; holds weight, fp32, bf16 or fp16, and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        helper = load_helper()
        assert helper is not None
        assert can_expect(weight)
        self.weight, self.bias = weight, bias
        added = None if bias is None else bias[None]
        self._run, self._matrix = helper.moe_cpu_choose, pack_matrix(weight[None], added, None, weight.shape[1])

    def __call__(self, x: Tensor, top_k: int, among: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor]:
        """Raises MemoryError."""
        num_experts, width = self.weight.shape
        x = _as_taken(x, self.weight)
        assert x.shape[1] == width, (x.shape, width)
        assert top_k <= (num_experts if among is None else among.shape[1]), top_k
        ids, weights = torch.empty(len(x), top_k, dtype=torch.int64), torch.empty(len(x), top_k)
        among = None if among is None else among.contiguous()
        choice = CHOICE.pack(
            *(x.data_ptr(), width * x.itemsize, KINDS[x.dtype], len(x)),
            *((0, 0) if among is None else (among.data_ptr(), among.shape[1])),
            *(top_k, normalize, ids.data_ptr(), weights.data_ptr()),
        )
        if self._run(self._matrix, choice, torch.get_num_threads(), 0):
            raise MemoryError(f"no memory for the scores of {len(x)} tokens")
        return ids, weights


def _as_taken(x: Tensor, weight: Tensor) -> Tensor:
    """What is compared with fp32 is widened on the way."""
    return (x if weight.dtype == torch.float32 and x.dtype in KINDS else x.to(weight.dtype)).contiguous()
