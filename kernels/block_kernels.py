"""What stands between a layer's matrix products while decoding, in few launches.

    h += add ─▶ norm ─▶ q k v (torch) ─▶ head norms, positions ─▶ attention ─▶ o (torch) ─▶ h += … ─▶ norm ─▶ router

Two kernels in the place of some thirty operators a layer. They round where torch's operators do: a 16-bit norm before
its weight (or, GPT-OSS's, after it alone), each product of a rotation; only sums of squares have another order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.cpu_block import head_norm_reference, norm_reference, rotated_reference
from moe.kernels.intrinsics import cast, check_device, device_function, launch_options, tl_dtype

MAX_WIDTH = 16384  # of a row, and of all heads together: one program holds it


def add_norm(h: Tensor, add: Tensor | None, weight: Tensor, eps: float, *, round_once: bool = False) -> Tensor:
    """RMS norm of h + add, [T, H]; h becomes the sum. One dtype, contiguous; T may be 0. One launch.

    round_once: the normed row is not rounded before its weight.
    """
    check_device(h)
    x = torch.empty_like(h)
    if len(h):
        _add_norm_kernel[(len(h),)](
            h,
            add,
            weight,
            x,
            eps,
            WIDTH=h.shape[1],
            WIDTH_P=triton.next_power_of_2(h.shape[1]),
            HAS_ADD=add is not None,
            ROUND_ONCE=round_once,
            DTYPE=tl_dtype(h.dtype),
            **launch_options(8 if h.shape[1] > 1024 else 4, 1),
        )
    return x


def add_norm_reference(
    h: Tensor, add: Tensor | None, weight: Tensor, eps: float, *, round_once: bool = False
) -> Tensor:
    """`add_norm` in plain torch."""
    if add is not None:
        h += add
    return norm_reference(h, weight, eps, round_once)


class Turn(NamedTuple):
    """What happens to the heads of q and k. q_norm, k_norm: [dim], or over all heads, or None.

    rotary: of the elements of a head, the first so many turn. round_once: as `add_norm` has it.
    """

    heads: int
    kv_heads: int
    dim: int
    rotary: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    round_once: bool = False


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """Normed heads, rotated by their positions: q [T, heads, dim], k [T, kv_heads, dim], both new. One launch.

    q: [T, heads * dim], k: [T, kv_heads * dim], rows may lie apart; cos, sin: [T, rotary]. One dtype; T may be 0.
    """
    check_device(q)
    out_q = torch.empty(len(q), turn.heads, turn.dim, dtype=q.dtype, device=q.device)
    out_k = torch.empty(len(q), turn.kv_heads, turn.dim, dtype=q.dtype, device=q.device)
    if len(q):
        norm = 0 if turn.q_norm is None else 1 if len(turn.q_norm) == turn.dim else 2
        _turn_kernel[(len(q), 2)](
            q,
            k,
            out_q,
            out_k,
            turn.q_norm,
            turn.k_norm,
            cos,
            sin,
            q.stride(0),
            k.stride(0),
            turn.eps,
            HEADS=turn.heads,
            KV_HEADS=turn.kv_heads,
            HEADS_P=triton.next_power_of_2(turn.heads),
            KV_HEADS_P=triton.next_power_of_2(turn.kv_heads),
            DIM=turn.dim,
            DIM_P=triton.next_power_of_2(turn.dim),
            ROTARY=turn.rotary,
            NORM=norm,
            ROUND_ONCE=turn.round_once,
            DTYPE=tl_dtype(q.dtype),
            **launch_options(8 if turn.heads * turn.dim > 1024 else 4, 1),
        )
    return out_q, out_k


def turned_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """`turned` in plain torch."""
    made = []
    for x, weight in ((q, turn.q_norm), (k, turn.k_norm)):
        heads = head_norm_reference(x, weight, turn.dim, turn.eps, turn.round_once).reshape(len(x), -1, turn.dim)
        made.append(rotated_reference(heads, cos, sin, turn.rotary))
    return made[0], made[1]


@triton.jit
def _add_norm_kernel(
    h_ptr,
    add_ptr,
    weight_ptr,
    x_ptr,
    eps,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    HAS_ADD: tl.constexpr,
    ROUND_ONCE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    at = tl.arange(0, WIDTH_P)
    ok = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    h = tl.load(h_ptr + row + at, mask=ok, other=0.0).to(tl.float32)
    if HAS_ADD:
        rounded = cast(h + tl.load(add_ptr + row + at, mask=ok, other=0.0).to(tl.float32), DTYPE)
        tl.store(h_ptr + row + at, rounded, mask=ok)
        h = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(x_ptr + row + at, _weighted(h * scale, weight, ROUND_ONCE, DTYPE), mask=ok)


@device_function
def _weighted(normed, weight, ROUND_ONCE: tl.constexpr, DTYPE: tl.constexpr):
    if not ROUND_ONCE:
        normed = cast(normed, DTYPE).to(tl.float32)
    return cast(weight * normed, DTYPE)


@device_function
def _turn(
    x_ptr,
    out_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_ONCE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """All heads of one row."""
    HALF: tl.constexpr = ROTARY // 2
    head = tl.arange(0, HEADS_P)[:, None]
    d = tl.arange(0, DIM_P)[None, :]
    ok = (head < HEADS) & (d < DIM)
    turns = ok & (d < ROTARY)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    x = tl.load(x_ptr + head * DIM + d, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + head * DIM + other, mask=turns, other=0.0).to(tl.float32)
    if NORM > 0:
        squares = tl.sum(x * x, 1)
        if NORM == 1:
            scale = tl.rsqrt(squares / DIM + eps)[:, None]
            first = head * 0
        else:
            scale = tl.rsqrt(tl.sum(squares, 0) / (HEADS * DIM) + eps)
            first = head * DIM
        weight = tl.load(weight_ptr + first + d, mask=ok, other=0.0).to(tl.float32)
        x = _weighted(x * scale, weight, ROUND_ONCE, DTYPE).to(tl.float32)
        weight = tl.load(weight_ptr + first + other, mask=turns, other=0.0).to(tl.float32)
        y = _weighted(y * scale, weight, ROUND_ONCE, DTYPE).to(tl.float32)
    cos = tl.load(cos_ptr + d, mask=d < ROTARY, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=d < ROTARY, other=0.0).to(tl.float32)
    sin = tl.where(d < HALF, -sin, sin)
    rotated = cast(x * cos, DTYPE).to(tl.float32) + cast(y * sin, DTYPE).to(tl.float32)
    tl.store(out_ptr + head * DIM + d, cast(tl.where(turns, rotated, x), DTYPE), mask=ok)


@triton.jit(do_not_specialize=["stride_q", "stride_k"])
def _turn_kernel(
    q_ptr,
    k_ptr,
    out_q_ptr,
    out_k_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    stride_q,
    stride_k,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    KV_HEADS_P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_ONCE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    cos_ptr += t * ROTARY
    sin_ptr += t * ROTARY
    if tl.program_id(1) == 0:
        x_ptr = q_ptr + t * stride_q
        out_ptr = out_q_ptr + t * HEADS * DIM
        _turn(
            x_ptr, out_ptr, q_norm_ptr, cos_ptr, sin_ptr, eps,
            HEADS, HEADS_P, DIM, DIM_P, ROTARY, NORM, ROUND_ONCE, DTYPE,
        )  # fmt: skip
    else:
        x_ptr = k_ptr + t * stride_k
        out_ptr = out_k_ptr + t * KV_HEADS * DIM
        _turn(
            x_ptr, out_ptr, k_norm_ptr, cos_ptr, sin_ptr, eps,
            KV_HEADS, KV_HEADS_P, DIM, DIM_P, ROTARY, NORM, ROUND_ONCE, DTYPE,
        )  # fmt: skip
