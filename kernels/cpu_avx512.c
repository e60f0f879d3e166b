/* AVX-512; with WITH_DOT (cpu_avx512_dot.c) also vdpbf16ps. */

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_place.h"

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#ifdef WITH_DOT
#define NAME(x) moe_avx512_dot_##x
#define ISA "avx512_dot"
#define TARGET __attribute__((target(AVX512 ",avx512bf16,avx512vbmi")))
#define VDOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
/* Nibbles j and, above it, 4 + j of each lane of a line as bf16; the lookup takes 5 bits, of which the highest is another
 * nibble's. VNEXT: the line with j + 1 where j was, so that it is loaded once. */
#define VNIBBLES(line, j, table)                                                                                  \
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_castps_si512(line), 4 * (unsigned)(j)), \
                                                 _mm512_castps_si512(table)))
#define VNEXT(line) _mm512_castsi512_ps(_mm512_srli_epi16(_mm512_castps_si512(line), 4))
#define DOT_TABLE(from) NAME(dot_table)(_mm512_loadu_ps(from))
#define DOT_TABLE_OF(table) NAME(dot_table)(table)
#define VLESS_ZERO(line, j, zero) NAME(less_zero)(line, j, zero)
#define E4M3_TABLES(to) NAME(e4m3_tables)(to)
#define VLINE_E4M3(p, lookup, to) NAME(line_e4m3)(_mm512_loadu_si512(p), lookup, to)
/* Floats that are exact in bf16 as such, two to a lane. */
#define VTWO(low, high) \
    _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(high), _mm512_srli_epi32(_mm512_castps_si512(low), 16)))
#else
#define NAME(x) moe_avx512_##x
#define ISA "avx512"
#define TARGET __attribute__((target(AVX512)))
#endif
#define VEC __m512
#define WIDTH 16
#define VZERO _mm512_setzero_ps()
#define VLOAD(p) _mm512_loadu_ps(p)
#define VODD(v) _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32((int)0xffff0000u)))
#define VEVEN(v) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16))
#define VLOAD_BF16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p))), 16))
#define VLOAD_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define VFMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VSUB(a, b) _mm512_sub_ps(a, b)
#define VSET(v) _mm512_set1_ps(v)
/* Of up to 8: a load of 64 bytes would most often be of two cache lines. */
#define VPICK(from, lane) \
    _mm512_permutexvar_ps(_mm512_loadu_si512(lane), _mm512_castps256_ps512(_mm256_loadu_ps(from)))
#define TABLE __m512
#define VAT(line, j, table) _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_castps_si512(line), 4 * (unsigned)(j)), table)
#define MR 6
#define NR 4
#define CODE_NR 2
#define SUM_BLOCK NAME(sum)

/* Four rows of x by four rows of w at once: 15 additions for 16 sums of 16 lanes. */
static inline __attribute__((always_inline)) TARGET void NAME(sum)(int mr, VEC a[6][4][1], float *c, int64_t ldc,
                                                                   int64_t first) {
#pragma GCC unroll 2
    for (int m = 0; m < mr; m += 4) {
        VEC v[4], none = VZERO;
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            VEC r0 = a[m][n][0], r1 = m + 1 < mr ? a[m + 1][n][0] : none, r2 = m + 2 < mr ? a[m + 2][n][0] : none;
            VEC r3 = m + 3 < mr ? a[m + 3][n][0] : none; /* i and i+8: */
            VEC p = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, r0, r1), _mm512_shuffle_f32x4(r0, r1, 0x4e));
            VEC q = m + 2 < mr ? _mm512_add_ps(_mm512_mask_blend_ps(0xff00, r2, r3), _mm512_shuffle_f32x4(r2, r3, 0x4e))
                               : none;
            v[n] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd)); /* i and i+4 */
        }
        VEC s01 = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])); /* i and i+2 */
        VEC s23 = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        __m512d d01 = _mm512_castps_pd(s01), d23 = _mm512_castps_pd(s23);
        VEC sum = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d01, d23)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(d01, d23))); /* i and i+1; a row in each quarter */
        __m128 row[4] = {_mm512_castps512_ps128(sum), _mm512_extractf32x4_ps(sum, 1), _mm512_extractf32x4_ps(sum, 2),
                         _mm512_extractf32x4_ps(sum, 3)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            float *to = c + (m + i) * ldc;
            if (m + i < mr) _mm_storeu_ps(to, first ? row[i] : _mm_add_ps(_mm_loadu_ps(to), row[i]));
        }
    }
}

SCALAR TARGET TABLE NAME(table_at)(const float *from) { return _mm512_loadu_ps(from); }

#ifdef WITH_DOT
SCALAR TARGET TABLE NAME(dot_table)(TABLE table) { /* twice the 16 in bf16, in which they are exact */
    __m256i once = (__m256i)_mm512_cvtneps_pbh(table);
    return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1));
}

/* As VNIBBLES of int4, less the zero points, -8 to 8 in fp32, a lane's own: -16 to 15, looked up by its low 5 bits. */
SCALAR TARGET VEC NAME(less_zero)(VEC line, int64_t j, VEC zero) {
    static const uint16_t whole[32] = {
        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130,
        0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
    }; /* 0 to 15, then -16 to -1, in bf16 */
    __m512i from = _mm512_srli_epi16(_mm512_castps_si512(line), j % 2 ? 4 : 0);
    from = _mm512_and_si512(from, _mm512_set1_epi16(0x0f0f)); /* of each word nibbles j and j + 2 */
    if (j >= 2) from = _mm512_srli_epi16(from, 8);
    __m512i eight = _mm512_cvtps_epi32(_mm512_add_ps(zero, _mm512_set1_ps(8.0f)));
    eight = _mm512_or_si512(eight, _mm512_slli_epi32(eight, 16)); /* 0 to 16, in both words */
    __m512i at = _mm512_sub_epi16(from, eight);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(at, _mm512_loadu_si512(whole)));
}
#endif

SCALAR TARGET VEC NAME(nibble)(int code, const char *p, int j, int u, TABLE table) { /* u is 0; the lookup takes the low 4 bits */
    (void)u, (void)code;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 4 * (unsigned)j), table);
}

/* The sign and the seven bits below it where fp16 has its sign, exponent and upper mantissa; see e4m3_part. */
SCALAR TARGET VEC NAME(byte_e4m3)(const char *p, int half, int u) { /* u is 0; halves of a pair share their loads */
    (void)u;
    if (half == 0) {
        __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
        v = _mm256_and_si256(_mm256_slli_epi16(v, 7), _mm256_set1_epi16((short)0xbf80));
        __m256i carried = _mm256_add_epi16(v, _mm256_set1_epi16(0x80));
        return _mm512_cvtph_ps(_mm256_or_si256(v, _mm256_and_si256(carried, _mm256_set1_epi16(0x4000))));
    }
    __m512i v = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
    v = _mm512_and_si512(_mm512_slli_epi16(v, 7), _mm512_set1_epi16((short)0xbf80));
    __m512i carried = _mm512_add_epi16(v, _mm512_set1_epi16(0x80));
    v = _mm512_or_si512(v, _mm512_and_si512(carried, _mm512_set1_epi16(0x4000)));
    return _mm512_cvtph_ps(half == 2 ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v));
}

SCALAR TARGET VEC NAME(byte_int8)(const char *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}

#ifdef WITH_DOT
/* The lower bytes in bf16 of e4m3's codes 0 to 127, then the upper ones. */
SCALAR TARGET void NAME(e4m3_tables)(VEC to[4]) {
    char code[128];
    __m512i word[4], even = _mm512_setzero_si512();
    for (int i = 0; i < 128; i++) code[i] = (char)i;
    for (int i = 0; i < 4; i++) {
        const char *p = code + 32 * i;
        word[i] = (__m512i)_mm512_cvtne2ps_pbh(NAME(byte_e4m3)(p, 2, 0), NAME(byte_e4m3)(p, 1, 0));
    }
    for (int i = 0; i < 64; i++) ((char *)&even)[i] = (char)(2 * i);
    __m512i odd = _mm512_add_epi8(even, _mm512_set1_epi8(1));
    for (int i = 0; i < 2; i++) {
        to[i] = _mm512_castsi512_ps(_mm512_permutex2var_epi8(word[2 * i], even, word[2 * i + 1]));
        to[2 + i] = _mm512_castsi512_ps(_mm512_permutex2var_epi8(word[2 * i], odd, word[2 * i + 1]));
    }
}

/* 64 codes of e4m3 as bf16, of each 32 in lane l: l, above it l + 16. Lookups take 7 bits; the sign is the code's. */
SCALAR TARGET void NAME(line_e4m3)(__m512i codes, const VEC *lookup, VEC to[2]) {
    static const uint8_t order[64] = { /* from which unpacking makes that */
        0,  16, 1,  17, 2,  18, 3,  19, 32, 48, 33, 49, 34, 50, 35, 51, 4,  20, 5,  21, 6,  22,
        7,  23, 36, 52, 37, 53, 38, 54, 39, 55, 8,  24, 9,  25, 10, 26, 11, 27, 40, 56, 41, 57,
        42, 58, 43, 59, 12, 28, 13, 29, 14, 30, 15, 31, 44, 60, 45, 61, 46, 62, 47, 63,
    };
    __m512i table[4];
    for (int i = 0; i < 4; i++) table[i] = _mm512_castps_si512(lookup[i]);
    codes = _mm512_permutexvar_epi8(_mm512_loadu_si512(order), codes);
    __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    __m512i high = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xd8); /* codes where 1 */
    to[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    to[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
}
#endif

SCALAR TARGET __m128 NAME(fold)(VEC v) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

SCALAR TARGET void NAME(sum_codes)(int mr, VEC a[6][2][1], float *c, int64_t ldc, int64_t first) {
#pragma GCC unroll 6
    for (int m = 0; m < mr; m++, c += ldc) {
        __m128 p = NAME(fold)(a[m][0][0]), q = NAME(fold)(a[m][1][0]);
        __m128 s = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q)); /* p02 q02 p13 q13 */
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        if (!first) s = _mm_add_ps(_mm_castpd_ps(_mm_load_sd((const double *)(void *)c)), s);
        _mm_storel_pi((__m64 *)(void *)c, s);
    }
}

struct NAME(group) {
    VEC first, last; /* by a code's two bits and two signs; by its last four bits */
};

SCALAR TARGET struct NAME(group) NAME(group_of)(int level, float scale, float third, float fourth, float last) {
    const VEC base = _mm512_setr_ps(-3, -1, 1, 3, -3, -1, 1, 3, -3, -1, 1, 3, -3, -1, 1, 3);
    const VEC sign3 = _mm512_setr_ps(-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1);
    const VEC sign4 = _mm512_setr_ps(-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1);
    const VEC steps = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -0.5f, 0.5f, 1.5f, 2.5f, 3.5f, 4.5f,
                                     5.5f, 6.5f, 7.5f);
    struct NAME(group) g = {_mm512_mul_ps(base, VSET(scale)), VZERO};
    if (level >= 3) g.first = VFMA(sign3, VSET(third), g.first);
    if (level >= 4) g.first = VFMA(sign4, VSET(fourth), g.first);
    if (level >= 8) g.last = _mm512_mul_ps(steps, VSET(last));
    return g;
}

SCALAR TARGET VEC NAME(nested)(int level, const char *const *plane, int64_t v, int u, const struct NAME(group) *g) {
    const __m512i two = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i four = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    (void)u; /* 0; a lookup takes the low 4 bits */
    __m512i at = _mm512_srlv_epi32(_mm512_set1_epi32((int)word_at(plane[0] + 4 * v)), two);
    if (level >= 3) at = _mm512_and_si512(at, _mm512_set1_epi32(3));
    if (level >= 3) at = _mm512_mask_or_epi32(at, half_at(plane[1] + 2 * v), at, _mm512_set1_epi32(4));
    if (level >= 4) at = _mm512_mask_or_epi32(at, half_at(plane[2] + 2 * v), at, _mm512_set1_epi32(8));
    VEC w = _mm512_permutexvar_ps(at, g->first);
    if (level < 8) return w;
    __m512i low = _mm512_set1_epi32((int)word_at(plane[3] + 8 * v));
    __m512i last = _mm512_mask_set1_epi32(low, 0xff00, (int)word_at(plane[3] + 8 * v + 4));
    return _mm512_add_ps(w, _mm512_permutexvar_ps(_mm512_srlv_epi32(last, four), g->last));
}

struct NAME(fields) {
    __m512i first, last;
};

SCALAR TARGET struct NAME(fields) NAME(fields_of)(int level, const char *const *plane, int64_t block, int half, int u) {
    (void)u; /* 0; rotations bring a sign plane's bits half (of lanes 8 and on 2 + half) to bits 2 and 3 of each nibble */
    const __m512i apart = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, -2, -2, -2, -2, -2, -2, -2, -2);
    struct NAME(fields) f = {_mm512_loadu_si512(plane[0] + 64 * block), _mm512_setzero_si512()};
    f.first = _mm512_srl_epi32(f.first, _mm_cvtsi32_si128(2 * half));
    if (level >= 3) {
        __m512i signs = _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)(plane[1] + 32 * block)));
        signs = _mm512_rolv_epi32(signs, _mm512_add_epi32(apart, _mm512_set1_epi32(2 - half)));
        f.first = _mm512_ternarylogic_epi32(f.first, signs, _mm512_set1_epi32(0x44444444), 0xd8); /* signs where 1 */
    }
    if (level >= 4) {
        __m512i signs = _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)(plane[2] + 32 * block)));
        signs = _mm512_rolv_epi32(signs, _mm512_add_epi32(apart, _mm512_set1_epi32(3 - half)));
        f.first = _mm512_ternarylogic_epi32(f.first, signs, _mm512_set1_epi32((int)0x88888888u), 0xd8);
    }
    if (level >= 8) f.last = _mm512_loadu_si512(plane[3] + 128 * block + 64 * half);
    return f;
}

SCALAR TARGET VEC NAME(next_nested)(int level, struct NAME(fields) *f, const struct NAME(group) *g) {
    VEC w = _mm512_permutexvar_ps(f->first, g->first); /* by the low 4 bits */
    f->first = _mm512_srli_epi32(f->first, 4);
    if (level < 8) return w;
    w = _mm512_add_ps(w, _mm512_permutexvar_ps(f->last, g->last));
    f->last = _mm512_srli_epi32(f->last, 4);
    return w;
}

struct NAME(exponents) {
    __m512i high, low; /* by the code: of the exponent all but its last bit, and that bit as the highest */
};

SCALAR TARGET struct NAME(exponents) NAME(exponents_of)(uint8_t highest) {
    const __m512i down = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __m512i e = _mm512_sub_epi8(_mm512_set1_epi8((char)highest), down);
    e = _mm512_maskz_mov_epi8(0x7fff7fff7fff7fff, e);
    return (struct NAME(exponents)){_mm512_and_si512(_mm512_srli_epi16(e, 1), _mm512_set1_epi8(0x7f)),
                                    _mm512_slli_epi16(_mm512_and_si512(e, _mm512_set1_epi8(1)), 7)};
}

SCALAR TARGET void NAME(widen)(const char *p, const struct NAME(exponents) *e, VEC to[4]) {
    const __m512i mantissa = _mm512_set1_epi8(0x7f), nibble = _mm512_set1_epi8(15);
    __m512i codes = _mm512_loadu_si512(p + 128);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i kept = _mm512_loadu_si512(p + 64 * half);
        __m512i code = _mm512_and_si512(half ? _mm512_srli_epi16(codes, 4) : codes, nibble);
        __m512i high = _mm512_shuffle_epi8(e->high, code), low = _mm512_shuffle_epi8(e->low, code);
        high = _mm512_ternarylogic_epi32(mantissa, high, kept, 0xca); /* the sign of what is kept */
        low = _mm512_ternarylogic_epi32(mantissa, kept, low, 0xca);   /* its mantissa */
        to[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
        to[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
    }
}

SCALAR TARGET int NAME(narrow)(const uint16_t *v, int highest, char *to) {
    const __m512i exponent = _mm512_set1_epi16(255), sign = _mm512_set1_epi16(0x80), most = _mm512_set1_epi16(14);
    __m512i codes[2];
    __mmask32 rare = 0;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i code[2], kept[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512i w = _mm512_loadu_si512(v + 64 * half + 32 * i), e = _mm512_and_si512(_mm512_srli_epi16(w, 7), exponent);
            __m512i below = _mm512_sub_epi16(_mm512_set1_epi16((short)highest), e);
            __mmask32 is_zero = _mm512_testn_epi16_mask(e, e), is_far = _mm512_cmpgt_epu16_mask(below, most);
            rare |= is_far & ~is_zero;
            code[i] = _mm512_mask_mov_epi16(below, is_zero | is_far, _mm512_set1_epi16(15));
            kept[i] = _mm512_ternarylogic_epi32(sign, _mm512_srli_epi16(w, 8), _mm512_andnot_si512(sign, w), 0xca);
            kept[i] = _mm512_and_si512(kept[i], exponent);
        }
        _mm512_storeu_si512(to + 64 * half, _mm512_packus_epi16(kept[0], kept[1]));
        codes[half] = _mm512_packus_epi16(code[0], code[1]);
    }
    _mm512_storeu_si512(to + 128, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
    return rare != 0;
}

#include "cpu_isa.h"

#endif
