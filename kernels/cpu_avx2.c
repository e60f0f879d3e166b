/* AVX2 with fused multiply-add. */

#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu_scalars.h"

#define NAME(x) moe_avx2_##x
#define ISA "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC __m256
#define WIDTH 8
#define VZERO _mm256_setzero_ps()
#define VLOAD(p) _mm256_loadu_ps(p)
#define VLOAD_ODD(p) \
    _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const void *)(p)), _mm256_set1_epi32((int)0xffff0000u)))
#define VLOAD_EVEN(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)(p)), 16))
#define VLOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define VFMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MR 3
#define NR 2
#define SUM_BLOCK NAME(sum)

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

#include "cpu_isa.h"

#endif
