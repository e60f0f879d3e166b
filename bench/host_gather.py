"""Experts gathered from mapped host memory by a kernel: what a device that decides alone would do."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import is_interpreted, launch_options


def gather(source: Tensor, target: Tensor, which: Tensor) -> None:
    """target[i] = source[which[i]]. source: uint8 [E, nbytes], pinned; target: [S, nbytes]; which: int32 [n]."""
    words = source.shape[1] // 8
    block = 1 << 12 if is_interpreted() else 2048
    grid = (min(8, triton.cdiv(words, block)), len(which))
    _gather_kernel[grid](
        source.view(torch.int64), target.view(torch.int64), which, WORDS=words, BLOCK=block, **launch_options(8, 1)
    )


@triton.jit
def _gather_kernel(source_ptr, target_ptr, which_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(1)
    begin = tl.load(which_ptr + row).to(tl.int64) * WORDS
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    while tl.min(word, 0) < WORDS:
        ok = word < WORDS
        tl.store(target_ptr + row.to(tl.int64) * WORDS + word, tl.load(source_ptr + begin + word, mask=ok), mask=ok)
        word += tl.num_programs(0) * BLOCK
