/* AVX-512; with WITH_DOT (cpu_avx512_dot.c) also vdpbf16ps. */

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_scalars.h"

#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#ifdef WITH_DOT
#define NAME(x) moe_avx512_dot_##x
#define ISA "avx512_dot"
#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#define VDOT(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#else
#define NAME(x) moe_avx512_##x
#define ISA "avx512"
#define TARGET __attribute__((target(AVX512)))
#endif
#define VEC __m512
#define WIDTH 16
#define VZERO _mm512_setzero_ps()
#define VLOAD(p) _mm512_loadu_ps(p)
#define VLOAD_ODD(p) \
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)))
#define VLOAD_EVEN(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))
#define VLOAD_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define VFMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MR 6
#define NR 4
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

#include "cpu_isa.h"

#endif
