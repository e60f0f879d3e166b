"""The tile that most engines run experts by, as a baseline: a launch per GEMM, a program per tile, no persistence.

Written anew from what is known of vLLM's fused_moe (rows sorted by expert and cut into blocks of BLOCK_M, programs in
groups of GROUP_M row blocks, the activation between the two launches, routing weights multiplied in by the second, sum
over k after it). Not a path of the engine.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moe.kernels.grouped_gemm import route_rows
from moe.kernels.intrinsics import cast, dot, is_interpreted, launch_options, tl_dtype
from moe.kernels.weights import ExpertWeights


def sizes(rows_per_expert: float) -> tuple[int, int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, warps, stages: near what vLLM's tables hold for an H100."""
    if is_interpreted():
        return 16, 64, 64, 1, 4, 1
    if rows_per_expert <= 16:
        return 16, 64, 128, 1, 4, 4
    if rows_per_expert <= 64:
        return 64, 128, 64, 8, 4, 4
    return 128, 256, 64, 16, 8, 4


def two_launch(x: Tensor, ids: Tensor, topk_weights: Tensor, weights: ExpertWeights, num_experts: int) -> Tensor:
    """Σ_k w·expert(x) [T, H]. x: [T, H]; ids: int32 [T, K], -1 = none; gated silu or plain gelu, no biases."""
    (num_tokens, top_k), hidden, inter = ids.shape, x.shape[1], weights.down.shape[2]
    block_m, block_n, block_k, group_m, warps, stages = sizes(num_tokens * top_k / num_experts)
    rows, tiles = route_rows(ids, len(weights.down), block_m)
    first = torch.empty(num_tokens * top_k, weights.gate_up.shape[1], dtype=x.dtype, device=x.device)
    second = torch.zeros(num_tokens * top_k, hidden, dtype=x.dtype, device=x.device)
    launches = (
        (x, weights.gate_up, first, top_k, None),
        (first, weights.down, second, 1, topk_weights.float().contiguous()),
    )
    for source, matrix, out, rows_of, factors in launches:
        if factors is not None:
            source = F.silu(first[:, :inter]) * first[:, inter:] if weights.activation.gated else F.gelu(first)
        num_columns, depth = matrix.shape[1:]
        _tile_kernel[(tiles.max_tiles * triton.cdiv(num_columns, block_n),)](
            source,
            matrix,
            out,
            factors,
            rows.order,
            tiles.table,
            tiles.num_tiles,
            tiles.max_tiles,
            matrix.stride(0),
            ROWS_OF=rows_of,
            N=num_columns,
            K=depth,
            HAS_FACTORS=factors is not None,
            DTYPE=tl_dtype(x.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=group_m,
            **launch_options(warps, stages),
        )
    return second.view(num_tokens, top_k, hidden).sum(1)


@triton.jit(do_not_specialize=["max_tiles"])
def _tile_kernel(  # type: ignore[no-untyped-def]
    source_ptr,
    matrix_ptr,
    out_ptr,
    factor_ptr,
    order_ptr,
    table_ptr,
    num_tiles_ptr,
    max_tiles,
    stride_expert,
    ROWS_OF: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.load(num_tiles_ptr)
    program = tl.program_id(0)
    group = program // (GROUP_M * N_TILES)
    size = tl.minimum(num_tiles - group * GROUP_M, GROUP_M)
    if size > 0:
        inside = program - group * GROUP_M * N_TILES
        tile, n = group * GROUP_M + inside % size, inside // size
        expert = tl.load(table_ptr + tile)
        if (expert >= 0) & (n < N_TILES):
            first = tl.load(table_ptr + max_tiles + tile)
            m = tl.arange(0, BLOCK_M)
            ok = m < tl.load(table_ptr + 2 * max_tiles + tile)
            row = tl.load(order_ptr + first + m, mask=ok, other=0).to(tl.int64)
            columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
            depth = tl.arange(0, BLOCK_K)
            a = source_ptr + (row // ROWS_OF)[:, None] * K + depth[None, :]
            b = matrix_ptr + expert.to(tl.int64) * stride_expert + columns[None, :] * K + depth[:, None]
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range((K + BLOCK_K - 1) // BLOCK_K):
                left = K - step * BLOCK_K
                left_a = tl.load(a, mask=ok[:, None] & (depth < left)[None, :], other=0.0)
                left_b = tl.load(b, mask=(columns < N)[None, :] & (depth < left)[:, None], other=0.0)
                sums = dot(left_a, left_b, sums)
                a += BLOCK_K
                b += BLOCK_K
            if HAS_FACTORS:
                sums *= tl.load(factor_ptr + row, mask=ok, other=0.0)[:, None]
            out = out_ptr + row[:, None] * N + columns[None, :]
            tl.store(out, cast(sums, DTYPE), mask=ok[:, None] & (columns < N)[None, :])
