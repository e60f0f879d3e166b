/* What stands before the experts of one layer on CPUs, in one call, for prompts and for decoding alike:
 *
 *   h += add ─▶ norm ─▶ q, k, v ─▶ norms of heads ─▶ rotary positions ─▶ k, v into the paged cache
 *     ─▶ attention ─▶ output ─▶ h += ─▶ norm ─▶ x ─▶ router: softmax, top-k
 *
 * kernels/cpu_block.py fills the structs and is the reference for every rounding: results of each arrow are rounded to the
 * kind of h, as transformers' modules do; sums, softmax and attention are fp32. A token's bits depend on its own sequence
 * alone, not on what else is in the step nor on how a prompt was cut: keys are taken in chunks that begin at multiples of
 * CHUNK positions, and what a query may not see adds an exact zero.
 */

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_scalars.h"

enum { CHUNK = 32, GROUP = 32, MAX_DIM = 256 }; /* keys at a time, query rows at a time, elements of a head */
enum { SCORES = CHUNK + 16, PART = 64 };        /* a row of scores and what a product writes beyond it; of a head at once */
enum { SERIAL_ATTENTION = 1 << 15 };            /* elements of keys below which a second thread costs more than it brings */

int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t x_kind, int64_t rows, void *out,
                       int64_t threads, int64_t isa);
void moe_cpu_rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t n, int64_t kind, float eps);

struct block { /* one layer */
    struct matrix q, k, v, o, router;
    const void *norm, *next_norm, *q_norm, *k_norm; /* weights; q_norm, k_norm: NULL where heads have no norm */
    char *keys, *values;                            /* the pool: [rows, kv_heads, dim] of the kind of h */
    const float *sinks;                             /* [heads], NULL: none */
    int64_t heads, kv_heads, dim, rotary;           /* rotary: the first elements of a head that turn with positions */
    int64_t norm_width;                             /* of q_norm: dim, or heads * dim */
    int64_t window, kind;                           /* window: keys that a query sees, itself included; 0: all */
    int64_t top_k, normalize, round_weights;        /* top_k 0: no router */
    float eps, head_eps, scale;
};

struct step { /* all layers of one step: T tokens of S sequences, a sequence's tokens side by side */
    char *h, *x;            /* [T, H]: the residual stream, in and out; what goes to the experts */
    const char *add;        /* [T, H]: what the layer before still has to add; NULL: nothing */
    const char *cos, *sin;  /* [T, rotary] */
    const int64_t *first;   /* [S + 1] each sequence's first token; T at the end */
    const int64_t *lengths; /* [S] keys of each sequence, the new ones included */
    const int32_t *blocks;  /* [S, max_blocks]: where a sequence's keys are in the pool, in blocks */
    int64_t *ids;           /* [T, top_k] */
    char *weights;          /* [T, top_k] fp32, or of the kind of h */
    char *work;             /* moe_cpu_block_work bytes */
    int64_t tokens, sequences, max_blocks, block_size, hidden, threads, isa;
};

SCALAR void put_one(int64_t kind, void *p, int64_t i, float f) {
    if (kind == F32)
        ((float *)p)[i] = f;
    else
        ((uint16_t *)p)[i] = float_to_bf16(f);
}

SCALAR float rounded(int64_t kind, float f) { return kind == F32 ? f : bf16_to_float(float_to_bf16(f)); }

/* ---- elements ---- */

SCALAR void add_rows(int kind, void *to, const void *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) put_one(kind, to, i, widen_one(kind, to, i) + widen_one(kind, from, i));
}

static CLONES void add_into(int64_t kind, void *to, const void *from, int64_t n) {
    if (kind == F32)
        add_rows(F32, to, from, n);
    else
        add_rows(BF16, to, from, n);
}

/* One head: x cos + rotate_half(x) sin, each product rounded, then the sum. */
SCALAR void rotate(int64_t kind, void *x, const void *cosines, const void *sines, int64_t rotary) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = widen_one(kind, x, i), b = widen_one(kind, x, i + half);
        float c0 = widen_one(kind, cosines, i), c1 = widen_one(kind, cosines, i + half);
        float s0 = widen_one(kind, sines, i), s1 = widen_one(kind, sines, i + half);
        put_one(kind, x, i, rounded(kind, a * c0) + rounded(kind, -b * s0));
        put_one(kind, x, i + half, rounded(kind, b * c1) + rounded(kind, a * s1));
    }
}

static CLONES void rotate_heads(int64_t kind, char *x, int64_t heads, int64_t dim, const void *cosines,
                                const void *sines, int64_t rotary) {
    for (int64_t n = 0; n < heads; n++, x += dim * size_of(kind)) {
        if (kind == F32)
            rotate(F32, x, cosines, sines, rotary);
        else
            rotate(BF16, x, cosines, sines, rotary);
    }
}

/* ---- attention: up to GROUP rows, each a query head of one token, that share a key head of one sequence ---- */

struct task {
    const struct block *b;
    const struct step *s;
    const char *q; /* [T, heads * dim] */
    char *out;     /* [T, heads * dim] */
};

struct rows {
    int64_t from[GROUP], to[GROUP], at[GROUP]; /* the keys that a row sees; its place in q and out, in bytes */
    float most[GROUP], sum[GROUP], shrink[GROUP];
    float *score, *acc, *v; /* [GROUP, SCORES], [GROUP, padded], [CHUNK, padded] */
    int64_t num, padded;    /* padded: dim, up to a multiple of PART */
};

/* Row of the pool, in elements, of a sequence's key at this position. */
SCALAR int64_t place_of(const struct block *b, const struct step *s, int64_t sequence, int64_t position) {
    int64_t block = s->blocks[sequence * s->max_blocks + position / s->block_size];
    return (block * s->block_size + position % s->block_size) * b->kv_heads * b->dim;
}

/* Scores of the keys [key, key + CHUNK) to their shares of the sum so far, exact zeros for what a row may not see. */
static CLONES void soften(struct rows *r, int64_t key, float scale) {
    for (int64_t n = 0; n < r->num; n++) {
        float *score = r->score + n * SCORES, top = r->most[n], part = 0.0f;
        int32_t low = (int32_t)(r->from[n] > key ? least(r->from[n] - key, CHUNK) : 0);
        int32_t high = (int32_t)(r->to[n] > key ? least(r->to[n] - key, CHUNK) : 0);
        for (int32_t j = 0; j < CHUNK; j++) score[j] = j >= low && j < high ? score[j] * scale : -1e30f;
        for (int32_t j = 0; j < CHUNK; j++) top = score[j] > top ? score[j] : top;
        for (int32_t j = 0; j < CHUNK; j++) {
            float share = exponential(score[j] - top);
            score[j] = j >= low && j < high ? share : 0.0f;
        }
        for (int32_t j = 0; j < CHUNK; j++) part += score[j];
        r->shrink[n] = exponential(r->most[n] - top);
        r->sum[n] = r->sum[n] * r->shrink[n] + part, r->most[n] = top;
    }
}

/* acc = acc * shrink + shares * v, key after key. */
static CLONES void gather(struct rows *r, int64_t keys) {
    for (int64_t n = 0; n < r->num; n++)
        for (int64_t i = 0; i < r->padded; i += PART) {
            float part[PART], *acc = r->acc + n * r->padded + i;
            for (int64_t l = 0; l < PART; l++) part[l] = acc[l] * r->shrink[n];
            for (int64_t j = 0; j < keys; j++) {
                float share = r->score[n * SCORES + j];
                const float *v = r->v + j * r->padded + i;
                for (int64_t l = 0; l < PART; l++) part[l] += share * v[l];
            }
            for (int64_t l = 0; l < PART; l++) acc[l] = part[l];
        }
}

static CLONES void widen_row(int64_t kind, const char *from, int64_t n, float *to) {
    if (kind == F32)
        for (int64_t i = 0; i < n; i++) to[i] = widen_one(F32, from, i);
    else
        for (int64_t i = 0; i < n; i++) to[i] = widen_one(BF16, from, i);
}

static CLONES void put_row(int64_t kind, const float *acc, float sum, int64_t n, char *to) {
    if (kind == F32)
        for (int64_t i = 0; i < n; i++) put_one(F32, to, i, acc[i] / sum);
    else
        for (int64_t i = 0; i < n; i++) put_one(BF16, to, i, acc[i] / sum);
}

/* Rows row0 and on of one key head of one sequence, token after token. 0: done; -1: out of memory. */
static int attend_rows(const struct task *t, int64_t sequence, int64_t kv_head, int64_t row0) {
    const struct block *b = t->b;
    const struct step *s = t->s;
    const struct kernels *k = moe_kernels(s->isa);
    int64_t dim = b->dim, size = size_of(b->kind), shared = b->heads / b->kv_heads, stride, begin = INT64_MAX, end = 0;
    int64_t new = s->first[sequence + 1] - s->first[sequence], old = s->lengths[sequence] - new;
    struct matrix keys = {.row = b->kv_heads * dim * size, .n = CHUNK, .k = dim, .kind = b->kind};
    int order = order_of(k, &keys, b->kind);
    int64_t vectors = vectors_of(order, dim);
    struct rows r = {.num = least(GROUP, new * shared - row0), .padded = (dim + PART - 1) / PART * PART};
    int64_t floats = GROUP * (vectors * LANES + SCORES + r.padded) + CHUNK * r.padded + DOWN_TILE * KC + 5 * LANES;
    uintptr_t at = (uintptr_t)moe_scratch(floats * sizeof(float));
    if (!at) return -1;
    float *x = take(&at, GROUP * vectors * LANES * sizeof(float));
    r.score = take(&at, GROUP * SCORES * sizeof(float)), r.acc = take(&at, GROUP * r.padded * sizeof(float));
    r.v = take(&at, CHUNK * r.padded * sizeof(float));
    float *scratch = take(&at, DOWN_TILE * KC * sizeof(float));
    memset(r.acc, 0, GROUP * r.padded * sizeof(float)), memset(r.v, 0, CHUNK * r.padded * sizeof(float));
    for (int64_t n = 0; n < r.num; n++) {
        int64_t token = (row0 + n) / shared, head = kv_head * shared + (row0 + n) % shared;
        r.to[n] = old + token + 1, r.from[n] = b->window && r.to[n] > b->window ? r.to[n] - b->window : 0;
        begin = least(begin, r.from[n]), end = r.to[n] > end ? r.to[n] : end;
        r.at[n] = ((s->first[sequence] + token) * b->heads + head) * dim * size;
        r.most[n] = b->sinks ? b->sinks[head] : -1e30f, r.sum[n] = b->sinks ? 1.0f : 0.0f;
        float *to = packed_row(k, x, vectors, r.num, n, &stride);
        k->pack_x(order, (int)b->kind, t->q + r.at[n], dim, to, stride);
    }
    for (int64_t key = begin / CHUNK * CHUNK; key < end; key += CHUNK) {
        int64_t num = least(CHUNK, end - key), run;
        for (int64_t j = 0; j < num; j += run) { /* keys that lie side by side: the rest of a block */
            run = least(s->block_size - (key + j) % s->block_size, num - j);
            const char *from = b->keys + (place_of(b, s, sequence, key + j) + kv_head * dim) * size;
            k->tile(order, x, r.num, &keys, from, 0, run, r.score + j, SCORES, scratch);
        }
        soften(&r, key, b->scale);
        for (int64_t j = 0; j < num; j++) {
            const char *from = b->values + (place_of(b, s, sequence, key + j) + kv_head * dim) * size;
            widen_row(b->kind, from, dim, r.v + j * r.padded);
        }
        gather(&r, num);
    }
    for (int64_t n = 0; n < r.num; n++) put_row(b->kind, r.acc + n * r.padded, r.sum[n], dim, t->out + r.at[n]);
    return 0;
}

static int attend_all(const struct task *t) {
    const struct block *b = t->b;
    const struct step *s = t->s;
    int64_t shared = b->heads / b->kv_heads, num_tasks = 0, elements = 0;
    int bad = 0;
    for (int64_t i = 0; i < s->sequences; i++) {
        int64_t groups = ((s->first[i + 1] - s->first[i]) * shared + GROUP - 1) / GROUP;
        num_tasks += groups * b->kv_heads, elements += groups * s->lengths[i] * b->kv_heads * b->dim;
    }
    int threads = elements < SERIAL_ATTENTION ? 1 : (int)least(s->threads, num_tasks);
    (void)threads;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : bad)
#endif
    for (int64_t n = 0; n < num_tasks; n++) {
        int64_t left = n, i = 0, per;
        for (;; i++) { /* which sequence; few, or many of one token */
            per = ((s->first[i + 1] - s->first[i]) * shared + GROUP - 1) / GROUP * b->kv_heads;
            if (left < per) break;
            left -= per;
        }
        bad |= attend_rows(t, i, left % b->kv_heads, left / b->kv_heads * GROUP);
    }
    return bad;
}

/* ---- router ---- */

static CLONES void route(const struct block *b, const struct step *s, const char *logits, float *p) {
    int64_t experts = b->router.n;
    for (int64_t t = 0; t < s->tokens; t++) {
        float top = -1e30f, sum = 0.0f, chosen = 0.0f;
        for (int64_t e = 0; e < experts; e++) {
            p[e] = widen_one(b->kind, logits, t * experts + e);
            top = p[e] > top ? p[e] : top;
        }
        for (int64_t e = 0; e < experts; e++) p[e] = exponential(p[e] - top);
        for (int64_t e = 0; e < experts; e++) sum += p[e];
        int64_t *ids = s->ids + t * b->top_k;
        float kept[64];
        for (int64_t k = 0; k < b->top_k; k++) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts; e++)
                if (p[e] > p[best]) best = e;
            ids[k] = best, kept[k] = p[best] / sum, p[best] = -1.0f;
            chosen += kept[k];
        }
        for (int64_t k = 0; k < b->top_k; k++)
            put_one(b->round_weights ? b->kind : F32, s->weights, t * b->top_k + k,
                    b->normalize ? kept[k] / chosen : kept[k]);
    }
}

/* ---- the whole ---- */

static int64_t widest(const struct block *b) { return (b->heads + 2 * b->kv_heads) * b->dim; }

/* sizeof both structs, so that a library of another version is noticed. */
EXPORT int64_t moe_cpu_block_abi(void) { return (int64_t)(sizeof(struct block) * 1000 + sizeof(struct step)); }

/* Bytes of scratch memory for a step of so many tokens. */
EXPORT int64_t moe_cpu_block_work(const struct block *b, int64_t tokens, int64_t hidden) {
    int64_t a_token = hidden + widest(b) + b->heads * b->dim + b->router.n;
    return (tokens * a_token + b->router.n + 64) * 4;
}

static void norm_heads(const struct block *b, char *x, const void *weight, int64_t rows, int64_t heads) {
    if (!weight) return;
    int64_t width = b->norm_width == b->dim ? b->dim : heads * b->dim;
    moe_cpu_rms_norm(x, weight, x, rows * heads * b->dim / width, width, b->kind, b->head_eps);
}

/* 0: done; -1: out of memory. */
EXPORT int64_t moe_cpu_block(const struct block *b, const struct step *s) {
    int64_t tokens = s->tokens, size = size_of(b->kind), hidden = s->hidden, row = hidden * size;
    int64_t q_width = b->heads * b->dim, kv_width = b->kv_heads * b->dim, bad = 0;
    char *normed = s->work, *q = normed + tokens * row, *k = q + tokens * q_width * size;
    char *v = k + tokens * kv_width * size, *out = v + tokens * kv_width * size;
    if (s->add) add_into(b->kind, s->h, s->add, tokens * hidden);
    moe_cpu_rms_norm(s->h, b->norm, normed, tokens, hidden, b->kind, b->eps);
    bad |= moe_cpu_linear(&b->q, normed, row, b->kind, tokens, q, s->threads, s->isa);
    bad |= moe_cpu_linear(&b->k, normed, row, b->kind, tokens, k, s->threads, s->isa);
    bad |= moe_cpu_linear(&b->v, normed, row, b->kind, tokens, v, s->threads, s->isa);
    norm_heads(b, q, b->q_norm, tokens, b->heads);
    norm_heads(b, k, b->k_norm, tokens, b->kv_heads);
    for (int64_t i = 0; i < s->sequences; i++)
        for (int64_t t = s->first[i]; t < s->first[i + 1]; t++) {
            const char *cosines = s->cos + t * b->rotary * size, *sines = s->sin + t * b->rotary * size;
            rotate_heads(b->kind, q + t * q_width * size, b->heads, b->dim, cosines, sines, b->rotary);
            rotate_heads(b->kind, k + t * kv_width * size, b->kv_heads, b->dim, cosines, sines, b->rotary);
            int64_t at = place_of(b, s, i, s->lengths[i] - (s->first[i + 1] - t)) * size;
            memcpy(b->keys + at, k + t * kv_width * size, kv_width * size);
            memcpy(b->values + at, v + t * kv_width * size, kv_width * size);
        }
    struct task task = {b, s, q, out};
    bad |= attend_all(&task);
    bad |= moe_cpu_linear(&b->o, out, q_width * size, b->kind, tokens, normed, s->threads, s->isa);
    add_into(b->kind, s->h, normed, tokens * hidden);
    moe_cpu_rms_norm(s->h, b->next_norm, s->x, tokens, hidden, b->kind, b->eps);
    if (b->top_k && !bad) {
        char *logits = q;
        float *p = (float *)(((uintptr_t)(logits + tokens * b->router.n * size) + 63) / 64 * 64);
        bad |= moe_cpu_linear(&b->router, s->x, row, b->kind, tokens, logits, s->threads, s->isa);
        if (!bad) route(b, s, logits, p);
    }
    return bad;
}
