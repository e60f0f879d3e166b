"""What the single launch (fused_kernel.py) puts to peers before their experts can begin: row numbers, and tokens.

A flag of the epoch follows each put and is released after it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton.language as tl

from moe.kernels.intrinsics import device_function, peer_pointer, release_set


@device_function
def send_rows(bases, me, peer, epoch, parity, order, offsets, G, EL, R_MAX, O_COUNT_FLAG, O_OFFSETS, O_ROWS):
    """Put the numbers of the rows that `peer` computes, sorted by expert, and where each expert's begin."""
    lane = tl.arange(0, 1024)
    first = tl.load(offsets + peer * EL)
    to_offsets = peer_pointer(bases, peer, O_OFFSETS, tl.int32) + (parity * G + me) * (EL + 1)
    i = 0
    while i <= EL:
        inside = i + lane <= EL
        begin = tl.load(offsets + peer * EL + i + lane, mask=inside, other=0)
        tl.store(to_offsets + i + lane, begin - first, mask=inside)
        i += 1024
    count = tl.load(offsets + (peer + 1) * EL) - first
    to_rows = peer_pointer(bases, peer, O_ROWS, tl.int32) + ((parity * G + me).to(tl.int64) * R_MAX)
    i = 0
    while i < count:
        inside = i + lane < count
        tl.store(to_rows + i + lane, tl.load(order + first + i + lane, mask=inside, other=0), mask=inside)
        i += 1024
    release_set(peer_pointer(bases, peer, O_COUNT_FLAG, tl.int32) + me, epoch, None, "sys")


@device_function
def clear(ptr, count):
    lane = tl.arange(0, 1024)
    i = 0
    while i < count:
        tl.store(ptr + i + lane, tl.zeros((1024,), tl.int32), mask=i + lane < count)
        i += 1024


@device_function
def send_tokens(
    bases,
    me,
    epoch,
    x,
    ids,
    num_tokens,
    block,
    G,
    EL,
    O_DATA_FLAG: tl.constexpr,
    O_RECV_X: tl.constexpr,
    DATA_BLOCKS: tl.constexpr,
    T_MAX: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_P: tl.constexpr,
    H: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Put each token of the block to every peer that owns one of its experts, once."""
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, TOP_K_P)
    inside = (token < num_tokens)[:, None] & (k < TOP_K)[None, :]
    expert = tl.load(ids + token[:, None] * TOP_K + k[None, :], mask=inside, other=-1)
    owner = tl.where(expert >= 0, expert // EL, -1)
    h0 = 0
    while h0 < H:
        cols = h0 + tl.arange(0, BLOCK_H)
        mask = (token < num_tokens)[:, None] & (cols < H)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * H + cols[None, :], mask=mask, other=0.0)
        distance = 1
        while distance < G:
            peer = (me + distance) % G
            wanted = tl.max((owner == peer).to(tl.int32), 1) > 0
            to = peer_pointer(bases, peer, O_RECV_X, DTYPE) + (me * T_MAX + token).to(tl.int64)[:, None] * H
            tl.store(to + cols[None, :], values, mask=mask & wanted[:, None])
            distance += 1
        h0 += BLOCK_H
    distance = 1
    while distance < G:
        peer = (me + distance) % G
        if tl.max(tl.max((owner == peer).to(tl.int32), 1), 0) > 0:
            flag = peer_pointer(bases, peer, O_DATA_FLAG, tl.int32) + me * DATA_BLOCKS + block
            release_set(flag, epoch, None, "sys")
        distance += 1
