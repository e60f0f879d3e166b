/* Dense layers on CPUs: out = x * W^T + bias, by the products that also compute experts (cpu_panel.h). */

#include "cpu_linear.h"
#include "cpu_team.h"

struct part { /* one of the matrices */
    const struct matrix *w;
    float *x; /* packed */
    char *out;
    int64_t first, vectors; /* of its tiles of columns; of a packed row, 0: x is that of the part before */
    int order;
};

struct run {
    const struct kernels *k;
    struct part parts[MOST_LINEAR];
    float *private; /* per thread: a tile of C and a packed piece of W */
    const char *x;
    int64_t x_row, x_kind, rows, num, tiles, next;
    int64_t packed; /* rows that are, or that a thread has taken */
};

enum { FLOATS = C_FLOATS + SCRATCH_FLOATS };
enum { SERIAL_PACKING = 1 << 14 }; /* elements of x below which a second thread costs more than it brings */

static void pack(struct run *r, int64_t row) {
    int64_t stride;
    for (struct part *p = r->parts; p < r->parts + r->num; p++) {
        if (!p->vectors) continue;
        float *to = packed_row(r->k, p->x, p->vectors, r->rows, row, &stride);
        r->k->pack_x(p->order, (int)r->x_kind, r->x + row * r->x_row, p->w->k, to, stride);
    }
}

static int64_t claim(struct run *r) { return __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED); }

static const struct part *part_of(const struct run *r, int64_t tile) {
    const struct part *p = r->parts + r->num - 1;
    while (tile < p->first) p--;
    return p;
}

static void work(void *run, const struct member *me) {
    struct run *r = run;
    int64_t size = size_of(r->x_kind);
    float *c = r->private + me->thread * FLOATS;
    for (int64_t row; (row = __atomic_fetch_add(&r->packed, 1, __ATOMIC_RELAXED)) < r->rows;) pack(r, row);
    moe_meet(me);
    for (int64_t tile = claim(r), next; tile < r->tiles; tile = next) {
        const struct part *p = part_of(r, tile);
        int64_t width = p->w->n, n0 = (tile - p->first) * DOWN_TILE, n = least(DOWN_TILE, width - n0);
        struct then then = {0};
        if ((next = claim(r)) < r->tiles) {
            const struct part *later = part_of(r, next);
            then = moe_then(later->w, 0, (next - later->first) * DOWN_TILE);
        }
        moe_product(r->k, p->order, p->w, 0, p->x, r->rows, n0, n, &then, c, DOWN_TILE, c + C_FLOATS);
        for (int64_t m = 0; m < r->rows; m++) {
            const float *row = c + m * DOWN_TILE, one = 1.0f;
            r->k->combine((int)r->x_kind, &row, &one, 1, n, p->out + (m * width + n0) * size);
        }
    }
}

/* `rows` <= ROWS rows of x from the first-th on. */
static int64_t linear(const struct linear *all, int64_t num, const char *x, int64_t x_row, int64_t x_kind, int64_t first,
                      int64_t rows, int64_t threads, const struct kernels *k) {
    struct run run = {.k = k, .x = x + first * x_row, .x_row = x_row, .x_kind = x_kind, .rows = rows, .num = num};
    int64_t columns = 0, floats = 0, width = all->w->k;
    for (int64_t i = 0; i < num; i++) {
        const struct matrix *w = all[i].w;
        struct part *p = run.parts + i;
        *p = (struct part){w, NULL, all[i].out + first * w->n * size_of(x_kind), run.tiles, 0, order_of(k, w, x_kind)};
        if (!i || p->order != p[-1].order) p->vectors = vectors_of(p->order, width);
        run.tiles += (w->n + DOWN_TILE - 1) / DOWN_TILE;
        columns += w->n;
        floats += (rows * p->vectors + 1) * LANES;
    }
    if (rows * columns * width < SERIAL_MACS) threads = 1;
    uintptr_t at = (uintptr_t)moe_scratch((floats + threads * FLOATS + LANES) * sizeof(float));
    if (!at) return -1;
    float *packed = NULL;
    for (struct part *p = run.parts; p < run.parts + num; p++) {
        if (p->vectors) packed = take(&at, rows * p->vectors * LANES * sizeof(float));
        p->x = packed;
    }
    run.private = take(&at, threads * FLOATS * sizeof(float));
    for (; rows * width < SERIAL_PACKING && run.packed < rows; run.packed++) pack(&run, run.packed);
    return moe_together(threads, work, &run);
}

int64_t moe_linears(const struct linear *all, int64_t num, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                    int64_t threads, int64_t isa) {
    int64_t status = 0;
    for (int64_t m = 0; m < rows && !status; m += ROWS)
        status = linear(all, num, x, x_row, x_kind, m, least(ROWS, rows - m), threads, moe_kernels(isa));
    return status;
}

/* 0: done; -1: out of memory or threads. w: slot 0 is the matrix; x and out are of kind x_kind. */
EXPORT int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                              void *out, int64_t threads, int64_t isa) {
    return moe_linears(&(struct linear){w, out}, 1, x, x_row, x_kind, rows, threads, isa);
}
