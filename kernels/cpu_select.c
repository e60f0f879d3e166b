/* Which instruction sets this machine can run, and scratch memory. */

#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu_place.h"

static const struct kernels *sets[5]; /* best first, NULL at the end */
static pthread_once_t sets_once = PTHREAD_ONCE_INIT;
/* To L2 where L1 has too few pending misses (Intel). Zen 5 has enough, and every line that L2 takes in is one that it
 * must throw out: past it bf16 is 1.1 to 1.2 x as fast from 1 to 64 rows, and what was in L2 stays. */
int moe_past_l2;

#if defined(__x86_64__)

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { PROBE_K = 1024, PROBE_ROWS = 12, PROBE_COLUMNS = 64 };

/* The least time of a product of bf16 that fits into L1 and L2; its result in c. */
static double time_of(const struct kernels *k, const uint16_t *x, const uint16_t *w, float *c, float *scratch) {
    struct matrix m = {.data = (const void *)w, .row = PROBE_K * 2, .n = PROBE_COLUMNS, .k = PROBE_K, .kind = BF16};
    int order = order_of(k, &m, BF16);
    int64_t vectors = vectors_of(order, PROBE_K);
    for (int64_t i = 0; i < PROBE_ROWS; i++)
        k->pack_x(order, BF16, (const void *)(x + i * PROBE_K), PROBE_K,
                  scratch + (i / k->mr * k->mr * vectors + i % k->mr) * LANES, k->mr * LANES);
    double best = 1e9;
    for (int turn = 0; turn < 8; turn++) {
        double start = seconds();
        k->tile(order, scratch, PROBE_ROWS, &m, m.data, 0, PROBE_COLUMNS, &NOTHING, c,
                PROBE_COLUMNS, scratch + PROBE_ROWS * vectors * LANES);
        double took = seconds() - start;
        best = took < best ? took : best;
    }
    return best;
}

/* vdpbf16ps is twice as fast as two fused multiply-adds on some processors (Zen 4), half as fast on others (Sapphire
 * Rapids). As their bits are equal, which is checked here too, the faster one may be chosen by the clock. */
static int dot_is_faster(void) {
    enum { X = PROBE_ROWS * PROBE_K, W = PROBE_COLUMNS * PROBE_K, C = PROBE_ROWS * PROBE_COLUMNS };
    float *memory = malloc((X + W) * 2 + (2 * C + 2 * X + PRIVATE_FLOATS) * sizeof(float));
    if (!memory) return 0;
    float *c = memory, *scratch = c + 2 * C;
    uint16_t *x = (uint16_t *)(scratch + 2 * X + PRIVATE_FLOATS);
    uint32_t random = 1;
    for (int64_t i = 0; i < X + W; i++) { /* normal numbers of both signs, 2^-16 to 2^16 */
        random = random * 1664525u + 1013904223u;
        x[i] = (uint16_t)((random >> 16 & 0x807fu) | (111u + (random >> 8) % 32u) << 7);
    }
    double fused = time_of(&moe_avx512_kernels, x, x + X, c, scratch);
    double dot = time_of(&moe_avx512_dot_kernels, x, x + X, c + C, scratch);
    int is_better = dot < fused && memcmp(c, c + C, C * sizeof(float)) == 0;
    free(memory);
    return is_better;
}

#endif

static void find_sets(void) {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    moe_past_l2 = __builtin_cpu_is("amd");
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    int dot = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    int is_faster = dot && dot_is_faster();
    if (dot && is_faster) sets[n++] = &moe_avx512_dot_kernels;
    if (avx512) sets[n++] = &moe_avx512_kernels;
    if (dot && !is_faster) sets[n++] = &moe_avx512_dot_kernels;
    if (avx2) sets[n++] = &moe_avx2_kernels;
#endif
    sets[n++] = &moe_plain_kernels;
}

const struct kernels *moe_kernels(int64_t i) {
    pthread_once(&sets_once, find_sets);
    return sets[i];
}

/* ---- scratch memory ---- */

struct block { size_t size; char *data; };
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_free(void *p) {
    free(((struct block *)p)->data);
    free(p);
}

static int is_poisoned;

static void scratch_create_key(void) { pthread_key_create(&scratch_key, scratch_free); }

char *moe_scratch(size_t size) {
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
    if (is_poisoned) memset(b->data, 0xff, size); /* not a number in every format */
    return b->data;
}

/* ---- a product ---- */

struct then moe_then(const struct matrix *w, int64_t slot, int64_t n0) {
    struct then t = {w->data + slot * w->slot + n0 * w->row, NULL, NULL};
    if (!w->is_coded || !w->coding.scale) return t;
    struct place at = place_of(w, slot, n0);
    t.scale = at.scale, t.zero = at.zero;
    return t;
}

void moe_product(const struct kernels *k, int order, const struct matrix *w, int64_t slot, const float *x, int64_t rows,
                 int64_t n0, int64_t n, const struct then *then, float *c, int64_t ldc, float *scratch) {
    if (!w->is_coded)
        k->tile(order, x, rows, w, w->data + slot * w->slot, n0, n, then, c, ldc, scratch);
    else if (w->coding.code == NESTED)
        k->tile_nested(x, rows, w, slot, n0, n, c, ldc, scratch);
    else if (w->coding.code == BF12)
        k->tile_bf12(order, x, rows, w, slot, n0, n, then, c, ldc, scratch);
    else if (codes_are_fast(w))
        k->tile_codes(order, x, rows, w, slot, n0, n, then, c, ldc, scratch);
    else
        moe_decoded_tile(k, x, rows, w, slot, n0, n, c, ldc, scratch);
    if (w->bias) {
        float bias[DOWN_TILE];
        const char *from = w->bias + slot * w->bias_slot + n0 * size_of(w->bias_kind);
        for (int64_t i = 0; i < n; i++) bias[i] = widen_one(w->bias_kind, from, i);
        k->add_bias(c, ldc, rows, bias, n);
    }
}

/* ---- what Python calls ---- */

/* The name of the i-th instruction set this machine can run, best first; NULL beyond the last. */
EXPORT const char *moe_cpu_isa(int64_t i) {
    const struct kernels *k = moe_kernels(i);
    return k ? k->name : NULL;
}

/* For tests: whether scratch memory is filled with what is no number before each use. */
EXPORT void moe_cpu_poison_scratch(int64_t on) { is_poisoned = on != 0; }

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
