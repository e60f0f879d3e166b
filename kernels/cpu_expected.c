/* What a router, or a forecast of one, chooses: its experts and weights, or tokens that each expert may expect; one call
 * for all rows.
 *
 * Plain C11 without the Python API, loaded by kernels/cpu_expected.py with ctypes.
 */

#include <math.h>
#include <stdlib.h>

#include "cpu_scalars.h"

int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t x_kind, int64_t rows, void *out,
                       int64_t threads, int64_t isa);

/* How many floats a part of so many rows is widened to: those of a forecast of fp32 from an x of another kind. */
static int64_t wide_floats(const struct matrix *router, int64_t x_kind, int64_t rows) {
    return router->kind == F32 && x_kind != F32 ? rows * router->k : 0;
}

/* Of `rows` rows, of the kind that x has in the product. wide: room for `wide_floats`. */
static int64_t find_scores(const struct matrix *router, const char *x, int64_t x_row, int64_t x_kind, int64_t rows,
                           float *wide, char *scores, int64_t threads, int64_t isa) {
    if (wide_floats(router, x_kind, rows)) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < router->k; j++) wide[i * router->k + j] = widen_one(x_kind, x + i * x_row, j);
        x = (const char *)wide, x_row = router->k * 4, x_kind = F32;
    }
    return moe_cpu_linear(router, x, x_row, x_kind, rows, scores, threads, isa);
}

/* scores: of one row; best, place: room for top_k + 1, filled best first. How many were found: one that is no number is
 * none. */
static int64_t find_best(const float *scores, int64_t experts, int64_t top_k, float *best, int64_t *place) {
    int64_t found = 0;
    for (int64_t e = 0; e < experts; e++) {
        if (!(scores[e] == scores[e]) || (found > top_k && scores[e] <= best[top_k])) continue;
        int64_t at = found <= top_k ? found++ : top_k;
        for (; at && scores[e] > best[at - 1]; at--) best[at] = best[at - 1], place[at] = place[at - 1];
        best[at] = scores[e], place[at] = e;
    }
    return found;
}

/* Adds one row. What stands at the cut counts `at_cut`, what is far above it nearly 1, in units of the scores' spread. */
static void add_row(const float *scores, int64_t experts, int64_t top_k, float at_cut, float *best, int64_t *place,
                    float *expected) {
    float mean = 0, squares = 0;
    for (int64_t e = 0; e < experts; e++) mean += scores[e];
    mean /= (float)experts;
    for (int64_t e = 0; e < experts; e++) squares += (scores[e] - mean) * (scores[e] - mean);
    float spread = fmaxf(sqrtf(squares / (float)experts), 1e-6f);
    int64_t found = find_best(scores, experts, top_k, best, place);
    for (int64_t i = 0; i < least(found, top_k); i++)
        expected[place[i]] += 1 - (1 - at_cut) * expf(-(best[i] - best[found - 1]) / spread);
}

/* Adds one row of a forecast: the cut is taken as known, what was left of each expert's scores as normal. */
static CLONES void add_sure_row(const float *scores, int64_t experts, int64_t top_k, const float *spread, float *best,
                                int64_t *place, float *expected) {
    int64_t found = find_best(scores, experts, top_k, best, place);
    if (found <= top_k) {
        for (int64_t i = 0; i < found; i++) expected[place[i]] += 1;
        return;
    }
    float cut = (best[top_k - 1] + best[top_k]) / 2;
    for (int64_t e = 0; e < experts; e++) {
        float above = (scores[e] - cut) / spread[e];
        above = above > -20.0f ? above : -20.0f; /* and what is no number */
        expected[e] += normal(above < 20.0f ? above : 20.0f);
    }
}

/* 0: done; -1: out of memory. router: [experts, H]; x: `rows` rows of the router's kind, or any for one of fp32, x_row
 * bytes apart; spread: of a forecast, [experts], else NULL; expected: [experts], zeros. */
EXPORT int64_t moe_cpu_expected(const struct matrix *router, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                                int64_t top_k, float at_cut, const float *spread, float *expected, int64_t threads,
                                int64_t isa) {
    int64_t experts = router->n, few = least(rows, ROWS), wide_size = wide_floats(router, x_kind, few);
    int64_t kind = wide_size ? F32 : x_kind, size = size_of(kind);
    char *memory = malloc((size_t)(few * experts * size + (experts + top_k + 1 + wide_size) * 4 + (top_k + 2) * 8));
    if (!memory) return -1;
    int64_t *place = (int64_t *)memory;
    float *best = (float *)(place + top_k + 2), *row = best + top_k + 1, *wide = row + experts;
    char *scores = (char *)(wide + wide_size);
    int64_t bad = 0;
    for (int64_t m = 0; m < rows && !bad; m += few) {
        int64_t n = least(few, rows - m);
        bad = find_scores(router, (const char *)x + m * x_row, x_row, x_kind, n, wide, scores, threads, isa);
        for (int64_t i = 0; i < n && !bad; i++) {
            for (int64_t e = 0; e < experts; e++) row[e] = widen_one(kind, scores + i * experts * size, e);
            if (spread)
                add_sure_row(row, experts, top_k, spread, best, place, expected);
            else
                add_row(row, experts, top_k, at_cut, best, place, expected);
        }
    }
    free(memory);
    return bad;
}

struct choice { /* of `rows` rows */
    const void *x;
    int64_t x_row, x_kind, rows; /* bytes from row to row; the kind of the router, or any for one of fp32 */
    const int64_t *among;        /* [rows, width], distinct: the experts to choose from; NULL: all */
    int64_t width, top_k, normalize;
    int64_t *ids;   /* [rows, top_k], best first, of equals the first */
    float *weights; /* [rows, top_k]: softmax over all experts, made to sum to 1 if `normalize` */
};

static CLONES void choose_row(const struct choice *c, int64_t row, int64_t experts, float *p) {
    const int64_t *among = c->among ? c->among + row * c->width : NULL;
    int64_t *ids = c->ids + row * c->top_k, count = among ? c->width : experts;
    float top = -INFINITY, sum = 0, chosen = 0;
    for (int64_t e = 0; e < experts; e++) top = p[e] > top ? p[e] : top;
    for (int64_t e = 0; e < experts; e++) /* at most 0 from here on: infinite ones come first, what is no number last */
        p[e] = p[e] == top ? 0.0f : p[e] == p[e] ? p[e] - top : -INFINITY;
    for (int64_t e = 0; e < experts; e++) sum += exponential(p[e]);
    float *weights = c->weights + row * c->top_k;
    for (int64_t k = 0; k < c->top_k; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; i++) {
            int64_t e = among ? among[i] : i;
            if (p[e] <= 0 && (best < 0 || p[e] > p[best])) best = e;
        }
        ids[k] = best;
        chosen += weights[k] = exponential(p[best]) / sum;
        p[best] = INFINITY; /* it was taken */
    }
    for (int64_t k = 0; c->normalize && k < c->top_k; k++) weights[k] /= chosen;
}

/* sizeof both structs, so that a library of another version is noticed. */
EXPORT int64_t moe_cpu_choice_abi(void) { return (int64_t)(sizeof(struct matrix) * 1000 + sizeof(struct choice)); }

/* 0: done; -1: out of memory. router: [experts, H]. */
EXPORT int64_t moe_cpu_choose(const struct matrix *router, const struct choice *c, int64_t threads, int64_t isa) {
    int64_t experts = router->n, few = least(c->rows, ROWS), wide_size = wide_floats(router, c->x_kind, few);
    int64_t kind = wide_size ? F32 : c->x_kind, size = size_of(kind);
    float *memory = malloc((size_t)(few * experts * size + (experts + wide_size) * 4));
    if (!memory) return -1;
    float *row = memory, *wide = row + experts;
    char *scores = (char *)(wide + wide_size);
    int64_t bad = 0;
    for (int64_t m = 0; m < c->rows && !bad; m += few) {
        int64_t n = least(few, c->rows - m);
        bad = find_scores(router, (const char *)c->x + m * c->x_row, c->x_row, c->x_kind, n, wide, scores, threads, isa);
        for (int64_t i = 0; i < n && !bad; i++) {
            for (int64_t e = 0; e < experts; e++) row[e] = widen_one(kind, scores + i * experts * size, e);
            choose_row(c, m + i, experts, row);
        }
    }
    free(memory);
    return bad;
}
