/* RMS norm on CPUs: out = w * round(x / sqrt(mean(x^2) + eps)), one call for all rows; or w * x / sqrt(…), rounded once.
 *
 * Plain C11 without the Python API, loaded by kernels/cpu_norm.py with ctypes. Arithmetic is fp32. The sum of squares has
 * one order on every machine: lane l of 16 sums the elements i = l mod 16 in turn, then lanes i and i+8, i+4, i+2, i+1 are
 * added. So a row's result depends on that row alone.
 */

#include <math.h>

#include "cpu_scalars.h"

SCALAR void norm_row(int kind, const void *x, const void *weight, void *out, int64_t n, float eps, int64_t once) {
    float lane[LANES] = {0};
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int64_t l = 0; l < LANES; l++) {
            float v = widen_one(kind, x, i + l);
            lane[l] += v * v;
        }
    for (int64_t i = whole; i < n; i++) {
        float v = widen_one(kind, x, i);
        lane[i - whole] += v * v;
    }
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t l = 0; l < half; l++) lane[l] += lane[l + half];
    float scale = 1.0f / sqrtf(lane[0] / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
        float h = widen_one(kind, x, i) * scale, w = widen_one(kind, weight, i);
        if (kind == F32) {
            ((float *)out)[i] = w * h;
        } else {
            uint16_t rounded = float_to_bf16(h);
            ((uint16_t *)out)[i] = float_to_bf16(w * (once ? h : widen_one(BF16, &rounded, 0)));
        }
    }
}

static CLONES void norm_rows(const void *x, const void *weight, void *out, int64_t rows, int64_t n, int64_t kind, float eps,
                             int64_t once) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t at = r * n;
        if (kind == F32)
            norm_row(F32, (const float *)x + at, weight, (float *)out + at, n, eps, once);
        else
            norm_row(BF16, (const uint16_t *)x + at, weight, (uint16_t *)out + at, n, eps, once);
    }
}

/* x, out: [rows, n]; weight: [n]; all contiguous and of one kind. once: nothing is rounded before the weight. */
EXPORT void moe_cpu_rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t n, int64_t kind, float eps,
                             int64_t once) {
    norm_rows(x, weight, out, rows, n, kind, eps, once);
}
