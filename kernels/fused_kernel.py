"""One persistent kernel: dispatch, both expert GEMMs and combine of a Mixture-of-Experts layer over all ranks.

Phases of a rank, each handed out by its own atomic ticket counter:

    A  send     row numbers to every peer | clear what the next epoch uses | tokens, once per destination rank
    B  experts  per expert: GEMM 1 tiles, and `lag` experts later its GEMM 2 tiles, which put their rows back
    C  combine  per block of tokens, as soon as its own results are back

Why it cannot deadlock, under any schedule, with any number of programs, co-resident or not: within a phase, ticket
order is a topological order, and a program waits only on smaller tickets of its rank or on an earlier phase of a rank;
so whatever it waits for has been claimed by a program that runs. A rank's own rows need no phase A at all (they are
read where they lie); with `split` they form a first wave of B that most programs start before A, so that matrix work
hides the puts.

Rows that a peer has put are read by ordinary loads: TMA reads through another proxy that would need a fence Triton does
not offer. Weights, which nobody writes, come by TMA where the chip has it.

Error bits: 1 tokens, 2 counts, 4 first GEMM, 8 results did not arrive within `limit` polls; 16 an expert with rows has
no slot. After an error no wait lasts, the launch ends, and the heap must be rebuilt.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from moe.kernels.fused_send import clear, send_rows, send_tokens
from moe.kernels.intrinsics import cast, device_function, peer_pointer, release_add, wait_all, wait_at_least
from moe.kernels.tiles import down_tile, gate_up_tile


@device_function
def _address(base, index, DTYPE: tl.constexpr):
    # int64 address of element `index` of an array of DTYPE at byte address `base`
    return base + index.to(tl.int64) * (DTYPE.primitive_bitwidth // 8)


# Counts that change with the step or the machine. A specialised G of 1 does not compile with triton 3.6.
@triton.jit(do_not_specialize=["num_programs", "first_rank", "num_ranks", "G", "num_tokens", "lag", "split", "limit"])
def fused_experts_kernel(
    bases,  # int64 [G], where every rank's heap lies as this process sees it
    state,  # int32 [3]: epoch of this launch, exit counter, error bits; in memory, so that a graph can replay
    num_programs,
    first_rank,  # this launch plays num_ranks ranks: 1, or all virtual ones
    num_ranks,
    G,
    # of the ranks played, [num_ranks, ...]
    x,  # [T, H]
    ids,  # int32 [T, K] physical experts, -1 = none
    topk_weights,  # float32 [T, K]
    order,  # int32 [T * K], rows sorted by id
    offsets,  # int32 [G * EL + 1]
    slots,  # int32 [EL], slot of each of the rank's experts
    out,  # [T, H]
    inter,  # [MAX_TILES * BLOCK_M, I]
    tile_flag,  # int32 [2, MAX_TILES]
    tickets,  # int32 [2, 4]
    num_tokens,
    lag,
    split,
    limit,
    gate,  # `Matrix`
    up,
    down,
    alpha,
    act_limit,
    O_COUNT_FLAG: tl.constexpr,
    O_DATA_FLAG: tl.constexpr,
    O_RET_FLAG: tl.constexpr,
    O_OFFSETS: tl.constexpr,
    O_ROWS: tl.constexpr,
    O_RECV_X: tl.constexpr,
    O_RET_Y: tl.constexpr,
    DATA_BLOCKS: tl.constexpr,
    RET_BLOCKS: tl.constexpr,
    T_MAX: tl.constexpr,
    EL: tl.constexpr,
    EP: tl.constexpr,  # power of two >= EL + lag
    GP: tl.constexpr,
    SCOPE: tl.constexpr,  # who sees results come back: "gpu" for one rank, "sys" for several
    TOP_K: tl.constexpr,
    TOP_K_P: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    MAX_TILES: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of x, of the heap and of inter begin on 16 bytes
    DTYPE: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    R_MAX: tl.constexpr = T_MAX * TOP_K
    N_TILES1: tl.constexpr = (I + BLOCK_N1 - 1) // BLOCK_N1
    N_TILES2: tl.constexpr = (H + BLOCK_N2 - 1) // BLOCK_N2
    H_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    epoch = tl.load(state)
    error = state + 2
    parity = epoch & 1
    num_rows = num_tokens * TOP_K
    ie = tl.arange(0, EP)
    distance = tl.arange(0, GP)
    m = tl.arange(0, BLOCK_M)

    # With split, most programs take their own rows' wave before they help with sending; one in eight sends first.
    own_first = (split != 0) & (tl.program_id(0) % 8 != 0)
    step = 0
    while step < 2 + split:
        phase = step  # 0 send, 1 and 2 waves of experts
        if own_first & (step < 2):
            phase = 1 - step
        v = 0
        while v < num_ranks:
            me = first_rank + v
            ticket = tickets + (v * 2 + parity) * 4 + phase
            my_heap = tl.load(bases + me)
            my_order = order + v * num_rows
            my_offsets = offsets + v * (G * EL + 1)
            if phase == 0:
                u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
                num_sends = G
                if GP > 1:
                    num_sends = G + tl.cdiv(num_tokens, BLOCK_D)
                while u < num_sends:
                    if u < G - 1:
                        peer = (me + 1 + u) % G
                        send_rows(
                            bases,
                            me,
                            peer,
                            epoch,
                            parity,
                            my_order,
                            my_offsets,
                            G,
                            EL,
                            R_MAX,
                            O_COUNT_FLAG,
                            O_OFFSETS,
                            O_ROWS,
                        )
                    elif u == G - 1:
                        clear(
                            peer_pointer(bases, me, O_RET_FLAG, tl.int32) + (1 - parity) * RET_BLOCKS,
                            RET_BLOCKS,
                        )
                        clear(tile_flag + (v * 2 + 1 - parity) * MAX_TILES, MAX_TILES)
                        clear(tickets + (v * 2 + 1 - parity) * 4, 4)
                    else:
                        send_tokens(
                            bases,
                            me,
                            epoch,
                            x + (v * num_tokens).to(tl.int64) * H,
                            ids + v * num_rows,
                            num_tokens,
                            u - G,
                            G,
                            EL,
                            O_DATA_FLAG,
                            O_RECV_X,
                            DATA_BLOCKS,
                            T_MAX,
                            TOP_K,
                            TOP_K_P,
                            H,
                            DTYPE,
                            BLOCK_D,
                            BLOCK_H,
                        )
                    u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
            else:
                # Sources in ring order from this rank on, so that own rows come first in every expert.
                far = split * (phase - 1)  # 1: the wave without own rows
                member = (distance >= far) & (distance < tl.where(split * (2 - phase) > 0, 1, G))
                source = (me + distance) % G
                remote = member & (source != me)
                if GP > 1:
                    flags = (my_heap + O_COUNT_FLAG).to(tl.pointer_type(tl.int32)) + source
                    wait_all(flags, epoch, remote, error, 2, limit, False, GP, "sys")
                begin_at = tl.where(
                    source == me,
                    _address((my_offsets + me * EL).to(tl.int64), distance * 0, tl.int32),
                    _address(my_heap + O_OFFSETS, (parity * G + source) * (EL + 1), tl.int32),
                ).to(tl.pointer_type(tl.int32))
                rows_at = tl.where(
                    source == me,
                    _address((my_order).to(tl.int64), distance * 0, tl.int32),
                    _address(my_heap + O_ROWS, (parity * G + source).to(tl.int64) * R_MAX, tl.int32),
                )
                # Tiles of every expert, and of the expert whose second GEMM stands at the same place of the order.
                here = (ie < EL)[:, None] & member[None, :]
                late = ((ie >= lag) & (ie - lag < EL))[:, None] & member[None, :]
                places = begin_at[None, :] + ie[:, None]
                counts = tl.load(places + 1, mask=here, other=0) - tl.load(places, mask=here, other=0)
                tiles = (tl.sum(counts, 1) + BLOCK_M - 1) // BLOCK_M
                counts = tl.load(places + 1 - lag, mask=late, other=0) - tl.load(places - lag, mask=late, other=0)
                late_tiles = (tl.sum(counts, 1) + BLOCK_M - 1) // BLOCK_M
                work = tiles * N_TILES1 + late_tiles * N_TILES2
                work_end = tl.cumsum(work, 0)
                tile_begin = tl.cumsum(tiles, 0) - tiles
                late_begin = tl.cumsum(late_tiles, 0) - late_tiles
                total = tl.sum(work, 0)

                u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
                while u < total:
                    place = tl.sum((work_end <= u).to(tl.int32), 0)
                    at = ie == place
                    inside = u - tl.sum(tl.where(at, work_end - work, 0), 0)
                    num_first = tl.sum(tl.where(at, tiles, 0), 0)
                    is_first = inside < num_first * N_TILES1
                    expert = tl.where(is_first, place, place - lag)
                    inside = tl.where(is_first, inside, inside - num_first * N_TILES1)
                    num_tiles = tl.where(is_first, num_first, tl.sum(tl.where(at, late_tiles, 0), 0))
                    tile = tl.sum(tl.where(at, tl.where(is_first, tile_begin, late_begin), 0), 0)
                    m_tile = inside % num_tiles  # row tiles are fastest: neighbours share a weight tile
                    n_tile = inside // num_tiles
                    tile += m_tile
                    if far > 0:
                        tile = MAX_TILES - 1 - tile  # the second wave counts from the other end

                    # Which source each row comes from, and its number there.
                    begin = tl.load(begin_at + expert, mask=member, other=0)
                    count = tl.load(begin_at + expert + 1, mask=member, other=0) - begin
                    until = tl.cumsum(count, 0)
                    p = m_tile * BLOCK_M + m
                    ok = p < tl.sum(count, 0)
                    which = tl.sum(((p[:, None] >= until[None, :]) & member[None, :]).to(tl.int32), 1) + far
                    mine = which[:, None] == distance[None, :]
                    src = tl.sum(tl.where(mine, source[None, :], 0), 1)
                    index = p + tl.sum(tl.where(mine, (begin - until + count)[None, :], 0), 1)
                    row_at = tl.sum(tl.where(mine, rows_at[None, :], 0), 1)
                    row = tl.load(_address(row_at, index, tl.int32).to(tl.pointer_type(tl.int32)), mask=ok, other=0)
                    token = row // TOP_K

                    slot = tl.load(slots + v * EL + expert)
                    if slot < 0:
                        tl.atomic_or(error, 16, sem="relaxed", scope="gpu")
                        slot = slot * 0
                    h_row = inter + ((v * MAX_TILES + tile).to(tl.int64) * BLOCK_M + m) * I
                    flag = tile_flag + (v * 2 + parity) * MAX_TILES + tile
                    if is_first:
                        x_at = _address(
                            (x + (v * num_tokens).to(tl.int64) * H).to(tl.int64), token.to(tl.int64) * H, DTYPE
                        )
                        if GP > 1:
                            data = (my_heap + O_DATA_FLAG).to(tl.pointer_type(tl.int32))
                            data += src * DATA_BLOCKS + token // BLOCK_D
                            wait_all(data, epoch, ok & (src != me), error, 1, limit, True, BLOCK_M, "sys")
                            there = _address(my_heap + O_RECV_X, (src * T_MAX + token).to(tl.int64) * H, DTYPE)
                            x_at = tl.where(src == me, x_at, there)
                        x_row = x_at.to(tl.pointer_type(DTYPE))
                        if ALIGNED:
                            x_row = tl.multiple_of(x_row, 16)
                        first_value = gate_up_tile(
                            x_row,
                            ok,
                            gate,
                            up,
                            slot,
                            n_tile * BLOCK_N1,
                            alpha,
                            act_limit,
                            H,
                            I,
                            KIND,
                            GATED,
                            DTYPE,
                            BLOCK_M,
                            BLOCK_N1,
                            BLOCK_K,
                        )
                        first_cols = n_tile * BLOCK_N1 + tl.arange(0, BLOCK_N1)
                        first_mask = ok[:, None] & (first_cols < I)[None, :]
                        tl.store(h_row[:, None] + first_cols[None, :], cast(first_value, DTYPE), mask=first_mask)
                        release_add(flag, 1, None, "gpu")
                    else:
                        wait_at_least(flag, N_TILES1, error, 4, limit, "gpu")
                        value = down_tile(
                            h_row,
                            ok,
                            down,
                            slot,
                            n_tile * BLOCK_N2,
                            H,
                            I,
                            BLOCK_M,
                            BLOCK_N2,
                            BLOCK_K,
                        )
                        cols = n_tile * BLOCK_N2 + tl.arange(0, BLOCK_N2)
                        mask = ok[:, None] & (cols < H)[None, :]
                        home = tl.load(bases + src)
                        y_row = _address(home + O_RET_Y, row.to(tl.int64) * H, Y_DTYPE).to(tl.pointer_type(Y_DTYPE))
                        if ALIGNED:
                            y_row = tl.multiple_of(y_row, 16)
                        tl.store(y_row[:, None] + cols[None, :], cast(value, Y_DTYPE), mask=mask)
                        back = (home + O_RET_FLAG).to(tl.pointer_type(tl.int32))
                        back += parity * RET_BLOCKS + token // BLOCK_R
                        # One addition per row: summing runs first would cost 400 spills.
                        release_add(back, 1, ok, SCOPE)
                    u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
            v += 1
        step += 1

    v = 0
    while v < num_ranks:
        me = first_rank + v
        ticket = tickets + (v * 2 + parity) * 4 + 3
        my_heap = tl.load(bases + me)
        results = (my_heap + O_RET_Y).to(tl.pointer_type(Y_DTYPE))
        u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
        while u < tl.cdiv(num_tokens, BLOCK_R) * H_TILES:
            block = u // H_TILES
            token = block * BLOCK_R + tl.arange(0, BLOCK_R)
            cols = (u % H_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
            ok = token < num_tokens
            k = tl.arange(0, TOP_K_P)
            places = v * num_rows + token[:, None] * TOP_K + k[None, :]
            chosen = tl.load(ids + places, mask=ok[:, None] & (k < TOP_K)[None, :], other=-1)
            want = tl.sum(tl.sum((chosen >= 0).to(tl.int32), 1), 0) * N_TILES2
            flag = (my_heap + O_RET_FLAG).to(tl.pointer_type(tl.int32)) + parity * RET_BLOCKS + block
            wait_at_least(flag, want, error, 8, limit, SCOPE)
            sum_y = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
            for j in tl.static_range(TOP_K):
                place = v * num_rows + token * TOP_K + j
                there = ok & (tl.load(ids + place, mask=ok, other=-1) >= 0)
                weight = tl.load(topk_weights + place, mask=ok, other=0.0)
                y_row = results + (token * TOP_K + j).to(tl.int64) * H
                y = tl.load(y_row[:, None] + cols[None, :], mask=there[:, None] & (cols < H)[None, :], other=0.0)
                sum_y = sum_y + weight[:, None] * y.to(tl.float32)
            out_row = out + (v * num_tokens + token).to(tl.int64) * H
            tl.store(out_row[:, None] + cols[None, :], cast(sum_y, DTYPE), mask=ok[:, None] & (cols < H)[None, :])
            u = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
        v += 1

    # The last program out moves the epoch on.
    if tl.atomic_add(state + 1, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
        tl.store(state + 1, 0)
        tl.store(state, epoch + 1)
