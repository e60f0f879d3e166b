/* Experts of one MoE layer on CPUs: y[t, k] = expert(slot_ids[t, k])(x[t]), one call per layer.
 *
 * Plain C11 with GCC/Clang extensions, no Python API: kernels/cpu.py loads it with ctypes and describes every argument.
 * OpenMP only starts the threads; the library is not linked to an OpenMP runtime but uses the one torch has loaded.
 * The rounding points are those of kernels/reference.py; the order of every sum is stated in cpu_experts_isa.h.
 *
 * Rows are grouped by slot (counting sort), then three rounds of tasks with a barrier between them:
 *   pack   one row of x, widened to fp32, into blocks of MR rows
 *   up     (expert, 240 rows, 32 of I): gate and up tiles, activation, h packed as x is
 *   down   (expert, 240 rows, 64 of H): y
 * and, when top-k weights are given, the weighted sum over k per token. No two tasks write the same element.
 *
 * moe_cpu_linear is one product of the same kind for the dense layers around them.
 */

#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { F32, BF16, F16 };                               /* storage; the order of cpu.py's _KINDS */
enum { SILU, GELU, GELU_TANH, RELU, RELU2, GPT_OSS };  /* the order of cpu.py's _ACTIVATIONS */
enum { LANES = 16, KC = 1024 };                        /* they define the order of sums; do not tune per machine */
enum { AHEAD = 8192 }; /* bytes to prefetch ahead, at least (measured) */
enum { ROWS = 240, UP_TILE = 32, DOWN_TILE = 64 };
enum { STRAIGHT_ROWS_F32 = 96, STRAIGHT_ROWS_16 = 24 }; /* rows of x up to which W is used where it lies (measured) */
#define CHUNK_BYTES (64 << 20) /* scratch per call; more tokens are done in chunks */
#define SERIAL_MACS 400000     /* below, waking a second thread costs more than it brings */

struct matrix { /* of one slot; strides in bytes */
    const char *data, *bias;
    int64_t slot, row, bias_slot, n, k, kind;
};

struct layer {
    struct matrix up, down;
    int64_t slots, gated, interleaved, act;
    float alpha, limit;
};

struct call {
    const void *x;
    int64_t x_row, x_kind; /* bytes from row to row */
    const void *slot_ids;  /* [T, K], contiguous */
    int64_t ids_are_64;
    const void *topk_weights; /* [T, K], contiguous; NULL: out is y */
    int64_t topk_kind;
    int64_t tokens, top_k;
    void *out; /* y: fp32 [T, K, H]; otherwise [T, H] of the kind of x; contiguous */
    int64_t threads;
};

struct walk { /* one pass over W; strides in bytes */
    int64_t row, step, group, groups, steps, ldc, first;
    int64_t ahead; /* how far to prefetch, 0 = not */
};

struct kernels {
    const char *name;
    int64_t mr;
    void (*pack_x)(int, const char *, int64_t, float *, int64_t);
    void (*tile)(const float *, int64_t, const struct matrix *, const char *, int64_t, int64_t, float *, int64_t,
                 float *);
    void (*add_bias)(float *, int64_t, int64_t, const float *, int64_t);
    void (*round)(int, float *, int64_t);
    void (*activate)(const struct layer *, float *, const float *, int64_t);
    void (*combine)(int, const float *const *, const float *, int64_t, int64_t, char *);
};

/* ---- scalars; the loops around them are vectorised by the compiler. Contraction is off: same bits everywhere. ---- */

#define SCALAR static inline __attribute__((always_inline))

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

/* x * normal distribution function, from erfc(z) = e^(-z^2) t P(t), z = |x|/sqrt2, t = 1/(1 + 0.47 z) (our own minimax
 * fit, 2e-8). The rounding error of x^2 is made good, so that the negative tail keeps its relative accuracy (4e-7). */
SCALAR float gelu(float x) {
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
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

/* 0.5 x (1 + tanh u) = x sigmoid(2u) */
SCALAR float gelu_tanh(float x) { return x * sigmoid(1.5957691f * (x + 0.044715f * (x * x * x))); }

/* ---- instruction sets ---- */

#if defined(__x86_64__)

#define NAME(x) avx512_##x
#define ISA "avx512"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define VEC __m512
#define WIDTH 16
#define VZERO _mm512_setzero_ps()
#define VLOAD(p) _mm512_loadu_ps(p)
#define VLOAD_BF16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define VLOAD_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define VFMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MR 6
#define NR 4

/* Four rows of x by four rows of w at once: 15 additions for 16 sums of 16 lanes. */
static inline __attribute__((always_inline)) TARGET void avx512_sum(int mr, VEC a[6][4][1], float *c, int64_t ldc,
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
#define SUM_BLOCK avx512_sum
#include "cpu_experts_isa.h"

#define NAME(x) avx2_##x
#define ISA "avx2"
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VEC __m256
#define WIDTH 8
#define VZERO _mm256_setzero_ps()
#define VLOAD(p) _mm256_loadu_ps(p)
#define VLOAD_BF16(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define VLOAD_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define VFMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MR 3
#define NR 2

SCALAR TARGET __m128 avx2_fold(VEC v[2]) {
    __m256 eight = _mm256_add_ps(v[0], v[1]);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

SCALAR TARGET void avx2_sum(int mr, VEC a[3][2][2], float *c, int64_t ldc, int64_t first) {
#pragma GCC unroll 3
    for (int m = 0; m < mr; m++, c += ldc) {
        __m128 p = avx2_fold(a[m][0]), q = avx2_fold(a[m][1]);
        __m128 s = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q)); /* p02 q02 p13 q13 */
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        if (!first) s = _mm_add_ps(_mm_castpd_ps(_mm_load_sd((const double *)(void *)c)), s);
        _mm_storel_pi((__m64 *)(void *)c, s);
    }
}
#define SUM_BLOCK avx2_sum
#include "cpu_experts_isa.h"

#endif

/* Four floats at a time: NEON with fused multiply-add, otherwise (x86 before 2013) multiply, then add. */
typedef float float4 __attribute__((vector_size(16)));

SCALAR float4 load4(const float *p) {
    float4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

#define NAME(x) plain_##x
#define ISA "plain"
#define TARGET
#define VEC float4
#define WIDTH 4
#define VZERO ((float4){0})
#define VLOAD(p) load4(p)
#define VLOAD_BF16(p) \
    ((float4){bf16_to_float((p)[0]), bf16_to_float((p)[1]), bf16_to_float((p)[2]), bf16_to_float((p)[3])})
#define VLOAD_F16(p) \
    ((float4){half_to_float((p)[0]), half_to_float((p)[1]), half_to_float((p)[2]), half_to_float((p)[3])})
#if defined(__aarch64__)
#define VFMA(a, b, c) ((float4)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define MR 3
#define NR 2
#else
#define VFMA(a, b, c) ((c) + (a) * (b))
#define MR 2
#define NR 1
#endif
#include "cpu_experts_isa.h"

static const struct kernels *const *supported(void) { /* best first, NULL at the end */
    static const struct kernels *sets[4];
    int n = 0;
    const struct kernels *found[4] = {0};
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found[n++] = &avx512_kernels;
    if (avx2) found[n++] = &avx2_kernels;
#endif
    found[n++] = &plain_kernels;
    memcpy(sets, found, sizeof sets); /* threads that race write the same bytes */
    return sets;
}

/* ---- scratch memory: one growing block per calling thread, given back when the thread ends ---- */

struct block { size_t size; char *data; };
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_free(void *p) {
    free(((struct block *)p)->data);
    free(p);
}

static void scratch_create_key(void) { pthread_key_create(&scratch_key, scratch_free); }

static char *scratch_of_size(size_t size) {
    pthread_once(&scratch_once, scratch_create_key);
    struct block *b = pthread_getspecific(scratch_key);
    if (!b) {
        if (!(b = calloc(1, sizeof *b))) return NULL;
        pthread_setspecific(scratch_key, b);
    }
    if (b->size < size) {
        void *data = NULL;
        free(b->data);
        b->data = NULL, b->size = 0;
        if (posix_memalign(&data, 4096, size)) return NULL;
        b->data = data, b->size = size;
    }
    return b->data;
}

/* ---- one chunk of tokens ---- */

struct rows { /* up to ROWS consecutive sorted rows of one slot */
    int64_t slot, first, count;
};

struct run {
    const struct layer *l;
    const struct call *c;
    const struct kernels *k;
    int64_t rows, num_parts, up_tiles, down_tiles, k16, i16;
    struct rows *parts;
    int32_t *position; /* [rows] token * K + k of each sorted row */
    int32_t *row_of;   /* [T * K] its inverse, -1 = no expert */
    float *x, *h, *y;  /* packed, packed, [T * K, H] */
    float *private;    /* per thread: two tiles of C and a packed piece of W */
    int64_t next[4];   /* the next task of each round */
};

enum { C_FLOATS = ROWS * DOWN_TILE, PRIVATE_FLOATS = 2 * C_FLOATS + DOWN_TILE * KC };

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t slot_of(const struct call *c, int64_t i) {
    return c->ids_are_64 ? ((const int64_t *)c->slot_ids)[i] : ((const int32_t *)c->slot_ids)[i];
}

/* The place of a row in packed form: `*stride` floats from 16 elements to the next 16. */
static float *packed_row(const struct run *r, float *base, int64_t width, const struct rows *p, int64_t i,
                         int64_t *stride) {
    int64_t mr = r->k->mr, block = i / mr * mr;
    *stride = least(mr, p->count - block) * LANES;
    return base + (p->first + block) * width + (i - block) * LANES;
}

static void pack_task(struct run *r, int64_t task) {
    const struct rows *p = r->parts + task;
    const struct call *c = r->c;
    int64_t stride;
    for (int64_t i = 0; i < p->count; i++) {
        const char *from = (const char *)c->x + r->position[p->first + i] / c->top_k * c->x_row;
        float *to = packed_row(r, r->x, r->k16, p, i, &stride);
        r->k->pack_x((int)c->x_kind, from, r->l->up.k, to, stride);
    }
}

/* C columns [n0, n0 + n) of one expert: x * W^T + bias. */
static void product(struct run *r, const struct matrix *w, const struct rows *p, const float *x, int64_t n0, int64_t n,
                    float *c, int64_t ldc, float *packed_w) {
    int64_t size = w->kind == F32 ? 4 : 2;
    r->k->tile(x, p->count, w, w->data + p->slot * w->slot, n0, n, c, ldc, packed_w);
    if (w->bias) {
        float bias[DOWN_TILE];
        for (int64_t i = 0; i < n; i++) bias[i] = widen_one(w->kind, w->bias + p->slot * w->bias_slot + n0 * size, i);
        r->k->add_bias(c, ldc, p->count, bias, n);
    }
}

static void up_task(struct run *r, int64_t task, float *c) {
    const struct layer *l = r->l;
    const struct rows *p = r->parts + task / r->up_tiles;
    const float *x = r->x + p->first * r->k16;
    int64_t i0 = task % r->up_tiles * UP_TILE, n = least(UP_TILE, l->down.k - i0), size = p->count * UP_TILE, stride;
    float *gate = c, *up = l->gated ? c + size : NULL, *both = c + C_FLOATS, *packed_w = both + C_FLOATS;
    int kind = (int)r->c->x_kind;

    if (n < UP_TILE) { /* nobody reads the columns beyond n, but the activation runs over them */
        memset(gate, 0, 2 * size * sizeof(float));
        memset(both, 0, 2 * size * sizeof(float));
    }
    if (l->interleaved) {
        product(r, &l->up, p, x, 2 * i0, 2 * n, both, 2 * UP_TILE, packed_w);
        for (int64_t i = 0; i < size; i++) gate[i] = both[2 * i], up[i] = both[2 * i + 1];
    } else {
        product(r, &l->up, p, x, i0, n, gate, UP_TILE, packed_w);
        if (up) product(r, &l->up, p, x, l->down.k + i0, n, up, UP_TILE, packed_w);
    }
    r->k->round(kind, gate, up ? 2 * size : size);
    r->k->activate(l, gate, up, size);
    r->k->round(kind, gate, size);
    for (int64_t m = 0; m < p->count; m++, gate += UP_TILE) {
        float *to = packed_row(r, r->h, r->i16, p, m, &stride) + i0 / LANES * stride;
        for (int64_t i = n; i % LANES; i++) gate[i] = 0.0f; /* up to the 16 that the next product reads */
        for (int64_t i = 0; i < n; i += LANES, to += stride) memcpy(to, gate + i, LANES * sizeof(float));
    }
}

static void down_task(struct run *r, int64_t task, float *c) {
    const struct matrix *w = &r->l->down;
    const struct rows *p = r->parts + task / r->down_tiles;
    int64_t n0 = task % r->down_tiles * DOWN_TILE, n = least(DOWN_TILE, w->n - n0);
    product(r, w, p, r->h + p->first * r->i16, n0, n, c, DOWN_TILE, c + 2 * C_FLOATS);
    for (int64_t m = 0; m < p->count; m++)
        memcpy(r->y + r->position[p->first + m] * w->n + n0, c + m * DOWN_TILE, n * sizeof(float));
}

static void combine_task(struct run *r, int64_t token, const float **y, float *weight) {
    const struct call *c = r->c;
    int64_t hidden = r->l->down.n;
    for (int64_t k = 0; k < c->top_k; k++) {
        int64_t i = token * c->top_k + k;
        y[k] = r->row_of[i] < 0 ? NULL : r->y + i * hidden;
        weight[k] = widen_one(c->topk_kind, c->topk_weights, i);
    }
    r->k->combine((int)c->x_kind, y, weight, c->top_k, hidden,
                  (char *)c->out + token * hidden * (c->x_kind == F32 ? 4 : 2));
}

#define FOR_EACH_TASK(round, total) \
    for (int64_t task; (task = __atomic_fetch_add(&r->next[round], 1, __ATOMIC_RELAXED)) < (total);)

static void barrier(int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
    (void)threads;
}

static void work(struct run *r, int64_t thread, int64_t threads) {
    float *private = r->private + thread * PRIVATE_FLOATS;
    FOR_EACH_TASK(0, r->num_parts) pack_task(r, task);
    barrier(threads);
    FOR_EACH_TASK(1, r->num_parts * r->up_tiles) up_task(r, task, private);
    barrier(threads);
    FOR_EACH_TASK(2, r->num_parts * r->down_tiles) down_task(r, task, private);
    if (!r->c->topk_weights) return;
    barrier(threads);
    const float **y = (const float **)(void *)private;
    FOR_EACH_TASK(3, r->c->tokens) combine_task(r, task, y, (float *)(y + r->c->top_k));
}

/* The next `size` bytes, aligned to a cache line. */
static void *take(uintptr_t *at, int64_t size) {
    uintptr_t p = *at;
    *at += ((uintptr_t)size + 63) / 64 * 64;
    return (void *)p;
}

static int64_t run_chunk(const struct layer *l, const struct call *c, const struct kernels *kernels) {
    int64_t total = c->tokens * c->top_k, hidden = l->down.n;
    struct run run = {.l = l, .c = c, .k = kernels}, *r = &run;
    r->k16 = (l->up.k + LANES - 1) / LANES * LANES;
    r->i16 = (l->down.k + LANES - 1) / LANES * LANES;
    r->up_tiles = (l->down.k + UP_TILE - 1) / UP_TILE;
    r->down_tiles = (hidden + DOWN_TILE - 1) / DOWN_TILE;

    int64_t rows = 0, macs, threads = c->threads;
    for (int64_t i = 0; i < total; i++) {
        int64_t slot = slot_of(c, i);
        if (slot < -1 || slot >= l->slots) return 1 + i;
        rows += slot >= 0;
    }
    macs = rows * (l->up.n * l->up.k + hidden * l->down.k);
#ifdef _OPENMP
    if (macs < SERIAL_MACS) threads = 1;
#else
    threads = 1;
#endif
    (void)macs;

    int32_t *start = NULL;
    for (uintptr_t base = 0, at = 0;; at = base) { /* the first round counts, the second one points */
        start = take(&at, (l->slots + 1) * sizeof *start);
        r->position = take(&at, rows * sizeof *r->position);
        r->row_of = take(&at, total * sizeof *r->row_of);
        r->parts = take(&at, (rows / ROWS + least(rows, l->slots)) * sizeof *r->parts);
        r->x = take(&at, rows * r->k16 * sizeof(float));
        r->h = take(&at, rows * r->i16 * sizeof(float));
        r->y = c->topk_weights ? take(&at, total * hidden * sizeof(float)) : c->out;
        r->private = take(&at, threads * PRIVATE_FLOATS * sizeof(float));
        if (base) break;
        if (!(base = (uintptr_t)scratch_of_size(at))) return -1;
    }

    memset(start, 0, (l->slots + 1) * sizeof *start);
    for (int64_t i = 0; i < total; i++) start[slot_of(c, i) + 1]++; /* start[0] counts the -1 */
    start[0] = 0;
    for (int64_t s = 0; s < l->slots; s++) {
        int32_t count = start[s + 1];
        for (int64_t done = 0; done < count; done += ROWS)
            r->parts[r->num_parts++] = (struct rows){s, start[s] + done, least(ROWS, count - done)};
        start[s + 1] += start[s];
    }
    for (int64_t i = 0; i < total; i++) { /* in order of position within each slot */
        int64_t slot = slot_of(c, i);
        r->row_of[i] = slot < 0 ? -1 : start[slot]++;
        if (slot >= 0)
            r->position[r->row_of[i]] = (int32_t)i;
        else if (!c->topk_weights)
            memset(r->y + i * hidden, 0, hidden * sizeof(float));
    }
    r->rows = rows;

#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        work(r, omp_get_thread_num(), omp_get_num_threads());
        return 0;
    }
#endif
    work(r, 0, 1);
    return 0;
}

/* ---- a dense layer: out = x * W^T + bias for few rows ---- */

static void linear_work(struct run *r, const struct matrix *w, char *out, int64_t thread) {
    int64_t size = w->kind == F32 ? 4 : 2, tiles = (w->n + DOWN_TILE - 1) / DOWN_TILE;
    float *c = r->private + thread * PRIVATE_FLOATS;
    FOR_EACH_TASK(0, tiles) {
        int64_t n0 = task * DOWN_TILE, n = least(DOWN_TILE, w->n - n0);
        product(r, w, r->parts, r->x, n0, n, c, DOWN_TILE, c + 2 * C_FLOATS);
        for (int64_t m = 0; m < r->rows; m++) {
            const float *row = c + m * DOWN_TILE, one = 1.0f;
            r->k->combine((int)w->kind, &row, &one, 1, n, out + (m * w->n + n0) * size);
        }
    }
}

/* x: `rows` <= ROWS rows of the kind of w, x_row bytes from one to the next; out: [rows, w->n], contiguous. */
static int64_t linear(const struct matrix *w, const char *x, int64_t x_row, int64_t rows, char *out, int64_t threads,
                      const struct kernels *kernels) {
    struct rows part = {.count = rows};
    struct run run = {.k = kernels, .rows = rows, .num_parts = 1, .parts = &part}, *r = &run;
    r->k16 = (w->k + LANES - 1) / LANES * LANES;
#ifdef _OPENMP
    if (rows * w->n * w->k < SERIAL_MACS) threads = 1;
#else
    threads = 1;
#endif
    uintptr_t at = (uintptr_t)scratch_of_size((rows * r->k16 + threads * PRIVATE_FLOATS + LANES) * sizeof(float));
    if (!at) return -1;
    r->x = take(&at, rows * r->k16 * sizeof(float));
    r->private = take(&at, threads * PRIVATE_FLOATS * sizeof(float));
    for (int64_t i = 0, stride; i < rows; i++) {
        float *to = packed_row(r, r->x, r->k16, &part, i, &stride);
        kernels->pack_x((int)w->kind, x + i * x_row, w->k, to, stride);
    }
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        linear_work(r, w, out, omp_get_thread_num());
        return 0;
    }
#endif
    linear_work(r, w, out, 0);
    return 0;
}

/* ---- what Python calls ---- */

#define EXPORT __attribute__((visibility("default")))

/* sizeof both structs, so that a library of another version is noticed. */
EXPORT int64_t moe_cpu_abi(void) { return (int64_t)(sizeof(struct layer) * 1000 + sizeof(struct call)); }

/* The name of the i-th instruction set this machine can run, best first; NULL beyond the last. */
EXPORT const char *moe_cpu_isa(int64_t i) {
    const struct kernels *const *sets = supported();
    for (int64_t n = 0; sets[n]; n++)
        if (n == i) return sets[n]->name;
    return NULL;
}

/* 0: done; -1: out of memory; otherwise 1 + the flat index of a slot id outside [-1, slots). */
EXPORT int64_t moe_cpu_experts(const struct layer *l, const struct call *whole, int64_t isa) {
    const struct kernels *k = supported()[isa];
    struct call c = *whole;
    int64_t hidden = l->down.n, out_row = c.topk_weights ? hidden * (c.x_kind == F32 ? 4 : 2) : c.top_k * hidden * 4;
    int64_t token_bytes = c.top_k * 4 * (l->up.k + l->down.k + (c.topk_weights ? hidden : 0));
    int64_t step = token_bytes < CHUNK_BYTES ? CHUNK_BYTES / token_bytes : 1;
    for (int64_t t = 0; t < whole->tokens; t += step) {
        int64_t done = t * c.top_k;
        c.tokens = least(step, whole->tokens - t);
        c.x = (const char *)whole->x + t * c.x_row;
        c.slot_ids = (const char *)whole->slot_ids + done * (c.ids_are_64 ? 8 : 4);
        if (c.topk_weights) c.topk_weights = (const char *)whole->topk_weights + done * (c.topk_kind == F32 ? 4 : 2);
        c.out = (char *)whole->out + t * out_row;
        int64_t status = run_chunk(l, &c, k);
        if (status) return status < 0 ? status : status + done;
    }
    return 0;
}

/* 0: done; -1: out of memory. w: slot 0 is the matrix; x and out are of its kind. */
EXPORT int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t rows, void *out,
                              int64_t threads, int64_t isa) {
    const struct kernels *k = supported()[isa];
    int64_t out_row = w->n * (w->kind == F32 ? 4 : 2), status = 0;
    for (int64_t m = 0; m < rows && !status; m += ROWS)
        status = linear(w, (const char *)x + m * x_row, x_row, least(ROWS, rows - m), (char *)out + m * out_row, threads,
                        k);
    return status;
}

/* The element functions alone, for tests: 0..4 = the activations, 5 = e^x, 6 and 7 = rounded to bf16 and fp16. */
EXPORT void moe_cpu_elementwise(int64_t what, const float *in, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float v = in[i];
        switch (what) {
        case SILU: out[i] = silu(v); break;
        case GELU: out[i] = gelu(v); break;
        case GELU_TANH: out[i] = gelu_tanh(v); break;
        case 5: out[i] = exponential(v); break;
        case 6: out[i] = bf16_to_float(float_to_bf16(v)); break;
        case 7: out[i] = half_to_float(float_to_half(v)); break;
        default: out[i] = v; break;
        }
    }
}
