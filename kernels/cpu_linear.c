/* Dense layers on CPUs: out = x * W^T + bias, by the products that also compute experts (cpu_panel.h). */

#include "cpu_linear.h"
#include "cpu_team.h"

struct part { /* one of the matrices */
    const struct matrix *w;
    const float *x; /* packed */
    char *out;
    int64_t first; /* of its tiles of columns */
    int order;
};

struct run {
    const struct kernels *k;
    struct part parts[MOST_LINEAR];
    float *private; /* per thread: a tile of C and a packed piece of W */
    int64_t rows, x_kind, num, tiles, next;
};

enum { FLOATS = C_FLOATS + SCRATCH_FLOATS };

static void work(void *run, const struct member *me) {
    struct run *r = run;
    int64_t size = size_of(r->x_kind);
    float *c = r->private + me->thread * FLOATS;
    for (int64_t tile; (tile = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED)) < r->tiles;) {
        const struct part *p = r->parts + r->num - 1;
        while (tile < p->first) p--;
        int64_t width = p->w->n, n0 = (tile - p->first) * DOWN_TILE, n = least(DOWN_TILE, width - n0);
        moe_product(r->k, p->order, p->w, 0, p->x, r->rows, n0, n, c, DOWN_TILE, c + C_FLOATS);
        for (int64_t m = 0; m < r->rows; m++) {
            const float *row = c + m * DOWN_TILE, one = 1.0f;
            r->k->combine((int)r->x_kind, &row, &one, 1, n, p->out + (m * width + n0) * size);
        }
    }
}

/* `rows` <= ROWS rows of x from the first-th on. */
static int64_t linear(const struct linear *all, int64_t num, const char *x, int64_t x_row, int64_t x_kind, int64_t first,
                      int64_t rows, int64_t threads, const struct kernels *k) {
    struct run run = {.k = k, .rows = rows, .x_kind = x_kind, .num = num};
    int64_t macs = 0, floats = 0, stride;
    for (int64_t i = 0; i < num; i++) {
        const struct matrix *w = all[i].w;
        struct part *p = run.parts + i;
        *p = (struct part){w, NULL, all[i].out + first * w->n * size_of(x_kind), run.tiles, order_of(k, w, x_kind)};
        run.tiles += (w->n + DOWN_TILE - 1) / DOWN_TILE;
        macs += rows * w->n * w->k;
        floats += rows * vectors_of(p->order, w->k) * LANES + LANES;
    }
    if (macs < SERIAL_MACS) threads = 1;
    uintptr_t at = (uintptr_t)moe_scratch((floats + threads * FLOATS + LANES) * sizeof(float));
    if (!at) return -1;
    for (struct part *p = run.parts; p < run.parts + num; p++) {
        if (p > run.parts && p->order == p[-1].order) {
            p->x = p[-1].x;
            continue;
        }
        int64_t vectors = vectors_of(p->order, p->w->k);
        float *packed = take(&at, rows * vectors * LANES * sizeof(float));
        for (int64_t i = 0; i < rows; i++) {
            float *to = packed_row(k, packed, vectors, rows, i, &stride);
            k->pack_x(p->order, (int)x_kind, x + (first + i) * x_row, p->w->k, to, stride);
        }
        p->x = packed;
    }
    run.private = take(&at, threads * FLOATS * sizeof(float));
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
