/* What the files of the CPU kernels share: storage kinds, the structs that Python fills, one table of functions per
 * instruction set, scratch memory.
 *
 * Every sum over K has one order, whatever the rows beside it, the path and the vector width. A vector of 64 bytes of
 * storage has 16 lanes; each lane sums its elements in turn; after every KC elements lanes i and i+8, i+4, i+2, i+1 are
 * added, and that is added to the result. Which elements a lane has is the `order`, which x is packed in:
 *
 *   NATURAL  lane l: k = l mod 16                                 fp32, fp16, nested precision, codes of a byte in odd groups
 *   HALVES   lane l: of every 32, l + 16, then l                  other codes of a byte; x is packed as for NATURAL
 *   PAIRS    lane l: of every 32, 2l + 1, then 2l                 bf16 and bf12 weights: what vdpbf16ps does, and as fast without it
 *   EIGHTS   lane l: of every 128, 8l + 4, 8l, 8l + 5, 8l + 1, … nibbles (cpu_codes.h)
 *   DOT      the sums of PAIRS, by vdpbf16ps; x stays in bf16     bf16 weights and x, where that instruction is fast
 *   DOT8     the sums of EIGHTS, likewise                         nibbles that are exact in bf16, less zero points
 *   DOT16    the sums of HALVES, likewise                         codes of a byte
 *
 * So a result depends on its own row of x alone, and is the same on every machine with fused multiply-add (numbers below
 * 2^-126 apart, which vdpbf16ps takes for zero).
 */

#ifndef MOE_CPU_EXPERTS_H
#define MOE_CPU_EXPERTS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32, BF16, F16 };                              /* storage; the order of cpu.py's KINDS */
enum { SILU, GELU, GELU_TANH, RELU, RELU2, GPT_OSS }; /* the order of cpu.py's _ACTIVATIONS */
enum { E4M3, INT8, INT4, E2M1, LUT4, NESTED, BF12, CODES }; /* the order of cpu.py's _CODES */
enum { E8M0 = 3, E4M3_SCALE, INT8_ZERO, WORDS };      /* scales may also be of these kinds */
enum { NATURAL, HALVES, PAIRS, EIGHTS, DOT, DOT8, DOT16 };
#define EIGHTH(i) ((i) % 2 ? (i) / 2 : 4 + (i) / 2) /* of a lane's eight elements, the i-th that EIGHTS sums */
enum { LANES = 16, KC = 1024 }; /* they define the order of sums; do not tune per machine */
enum { AHEAD = 8192 };          /* bytes to prefetch ahead, at least (measured) */
enum { ROWS = 240, UP_TILE = 32, DOWN_TILE = 64 };
enum { C_FLOATS = ROWS * DOWN_TILE, CODE_FLOATS = 1 << 16 };
enum { SCRATCH_FLOATS = DOWN_TILE * KC + CODE_FLOATS, PRIVATE_FLOATS = 2 * C_FLOATS + SCRATCH_FLOATS }; /* of a thread */
enum { SERIAL_MACS = 400000 }; /* below, waking a second thread costs more than it brings */

struct coding { /* kernels/formats.py's Coding of one matrix: slot 0, then bytes from slot to slot; NULL where absent */
    const char *scale, *zero, *factor, *table, *group_of; /* table of BF12: table_slot bytes for all slots */
    int64_t scale_slot, zero_slot, factor_slot, table_slot, group_slot;
    int64_t code, scale_kind, rows, columns, groups, row_blocks, parts, interleaved; /* row_blocks: of a part */
    const char *residual[7];  /* of NESTED: bits, then codes and scales of 3, of 4 and of 8 bits */
    int64_t residual_slot[7];
};

struct matrix { /* of one slot; strides in bytes */
    const char *data, *bias;
    int64_t slot, row, bias_slot, n, k, kind, bias_kind, is_coded; /* kind: of storage that is not coded */
    struct coding coding;
};

struct layer {
    struct matrix up, down;
    int64_t slots, gated, interleaved, act;
    float alpha, limit;
};

struct call {
    const void *x;
    int64_t x_row, x_kind; /* bytes from row to row */
    const void *slot_ids;  /* [T, K], contiguous; NO_EXPERT: 0, LEFT: y has it */
    int64_t ids_are_64;
    const void *topk_weights; /* [T, K], contiguous; NULL: out is y */
    int64_t topk_kind;
    int64_t tokens, top_k;
    void *out; /* y: fp32 [T, K, H]; otherwise [T, H] of the kind of x; contiguous */
    float *y;  /* fp32 [T, K, H], what LEFT pairs have, written to: out itself without weights; NULL if there are none */
    int64_t threads;
};

struct ahead { /* what is prefetched: n-th of the rows at once, s-th step: at + n * row + s * step; NULL: nothing */
    const char *at;
    int64_t row, step, past_l2; /* past_l2: to L1 alone */
};

struct then { /* what a thread reads after a tile: where that begins; NULL: nothing, or it is not known */
    const char *codes, *scale, *zero;
};
static const struct then NOTHING;

struct walk { /* one pass over W; strides in bytes */
    int64_t row, step, group, groups, steps, ldc, first;
    struct ahead ahead;
};

/* acc[m] = acc[m] * shrink[m] + sum over j < keys of share[m][j] * v[j], key after key. */
struct gather {
    int64_t rows, keys, width, kind; /* width: a multiple of 64; kind: of v, F32 or BF16 */
    const float *shrink, *share;     /* [rows], [rows, ld] */
    int64_t ld;
    const char *v;         /* v[j]: `width` elements at v + places[j] */
    const int64_t *places; /* in bytes */
    float *acc;            /* [rows, width] */
};

struct kernels {
    const char *name;
    int64_t mr;      /* rows of x in a block; packed x: blocks of [vectors][rows][16 floats] */
    int64_t has_dot; /* can run DOT, DOT8 and DOT16 */
    void (*pack_x)(int order, int kind, const char *from, int64_t n, float *to, int64_t stride);
    void (*tile)(int order, const float *x, int64_t rows, const struct matrix *w, const char *base, int64_t n0,
                 int64_t count, const struct then *then, float *c, int64_t ldc, float *scratch);
    void (*tile_codes)(int order, const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0, int64_t count,
                       const struct then *then, float *c, int64_t ldc, float *scratch);
    void (*tile_nested)(const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0, int64_t count, float *c,
                        int64_t ldc, float *scratch);
    void (*tile_bf12)(int order, const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0, int64_t count,
                      const struct then *then, float *c, int64_t ldc, float *scratch);
    int64_t (*shorten)(const char *from, int64_t n, int64_t k, int64_t parts, int64_t room, char *codes, char *words);
    void (*add_bias)(float *c, int64_t ldc, int64_t rows, const float *bias, int64_t n);
    void (*round)(int kind, float *v, int64_t n);
    void (*activate)(const struct layer *l, float *gate, const float *up, int64_t n);
    void (*combine)(int kind, const float *const *y, const float *weight, int64_t top_k, int64_t n, char *out);
    void (*gather)(const struct gather *g);
};

extern const struct kernels moe_avx512_dot_kernels, moe_avx512_kernels, moe_avx2_kernels, moe_plain_kernels;

/* The i-th set that this machine can run, best first; NULL beyond the last. */
const struct kernels *moe_kernels(int64_t i);
extern int moe_past_l2; /* once `moe_kernels` was called: whether weights are best prefetched to L1 alone */

/* One growing block per calling thread, given back when the thread ends; NULL without memory. */
char *moe_scratch(size_t size);

#define SCALAR static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default"))) /* called from Python */
#if defined(__x86_64__) && defined(__gnu_linux__) /* plain loops, compiled for each of these and chosen at run time */
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default"))) /* never of EXPORT: clang refuses both */
#else
#define CLONES
#endif

SCALAR int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* How far `num` rows at once prefetch: whole such groups, so that what follows a tile begins where it does. */
SCALAR int64_t bytes_ahead(int64_t row, int64_t num) { return (AHEAD + num * row - 1) / (num * row) * num * row; }

/* What `num` rows at `from` prefetch step after step: the same columns `bytes_ahead` later (the hardware loses
 * streams at pages); or, where weights go past L2, what lies there line after line, in the order that memory is fastest in. Beyond
 * the end of the tile that is what the thread reads then. */
SCALAR struct ahead ahead_of(const char *from, const char *end, int64_t row, int64_t num, int64_t step,
                             const struct then *then) {
    const char *at = from + bytes_ahead(row, num);
    if (at >= end && !then->codes) return (struct ahead){from, 0, 0, 1}; /* what is in L1: nothing */
    if (at >= end) at = then->codes + (at - end);
    if (!moe_past_l2) return (struct ahead){at, row, step, 0};
    return (struct ahead){at, step, num * step, 1};
}

/* The next `size` bytes, aligned to a cache line. */
SCALAR void *take(uintptr_t *at, int64_t size) {
    uintptr_t p = *at;
    *at += ((uintptr_t)size + 63) / 64 * 64;
    return (void *)p;
}

SCALAR int64_t size_of(int64_t kind) { return kind == F32 ? 4 : 2; }

SCALAR int is_nibble(const struct coding *q) { return q->code >= INT4 && q->code <= LUT4; }

/* Whether cpu_codes.h multiplies them (cpu_nested.h those of nested precision): the columns of a vector, or of its lanes, share their scales. */
SCALAR int codes_are_fast(const struct matrix *w) {
    int64_t columns = w->coding.columns;
    if (w->coding.group_of || w->coding.code == NESTED) return 0;
    if (columns >= w->k) return 1;
    if (!is_nibble(&w->coding)) return columns % LANES == 0;
    return columns % (8 * LANES) == 0 || columns == 16 || columns == 32 || columns == 64;
}

/* How x must be packed for w. */
SCALAR int order_of(const struct kernels *k, const struct matrix *w, int64_t x_kind) {
    int can_dot = k->has_dot && x_kind == BF16;
    if (w->is_coded && w->coding.code == BF12) return can_dot ? DOT : PAIRS;
    if (w->is_coded && !codes_are_fast(w)) return NATURAL;
    if (w->is_coded && is_nibble(&w->coding)) return can_dot && w->coding.code != LUT4 ? DOT8 : EIGHTS;
    if (w->is_coded && w->coding.columns < w->k && w->coding.columns % (2 * LANES)) return NATURAL;
    if (w->is_coded) return can_dot ? DOT16 : HALVES;
    if (w->kind != BF16) return NATURAL;
    return can_dot ? DOT : PAIRS;
}

/* Vectors of 64 bytes that n elements of x take when packed. */
SCALAR int64_t vectors_of(int order, int64_t n) {
    int64_t lane = order == NATURAL ? 1 : order == EIGHTS || order == DOT8 ? 8 : 2;
    int64_t steps = (n + LANES * lane - 1) / (LANES * lane);
    return order >= DOT ? lane / 2 * steps : lane * steps;
}

/* The place of row i of `count` rows in packed form; `*stride` floats from one vector to the next. */
SCALAR float *packed_row(const struct kernels *k, float *base, int64_t vectors, int64_t count, int64_t i,
                         int64_t *stride) {
    int64_t block = i / k->mr * k->mr;
    *stride = least(k->mr, count - block) * LANES;
    return base + (block * vectors + i - block) * LANES;
}

/* Like tile_codes, for codes that are not fast; x is NATURAL. */
void moe_decoded_tile(const struct kernels *k, const float *x, int64_t rows, const struct matrix *w, int64_t slot,
                      int64_t n0, int64_t count, float *c, int64_t ldc, float *scratch);

/* c[m][i] = x row m * row n0 + i of W in this slot, + bias. scratch: SCRATCH_FLOATS. then: changes the speed alone. */
void moe_product(const struct kernels *k, int order, const struct matrix *w, int64_t slot, const float *x, int64_t rows,
                 int64_t n0, int64_t n, const struct then *then, float *c, int64_t ldc, float *scratch);

/* Where rows n0 and on of W begin. */
struct then moe_then(const struct matrix *w, int64_t slot, int64_t n0);

#endif
