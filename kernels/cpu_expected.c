/* What a router, or a forecast of one, would choose, as tokens that each expert may expect; one call for all rows.
 *
 * Plain C11 without the Python API, loaded by kernels/cpu_expected.py with ctypes.
 */

#include <math.h>
#include <stdlib.h>

#include "cpu_scalars.h"

int64_t moe_cpu_linear(const struct matrix *w, const void *x, int64_t x_row, int64_t x_kind, int64_t rows, void *out,
                       int64_t threads, int64_t isa);

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

/* 0: done; -1: out of memory. router: [experts, H]; x: `rows` rows of the kind x_kind, x_row bytes apart; spread: of a
 * forecast, [experts], else NULL; expected: [experts], zeros. */
EXPORT int64_t moe_cpu_expected(const struct matrix *router, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                                int64_t top_k, float at_cut, const float *spread, float *expected, int64_t threads,
                                int64_t isa) {
    int64_t experts = router->n, few = least(rows, ROWS), size = size_of(x_kind);
    char *memory = malloc((size_t)(few * experts * size + (experts + top_k + 1) * 4 + (top_k + 2) * 8));
    if (!memory) return -1;
    int64_t *place = (int64_t *)memory;
    float *best = (float *)(place + top_k + 2), *row = best + top_k + 1;
    char *scores = (char *)(row + experts);
    int64_t bad = 0;
    for (int64_t m = 0; m < rows && !bad; m += few) {
        int64_t n = least(few, rows - m);
        bad = moe_cpu_linear(router, (const char *)x + m * x_row, x_row, x_kind, n, scores, threads, isa);
        for (int64_t i = 0; i < n && !bad; i++) {
            for (int64_t e = 0; e < experts; e++) row[e] = widen_one(x_kind, scores + i * experts * size, e);
            if (spread)
                add_sure_row(row, experts, top_k, spread, best, place, expected);
            else
                add_row(row, experts, top_k, at_cut, best, place, expected);
        }
    }
    free(memory);
    return bad;
}
