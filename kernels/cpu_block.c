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

#include "cpu_block.h"
#include "cpu_linear.h"
#include "cpu_scalars.h"
#include "cpu_team.h"

enum { CHUNK = 32, GROUP = 64 }; /* keys at a time, query rows at a time */
enum { SCORES = CHUNK + 16, PART = 64 };        /* a row of scores and what a product writes beyond it; of a head at once */
enum { FEW_ROWS = 8 };                          /* values of more query rows are widened once for all of them */
enum { SERIAL_ELEMENTS = 1 << 13 };             /* of norms and the like, for a thread at once: some 10 us */
enum { SERIAL_ATTENTION = 1 << 15 };            /* elements of keys below which a second thread costs more than it brings */

void moe_cpu_rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t n, int64_t kind, float eps,
                      int64_t once);

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

/* ---- attention: up to GROUP rows, each a query head of one token, of one sequence; of one key head, or of several ---- */

struct task {
    const struct block *b;
    const struct step *s;
    const char *q; /* [T, heads * dim] */
    char *out;     /* [T, heads * dim] */
};

struct part { /* of a task: rows row0 to row0 + num of each of the key heads head0 to head0 + heads */
    int64_t sequence, head0, heads, row0, num;
};

struct rows { /* of the first key head, then of the second … */
    int64_t from[GROUP], to[GROUP], at[GROUP]; /* the keys that a row sees; its place in q and out, in bytes */
    float most[GROUP], sum[GROUP], shrink[GROUP];
    float *score, *acc, *v; /* [GROUP, SCORES], [GROUP, padded], [CHUNK, padded] */
    int64_t num, padded;    /* padded: dim, up to a multiple of PART */
};

/* Bytes into the pool of the rows of a sequence's keys [key, key + num). */
SCALAR void places_of(const struct block *b, const struct step *s, int64_t sequence, int64_t key, int64_t num,
                      int64_t *to) {
    int64_t row = b->kv_heads * b->dim * size_of(b->kind);
    for (int64_t j = 0, run; j < num; j += run) { /* keys that lie side by side: the rest of a block */
        int64_t inside = (key + j) % s->block_size;
        int64_t block = s->blocks[sequence * s->max_blocks + (key + j) / s->block_size];
        run = least(s->block_size - inside, num - j);
        for (int64_t i = 0; i < run; i++) to[j + i] = (block * s->block_size + inside + i) * row;
    }
}

SCALAR float larger(float a, float b) { return a > b ? a : b; }

/* Where a key is in the chunk that begins at `key`, or the end of it that is nearer. */
SCALAR int32_t first_of(int64_t position, int64_t key) {
    return (int32_t)(position > key ? least(position - key, CHUNK) : 0);
}

/* Lanes of every row to lane 0, halves first; `sums`, or the largest. Rows side by side, so that none waits for another. */
SCALAR void fold(float (*lane)[CHUNK / 2], int64_t rows, int sums) {
    for (int64_t half = CHUNK / 4; half; half /= 2)
        for (int64_t n = 0; n < rows; n++)
            for (int64_t j = 0; j < half; j++)
                lane[n][j] = sums ? lane[n][j] + lane[n][j + half] : larger(lane[n][j], lane[n][j + half]);
}

/* Scores of the keys [key, key + CHUNK) to their shares of the sum so far, exact zeros for what a row may not see. */
static CLONES void soften(struct rows *r, int64_t key, float scale) {
    float lane[GROUP][CHUNK / 2], top[GROUP];
    for (int64_t n = 0; n < r->num; n++) {
        float *score = r->score + n * SCORES;
        int32_t low = first_of(r->from[n], key), high = first_of(r->to[n], key);
        for (int32_t j = 0; j < CHUNK; j++) score[j] = j >= low && j < high ? score[j] * scale : -1e30f;
        for (int32_t j = 0; j < CHUNK / 2; j++) lane[n][j] = larger(score[j], score[j + CHUNK / 2]);
    }
    fold(lane, r->num, 0);
    for (int64_t n = 0; n < r->num; n++) top[n] = larger(lane[n][0], r->most[n]);
    for (int64_t n = 0; n < r->num; n++) {
        float *score = r->score + n * SCORES;
        int32_t low = first_of(r->from[n], key), high = first_of(r->to[n], key);
        for (int32_t j = 0; j < CHUNK; j++) {
            float share = exponential(score[j] - top[n]);
            score[j] = j >= low && j < high ? share : 0.0f;
        }
        for (int32_t j = 0; j < CHUNK / 2; j++) lane[n][j] = score[j] + score[j + CHUNK / 2];
    }
    fold(lane, r->num, 1);
    for (int64_t n = 0; n < r->num; n++) r->shrink[n] = exponential(r->most[n] - top[n]);
    for (int64_t n = 0; n < r->num; n++) r->sum[n] = r->sum[n] * r->shrink[n] + lane[n][0], r->most[n] = top[n];
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

/* To L2: the heads are read one after the other, in pieces too short for the hardware to see that rows follow rows. */
SCALAR void prefetch_rows(const char *from, const int64_t *places, int64_t num, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        for (int64_t j = 0; j < num; j++) __builtin_prefetch(from + i + places[j], 0, 2);
}

/* 0: done; -1: out of memory or threads. */
static int attend_part(const struct task *t, const struct part *p) {
    const struct block *b = t->b;
    const struct step *s = t->s;
    const struct kernels *k = moe_kernels(s->isa);
    int64_t dim = b->dim, size = size_of(b->kind), shared = b->heads / b->kv_heads, stride, begin = INT64_MAX, end = 0;
    int64_t first = s->first[p->sequence], old = s->lengths[p->sequence] - (s->first[p->sequence + 1] - first);
    struct matrix keys = {.row = b->kv_heads * dim * size, .n = CHUNK, .k = dim, .kind = b->kind};
    int order = order_of(k, &keys, b->kind);
    int64_t vectors = vectors_of(order, dim), of_head = p->num * vectors * LANES;
    struct rows r = {.num = p->heads * p->num, .padded = (dim + PART - 1) / PART * PART};
    int64_t floats = GROUP * (vectors * LANES + SCORES + r.padded) + CHUNK * r.padded + DOWN_TILE * KC + 5 * LANES;
    uintptr_t at = (uintptr_t)moe_scratch(floats * sizeof(float));
    if (!at) return -1;
    float *x = take(&at, GROUP * vectors * LANES * sizeof(float));
    r.score = take(&at, GROUP * SCORES * sizeof(float)), r.acc = take(&at, GROUP * r.padded * sizeof(float));
    r.v = take(&at, CHUNK * r.padded * sizeof(float));
    float *scratch = take(&at, DOWN_TILE * KC * sizeof(float));
    memset(r.acc, 0, r.num * r.padded * sizeof(float)), memset(r.v, 0, CHUNK * r.padded * sizeof(float));
    for (int64_t n = 0; n < r.num; n++) {
        int64_t row = p->row0 + n % p->num, token = row / shared;
        int64_t head = (p->head0 + n / p->num) * shared + row % shared;
        r.to[n] = old + token + 1, r.from[n] = b->window && r.to[n] > b->window ? r.to[n] - b->window : 0;
        begin = least(begin, r.from[n]), end = r.to[n] > end ? r.to[n] : end;
        r.at[n] = ((first + token) * b->heads + head) * dim * size;
        r.most[n] = b->sinks ? b->sinks[head] : -1e30f, r.sum[n] = b->sinks ? 1.0f : 0.0f;
        float *to = packed_row(k, x + n / p->num * of_head, vectors, p->num, n % p->num, &stride);
        k->pack_x(order, (int)b->kind, t->q + r.at[n], dim, to, stride);
    }
    int64_t widens = p->num > FEW_ROWS || dim != r.padded, widened[CHUNK];
    for (int64_t j = 0; j < CHUNK; j++) widened[j] = j * r.padded * (int64_t)sizeof(float);
    int64_t here[CHUNK], next[CHUNK] = {0}, key = begin / CHUNK * CHUNK;
    places_of(b, s, p->sequence, key, least(CHUNK, end - key), next);
    for (int64_t num; key < end; key += CHUNK) {
        num = least(CHUNK, end - key);
        int64_t more = p->heads > 1 && end > key + CHUNK ? least(CHUNK, end - key - CHUNK) : 0;
        memcpy(here, next, sizeof here);
        if (end > key + CHUNK) places_of(b, s, p->sequence, key + CHUNK, least(CHUNK, end - key - CHUNK), next);
        for (int64_t h = 0; h < p->heads; h++) {
            const char *from = b->keys + (p->head0 + h) * dim * size;
            prefetch_rows(from, next, more, dim * size);
            for (int64_t j = 0, run; j < num; j += run) {
                run = least(s->block_size - (key + j) % s->block_size, num - j);
                float *score = r.score + h * p->num * SCORES + j;
                k->tile(order, x + h * of_head, p->num, &keys, from + here[j], 0, run, &NOTHING, score, SCORES,
                        scratch);
            }
        }
        soften(&r, key, b->scale);
        for (int64_t h = 0; h < p->heads; h++) {
            const char *from = b->values + (p->head0 + h) * dim * size;
            int64_t n = h * p->num;
            struct gather g = {p->num, num, r.padded, b->kind, r.shrink + n, r.score + n * SCORES,
                               SCORES, from, here, r.acc + n * r.padded};
            prefetch_rows(from, next, more, dim * size);
            if (widens) {
                for (int64_t j = 0; j < num; j++) widen_row(b->kind, from + here[j], dim, r.v + j * r.padded);
                g.kind = F32, g.v = (const char *)r.v, g.places = widened;
            }
            k->gather(&g);
        }
    }
    for (int64_t n = 0; n < r.num; n++) put_row(b->kind, r.acc + n * r.padded, r.sum[n], dim, t->out + r.at[n]);
    return 0;
}

/* How many key heads a task takes: one where a sequence's rows are many, else all that fit, but work for all threads. */
static int64_t heads_at_once(const struct block *b, const struct step *s, int64_t rows) {
    if (rows > GROUP) return 1;
    int64_t parts = (s->threads + s->sequences - 1) / s->sequences, most = (b->kv_heads + parts - 1) / parts;
    return least(most, GROUP / rows);
}

struct tasks {
    struct task task;
    int64_t bad;
};

static void attend_some(void *of_all, int64_t from, int64_t to) {
    struct tasks *all = of_all;
    const struct block *b = all->task.b;
    const struct step *s = all->task.s;
    int64_t shared = b->heads / b->kv_heads;
    for (int64_t n = from; n < to; n++) {
        int64_t left = n, i = 0, rows, heads, across;
        for (;; i++) { /* which sequence; few, or many of one token */
            rows = (s->first[i + 1] - s->first[i]) * shared, heads = heads_at_once(b, s, rows);
            across = (b->kv_heads + heads - 1) / heads;
            int64_t per = (rows + GROUP - 1) / GROUP * across;
            if (left < per) break;
            left -= per;
        }
        int64_t head0 = left % across * heads, row0 = left / across * GROUP;
        struct part part = {i, head0, least(heads, b->kv_heads - head0), row0, least(GROUP, rows - row0)};
        if (attend_part(&all->task, &part)) __atomic_store_n(&all->bad, -1, __ATOMIC_RELAXED);
    }
}

static int64_t attend_all(const struct task *t) {
    const struct block *b = t->b;
    const struct step *s = t->s;
    struct tasks all = {*t, 0};
    int64_t shared = b->heads / b->kv_heads, num = 0, elements = 0;
    for (int64_t i = 0; i < s->sequences; i++) {
        int64_t rows = (s->first[i + 1] - s->first[i]) * shared, heads = heads_at_once(b, s, rows);
        int64_t groups = (rows + GROUP - 1) / GROUP;
        num += groups * ((b->kv_heads + heads - 1) / heads);
        elements += groups * s->lengths[i] * b->kv_heads * b->dim;
    }
    return moe_for_each(elements < SERIAL_ATTENTION ? 1 : s->threads, num, 1, attend_some, &all) | all.bad;
}

/* ---- router ---- */

static CLONES void route(const struct block *b, const struct step *s, const char *logits, float *scores, int64_t from,
                         int64_t to) {
    int64_t experts = b->router.n;
    for (int64_t t = from; t < to; t++) {
        float *p = scores + t * experts, top = -1e30f, sum = 0.0f, chosen = 0.0f;
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
    int64_t a_token = hidden + widest(b) + b->heads * b->dim + 2 * b->router.n;
    return (tokens * a_token + 64) * 4;
}

static void norm_heads(const struct block *b, char *x, const void *weight, int64_t rows, int64_t heads) {
    if (!weight) return;
    int64_t width = b->norm_width == b->dim ? b->dim : heads * b->dim;
    moe_cpu_rms_norm(x, weight, x, rows * heads * b->dim / width, width, b->kind, b->head_eps, b->round_once);
}

struct pass { /* what the parts between products share; each is for the tokens [from, to) */
    const struct block *b;
    const struct step *s;
    char *normed, *q, *k, *v, *out, *logits;
    float *scores;
};

static void add_and_norm(const struct pass *p, const char *add, const void *norm, char *to, int64_t from, int64_t end) {
    int64_t hidden = p->s->hidden, at = from * hidden * size_of(p->b->kind);
    if (add) add_into(p->b->kind, p->s->h + at, add + at, (end - from) * hidden);
    moe_cpu_rms_norm(p->s->h + at, norm, to + at, end - from, hidden, p->b->kind, p->b->eps, p->b->round_once);
}

static void enter(void *of_pass, int64_t from, int64_t to) {
    const struct pass *p = of_pass;
    add_and_norm(p, p->s->add, p->b->norm, p->normed, from, to);
}

static void place(void *of_pass, int64_t from, int64_t to) {
    const struct pass *p = of_pass;
    const struct block *b = p->b;
    const struct step *s = p->s;
    int64_t size = size_of(b->kind), q_row = b->heads * b->dim * size, kv_row = b->kv_heads * b->dim * size;
    norm_heads(b, p->q + from * q_row, b->q_norm, to - from, b->heads);
    norm_heads(b, p->k + from * kv_row, b->k_norm, to - from, b->kv_heads);
    for (int64_t t = from, i = 0, at; t < to; t++) {
        const char *cosines = s->cos + t * b->rotary * size, *sines = s->sin + t * b->rotary * size;
        rotate_heads(b->kind, p->q + t * q_row, b->heads, b->dim, cosines, sines, b->rotary);
        rotate_heads(b->kind, p->k + t * kv_row, b->kv_heads, b->dim, cosines, sines, b->rotary);
        while (t >= s->first[i + 1]) i++;
        places_of(b, s, i, s->lengths[i] - (s->first[i + 1] - t), 1, &at);
        memcpy(b->keys + at, p->k + t * kv_row, kv_row);
        memcpy(b->values + at, p->v + t * kv_row, kv_row);
    }
}

static void leave(void *of_pass, int64_t from, int64_t to) {
    const struct pass *p = of_pass;
    add_and_norm(p, p->normed, p->b->next_norm, p->s->x, from, to);
}

static void choose(void *of_pass, int64_t from, int64_t to) {
    const struct pass *p = of_pass;
    route(p->b, p->s, p->logits, p->scores, from, to);
}

/* 0: done; -1: out of memory or threads. */
EXPORT int64_t moe_cpu_block(const struct block *b, const struct step *s) {
    int64_t tokens = s->tokens, size = size_of(b->kind), row = s->hidden * size, threads = s->threads;
    int64_t q_row = b->heads * b->dim * size, kv_row = b->kv_heads * b->dim * size, bad = 0;
    int64_t few = 1 + SERIAL_ELEMENTS / s->hidden;
    struct pass pass = {b, s, s->work, s->work + tokens * row, NULL, NULL, NULL, NULL, NULL}, *p = &pass;
    p->k = p->q + tokens * q_row, p->v = p->k + tokens * kv_row, p->out = p->v + tokens * kv_row;
    struct linear qkv[] = {{&b->q, p->q}, {&b->k, p->k}, {&b->v, p->v}}, o = {&b->o, p->normed};
    struct task task = {b, s, p->q, p->out};
    bad |= moe_for_each(threads, tokens, few, enter, p);
    bad |= moe_linears(qkv, 3, p->normed, row, b->kind, tokens, threads, s->isa);
    bad |= moe_for_each(threads, tokens, few, place, p);
    bad |= attend_all(&task);
    bad |= moe_linears(&o, 1, p->out, q_row, b->kind, tokens, threads, s->isa);
    bad |= moe_for_each(threads, tokens, few, leave, p);
    if (!b->top_k || bad) return bad;
    struct linear router = {&b->router, p->logits = p->q};
    p->scores = (float *)(((uintptr_t)(p->logits + tokens * b->router.n * size) + 63) / 64 * 64);
    bad |= moe_linears(&router, 1, s->x, row, b->kind, tokens, threads, s->isa);
    return bad ? bad : moe_for_each(threads, tokens, 1 + SERIAL_ELEMENTS / (b->router.n * b->top_k), choose, p);
}
