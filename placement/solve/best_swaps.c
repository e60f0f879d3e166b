/* The best swaps of two copies of different ranks in one layer, of every size (few_moves.py, whose tables in numpy are the
 * slow twin): by what the busiest ranks serve and what ranks send if every copy keeps its tokens. Every pair of copies is
 * looked at, each from four sets of tokens: O(copies^2 tokens / 64). The caller checks sizes and indices.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../cover.h"
#include "change.h"

#define SIZES 3 /* how many more copies then are new: none or fewer, one, two */

typedef struct {
    int64_t tokens, top, copies, experts, ranks, is_exact, squares; /* squares: the norm's order is 2^squares */
    double pair, row, result;    /* seconds: of a pair on the busiest rank, of a row out and of one back */
    const int16_t *served;       /* [tokens, top] copy that serves each pair, -1 = none */
    const int64_t *home;         /* [tokens] rank */
    const int64_t *expert, *rank; /* [copies] */
    const uint8_t *hosted, *first; /* [experts, ranks]: copies that are there, and that were at first */
    int64_t *best;               /* [SIZES, 2] copies to swap, -1 = none; out */
    double *least;               /* [SIZES] what that costs, but for the bytes sent before it; out */
} Swaps;

static double to_the_norm(double x, int64_t squares) {
    for (int64_t n = 0; n < squares; n++) x *= x;
    return x;
}

static double of_bytes(const Swaps *p, int64_t rows, int64_t results) {
    return p->row * (double)rows + p->result * (double)(p->is_exact ? results : rows);
}

EXPORT int64_t moe_best_swaps_abi(void) { return (int64_t)sizeof(Swaps); }

/* 0, or -1: memory is short. */
EXPORT int64_t moe_best_swaps(const Swaps *p) {
    int64_t words = (p->tokens + 63) / 64, ranks = p->ranks, result = -1;
    uint64_t *bits = calloc((size_t)((p->copies + 2 * ranks) * words + 1), 8), *once = bits + p->copies * words;
    uint64_t *twice = once + ranks * words;
    double *load = calloc((size_t)(p->copies + ranks), 8), *busy = load + p->copies;
    int64_t *at_home = calloc((size_t)(p->copies * (ranks + 1) + 1), 8); /* pairs of each copy by their tokens' homes */
    int64_t *sole = at_home + p->copies * ranks; /* tokens that come to a copy's rank for it alone */
    if (!bits || !load || !at_home) goto done;
    for (int64_t t = 0; t < p->tokens; t++) {
        uint64_t bit = 1ull << t % 64;
        once[p->home[t] * words + t / 64] |= bit;
        for (int64_t k = 0; k < p->top; k++) {
            int64_t copy = p->served[t * p->top + k];
            if (copy < 0) continue;
            bits[copy * words + t / 64] |= bit;
            at_home[copy * ranks + p->home[t]]++, load[copy]++, busy[p->rank[copy]]++;
        }
    }
    double most = 1e-12, powers = 0;
    for (int64_t i = 0; i < p->copies; i++) {
        uint64_t *here = once + p->rank[i] * words, *more = twice + p->rank[i] * words;
        for (int64_t w = 0; w < words; w++) more[w] |= here[w] & bits[i * words + w], here[w] |= bits[i * words + w];
    }
    for (int64_t i = 0; i < p->copies; i++)
        for (int64_t w = 0; w < words; w++)
            sole[i] += __builtin_popcountll(bits[i * words + w] & ~twice[p->rank[i] * words + w]);
    for (int64_t g = 0; g < ranks; g++) most = busy[g] > most ? busy[g] : most;
    for (int64_t g = 0; g < ranks; g++) powers += to_the_norm(busy[g] / most, p->squares);
    for (int64_t n = 0; n < SIZES; n++) p->best[2 * n] = p->best[2 * n + 1] = -1, p->least[n] = INFINITY;
    Change change = fastest();
    for (int64_t i = 0; i < p->copies; i++) {
        for (int64_t j = i + 1; j < p->copies; j++) {
            int64_t a = p->rank[i], b = p->rank[j], e = p->expert[i] * ranks, f = p->expert[j] * ranks;
            if (p->hosted[e + b] || p->hosted[f + a]) continue; /* among them those of one rank */
            int64_t size = p->first[e + a] + p->first[f + b] - p->first[e + b] - p->first[f + a];
            size = size < 0 ? 0 : size;
            double others = powers - to_the_norm(busy[a] / most, p->squares) - to_the_norm(busy[b] / most, p->squares);
            others += to_the_norm((busy[a] + load[j] - load[i]) / most, p->squares);
            others += to_the_norm((busy[b] + load[i] - load[j]) / most, p->squares);
            double norm = (others > 0 ? others : 0) / (double)ranks;
            for (int64_t n = 0; n < p->squares; n++) norm = sqrt(norm);
            double cost = p->pair * most * norm;
            const uint64_t *out = bits + i * words, *in = bits + j * words;
            int64_t results = at_home[i * ranks + a] - at_home[i * ranks + b] + at_home[j * ranks + b] - at_home[j * ranks + a];
            int64_t rows = -sole[i] - sole[j]; /* at least */
            if (cost + of_bytes(p, rows, results) >= p->least[size]) continue;
            rows = change(once + a * words, twice + a * words, out, in, words);
            rows += change(once + b * words, twice + b * words, in, out, words);
            cost += of_bytes(p, rows, results);
            if (cost < p->least[size]) p->least[size] = cost, p->best[2 * size] = i, p->best[2 * size + 1] = j;
        }
    }
    result = 0;
done:
    free(bits), free(load), free(at_home);
    return result;
}
