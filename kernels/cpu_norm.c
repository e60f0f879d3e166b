/* RMS norm on CPUs: out = w * round(x / sqrt(mean(x^2) + eps)), one call for all rows.
 *
 * Plain C11 without the Python API, loaded by kernels/cpu_norm.py with ctypes. Arithmetic is fp32. The sum of squares has
 * one order on every machine: lane l of 16 sums the elements i = l mod 16 in turn, then lanes i and i+8, i+4, i+2, i+1 are
 * added. So a row's result depends on that row alone.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { F32, BF16 }; /* the order of cpu_norm.py's _KINDS */
enum { LANES = 16 };

#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE float widen(int kind, const void *p, int64_t i) {
    if (kind == F32) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE uint16_t round_bf16(float f) { /* to nearest, ties to even */
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

INLINE void norm_row(int kind, const void *x, const void *weight, void *out, int64_t n, float eps) {
    float lane[LANES] = {0};
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int64_t l = 0; l < LANES; l++) {
            float v = widen(kind, x, i + l);
            lane[l] += v * v;
        }
    for (int64_t i = whole; i < n; i++) {
        float v = widen(kind, x, i);
        lane[i - whole] += v * v;
    }
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t l = 0; l < half; l++) lane[l] += lane[l + half];
    float scale = 1.0f / sqrtf(lane[0] / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
        float h = widen(kind, x, i) * scale, w = widen(kind, weight, i);
        if (kind == F32) {
            ((float *)out)[i] = w * h;
        } else {
            uint16_t rounded = round_bf16(h);
            ((uint16_t *)out)[i] = round_bf16(w * widen(BF16, &rounded, 0));
        }
    }
}

/* x, out: [rows, n]; weight: [n]; all contiguous and of one kind. */
__attribute__((visibility("default"))) CLONES void moe_cpu_rms_norm(const void *x, const void *weight, void *out,
                                                                    int64_t rows, int64_t n, int64_t kind, float eps) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = r * n;
        if (kind == F32)
            norm_row(F32, (const float *)x + at, weight, (float *)out + at, n, eps);
        else
            norm_row(BF16, (const uint16_t *)x + at, weight, (uint16_t *)out + at, n, eps);
    }
}
