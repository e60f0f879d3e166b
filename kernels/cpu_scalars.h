/* Conversions and activations, one number at a time; the loops around them are vectorised by the compiler. Contraction is
 * off: the same bits everywhere.
 */

#ifndef MOE_CPU_SCALARS_H
#define MOE_CPU_SCALARS_H

#include "cpu_experts.h"

SCALAR float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

SCALAR uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

SCALAR float bf16_to_float(uint16_t v) { return as_float((uint32_t)v << 16); }

SCALAR uint16_t float_to_bf16(float f) { /* to nearest, ties to even */
    uint32_t u = as_bits(f), rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

SCALAR float half_to_float(uint16_t v) {
    uint32_t magnitude = (uint32_t)(v & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = normal + (112u << 23);                                                /* inf, nan */
    uint32_t tiny = as_bits(as_float(normal + (1u << 23)) - as_float(113u << 23));           /* subnormal: exact */
    uint32_t u = exponent == 0x0f800000u ? special : exponent == 0 ? tiny : normal;
    return as_float(u | (uint32_t)(v & 0x8000u) << 16);
}

SCALAR uint16_t float_to_half(float f) { /* to nearest, ties to even */
    uint32_t u = as_bits(f), magnitude = u & 0x7fffffffu, magic = 126u << 23;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t tiny = as_bits(as_float(magnitude) + as_float(magic)) - magic; /* the addition rounds to multiples of 2^-24 */
    uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t h = magnitude >= 143u << 23 ? large : magnitude < 113u << 23 ? tiny : normal;
    return (uint16_t)(h | (u >> 16 & 0x8000u));
}

SCALAR float widen_one(int64_t kind, const void *p, int64_t i) {
    if (kind == F32) {
        float f;
        memcpy(&f, (const char *)p + 4 * i, sizeof f);
        return f;
    }
    uint16_t v;
    memcpy(&v, (const char *)p + 2 * i, sizeof v);
    return kind == BF16 ? bf16_to_float(v) : half_to_float(v);
}

/* 2^-8 of the value of an e4m3: its bits as those of an fp16. Only the largest magnitude, 0x7f, carries into the top bit
 * of the exponent: it is no number, and so none in fp16. */
SCALAR float e4m3_part(uint8_t v) {
    uint32_t magnitude = (v & 0x7fu) << 7;
    return half_to_float((uint16_t)((v & 0x80u) << 8 | magnitude | ((magnitude + 0x80u) & 0x4000u)));
}

/* One scale or zero point. */
SCALAR float scale_to_float(int kind, const char *p, int64_t i) {
    const uint8_t *byte = (const uint8_t *)p;
    if (kind == E8M0) {
        uint32_t bits = (uint32_t)byte[i] << 23;
        bits |= (uint32_t)(byte[i] == 0xffu) << 22; /* nan */
        return as_float(bits > 1u << 22 ? bits : 1u << 22); /* 2^-127 is subnormal */
    }
    if (kind == E4M3_SCALE) return 256.0f * e4m3_part(byte[i]);
    if (kind == INT8_ZERO) return (float)(int8_t)byte[i];
    return widen_one(kind, p, i);
}

SCALAR int64_t scale_size(int64_t kind) { return kind == F32 || kind == WORDS ? 4 : kind <= F16 ? 2 : 1; }

/* e^x = 2^n (1 + r + r^2 p(r)), |r| <= ln2/2; p: our own minimax fit (5e-11). Relative error < 1.2e-7; x is clamped to
 * [-87.3, 88.3], where the result is a normal number; nan stays nan. */
SCALAR float exponential(float x) {
    x = x < -87.33f ? -87.33f : x;
    x = x > 88.37f ? 88.37f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum is rounded to an integer */
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f; /* ln 2 in two parts; the first product is exact */
    float p = 1.9790298e-4f;
    p = p * r + 1.3944703e-3f;
    p = p * r + 8.333498e-3f;
    p = p * r + 4.1666295e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    return (p * (r * r) + r + 1.0f) * as_float((as_bits(shifted) - 0x4b400000u + 127u) << 23);
}

SCALAR float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

SCALAR float silu(float x) { return x / (1.0f + exponential(-x)); }

/* The normal distribution function, from erfc(z) = e^(-z^2) t P(t), z = |x|/sqrt2, t = 1/(1 + 0.47 z) (our own minimax
 * fit, 2e-8). The rounding error of x^2 is made good, so that the negative tail keeps its relative accuracy (4e-7). */
SCALAR float normal(float x) {
    float a = x < 0.0f ? -x : x, high = as_float(as_bits(a) & 0xfffff000u), low = a - high;
    float square = a * a, missing = ((high * high - square) + 2.0f * high * low) + low * low;
    float e = exponential(-0.5f * square) * (1.0f - 0.5f * missing);
    float t = 1.0f / (1.0f + a * 0.33234018f); /* 0.47 / sqrt2 */
    float p = -0.01687859f;
    p = p * t + 0.041304577f;
    p = p * t + 0.06852376f;
    p = p * t - 0.3111398f;
    p = p * t + 0.26780522f;
    p = p * t - 0.024639146f;
    p = p * t + 0.2150852f;
    p = p * t + 0.22892071f;
    p = p * t + 0.26587975f;
    p = p * t + 0.2651383f;
    float tail = 0.5f * (p * t * e);
    return x < 0.0f ? tail : 1.0f - tail;
}

SCALAR float gelu(float x) { return x * normal(x); }

/* 0.5 x (1 + tanh u) = x sigmoid(2u) */
SCALAR float gelu_tanh(float x) { return x * sigmoid(1.5957691f * (x + 0.044715f * (x * x * x))); }

#endif
