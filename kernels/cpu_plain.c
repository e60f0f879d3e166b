/* Four floats at a time: NEON with fused multiply-add, otherwise (x86 before 2013) multiply, then add. */

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu_place.h"

typedef float float4 __attribute__((vector_size(16)));
typedef uint32_t word4 __attribute__((vector_size(16)));

SCALAR float4 load4(const float *p) {
    float4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

#define NAME(x) moe_plain_##x
#define ISA "plain"
#define TARGET
#define VEC float4
#define WIDTH 4
#define VZERO ((float4){0})
#define VLOAD(p) load4(p)
#define VODD(v) ((float4)((word4)(v) & 0xffff0000u))
#define VEVEN(v) ((float4)((word4)(v) << 16))
#define VLOAD_BF16(p) \
    ((float4){bf16_to_float((p)[0]), bf16_to_float((p)[1]), bf16_to_float((p)[2]), bf16_to_float((p)[3])})
#define VLOAD_F16(p) \
    ((float4){half_to_float((p)[0]), half_to_float((p)[1]), half_to_float((p)[2]), half_to_float((p)[3])})
#define VSUB(a, b) ((a) - (b))
#define VSET(v) ((float4){(v), (v), (v), (v)})
#define VPICK(from, lane) ((float4){(from)[(lane)[0]], (from)[(lane)[1]], (from)[(lane)[2]], (from)[(lane)[3]]})
#define TABLE const float *
#define CODE_NR 1
#if defined(__aarch64__)
#define VFMA(a, b, c) ((float4)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define MR 3
#define NR 2
#else
#define VFMA(a, b, c) ((c) + (a) * (b))
#define MR 2
#define NR 1
#endif

SCALAR TABLE NAME(table_at)(const float *from) { return from; }

SCALAR VEC NAME(nibble)(int code, const char *p, int j, int u, TABLE table) {
    (void)code;
    const uint8_t *byte = (const uint8_t *)p + 16 * u + j / 2; /* of a lane's four, the one with nibble j */
    int shift = j % 2 * 4;
    return (float4){table[byte[0] >> shift & 15], table[byte[4] >> shift & 15], table[byte[8] >> shift & 15],
                    table[byte[12] >> shift & 15]};
}

SCALAR VEC NAME(byte_e4m3)(const char *p, int half, int u) {
    const uint8_t *v = (const uint8_t *)p + half / 2 * LANES + u * WIDTH;
    return (float4){e4m3_part(v[0]), e4m3_part(v[1]), e4m3_part(v[2]), e4m3_part(v[3])};
}

SCALAR VEC NAME(byte_int8)(const char *p) {
    const int8_t *v = (const int8_t *)p;
    return (float4){v[0], v[1], v[2], v[3]};
}

SCALAR void NAME(sum_codes)(int mr, VEC a[MR][1][4], float *c, int64_t ldc, int64_t first) {
    for (int m = 0; m < mr; m++, c += ldc) {
        float lane[LANES];
        memcpy(lane, a[m][0], sizeof lane);
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) lane[i] += lane[i + half];
        *c = first ? lane[0] : *c + lane[0];
    }
}

struct NAME(group) {
    float scale, third, fourth, last;
};

SCALAR struct NAME(group) NAME(group_of)(int level, float scale, float third, float fourth, float last) {
    (void)level;
    return (struct NAME(group)){scale, third, fourth, last};
}

SCALAR VEC NAME(nested)(int level, const char *const *plane, int64_t v, int u, const struct NAME(group) *g) {
    uint32_t two = word_at(plane[0] + 4 * v) >> 8 * u;
    uint32_t third = level < 3 ? 0 : (uint32_t)half_at(plane[1] + 2 * v) >> 4 * u;
    uint32_t fourth = level < 4 ? 0 : (uint32_t)half_at(plane[2] + 2 * v) >> 4 * u;
    uint32_t last = level < 8 ? 0 : word_at(plane[3] + 8 * v + 4 * (u / 2)) >> u % 2 * 16;
    VEC w;
    for (int i = 0; i < 4; i++) {
        w[i] = (float)((int32_t)(2 * (two >> 2 * i & 3)) - 3) * g->scale;
        if (level >= 3) w[i] += (float)((int32_t)(2 * (third >> i & 1)) - 1) * g->third;
        if (level >= 4) w[i] += (float)((int32_t)(2 * (fourth >> i & 1)) - 1) * g->fourth;
        if (level >= 8) w[i] += ((float)(int32_t)(last >> 4 * i & 15) - 7.5f) * g->last;
    }
    return w;
}

struct NAME(fields) {
    uint32_t two[4], third[4], fourth[4], last[4];
};

SCALAR struct NAME(fields) NAME(fields_of)(int level, const char *const *plane, int64_t block, int half, int u) {
    struct NAME(fields) f = {{0}, {0}, {0}, {0}};
    for (int i = 0; i < 4; i++) {
        int lane = 4 * u + i;
        f.two[i] = word_at(plane[0] + 64 * block + 4 * lane) >> 2 * half;
        if (level >= 3) f.third[i] = word_at(plane[1] + 32 * block + 4 * (lane % 8)) >> (half + lane / 8 * 2);
        if (level >= 4) f.fourth[i] = word_at(plane[2] + 32 * block + 4 * (lane % 8)) >> (half + lane / 8 * 2);
        if (level >= 8) f.last[i] = word_at(plane[3] + 128 * block + 64 * half + 4 * lane);
    }
    return f;
}

SCALAR VEC NAME(next_nested)(int level, struct NAME(fields) *f, const struct NAME(group) *g) {
    VEC w;
    for (int i = 0; i < 4; i++) {
        w[i] = (float)((int32_t)(2 * (f->two[i] & 3)) - 3) * g->scale;
        if (level >= 3) w[i] += (float)((int32_t)(2 * (f->third[i] & 1)) - 1) * g->third;
        if (level >= 4) w[i] += (float)((int32_t)(2 * (f->fourth[i] & 1)) - 1) * g->fourth;
        if (level >= 8) w[i] += ((float)(int32_t)(f->last[i] & 15) - 7.5f) * g->last;
        f->two[i] >>= 4, f->third[i] >>= 4, f->fourth[i] >>= 4, f->last[i] >>= 4;
    }
    return w;
}

struct NAME(exponents) {
    uint8_t high[16], low[16]; /* by the code: of the exponent all but its last bit, and that bit as the highest */
};

SCALAR struct NAME(exponents) NAME(exponents_of)(uint8_t highest) {
    struct NAME(exponents) e = {{0}, {0}};
    for (int i = 0; i < 15; i++) {
        uint8_t exponent = (uint8_t)(highest - i);
        e.high[i] = exponent >> 1, e.low[i] = (uint8_t)(exponent << 7);
    }
    return e;
}

SCALAR void NAME(widen)(const char *p, const struct NAME(exponents) *e, VEC to[16]) {
    const uint8_t *kept = (const uint8_t *)p, *codes = kept + 128;
    for (int half = 0; half < 2; half++, kept += 64, to += 8)
        for (int l = 0; l < 4; l++) { /* 16 bytes: 8 weights, and the 8 that lie 32 beyond */
#if defined(__aarch64__)
            uint8x16_t code = vld1q_u8(codes + 16 * l), own = vld1q_u8(kept + 16 * l), sign = vdupq_n_u8(0x80);
            code = half ? vshrq_n_u8(code, 4) : vandq_u8(code, vdupq_n_u8(15));
            uint8x16_t high = vorrq_u8(vandq_u8(own, sign), vqtbl1q_u8(vld1q_u8(e->high), code));
            uint8x16_t low = vorrq_u8(vbicq_u8(own, sign), vqtbl1q_u8(vld1q_u8(e->low), code));
            to[l] = (VEC)vzip1q_u8(low, high), to[l + 4] = (VEC)vzip2q_u8(low, high);
#else
            uint16_t wide[16];
            for (int i = 0; i < 16; i++) {
                int at = 16 * l + i, code = codes[at] >> 4 * half & 15;
                uint8_t high = (uint8_t)((kept[at] & 0x80) | e->high[code]), low = (uint8_t)((kept[at] & 0x7f) | e->low[code]);
                wide[i] = (uint16_t)(high << 8 | low);
            }
            memcpy(to + l, wide, 16), memcpy(to + l + 4, wide + 8, 16);
#endif
        }
}

SCALAR int NAME(narrow)(const uint16_t *v, int highest, char *to) {
    uint8_t code[128];
    uint16_t rare = 0;
#if defined(__aarch64__)
    const uint16x8_t far = vdupq_n_u16(15);
    uint16x8_t any = vdupq_n_u16(0);
    for (int at = 0; at < 128; at += 16) { /* 16 bytes, as in widen */
        uint8x8_t codes[2], kept[2];
        for (int i = 0; i < 2; i++) {
            uint16x8_t w = vld1q_u16(v + at / 64 * 64 + i * 32 + at / 16 % 4 * 8);
            uint16x8_t e = vandq_u16(vshrq_n_u16(w, 7), vdupq_n_u16(255)), is_zero = vceqzq_u16(e);
            uint16x8_t below = vsubq_u16(vdupq_n_u16((uint16_t)highest), e), is_far = vcgeq_u16(below, far);
            any = vorrq_u16(any, vbicq_u16(is_far, is_zero));
            codes[i] = vmovn_u16(vbslq_u16(vorrq_u16(is_zero, is_far), far, below));
            kept[i] = vmovn_u16(vbslq_u16(vdupq_n_u16(0x80), vshrq_n_u16(w, 8), w));
        }
        vst1q_u8((uint8_t *)to + at, vcombine_u8(kept[0], kept[1]));
        vst1q_u8(code + at, vcombine_u8(codes[0], codes[1]));
    }
    rare = vmaxvq_u16(any);
#else
    for (int at = 0; at < 128; at++) { /* the bytes of each half in their order */
        uint16_t w = v[at / 64 * 64 + at / 8 % 2 * 32 + at / 16 % 4 * 8 + at % 8];
        uint16_t e = w >> 7 & 255, below = (uint16_t)(highest - e), is_kept = below < 15;
        to[at] = (char)((w >> 8 & 0x80) | (w & 0x7f));
        code[at] = (uint8_t)(e && is_kept ? below : 15);
        rare |= e && !is_kept;
    }
#endif
    for (int at = 0; at < 64; at++) to[128 + at] = (char)(code[at] | code[at + 64] << 4);
    return rare;
}

#include "cpu_isa.h"
