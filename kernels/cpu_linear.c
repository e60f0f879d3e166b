/* A dense layer on CPUs: out = x * W^T + bias, by the products that also compute experts (cpu_panel.h). */

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu_experts.h"

struct run {
    const struct kernels *k;
    const struct matrix *w;
    const float *x; /* packed */
    float *private; /* per thread: a tile of C and a packed piece of W */
    char *out;
    int64_t rows, x_kind, next; /* next: the next tile of columns */
    int order;
};

enum { FLOATS = C_FLOATS + SCRATCH_FLOATS };

static void work(struct run *r, int64_t thread) {
    int64_t size = size_of(r->x_kind), width = r->w->n;
    float *c = r->private + thread * FLOATS;
    for (int64_t n0; (n0 = __atomic_fetch_add(&r->next, DOWN_TILE, __ATOMIC_RELAXED)) < width;) {
        int64_t n = least(DOWN_TILE, width - n0);
        moe_product(r->k, r->order, r->w, 0, r->x, r->rows, n0, n, c, DOWN_TILE, c + C_FLOATS);
        for (int64_t m = 0; m < r->rows; m++) {
            const float *row = c + m * DOWN_TILE, one = 1.0f;
            r->k->combine((int)r->x_kind, &row, &one, 1, n, r->out + (m * width + n0) * size);
        }
    }
}

/* x: `rows` <= ROWS rows, x_row bytes from one to the next; out: [rows, w->n] of the kind of x, contiguous. */
static int64_t linear(const struct matrix *w, const char *x, int64_t x_row, int64_t x_kind, int64_t rows, char *out,
                      int64_t threads, const struct kernels *k) {
    struct run run = {.k = k, .w = w, .rows = rows, .x_kind = x_kind, .out = out, .order = order_of(k, w, x_kind)};
    int64_t vectors = vectors_of(run.order, w->k), stride;
#ifdef _OPENMP
    if (rows * w->n * w->k < SERIAL_MACS) threads = 1;
#else
    threads = 1;
#endif
    uintptr_t at = (uintptr_t)moe_scratch((rows * vectors * LANES + threads * FLOATS + LANES) * sizeof(float));
    if (!at) return -1;
    float *packed = take(&at, rows * vectors * LANES * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        float *to = packed_row(k, packed, vectors, rows, i, &stride);
        k->pack_x(run.order, (int)x_kind, x + i * x_row, w->k, to, stride);
    }
    run.x = packed, run.private = take(&at, threads * FLOATS * sizeof(float));
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        work(&run, omp_get_thread_num());
        return 0;
    }
#endif
    work(&run, 0);
    return 0;
}

/* 0: done; -1: out of memory. w: slot 0 is the matrix; x and out are of kind x_kind. */
EXPORT int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                              void *out, int64_t threads, int64_t isa) {
    int64_t out_row = w->n * size_of(x_kind), status = 0;
    for (int64_t m = 0; m < rows && !status; m += ROWS)
        status = linear(w, (const char *)x + m * x_row, x_row, x_kind, least(ROWS, rows - m), (char *)out + m * out_row,
                        threads, moe_kernels(isa));
    return status;
}
