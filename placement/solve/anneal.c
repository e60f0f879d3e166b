/* Simulated annealing of one layer's expert copies on what is served: ranks a token visits besides its home, pairs that
 * are served elsewhere at their price, what the ranks serve above a cap when each expert of a token is shared by the ranks
 * that may serve it (the rule of placement/replicas.py, whose dealing is even only on average), and the ranks' second
 * moments, sums over every two of a rank's experts, when each copy of an expert has an equal share of it.
 *
 * State: a mask of ranks per expert. Moves: swap two copies between ranks, move a copy into an empty slot, or give one
 * copy's slot of a replicated expert to another expert. Nine moves of ten are drawn by what they may save: an expert goes
 * to a rank as likely as its tokens have another expert there. Only the tokens of the two experts are served again. The
 * caller (anneal.py) checks sizes and indices; the same seed gives the same masks on every machine with IEEE doubles.
 */
#include <stdlib.h>
#include <string.h>

#include "../cover.h"
#include "pace.h"
#include "random.h"

#define GUIDED 230 /* moves of 256 that are drawn by tokens in common; the others reach every rank and expert */

typedef struct {
    int64_t tokens, top, experts, ranks, slots; /* slots: copies per rank */
    int64_t seed, home_first;
    Schedule schedule;
    double pair_cost;            /* visits that a pair served elsewhere costs */
    double cap, penalty;         /* pairs that a rank may serve; visits that one above costs */
    const double *moments;       /* [experts, experts] symmetric, in visits */
    const int16_t *ids;          /* [tokens, top], -1 = none */
    const uint8_t *home;         /* [tokens] */
    uint64_t *masks;             /* [experts], in and out */
} Problem;

static int count(uint64_t x) { return __builtin_popcountll(x); }

static Visits visits(const Problem *p, int64_t t) {
    return visits_of(p->masks, p->ids + t * p->top, p->top, p->home[t], p->ranks);
}

/* Adds `sign` times the pairs of token t to the ranks' loads, shared equally by those that may serve them; returns what
 * the token costs: visits besides home, and the pairs served elsewhere at their price. */
static double serve(const Problem *p, int64_t t, Visits v, double sign, double *load) {
    const int16_t *ids = p->ids + t * p->top;
    int64_t home = p->home[t];
    double at_home = 0, pairs = 0;
    for (int64_t k = 0; k < p->top; k++) {
        if (ids[k] < 0) continue;
        uint64_t mask = options_of(p->masks[ids[k]], v.used, home, p->home_first);
        double share = 1.0 / count(mask);
        pairs += 1, at_home += mask >> home & 1 ? share : 0;
        for (; mask; mask &= mask - 1) load[__builtin_ctzll(mask)] += sign * share;
    }
    return (double)(count(v.used) - 1 + v.lonely) + p->pair_cost * (pairs - at_home);
}

/* What load above the cap costs. */
static double overload(const Problem *p, const double *load) {
    double over = 0;
    for (int64_t g = 0; g < p->ranks; g++) over += load[g] > p->cap ? load[g] - p->cap : 0;
    return p->penalty * over;
}

/* What rank g has of an expert once its mask changes. */
static double more(uint64_t old, uint64_t new, int64_t g) {
    return (new >> g & 1 ? 1.0 / count(new) : 0) - (old >> g & 1 ? 1.0 / count(old) : 0);
}

/* An expert's mask changes: adds to what each rank's experts have in common with every expert, [ranks, experts];
 * returns by how much the ranks' moments rise. */
static double share_anew(const Problem *p, double *common, int64_t e, uint64_t old, uint64_t new) {
    const double *moments = p->moments + e * p->experts;
    double rise = 0;
    for (uint64_t rest = old | new; rest; rest &= rest - 1) {
        int64_t g = __builtin_ctzll(rest);
        double share = more(old, new, g), *of_rank = common + g * p->experts;
        if (share == 0) continue;
        rise += share * (2 * of_rank[e] + share * moments[e]);
        for (int64_t x = 0; x < p->experts; x++) of_rank[x] += share * moments[x];
    }
    return rise;
}

/* An expert that shares a token with expert e, as likely as they share some, or e itself; -1 = none. */
static int32_t neighbour(const Problem *p, const int64_t *begin, const int64_t *list, int32_t e, Random *random) {
    if (e < 0 || begin[e] == begin[e + 1] || below(random, 256) >= GUIDED) return -1;
    int64_t token = list[begin[e] + below(random, begin[e + 1] - begin[e])];
    return p->ids[token * p->top + below(random, p->top)];
}

static int64_t one_of(uint64_t mask, Random *random) {
    for (int64_t skip = below(random, count(mask)); skip; skip--) mask &= mask - 1;
    return __builtin_ctzll(mask);
}

EXPORT int64_t moe_anneal_abi(void) { return (int64_t)sizeof(Problem); }

/* Masks of the best state; its cost, or -1 where memory is short. */
EXPORT double moe_anneal(const Problem *p) {
    int64_t n = p->tokens, pairs = n * p->top;
    int64_t *begin = calloc((size_t)p->experts + 1, 8), *where = malloc((size_t)(p->experts + 1) * 8);
    int64_t *list = malloc((size_t)(pairs + 1) * 8), *touched = malloc((size_t)(n + 1) * 8);
    int64_t *stamp = calloc((size_t)n + 1, 8);
    Visits *used = malloc((size_t)(n + 1) * sizeof *used), *fresh = malloc((size_t)(n + 1) * sizeof *fresh);
    double *worth = malloc((size_t)(n + 1) * 8), *trial_worth = malloc((size_t)(n + 1) * 8);
    uint64_t *best = malloc((size_t)(p->experts + 1) * 8);
    int32_t *slot = malloc((size_t)(p->ranks * p->slots + 1) * 4); /* expert in each slot, -1 empty */
    size_t loads = (size_t)p->ranks * 8;
    double *load = calloc(1, loads), *trial = malloc(loads), *common = calloc((size_t)(p->ranks * p->experts + 1), 8);
    double result = -1;
    if (!begin || !where || !list || !touched || !stamp || !used || !fresh || !worth || !trial_worth || !best || !slot || !load || !trial || !common) goto done;

    for (int64_t i = 0; i < pairs; i++)
        if (p->ids[i] >= 0) begin[p->ids[i] + 1]++;
    for (int64_t e = 0; e < p->experts; e++) begin[e + 1] += begin[e];
    memcpy(where, begin, (size_t)(p->experts + 1) * 8);
    for (int64_t i = 0; i < pairs; i++)
        if (p->ids[i] >= 0) list[where[p->ids[i]]++] = i / p->top;
    for (int64_t i = 0; i < p->ranks * p->slots; i++) slot[i] = -1;
    for (int64_t g = 0; g < p->ranks; g++)
        for (int64_t e = 0, i = 0; e < p->experts; e++)
            if (p->masks[e] >> g & 1) slot[g * p->slots + i++] = (int32_t)e;

    Random random = seeded((uint64_t)p->seed);
    double cost = 0;
    for (int64_t t = 0; t < n; t++) {
        used[t] = visits(p, t);
        cost += worth[t] = serve(p, t, used[t], 1, load);
    }
    double over = overload(p, load);
    for (int64_t e = 0; e < p->experts; e++) over += share_anew(p, common, e, 0, p->masks[e]);
    double best_cost = cost, best_over = over;
    memcpy(best, p->masks, (size_t)p->experts * 8);
    Pace pace = paced(&p->schedule, 100 + 300 * pairs / (p->experts + 1));

    for (int64_t step = 1; step <= pace.total; step++, pace.temperature *= pace.cooling) {
        if ((step - 1) % pace.every == 0) {
            look(&p->schedule, step - 1, &pace);
            if (step > pace.total) break;
        }
        int64_t a = below(&random, p->ranks), i = a * p->slots + below(&random, p->slots), j = -1;
        int32_t e = slot[i], f = -1;
        if (e < 0) continue;
        uint64_t here = 1ull << a, mask_e = p->masks[e], mask_f = 0, new_e, new_f = 0;
        if (next(&random) & 1) { /* swap, or move into an empty slot */
            int32_t near = neighbour(p, begin, list, e, &random);
            int64_t b = near < 0 || near == e ? below(&random, p->ranks) : one_of(p->masks[near], &random);
            uint64_t there = 1ull << b;
            j = b * p->slots + below(&random, p->slots);
            f = slot[j];
            if (b == a || f == e || (mask_e & there)) continue;
            if (f >= 0 && (p->masks[f] & here)) continue;
            new_e = (mask_e & ~here) | there;
            if (f >= 0) mask_f = p->masks[f], new_f = (mask_f & ~there) | here;
        } else { /* another expert takes the slot */
            if (count(mask_e) < 2) continue;
            f = neighbour(p, begin, list, slot[a * p->slots + below(&random, p->slots)], &random);
            if (f < 0) f = (int32_t)below(&random, p->experts);
            mask_f = p->masks[f];
            if (mask_f & here) continue;
            new_e = mask_e & ~here, new_f = mask_f | here;
        }
        int64_t changed = 0;
        for (int x = 0; x < 2; x++) {
            int32_t z = x ? f : e;
            for (int64_t y = z < 0 ? 0 : begin[z]; z >= 0 && y < begin[z + 1]; y++)
                if (stamp[list[y]] != step) stamp[list[y]] = step, touched[changed++] = list[y];
        }
        memcpy(trial, load, loads);
        for (int64_t y = 0; y < changed; y++) serve(p, touched[y], used[touched[y]], -1, trial);
        p->masks[e] = new_e;
        if (f >= 0) p->masks[f] = new_f;
        double delta = 0;
        for (int64_t y = 0; y < changed; y++) {
            int64_t t = touched[y];
            fresh[y] = visits(p, t);
            trial_worth[y] = serve(p, t, fresh[y], 1, trial);
            delta += trial_worth[y] - worth[t];
        }
        double new_over = over + overload(p, trial) - overload(p, load);
        for (uint64_t rest = mask_e | new_e | mask_f | new_f; rest; rest &= rest - 1) {
            int64_t g = __builtin_ctzll(rest);
            const double *of_rank = common + g * p->experts, *of_e = p->moments + e * p->experts;
            double x = more(mask_e, new_e, g), y = f < 0 ? 0 : more(mask_f, new_f, g);
            new_over += x * (2 * of_rank[e] + x * of_e[e]);
            if (f >= 0) new_over += y * (2 * (of_rank[f] + x * of_e[f]) + y * p->moments[f * p->experts + f]);
        }
        double change = delta + pace.severity * (new_over - over);
        if (change > 0 && uniform(&random) >= exp(-change / pace.temperature)) {
            p->masks[e] = mask_e;
            if (f >= 0) p->masks[f] = mask_f;
            continue;
        }
        for (int64_t y = 0; y < changed; y++) used[touched[y]] = fresh[y], worth[touched[y]] = trial_worth[y];
        memcpy(load, trial, loads);
        share_anew(p, common, e, mask_e, new_e);
        if (f >= 0) share_anew(p, common, f, mask_f, new_f);
        cost += delta, over = new_over;
        slot[i] = f;
        if (j >= 0) slot[j] = e;
        if (cost + pace.severity * over < best_cost + pace.severity * best_over - 1e-6) {
            best_cost = cost, best_over = over;
            memcpy(best, p->masks, (size_t)p->experts * 8);
        }
    }
    memcpy(p->masks, best, (size_t)p->experts * 8);
    result = best_cost + pace.severity * best_over;
done:
    free(begin), free(where), free(list), free(touched), free(stamp), free(used), free(fresh), free(worth), free(trial_worth), free(best), free(slot), free(load), free(trial), free(common);
    return result;
}
