"""What the codes of a tile stand for, in registers: the device functions behind `matrix.multiply`.

`m` is a `matrix.Matrix`, `slot` a scalar, `cols` the rows of W whose products are columns of the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton.language as tl

from moe.kernels.intrinsics import INTERPRETED, device_function

FEW_RARE = tl.constexpr(8)  # of a row of bf12, looked for without a loop


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


@device_function
def short_start(m, slot, cols, N: tl.constexpr, BLOCK_K: tl.constexpr):
    # Of bf12, before the first tile: where its words of four codes lie [BLOCK_N, BLOCK_K / 4 or 16], in the order of
    # columns; each row's highest exponent four times [BLOCK_N]; how many rare weights a row has at most
    if BLOCK_K >= 64:
        word = tl.arange(0, 16)
    else:
        word = tl.arange(0, BLOCK_K // 4)
    rows = m.codes + slot.to(tl.int64) * m.stride_slot + cols.to(tl.int64) * m.stride_row
    words = m.scale + slot.to(tl.int64) * m.stride_scale + cols * m.stride_words
    first = tl.load(words, mask=cols < N, other=0)
    return rows[:, None] + _place(word)[None, :], (first & 255).to(tl.uint32) * 0x01010101, tl.max(first >> 8, 0)


@device_function
def short_floats(m, start, slot, k0, cols, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # bfloat16 [BLOCK_K, BLOCK_N], bit for bit what was encoded. Four weights are decoded at once in the bytes of a word
    tl.static_assert(BLOCK_K <= 128)
    ptrs, highest, most = start
    WHOLE: tl.constexpr = N % BLOCK_N == 0
    at = ptrs + k0 // 128 * 48
    if BLOCK_K < 64:  # else 0, which triton 3.6 does not see, and loads no two words at once
        at += _place(k0 % 64 // 4)
    there = (cols < N)[:, None]
    if BLOCK_K == 128:
        low, high, codes = _words(at, there, WHOLE), _words(at + 16, there, WHOLE), _words(at + 32, there, WHOLE)
        exponents = _exponents(codes, highest), _exponents(codes >> 4, highest)
    else:
        half = k0 // 64 % 2
        low, codes = _words(at + 16 * half, there, WHOLE), _words(at + 32, there, WHOLE) >> (4 * half)
        exponents = (_exponents(codes, highest),)  # type: ignore[assignment]
    words = m.scale + slot.to(tl.int64) * m.stride_scale + cols * m.stride_words
    count = tl.minimum(tl.load(words, mask=cols < N, other=0) >> 8, m.stride_words - 1)  # a damaged file may say more
    for r in tl.static_range(0 if m.RARE == "none" else FEW_RARE):
        if r < 2:  # most rows that have any have no more: these stay in registers, the others are loaded where they are
            rare = _rare(words, r, count, codes)
            if r < most:
                exponents = _with_rare(exponents, rare, k0, BLOCK_K)
        elif r < most:
            exponents = _with_rare(exponents, _rare(words, r, count, codes), k0, BLOCK_K)
    if m.RARE == "many":  # a loop inside of that over columns, which then is no pipeline
        for r in range(FEW_RARE, tl.minimum(most, m.stride_words - 1)):
            exponents = _with_rare(exponents, _rare(words, r, count, codes), k0, BLOCK_K)
    if BLOCK_K == 128:
        halves = tl.join(_put_together(low, exponents[0]), _put_together(high, exponents[1]))
        return tl.trans(tl.reshape(tl.permute(halves, (0, 2, 1)), (BLOCK_N, BLOCK_K)))
    else:
        return tl.trans(_put_together(low, exponents[0]))


@device_function
def _place(word):
    # Of words of four columns within 64, which `bf12.py` lays out otherwise
    return word // 2 % 4 * 4 + word // 8 * 2 + word % 2


@device_function
def _words(at, there, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(at).to(tl.uint32, bitcast=True)
    else:
        return tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True)


@device_function
def _exponents(codes, highest):
    # Four a word, of the low half bytes of codes; 0 where a code is 15
    codes = codes & 0x0F0F0F0F
    ends = (codes + 0x01010101) & 0x10101010
    is_zero = (ends << 4) - (ends >> 4)  # 255 where it is
    return (highest[:, None] - (codes & ~is_zero)) & ~is_zero


@device_function
def _rare(words, r, count, like):
    # Each row's r-th rare weight, [BLOCK_N, words]; of no column where it has fewer. What is added is 0, and has what
    # follows computed where the words of codes are: else values of rows change threads, by shared memory, at each step
    rare = tl.load(words + 1 + r, mask=count > r, other=-256)
    return rare[:, None] + (tl.arange(0, like.shape[1]) // like.shape[1])[None, :]


@device_function
def _with_rare(exponents, rare, k0, BLOCK_K: tl.constexpr):
    # And those of each row's rare weight, if it is one of the tile's
    if BLOCK_K == 128:
        return _and_rare(exponents[0], rare, k0), _and_rare(exponents[1], rare, k0 + 64)
    else:
        return (_and_rare(exponents[0], rare, k0),)


@device_function
def _and_rare(exponents, rare, k0):
    # Its code has told none, so that its byte is 0
    is_here = (rare >> 10) == (k0 // 4 + tl.arange(0, exponents.shape[1]))[None, :]
    return exponents | tl.where(is_here, (rare & 255).to(tl.uint32) << ((rare >> 8 & 3) * 8).to(tl.uint32), 0)


@device_function
def _put_together(kept, exponents):
    # bfloat16 [BLOCK_N, 4 * words] of signs and mantissas, and exponents: their upper and lower bytes, four a word
    upper = (kept & 0x80808080) | ((exponents >> 1) & 0x7F7F7F7F)
    lower = (kept & 0x7F7F7F7F) | ((exponents << 7) & 0x80808080)
    pairs = tl.join(_interleaved(lower, upper), _interleaved(lower >> 16, upper >> 16))
    pairs = tl.reshape(pairs, (kept.shape[0], 2 * kept.shape[1]))
    halves = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(halves, (kept.shape[0], 4 * kept.shape[1])).to(tl.bfloat16, bitcast=True)


@device_function
def _interleaved(lower, upper):
    # The low two bytes of each
    return (lower & 0xFF) | ((upper & 0xFF) << 8) | ((lower & 0xFF00) << 8) | ((upper & 0xFF00) << 16)
