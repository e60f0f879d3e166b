"""The weighted sum of a token's expert outputs, in the fixed order k = 0 … K-1: deterministic, no atomics."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import cast, check_device, device_function, is_interpreted, launch_options, tl_dtype


def combine(y: Tensor, topk_weights: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """out[t] = Σ_k topk_weights[t, k] · y[t, k] in float32, rounded once; bit-equal to `combine_reference`.

    y: [T, K, H] contiguous; topk_weights: [T, K]; dtype: of the result, None = that of y. Returns [T, H]. Bandwidth
    bound: K * T * H reads.
    """
    check_device(y)
    if y.dim() != 3 or y.shape[:2] != topk_weights.shape:
        raise ValueError(f"topk_weights {tuple(topk_weights.shape)} must be [T, K] of y {tuple(y.shape)} = [T, K, H]")
    num_tokens, top_k, hidden = y.shape
    out = torch.empty(num_tokens, hidden, dtype=dtype or y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    block_t = 16 if is_interpreted() else 1
    block_h = min(triton.next_power_of_2(hidden), 1024)
    _combine_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(hidden, block_h))](
        y.contiguous(),
        topk_weights.float().contiguous(),
        out,
        num_tokens,
        TOP_K=top_k,
        H=hidden,
        DTYPE=tl_dtype(out.dtype),
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        **launch_options(4, 1),
    )
    return out


@device_function
def weighted_sum(
    y_ptrs, weight_ptrs, weight_mask, mask, TOP_K: tl.constexpr, H, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Σ_k over rows K * t + k. y_ptrs: pointers [BLOCK_T, BLOCK_H] to k = 0, row stride H. float32."""
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in tl.static_range(TOP_K):
        weight = tl.load(weight_ptrs + k, mask=weight_mask, other=0.0)
        y = tl.load(y_ptrs + k * H, mask=mask, other=0.0).to(tl.float32)
        total = total + weight[:, None] * y
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    y_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    ok = token < num_tokens
    mask = ok[:, None] & (cols < H)[None, :]
    y_ptrs = y_ptr + token.to(tl.int64)[:, None] * (TOP_K * H) + cols[None, :]
    total = weighted_sum(y_ptrs, weight_ptr + token * TOP_K, ok, mask, TOP_K, H, BLOCK_T, BLOCK_H)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * H + cols[None, :], cast(total, DTYPE), mask=mask)
