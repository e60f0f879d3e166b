"""Attention of one new token per sequence over cached latents (MLA), which are never expanded.

    scores   q·W_uk · c  +  q_rot · r      all heads read the same latent c [L] and positions r [R] of a key
    result   Σ p c       ─▶  · W_uv        by the caller, for both products

The absorbed form of DeepSeek-V2 (arXiv 2405.04434, section 2.1.3). Splits, order of sums and bits in any batch are as
in paged_attention.py, and its second kernel sums the parts. `latent_attention_reference` is the slow twin.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import cast, check_device, dot, is_interpreted, launch_options, tl_dtype
from moe.kernels.paged_attention import SPLIT, Pages, sum_kernel

HEADS_AT_A_TIME = 16
MAX_LATENT = 512


def latent_attention(
    q: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor], pages: Pages, scale: float
) -> Tensor:
    """Sums of latents [S, heads, L] of S new tokens, one of each sequence; writes their latents to the pool.

    q: [S, heads, L] and [S, heads, R], the first absorbed; new: [S, L] and [S, R]; pool: [rows, 1, L] and [rows, 1, R],
    contiguous; one dtype. S may be 0, and a length: such a row is 0 and writes nothing. Two launches, no sync.
    """
    check_device(q[0])
    (latent, turned), (latents, turns) = q, pool
    num, heads, width = latent.shape
    rotary = turned.shape[2]
    if reason := why_not(latent.dtype, width, rotary):
        raise ValueError(f"no latent attention: {reason}")
    out = torch.empty(num, heads, width, dtype=latent.dtype, device=latent.device)
    if num == 0:
        return out
    num_splits = triton.cdiv(pages.longest, SPLIT)
    parts = torch.empty(num, heads, num_splits, width, dtype=torch.float32, device=latent.device)
    sums = torch.empty(2, num, heads, num_splits, dtype=torch.float32, device=latent.device)
    width_p, rotary_p = (max(16, triton.next_power_of_2(n)) for n in (width, rotary))
    tensors = (t.contiguous() for t in (latent, turned, *new))
    _latent_part_kernel[(num, triton.cdiv(heads, HEADS_AT_A_TIME), num_splits)](
        *tensors,
        latents,
        turns,
        pages.tables,
        pages.lengths,
        parts,
        sums,
        scale,
        pages.tables.stride(0),
        pages.block_size,
        num_splits,
        sums.stride(0),
        HEADS=heads,
        GROUP=HEADS_AT_A_TIME,
        WIDTH=width,
        WIDTH_P=width_p,
        ROTARY=rotary,
        ROTARY_P=rotary_p,
        DTYPE=tl_dtype(latent.dtype),
        SPLIT=SPLIT,
        BLOCK_N=64 if is_interpreted() else 16 if latent.dtype == torch.float32 else 32,
        STEP=min(width_p, 512 if is_interpreted() else 64),
        **launch_options(8, 1),
    )
    sum_kernel[(num, heads)](
        parts,
        sums,
        pages.lengths,
        None,
        out,
        num_splits,
        sums.stride(0),
        HEADS=heads,
        DIM=width,
        DIM_P=width_p,
        WINDOW=0,
        HAS_SINKS=False,
        DTYPE=tl_dtype(latent.dtype),
        SPLIT=SPLIT,
        **launch_options(4, 1),
    )
    return out


def why_not(dtype: torch.dtype, width: int, rotary: int) -> str | None:
    """Why the kernel cannot attend over such latents; None if it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 or float16, not {dtype}"
    if not 0 < width <= MAX_LATENT or not 0 < rotary <= 128:
        return f"latents of {width} and {rotary} elements; at most {MAX_LATENT} and 128 are taken"
    return None


def latent_attention_reference(
    q: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor], pages: Pages, scale: float
) -> Tensor:
    """`latent_attention` in plain torch, in fp32 with one rounding at the end."""
    out = torch.zeros_like(q[0])
    for s, length in enumerate(pages.lengths.tolist()):
        if length == 0:
            continue
        rows = pages.tables[s].long()[:, None] * pages.block_size + torch.arange(pages.block_size, device=q[0].device)
        rows = rows.flatten()[:length]
        for cache, own in zip(pool, new):
            cache[rows[-1], 0] = own[s]
        c, r = (cache[rows, 0].float() for cache in pool)
        scores = (q[0][s].float() @ c.T + q[1][s].float() @ r.T) * scale
        out[s] = (scores.softmax(-1) @ c).to(out.dtype)
    return out


@triton.jit(do_not_specialize=["stride_table", "block_size", "num_splits", "stride_sums"])
def _latent_part_kernel(
    q_ptr,  # [S, HEADS, WIDTH]
    turned_ptr,  # [S, HEADS, ROTARY]
    new_c_ptr,
    new_r_ptr,
    c_ptr,  # [rows, WIDTH]
    r_ptr,  # [rows, ROTARY]
    table_ptr,
    length_ptr,
    part_ptr,  # [S, HEADS, splits, WIDTH]
    sum_ptr,  # [2, S, HEADS, splits]: maxima, sums
    scale,
    stride_table,
    block_size,
    num_splits,
    stride_sums,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTARY_P: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * GROUP
    split = tl.program_id(2)
    length = tl.load(length_ptr + s)
    end = tl.minimum(length, (split + 1) * SPLIT)
    at = split * SPLIT
    if at < end:
        d = tl.arange(0, WIDTH_P)
        t = tl.arange(0, ROTARY_P)
        head = first_head + tl.arange(0, GROUP)
        in_d = d < WIDTH
        in_t = t < ROTARY
        is_head = head < HEADS
        row_of = s * HEADS + head
        turned = tl.load(
            turned_ptr + row_of[:, None] * ROTARY + t[None, :], mask=is_head[:, None] & in_t[None, :], other=0.0
        )
        new_c = tl.load(new_c_ptr + s * WIDTH + d, mask=in_d, other=0.0)
        new_r = tl.load(new_r_ptr + s * ROTARY + t, mask=in_t, other=0.0)
        most = tl.full((GROUP,), -1e30, tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        mixed = tl.zeros((GROUP, WIDTH_P), tl.float32)
        while at < end:
            n = at + tl.arange(0, BLOCK_N)
            ok = n < end
            is_new = n == length - 1
            block = tl.load(table_ptr + s * stride_table + n // block_size, mask=ok, other=0)
            row = block.to(tl.int64) * block_size + n % block_size
            old = (ok & (n < length - 1))[:, None]
            c_at = row[:, None] * WIDTH + d[None, :]
            r_at = row[:, None] * ROTARY + t[None, :]
            r = tl.load(r_ptr + r_at, mask=old & in_t[None, :], other=0.0)
            r = tl.where(is_new[:, None], new_r[None, :], r)
            x = dot(turned, tl.trans(r), tl.zeros((GROUP, BLOCK_N), tl.float32))
            for start in range(0, WIDTH_P, STEP):  # a whole query would take all registers
                part = start + tl.arange(0, STEP)
                in_part = part < WIDTH
                q_at = row_of[:, None] * WIDTH + part[None, :]
                q = tl.load(q_ptr + q_at, mask=is_head[:, None] & in_part[None, :], other=0.0)
                some = tl.load(c_ptr + row[:, None] * WIDTH + part[None, :], mask=old & in_part[None, :], other=0.0)
                new = tl.load(new_c_ptr + s * WIDTH + part, mask=in_part, other=0.0)
                x = dot(q, tl.trans(tl.where(is_new[:, None], new[None, :], some)), x)
            x = x * scale
            x = tl.where(ok[None, :], x, -float("inf"))
            now = tl.maximum(most, tl.max(x, 1))
            shrink = tl.exp(most - now)
            p = tl.exp(x - now[:, None])
            c = tl.load(c_ptr + c_at, mask=old & in_d[None, :], other=0.0)
            c = tl.where(is_new[:, None], new_c[None, :], c)
            if tl.program_id(1) == 0:  # alone writes what is new, which the others have too
                tl.store(c_ptr + c_at, c, mask=is_new[:, None] & in_d[None, :])
                tl.store(r_ptr + r_at, r, mask=is_new[:, None] & in_t[None, :])
            total = total * shrink + tl.sum(p, 1)
            mixed = dot(cast(p, DTYPE), c, mixed * shrink[:, None])
            most = now
            at += BLOCK_N
        out = row_of * num_splits + split
        tl.store(sum_ptr + out, most, mask=is_head)
        tl.store(sum_ptr + stride_sums + out, total, mask=is_head)
        tl.store(part_ptr + out[:, None] * WIDTH + d[None, :], mixed, mask=is_head[:, None] & in_d[None, :])
