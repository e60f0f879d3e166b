/* Experts of one MoE layer on CPUs: y[t, k] = expert(slot_ids[t, k])(x[t]), one call per layer.
 *
 * Plain C11 with GCC/Clang extensions, no Python API: kernels/cpu.py loads it with ctypes and describes every argument.
 * The rounding points are those of kernels/reference.py; the order of every sum is stated in cpu_experts.h.
 *
 * Rows are grouped by slot (counting sort), then three rounds of tasks with a barrier between them:
 *   pack   one row of x, in the order that W needs, into blocks of MR rows
 *   up     (expert, 240 rows, 32 of I): gate and up tiles, activation, h packed as x is
 *   down   (expert, 240 rows, 64 of H): y
 * and, when top-k weights are given, the weighted sum over k per token. No two tasks write the same element.
 */

#include "cpu_scalars.h"
#include "cpu_team.h"

enum { NO_EXPERT = -1, LEFT = -2 };
#define CHUNK_BYTES (64 << 20) /* scratch per call; more tokens are done in chunks */
struct rows { /* up to ROWS consecutive sorted rows of one slot */
    int64_t slot, first, count;
};

struct packing { /* of x for one matrix */
    int order;
    int64_t vectors; /* per row */
};

struct run {
    const struct layer *l;
    const struct call *c;
    const struct kernels *k;
    int64_t rows, num_parts, up_tiles, down_tiles;
    struct packing up, down;
    struct rows *parts;
    int32_t *position; /* [rows] token * K + k of each sorted row */
    int32_t *row_of;   /* [T * K] its inverse, or NO_EXPERT, or LEFT */
    float *x, *h, *y;  /* packed, packed, [T * K, H] */
    float *private;    /* per thread: two tiles of C and a packed piece of W */
    int64_t next[4];   /* the next task of each round */
};

static int64_t slot_of(const struct call *c, int64_t i) {
    return c->ids_are_64 ? ((const int64_t *)c->slot_ids)[i] : ((const int32_t *)c->slot_ids)[i];
}

static struct packing packing_of(const struct kernels *k, const struct matrix *w, int64_t x_kind) {
    int order = order_of(k, w, x_kind);
    return (struct packing){order, vectors_of(order, w->k)};
}

static float *rows_at(float *base, const struct packing *p, const struct rows *rows) {
    return base + rows->first * p->vectors * LANES;
}

static void pack_task(struct run *r, int64_t task) {
    const struct rows *p = r->parts + task;
    const struct call *c = r->c;
    int64_t stride;
    for (int64_t i = 0; i < p->count; i++) {
        const char *from = (const char *)c->x + r->position[p->first + i] / c->top_k * c->x_row;
        float *to = packed_row(r->k, rows_at(r->x, &r->up, p), r->up.vectors, p->count, i, &stride);
        r->k->pack_x(r->up.order, (int)c->x_kind, from, r->l->up.k, to, stride);
    }
}

static void up_product(struct run *r, const struct rows *p, int64_t n0, int64_t n, const struct then *then, float *c,
                       int64_t ldc, float *scratch) {
    const float *x = rows_at(r->x, &r->up, p);
    moe_product(r->k, r->up.order, &r->l->up, p->slot, x, p->count, n0, n, then, c, ldc, scratch);
}

static struct then down_begin(const struct run *r, int64_t task) {
    if (task >= r->num_parts * r->down_tiles) return (struct then){0};
    return moe_then(&r->l->down, r->parts[task / r->down_tiles].slot, task % r->down_tiles * DOWN_TILE);
}

/* Where this task begins to read; beyond the last, what is likely this thread's first one of the next round. */
static struct then up_begin(const struct run *r, int64_t task, int64_t thread) {
    if (task >= r->num_parts * r->up_tiles) return down_begin(r, thread);
    int64_t i0 = task % r->up_tiles * UP_TILE;
    return moe_then(&r->l->up, r->parts[task / r->up_tiles].slot, r->l->interleaved ? 2 * i0 : i0);
}

/* Columns [i0, i0 + n) of h, whose last step is filled up with zeros. */
static void pack_h(struct run *r, const struct rows *p, const float *h, int64_t i0, int64_t n) {
    for (int64_t m = 0, stride; m < p->count; m++, h += UP_TILE) {
        float *to = packed_row(r->k, rows_at(r->h, &r->down, p), r->down.vectors, p->count, m, &stride);
        if (r->down.order == EIGHTS || r->down.order == DOT8) {
            int64_t lane = i0 / 8 % LANES, lanes = i0 + n == r->l->down.k ? LANES - lane : UP_TILE / 8;
            to += vectors_of(r->down.order, i0 / (8 * LANES) * (8 * LANES)) * stride + lane;
            if (r->down.order == EIGHTS)
                for (int64_t i = 0; i < 8 * lanes; i++) {
                    int64_t from = i / 8 * 8 + EIGHTH(i % 8);
                    to[i % 8 * stride + i / 8] = from < n ? h[from] : 0.0f;
                }
            else /* rounded to bf16 already */
                for (int64_t i = 0; i < 4 * lanes; i++) {
                    int64_t from = i / 4 * 8 + i % 4;
                    uint32_t low = from < n ? as_bits(h[from]) >> 16 : 0;
                    uint32_t both = low | (from + 4 < n ? as_bits(h[from + 4]) & 0xffff0000u : 0);
                    memcpy(to + i % 4 * stride + i / 4, &both, sizeof both);
                }
            continue;
        }
        to += vectors_of(r->down.order, i0) * stride;
        uint16_t narrow[UP_TILE];
        int is_dot = r->down.order >= DOT;
        if (is_dot) /* rounded to bf16 already */
            for (int64_t i = 0; i < n; i++) narrow[i] = (uint16_t)(as_bits(h[i]) >> 16);
        r->k->pack_x(r->down.order, is_dot ? BF16 : F32, is_dot ? (const char *)narrow : (const char *)h, n, to, stride);
    }
}

static void up_task(struct run *r, int64_t task, const struct then *then, float *c) {
    const struct layer *l = r->l;
    const struct rows *p = r->parts + task / r->up_tiles;
    int64_t i0 = task % r->up_tiles * UP_TILE, n = least(UP_TILE, l->down.k - i0), size = p->count * UP_TILE;
    float *gate = c, *up = l->gated ? c + size : NULL, *both = c + C_FLOATS, *packed_w = both + C_FLOATS;
    int kind = (int)r->c->x_kind;

    if (n < UP_TILE) { /* nobody reads the columns beyond n, but the activation runs over them */
        memset(gate, 0, 2 * size * sizeof(float));
        memset(both, 0, 2 * size * sizeof(float));
    }
    if (l->interleaved) {
        up_product(r, p, 2 * i0, 2 * n, then, both, 2 * UP_TILE, packed_w);
        for (int64_t i = 0; i < size; i++) gate[i] = both[2 * i], up[i] = both[2 * i + 1];
    } else {
        struct then second = *then;
        if (up) second = moe_then(&l->up, p->slot, l->down.k + i0);
        up_product(r, p, i0, n, &second, gate, UP_TILE, packed_w);
        if (up) up_product(r, p, l->down.k + i0, n, then, up, UP_TILE, packed_w);
    }
    r->k->round(kind, gate, up ? 2 * size : size);
    r->k->activate(l, gate, up, size);
    r->k->round(kind, gate, size);
    pack_h(r, p, gate, i0, n);
}

static void down_task(struct run *r, int64_t task, const struct then *then, float *c) {
    const struct matrix *w = &r->l->down;
    const struct rows *p = r->parts + task / r->down_tiles;
    int64_t n0 = task % r->down_tiles * DOWN_TILE, n = least(DOWN_TILE, w->n - n0);
    moe_product(r->k, r->down.order, w, p->slot, rows_at(r->h, &r->down, p), p->count, n0, n, then, c,
                DOWN_TILE, c + 2 * C_FLOATS);
    for (int64_t m = 0; m < p->count; m++) {
        r->k->round((int)r->c->x_kind, c + m * DOWN_TILE, n);
        memcpy(r->y + r->position[p->first + m] * w->n + n0, c + m * DOWN_TILE, n * sizeof(float));
    }
}

static void combine_task(struct run *r, int64_t token, const float **y, float *weight) {
    const struct call *c = r->c;
    int64_t hidden = r->l->down.n;
    for (int64_t k = 0; k < c->top_k; k++) {
        int64_t i = token * c->top_k + k;
        y[k] = r->row_of[i] == NO_EXPERT ? NULL : r->y + i * hidden;
        weight[k] = widen_one(c->topk_kind, c->topk_weights, i);
    }
    r->k->combine((int)c->x_kind, y, weight, c->top_k, hidden,
                  (char *)c->out + token * hidden * size_of(c->x_kind));
}

static int64_t claim(struct run *r, int round) { return __atomic_fetch_add(&r->next[round], 1, __ATOMIC_RELAXED); }

/* A task ahead, so that what it begins to read is asked for while another ends. */
#define FOR_EACH_TASK(round, total) \
    for (int64_t task = claim(r, round), next; task < (total) && (next = claim(r, round), 1); task = next)

static void work(void *run, const struct member *me) {
    struct run *r = run;
    float *private = r->private + me->thread * PRIVATE_FLOATS;
    FOR_EACH_TASK(0, r->num_parts) pack_task(r, task);
    moe_meet(me);
    FOR_EACH_TASK(1, r->num_parts * r->up_tiles) {
        struct then then = up_begin(r, next, me->thread);
        up_task(r, task, &then, private);
    }
    moe_meet(me);
    FOR_EACH_TASK(2, r->num_parts * r->down_tiles) {
        struct then then = down_begin(r, next);
        down_task(r, task, &then, private);
    }
    if (!r->c->topk_weights) return;
    moe_meet(me);
    const float **y = (const float **)(void *)private;
    FOR_EACH_TASK(3, r->c->tokens) combine_task(r, task, y, (float *)(y + r->c->top_k));
}

static int64_t run_chunk(const struct layer *l, const struct call *c, const struct kernels *kernels) {
    int64_t total = c->tokens * c->top_k, hidden = l->down.n;
    struct run run = {.l = l, .c = c, .k = kernels}, *r = &run;
    r->up = packing_of(kernels, &l->up, c->x_kind), r->down = packing_of(kernels, &l->down, c->x_kind);
    r->up_tiles = (l->down.k + UP_TILE - 1) / UP_TILE;
    r->down_tiles = (hidden + DOWN_TILE - 1) / DOWN_TILE;

    int64_t rows = 0, macs, threads = c->threads;
    for (int64_t i = 0; i < total; i++) {
        int64_t slot = slot_of(c, i);
        if (slot < (c->y ? LEFT : NO_EXPERT) || slot >= l->slots) return 1 + i;
        rows += slot >= 0;
    }
    macs = rows * (l->up.n * l->up.k + hidden * l->down.k);
    if (macs < SERIAL_MACS) threads = 1;

    int32_t *start = NULL;
    for (uintptr_t base = 0, at = 0;; at = base) { /* the first round counts, the second one points */
        start = take(&at, (l->slots + 1) * sizeof *start);
        r->position = take(&at, rows * sizeof *r->position);
        r->row_of = take(&at, total * sizeof *r->row_of);
        r->parts = take(&at, (rows / ROWS + least(rows, l->slots)) * sizeof *r->parts);
        r->x = take(&at, rows * r->up.vectors * LANES * sizeof(float));
        r->h = take(&at, rows * r->down.vectors * LANES * sizeof(float));
        r->y = c->y ? c->y : !c->topk_weights ? c->out : take(&at, total * hidden * sizeof(float));
        r->private = take(&at, threads * PRIVATE_FLOATS * sizeof(float));
        if (base) break;
        if (!(base = (uintptr_t)moe_scratch(at))) return -1;
    }

    memset(start, 0, (l->slots + 1) * sizeof *start);
    for (int64_t i = 0, slot; i < total; i++)
        if ((slot = slot_of(c, i)) >= 0) start[slot + 1]++;
    for (int64_t s = 0; s < l->slots; s++) {
        int32_t count = start[s + 1];
        for (int64_t done = 0; done < count; done += ROWS)
            r->parts[r->num_parts++] = (struct rows){s, start[s] + done, least(ROWS, count - done)};
        start[s + 1] += start[s];
    }
    for (int64_t i = 0; i < total; i++) { /* in order of position within each slot */
        int64_t slot = slot_of(c, i);
        r->row_of[i] = slot < 0 ? (int32_t)slot : start[slot]++;
        if (slot >= 0)
            r->position[r->row_of[i]] = (int32_t)i;
        else if (slot == NO_EXPERT && !c->topk_weights)
            memset(r->y + i * hidden, 0, hidden * sizeof(float));
    }
    r->rows = rows;

    return moe_together(threads, work, r);
}

/* ---- what Python calls ---- */

/* sizeof both structs, so that a library of another version is noticed. */
EXPORT int64_t moe_cpu_abi(void) { return (int64_t)(sizeof(struct layer) * 1000 + sizeof(struct call)); }

/* 0: done; -1: out of memory or threads; otherwise 1 + the flat index of a slot id that does not exist. */
EXPORT int64_t moe_cpu_experts(const struct layer *l, const struct call *whole, int64_t isa) {
    const struct kernels *k = moe_kernels(isa);
    struct call c = *whole;
    int64_t hidden = l->down.n, out_row = c.topk_weights ? hidden * size_of(c.x_kind) : c.top_k * hidden * 4;
    int64_t token_bytes = c.top_k * 4 * (l->up.k + l->down.k + (c.topk_weights ? hidden : 0));
    int64_t step = token_bytes < CHUNK_BYTES ? CHUNK_BYTES / token_bytes : 1;
    for (int64_t t = 0; t < whole->tokens; t += step) {
        int64_t done = t * c.top_k;
        c.tokens = least(step, whole->tokens - t);
        c.x = (const char *)whole->x + t * c.x_row;
        c.slot_ids = (const char *)whole->slot_ids + done * (c.ids_are_64 ? 8 : 4);
        if (c.topk_weights) c.topk_weights = (const char *)whole->topk_weights + done * size_of(c.topk_kind);
        c.out = (char *)whole->out + t * out_row;
        if (c.y) c.y = whole->y + done * hidden;
        int64_t status = run_chunk(l, &c, k);
        if (status) return status < 0 ? status : status + done;
    }
    return 0;
}
