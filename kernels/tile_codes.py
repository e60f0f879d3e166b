"""What the codes of a tile stand for, in registers: the device functions behind `matrix.multiply`.

`m` is a `matrix.Matrix`, `slot` a scalar, `cols` the rows of W whose products are columns of the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton.language as tl

from moe.kernels.intrinsics import INTERPRETED, device_function


@device_function
def code_values(m, codes, zero, slot):
    # What codes stand for, less the zero point, in float32: at most 9 bits of it are used, but for tables
    if m.CODE == "e4m3 bits":
        value = _e4m3(codes)
    elif m.CODE == "int4":
        value = codes.to(tl.float32) - 8.0
    elif m.CODE == "e2m1":
        bits = codes.to(tl.uint32)
        magnitude = ((bits & 7) << 22) | ((bits & 8) << 28)  # as a float32 whose exponent is too small by 126
        value = magnitude.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif m.CODE == "lut4":
        value = tl.load(m.table + slot.to(tl.int64) * m.stride_table + codes.to(tl.int32))
    else:
        value = codes.to(tl.float32)
    if m.zero is not None:
        value = value - zero.to(tl.float32)
    return value


@device_function
def nested_values(m, slot, cols, k0, there, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_K, BLOCK_N] in float32 at the slot's level, added plane by plane as kernels/nested.py says
    p, slot, ks = m.planes, slot.to(tl.int64), k0 + tl.arange(0, BLOCK_K)
    level = tl.load(p.bits + slot * p.stride_bits) + tl.zeros((1, 1), tl.int32)  # interpreted, masks are blocks
    if m.SCALE_K % BLOCK_K == 0:
        group, known = k0 // m.SCALE_K + tl.zeros((1, 1), tl.int32), (cols < N)[None, :]
    else:
        group, known = (ks // m.SCALE_K)[:, None], there
    scale = in_block(m, m.scale, m.stride_scale, slot, cols[None, :], group, known).to(tl.float32)
    w = (2 * _fields(m.codes + slot * m.stride_slot, m.stride_row, cols, ks, 2, K, there) - 3).to(tl.float32) * scale
    if p.codes3 is not None:
        stored = in_block(m, p.scale3, p.stride_scale3, slot, cols[None, :], group, known & (level >= 3))
        codes = _fields(p.codes3 + slot * p.stride_codes3, p.stride_row3, cols, ks, 1, K, there & (level >= 3))
        w += (2 * codes - 1).to(tl.float32) * (scale * (stored.to(tl.float32) * 0.00390625))
    if p.codes4 is not None:
        stored = in_block(m, p.scale4, p.stride_scale4, slot, cols[None, :], group, known & (level >= 4))
        codes = _fields(p.codes4 + slot * p.stride_codes4, p.stride_row4, cols, ks, 1, K, there & (level >= 4))
        w += (2 * codes - 1).to(tl.float32) * (scale * (stored.to(tl.float32) * 0.00390625))
    if p.codes8 is not None:
        stored = in_block(m, p.scale8, p.stride_scale8, slot, cols[None, :], group, known & (level >= 8))
        codes = _fields(p.codes8 + slot * p.stride_codes8, p.stride_row8, cols, ks, 4, K, there & (level >= 8))
        w += (codes.to(tl.float32) - 7.5) * stored.to(tl.float32)
    return w


@device_function
def _fields(plane, stride_row, cols, ks, BITS: tl.constexpr, K: tl.constexpr, mask):
    # Fields of BITS bits of columns ks of W's rows cols, which lie where `nested.bit_of` says: int32 [BLOCK_K,
    # BLOCK_N], 0 where masked
    half, nibble, lane = ks // 128 % 2, ks // 16 % 8 * 4, ks % 16
    if BITS == 4:
        inside = 512 * half + 32 * lane + nibble
    elif BITS == 2:
        inside = 32 * lane + 2 * half + nibble
    else:
        inside = 32 * (lane % 8) + half + 2 * (lane // 8) + nibble
    bit = tl.where(ks < K // 256 * 256, ks // 256 * (256 * BITS) + inside, ks * BITS)
    at = cols[None, :] * stride_row.to(tl.int32) + (bit // 8)[:, None]  # a matrix is below 2 GiB
    byte = tl.load(plane + at, mask=mask, other=0).to(tl.int32)
    return (byte >> (bit % 8)[:, None]) & ((1 << BITS) - 1)


@device_function
def _e4m3(bits):
    # float32 whose exponent is too small by 120, also of subnormal numbers; 0x7f is no number, and its bits are of 480
    bits = bits.to(tl.uint32)
    magnitude = ((bits & 127) << 20) | ((bits & 128) << 24) | tl.where((bits & 127) == 127, 0x7F800000, 0)
    return magnitude.to(tl.float32, bitcast=True) * 1.329227995784916e36


@device_function
def in_block(m, values, stride, slot, cols, group, mask):
    # Entries of a grid [S, rows of blocks, GROUPS], one for each of `cols` and `group` as they broadcast
    return tl.load(values + slot.to(tl.int64) * stride + cols // m.SCALE_N * m.GROUPS + group, mask=mask, other=0)


@device_function
def zero_points(m, slot, cols, group, mask):
    # Zero points, 0 without: triton 3.6 returns no None from a function
    if m.zero is None:
        return 0
    else:
        return in_block(m, m.zero, m.stride_zero, slot, cols, group, mask)


@device_function
def scale_values(m, stored):
    if m.SCALE == "e8m0":
        bits = stored.to(tl.uint32)
        return tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)  # 2 ** -127 is subnormal
    elif m.SCALE == "e4m3":
        return _e4m3(stored)
    else:
        return stored.to(tl.float32)


@device_function
def scales_of_tile(m, slot, cols, k0, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_K, BLOCK_N], or [1, BLOCK_N] where one block of columns holds the tile
    if m.SCALE_K >= BLOCK_K:
        return scale_values(m, in_block(m, m.scale, m.stride_scale, slot, cols, k0 // m.SCALE_K, cols < N))[None, :]
    else:
        if INTERPRETED:  # which leaves constants of tuples wrapped
            SIZE = m.SCALE_K.value
        else:
            SIZE: tl.constexpr = m.SCALE_K  # type: ignore[no-redef]
        EACH: tl.constexpr = BLOCK_K // SIZE
        group = k0 // SIZE + tl.arange(0, EACH)
        there = (cols < N)[:, None] & (group * SIZE < K)[None, :]
        scale = in_block(m, m.scale, m.stride_scale, slot, cols[:, None], group[None, :], there)
        spread = tl.broadcast_to(scale_values(m, scale)[:, :, None], (BLOCK_N, EACH, SIZE))
        return tl.trans(tl.reshape(spread, (BLOCK_N, BLOCK_K)))
