"""Attention of one new token per sequence over the paged KV cache: no gather, and its key and value written on the way.

    tokens × key heads × splits of SPLIT keys ─▶ maximum, sum and weighted values of each ─▶ one sum per token and head

A sequence's keys are split at fixed places, its parts are summed in their order: a result has the same bits whatever it
is batched with, and however long its neighbours are. Heads that share keys share a program and its loads.
`paged_attention_reference` is the slow twin. Wins over a gather by reading the cache once instead of three times.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.intrinsics import cast, check_device, device_function, dot, is_interpreted, launch_options, tl_dtype

SPLIT = 256  # keys that one program reads
BLOCK_N = 64  # of them at a time


class Pages(NamedTuple):
    """Where S sequences have their keys. tables: int32 [S, max_blocks]; lengths: int32 [S], the new token included.

    longest: no length is larger (known to the host; it bounds the launch, not the result).
    """

    tables: Tensor
    lengths: Tensor
    block_size: int
    longest: int


class Scores(NamedTuple):
    """scale: of q·k; window: keys that a query sees, itself included, 0: all; softcap: c·tanh(s / c), 0: none.

    sinks: [heads], logits that take part in the softmax and have no value, or None.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


def paged_attention(
    q: Tensor, new: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor], pages: Pages, scores: Scores
) -> Tensor:
    """Attention of S new tokens, one of each sequence; writes their keys and values to the pool. Returns [S, heads, D].

    q: [S, heads, D]; new: keys and values [S, kv_heads, D]; pool: the same, [rows, kv_heads, D], contiguous; one dtype,
    D up to 256 and equal for keys and values. S may be 0, and a length: such a row is 0 and writes nothing. Two
    launches, no sync.
    """
    check_device(q)
    (keys, values), (new_keys, new_values) = pool, new
    (num, heads, dim), kv_heads = q.shape, keys.shape[1]
    if reason := why_not(q.dtype, heads, keys.shape, values.shape):
        raise ValueError(f"no paged attention: {reason}")
    out = torch.empty(num, heads, dim, dtype=q.dtype, device=q.device)
    if num == 0:
        return out
    num_splits = triton.cdiv(pages.longest, SPLIT)
    parts = torch.empty(num, heads, num_splits, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(2, num, heads, num_splits, dtype=torch.float32, device=q.device)
    dim_p, group = triton.next_power_of_2(dim), heads // kv_heads
    q = q if q.stride(2) == 1 else q.contiguous()
    new_keys, new_values = (t if t.stride(2) == 1 else t.contiguous() for t in (new_keys, new_values))
    _part_kernel[(num, kv_heads, num_splits)](
        q,
        new_keys,
        new_values,
        keys,
        values,
        pages.tables,
        pages.lengths,
        parts,
        sums,
        scores.scale,
        scores.softcap,
        *q.stride()[:2],
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        pages.tables.stride(0),
        pages.block_size,
        num_splits,
        sums.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        DIM_P=max(16, dim_p),
        GROUP_P=max(16, triton.next_power_of_2(group)),
        WINDOW=scores.window,
        HAS_CAP=scores.softcap > 0,
        DTYPE=tl_dtype(q.dtype),
        SPLIT=SPLIT,
        BLOCK_N=_keys_at_a_time(q.dtype, dim_p),
        **launch_options(4, 2),
    )
    sum_kernel[(num, heads)](
        parts,
        sums,
        pages.lengths,
        scores.sinks,
        out,
        num_splits,
        sums.stride(0),
        HEADS=heads,
        DIM=dim,
        DIM_P=dim_p,
        WINDOW=scores.window,
        HAS_SINKS=scores.sinks is not None,
        DTYPE=tl_dtype(q.dtype),
        SPLIT=SPLIT,
        **launch_options(1, 1),
    )
    return out


def _keys_at_a_time(dtype: torch.dtype, dim_p: int) -> int:
    """As registers allow: fp32 is multiplied without matrix instructions (131 spills on sm_90, 1193 with 64)."""
    if is_interpreted():
        return BLOCK_N
    if dtype == torch.float32:
        return BLOCK_N // 4
    return BLOCK_N if dim_p <= 128 else BLOCK_N // 2


def why_not(dtype: torch.dtype, heads: int, keys: torch.Size, values: torch.Size) -> str | None:
    """Why the kernel cannot attend over such a cache; None if it can. keys, values: shapes [rows, kv_heads, D]."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 or float16, not {dtype}"
    if keys != values or keys[2] > 256:
        return f"keys are {tuple(keys[1:])}, values {tuple(values[1:])}; they must be equal, and at most 256 wide"
    if heads % keys[1]:
        return f"{heads} heads do not share {keys[1]} key heads"
    return None


def paged_attention_reference(
    q: Tensor, new: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor], pages: Pages, scores: Scores
) -> Tensor:
    """`paged_attention` in plain torch, in fp32 with one rounding at the end."""
    out = torch.empty_like(q)
    group = q.shape[1] // pool[0].shape[1]
    for s, length in enumerate(pages.lengths.tolist()):
        if length == 0:
            out[s] = 0
            continue
        rows = pages.tables[s].long()[:, None] * pages.block_size + torch.arange(pages.block_size, device=q.device)
        rows = rows.flatten()[:length]
        for cache, own in zip(pool, new):
            cache[rows[-1]] = own[s]
        seen = rows[max(0, length - scores.window) if scores.window else 0 :]
        k, v = (cache[seen].float().repeat_interleave(group, dim=1) for cache in pool)
        logits = torch.einsum("hd,nhd->hn", q[s].float(), k) * scores.scale
        if scores.softcap:
            logits = torch.tanh(logits / scores.softcap) * scores.softcap
        if scores.sinks is not None:
            logits = torch.cat([logits, scores.sinks.float()[:, None]], dim=1)
        out[s] = torch.einsum("hn,nhd->hd", logits.softmax(-1)[:, : len(seen)], v).to(q.dtype)
    return out


@device_function
def _capped(x, cap):
    # cap · tanh(x / cap), by a sigmoid
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)


@triton.jit(do_not_specialize=["stride_table", "block_size", "num_splits", "stride_sums"])
def _part_kernel(
    q_ptr,
    new_k_ptr,
    new_v_ptr,
    k_ptr,  # [rows, KV_HEADS, DIM]
    v_ptr,
    table_ptr,
    length_ptr,
    part_ptr,  # [S, HEADS, splits, DIM]
    sum_ptr,  # [2, S, HEADS, splits]: maxima, sums
    scale,
    cap,
    stride_qs,
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    stride_table,
    block_size,
    num_splits,
    stride_sums,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    GROUP_P: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    s = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(length_ptr + s)
    end = tl.minimum(length, (split + 1) * SPLIT)
    first = split * SPLIT
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    if tl.maximum(first, low) < end:
        d = tl.arange(0, DIM_P)
        g = tl.arange(0, GROUP_P)
        in_dim = d < DIM
        head = kv_head * GROUP + g
        q = tl.load(
            q_ptr + s * stride_qs + head[:, None] * stride_qh + d[None, :],
            mask=(g < GROUP)[:, None] & in_dim[None, :],
            other=0.0,
        )
        new_k = tl.load(new_k_ptr + s * stride_ks + kv_head * stride_kh + d, mask=in_dim, other=0.0)
        new_v = tl.load(new_v_ptr + s * stride_vs + kv_head * stride_vh + d, mask=in_dim, other=0.0)
        most = tl.full((GROUP_P,), -1e30, tl.float32)
        total = tl.zeros((GROUP_P,), tl.float32)
        mixed = tl.zeros((GROUP_P, DIM_P), tl.float32)
        at = tl.maximum(first, low // BLOCK_N * BLOCK_N)
        while at < end:
            n = at + tl.arange(0, BLOCK_N)
            ok = (n >= low) & (n < end)
            is_new = n == length - 1
            block = tl.load(table_ptr + s * stride_table + n // block_size, mask=ok, other=0)
            row = block.to(tl.int64) * block_size + n % block_size
            place = (row * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
            old = (ok & (n < length - 1))[:, None] & in_dim[None, :]
            k = tl.where(is_new[:, None], new_k[None, :], tl.load(k_ptr + place, mask=old, other=0.0))
            v = tl.where(is_new[:, None], new_v[None, :], tl.load(v_ptr + place, mask=old, other=0.0))
            here = is_new[:, None] & in_dim[None, :]  # this program alone has the last key
            tl.store(k_ptr + place, k, mask=here)
            tl.store(v_ptr + place, v, mask=here)
            x = dot(q, tl.trans(k), tl.zeros((GROUP_P, BLOCK_N), tl.float32)) * scale
            if HAS_CAP:
                x = _capped(x, cap)
            x = tl.where(ok[None, :], x, -float("inf"))
            now = tl.maximum(most, tl.max(x, 1))
            shrink = tl.exp(most - now)
            p = tl.exp(x - now[:, None])
            total = total * shrink + tl.sum(p, 1)
            mixed = dot(cast(p, DTYPE), v, mixed * shrink[:, None])
            most = now
            at += BLOCK_N
        out = (s * HEADS + head) * num_splits + split
        mask = g < GROUP
        tl.store(sum_ptr + out, most, mask=mask)
        tl.store(sum_ptr + stride_sums + out, total, mask=mask)
        tl.store(part_ptr + out[:, None] * DIM + d[None, :], mixed, mask=mask[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["num_splits", "stride_sums"])
def sum_kernel(
    part_ptr,
    sum_ptr,
    length_ptr,
    sink_ptr,
    out_ptr,  # [S, HEADS, DIM]
    num_splits,
    stride_sums,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(length_ptr + s)
    d = tl.arange(0, DIM_P)
    in_dim = d < DIM
    most = tl.full((1,), -1e30, tl.float32)
    total = tl.zeros((1,), tl.float32)
    if HAS_SINKS:
        most = tl.load(sink_ptr + head + tl.arange(0, 1)).to(tl.float32)
        total = tl.full((1,), 1.0, tl.float32)
    mixed = tl.zeros((DIM_P,), tl.float32)
    split = 0
    if WINDOW > 0:
        split = tl.maximum(length - WINDOW, 0) // SPLIT
    while split * SPLIT < length:
        at = (s * HEADS + head) * num_splits + split
        own = tl.load(sum_ptr + at + tl.arange(0, 1))
        now = tl.maximum(most, own)
        shrink, grow = tl.exp(most - now), tl.exp(own - now)
        total = total * shrink + tl.load(sum_ptr + stride_sums + at + tl.arange(0, 1)) * grow
        part = tl.load(part_ptr + at * DIM + d, mask=in_dim, other=0.0)
        mixed = mixed * shrink + part * grow
        most = now
        split += 1
    mixed = tl.where(length > 0, mixed / tl.where(total > 0, total, 1.0), 0.0)  # length 0: a place that nobody has
    tl.store(out_ptr + (s * HEADS + head) * DIM + d, cast(mixed, DTYPE), mask=in_dim)
