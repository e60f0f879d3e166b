/* AVX2 with fused multiply-add. */

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_place.h"

#define NAME(x) moe_avx2_##x
#define ISA "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC __m256
#define WIDTH 8
#define VZERO _mm256_setzero_ps()
#define VLOAD(p) _mm256_loadu_ps(p)
#define VODD(v) _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32((int)0xffff0000u)))
#define VEVEN(v) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16))
#define VLOAD_BF16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p))), 16))
#define VLOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define VFMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define VSUB(a, b) _mm256_sub_ps(a, b)
#define VSET(v) _mm256_set1_ps(v)
#define VPICK(from, lane) _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), _mm256_loadu_si256((const void *)(lane)))
#define TABLE struct table
#define MR 3
#define NR 2
#define CODE_NR 2
#define CODE_SUB 2
#define HAS_NIBBLES 1
#define SUM_BLOCK NAME(sum)
#define IN_ORDER __asm__ volatile("" ::: "memory")

SCALAR TARGET __m128 NAME(fold)(VEC v[2]) {
    __m256 eight = _mm256_add_ps(v[0], v[1]);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

SCALAR TARGET void NAME(sum)(int mr, VEC a[3][2][2], float *c, int64_t ldc, int64_t first) {
#pragma GCC unroll 3
    for (int m = 0; m < mr; m++, c += ldc) {
        __m128 p = NAME(fold)(a[m][0]), q = NAME(fold)(a[m][1]);
        __m128 s = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q)); /* p02 q02 p13 q13 */
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        if (!first) s = _mm_add_ps(_mm_castpd_ps(_mm_load_sd((const double *)(void *)c)), s);
        _mm_storel_pi((__m64 *)(void *)c, s);
    }
}

struct table {
    __m256 low, high; /* of entries 0 to 7, and 8 to 15 */
};

SCALAR TARGET TABLE NAME(table_at)(const float *from) {
    return (struct table){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}

/* Int4 and e2m1 as floats' lower bits: 2^23 + n, say, less 2^23 + 8. One lookup by four bits is several instructions. */
SCALAR TARGET VEC NAME(nibble)(int code, const char *p, int j, int u, TABLE table) {
    const __m256i twice = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, /* e2m1, plus 12 */
                                           12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    __m256i v = _mm256_loadu_si256((const void *)(p + 32 * u));
    if (code == LUT4) { /* a lookup takes the low 3 bits */
        __m256i at = _mm256_srli_epi32(v, 4 * j);
        __m256 low = _mm256_permutevar8x32_ps(table.low, at), high = _mm256_permutevar8x32_ps(table.high, at);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(v, 28 - 4 * j)));
    }
    int at = code == INT4 ? j % 4 * 4 : j / 2 % 2 * 8, one = code == INT4 ? 23 : 22;
    if (code == E2M1 && j % 2) v = _mm256_srli_epi32(v, 4);
    if (code == E2M1) v = _mm256_shuffle_epi8(twice, _mm256_and_si256(v, _mm256_set1_epi32(0x0f0f0f0f)));
    if (j >= 4) v = _mm256_srli_epi32(v, 16);
    v = _mm256_blend_epi16(v, _mm256_set1_epi32((code == INT4 ? 158 : 157) << 23), 0xaa); /* has the bits of each exponent */
    v = _mm256_and_si256(v, _mm256_set1_epi32((127 + one - at) << 23 | (code == INT4 ? 15 : 31) << at));
    return VSUB(_mm256_castsi256_ps(v), VSET((float)(1 << (one - at)) + (code == INT4 ? 8.0f : 6.0f)));
}

/* The sign and the seven bits below it where fp16 has its sign, exponent and upper mantissa; see e4m3_part. */
SCALAR TARGET __m128i NAME(half_e4m3)(const char *p) {
    __m128i v = _mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)p));
    return _mm_and_si128(_mm_slli_epi16(v, 7), _mm_set1_epi16((short)0xbf80));
}

SCALAR TARGET VEC NAME(byte_e4m3)(const char *p, int half, int u) {
    __m128i v = NAME(half_e4m3)(p + half / 2 * LANES + u * WIDTH), carried = _mm_add_epi16(v, _mm_set1_epi16(0x80));
    return _mm256_cvtph_ps(_mm_or_si128(v, _mm_and_si128(carried, _mm_set1_epi16(0x4000))));
}

/* The same of codes that are numbers, and whether any of n, a multiple of 16, is none: looked for apart, it is cheaper. */
#define FINITE_E4M3(p, half, u) _mm256_cvtph_ps(NAME(half_e4m3)((p) + (half) / 2 * LANES + (u) * WIDTH))
#define NO_NUMBER(p, n) NAME(no_number)(p, n)
SCALAR TARGET int NAME(no_number)(const char *p, int64_t n) {
    const __m256i sign = _mm256_set1_epi8((char)0x80), all = _mm256_set1_epi8(-1);
    __m256i found = _mm256_setzero_si256();
    for (int64_t i = 0; i + 32 <= n; i += 32) {
        __m256i v = _mm256_loadu_si256((const void *)(p + i));
        found = _mm256_or_si256(found, _mm256_cmpeq_epi8(_mm256_or_si256(v, sign), all));
    }
    if (n % 32) {
        __m256i v = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(p + n - 16)));
        found = _mm256_or_si256(found, _mm256_cmpeq_epi8(_mm256_or_si256(v, sign), all));
    }
    return !_mm256_testz_si256(found, found);
}

SCALAR TARGET VEC NAME(byte_int8)(const char *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}

#define SUM_CODES NAME(sum)

struct NAME(group) {
    VEC first, fourth, last; /* first: by a code's two bits and its first sign */
};

SCALAR TARGET struct NAME(group) NAME(group_of)(int level, float scale, float third, float fourth, float last) {
    const VEC sign3 = _mm256_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1);
    VEC first = _mm256_mul_ps(_mm256_setr_ps(-3, -1, 1, 3, -3, -1, 1, 3), VSET(scale));
    if (level >= 3) first = VFMA(sign3, VSET(third), first);
    return (struct NAME(group)){first, VSET(fourth), VSET(last)};
}

/* + or - size, as the highest bits say. */
SCALAR TARGET VEC NAME(signed)(VEC size, __m256i bits) {
    return _mm256_xor_ps(size, _mm256_andnot_ps(_mm256_castsi256_ps(bits), VSET(-0.0f)));
}

/* Bits 8u to 8u + 7 of a plane's 16 as the highest of their lanes. */
SCALAR TARGET __m256i NAME(signs)(const char *plane, int u) {
    const __m256i left = _mm256_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8);
    __m256i bits = _mm256_set1_epi16((short)half_at(plane));
    return _mm256_sllv_epi32(bits, _mm256_sub_epi32(left, _mm256_set1_epi32(8 * u)));
}

SCALAR TARGET VEC NAME(nested)(int level, const char *const *plane, int64_t v, int u, const struct NAME(group) *g) {
    const __m256i two = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), four = _mm256_add_epi32(two, two);
    __m256i at = _mm256_srlv_epi32(_mm256_set1_epi32((int)(word_at(plane[0] + 4 * v) >> 16 * u)), two);
    if (level >= 3) {
        __m256i third = _mm256_and_si256(_mm256_srli_epi32(NAME(signs)(plane[1] + 2 * v, u), 29), _mm256_set1_epi32(4));
        at = _mm256_or_si256(_mm256_and_si256(at, _mm256_set1_epi32(3)), third);
    }
    VEC w = _mm256_permutevar8x32_ps(g->first, at); /* by the low 3 bits: of level 2 the third does not count */
    if (level >= 4) w = _mm256_add_ps(w, NAME(signed)(g->fourth, NAME(signs)(plane[2] + 2 * v, u)));
    if (level < 8) return w;
    __m256i last = _mm256_srlv_epi32(_mm256_set1_epi32((int)word_at(plane[3] + 8 * v + 4 * u)), four);
    last = _mm256_and_si256(last, _mm256_set1_epi32(15));
    return VFMA(VSUB(_mm256_cvtepi32_ps(last), VSET(7.5f)), g->last, w); /* the product is exact */
}

struct NAME(fields) {
    __m256i first, last;
};

SCALAR TARGET struct NAME(fields) NAME(fields_of)(int level, const char *const *plane, int64_t block, int half, int u) {
    struct NAME(fields) f = {_mm256_loadu_si256((const void *)(plane[0] + 64 * block + 32 * u)), _mm256_setzero_si256()};
    if (half) f.first = _mm256_srli_epi32(f.first, 2);
    f.first = _mm256_and_si256(f.first, _mm256_set1_epi32(0x33333333));
    for (int i = 1; i <= 2; i++) { /* a sign in bit 2, then in bit 3 of each nibble */
        if (level < 2 + i) break;
        __m256i signs = _mm256_loadu_si256((const void *)(plane[i] + 32 * block));
        signs = _mm256_and_si256(_mm256_srli_epi32(signs, half + 2 * u), _mm256_set1_epi32(0x11111111));
        f.first = _mm256_or_si256(f.first, _mm256_slli_epi32(signs, 1 + i));
    }
    if (level >= 8) f.last = _mm256_loadu_si256((const void *)(plane[3] + 128 * block + 64 * half + 32 * u));
    return f;
}

SCALAR TARGET VEC NAME(next_nested)(int level, struct NAME(fields) *f, const struct NAME(group) *g) {
    VEC w = _mm256_permutevar8x32_ps(g->first, f->first);
    if (level >= 4) w = _mm256_add_ps(w, NAME(signed)(g->fourth, _mm256_slli_epi32(f->first, 28)));
    f->first = _mm256_srli_epi32(f->first, 4);
    if (level < 8) return w;
    __m256i last = _mm256_and_si256(f->last, _mm256_set1_epi32(15));
    f->last = _mm256_srli_epi32(f->last, 4);
    return VFMA(VSUB(_mm256_cvtepi32_ps(last), VSET(7.5f)), g->last, w); /* the product is exact */
}

struct NAME(exponents) {
    __m256i high, low; /* by the code: of the exponent all but its last bit, and that bit as the highest */
};

SCALAR TARGET struct NAME(exponents) NAME(exponents_of)(uint8_t highest) {
    const __m256i down = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m256i all = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0));
    __m256i e = _mm256_and_si256(_mm256_sub_epi8(_mm256_set1_epi8((char)highest), down), all);
    return (struct NAME(exponents)){_mm256_and_si256(_mm256_srli_epi16(e, 1), _mm256_set1_epi8(0x7f)),
                                    _mm256_slli_epi16(_mm256_and_si256(e, _mm256_set1_epi8(1)), 7)};
}

SCALAR TARGET void NAME(widen)(const char *p, const struct NAME(exponents) *e, VEC to[8]) {
    const __m256i mantissa = _mm256_set1_epi8(0x7f), nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 32 bytes: of 64 weights 16 i % 2 and on, and 32 beyond these */
        __m256i codes = _mm256_loadu_si256((const void *)(p + 128 + i % 2 * 32));
        __m256i kept = _mm256_loadu_si256((const void *)(p + i * 32));
        __m256i code = _mm256_and_si256(i / 2 ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        __m256i high = _mm256_or_si256(_mm256_andnot_si256(mantissa, kept), _mm256_shuffle_epi8(e->high, code));
        __m256i low = _mm256_or_si256(_mm256_and_si256(mantissa, kept), _mm256_shuffle_epi8(e->low, code));
        to[i / 2 * 4 + i % 2] = _mm256_castsi256_ps(_mm256_unpacklo_epi8(low, high));
        to[i / 2 * 4 + i % 2 + 2] = _mm256_castsi256_ps(_mm256_unpackhi_epi8(low, high));
    }
}

SCALAR TARGET int NAME(narrow)(const uint16_t *v, int highest, char *to) {
    const __m256i exponent = _mm256_set1_epi16(255), sign = _mm256_set1_epi16(0x80), far = _mm256_set1_epi16(15);
    __m256i codes[4], rare = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 32 bytes, as in widen */
        const __m256i mantissa = _mm256_set1_epi16(0x7f);
        __m256i code[2], kept[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m256i w = _mm256_loadu_si256((const void *)(v + i / 2 * 64 + j * 32 + i % 2 * 16));
            __m256i e = _mm256_and_si256(_mm256_srli_epi16(w, 7), exponent);
            __m256i below = _mm256_sub_epi16(_mm256_set1_epi16((short)highest), e);
            __m256i is_zero = _mm256_cmpeq_epi16(e, _mm256_setzero_si256());
            __m256i is_far = _mm256_cmpeq_epi16(_mm256_max_epu16(below, far), below);
            rare = _mm256_or_si256(rare, _mm256_andnot_si256(is_zero, is_far));
            code[j] = _mm256_blendv_epi8(below, far, _mm256_or_si256(is_zero, is_far));
            kept[j] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(w, 8), sign), _mm256_and_si256(w, mantissa));
        }
        _mm256_storeu_si256((void *)(to + i * 32), _mm256_packus_epi16(kept[0], kept[1]));
        codes[i] = _mm256_packus_epi16(code[0], code[1]);
    }
    for (int i = 0; i < 2; i++)
        _mm256_storeu_si256((void *)(to + 128 + i * 32), _mm256_or_si256(codes[i], _mm256_slli_epi16(codes[i + 2], 4)));
    return !_mm256_testz_si256(rare, rare);
}

#include "cpu_isa.h"

#endif
