/* Simulated annealing of one layer's experts, one copy each: ranks (and nodes) that tokens touch, pairs of a rank above a
 * cap, and a rank's second moment, a sum over every two of its experts, above another.
 *
 * A rank keeps two sets of tokens as bits: those that touch it, and those that touch it for two reasons or more. What a
 * swap of two experts changes is then counted from four sets, whatever the number of experts on a rank: O(tokens / 64).
 * Counts are integers and sums are taken in a fixed order: the same seed gives the same places on every machine with
 * IEEE doubles. The caller (assign.py) checks sizes and indices.
 */
#include <stdlib.h>
#include <string.h>

#include "../cover.h"
#include "change.h"
#include "pace.h"
#include "random.h"

typedef struct {
    int64_t tokens, top, items, ranks, places; /* items = ranks * places: experts, and empty places after them */
    int64_t nodes, seed;
    double node_weight, cap, price, moment_cap; /* price: of a pair above the cap */
    Schedule schedule;
    const double *loads;             /* [items] pairs */
    const double *moments;           /* [items, items] symmetric, 0 for empty places */
    const int16_t *ids;              /* [tokens, top], -1 = none */
    const int32_t *pin;              /* [tokens] rank that is touched anyway, -1 = none */
    const int32_t *node;             /* [ranks] */
    int32_t *now, *best;             /* [ranks, places] items; both in and out */
} Assign;

typedef struct {
    uint64_t *once, *twice; /* [groups, words] */
    const uint64_t *pins;   /* [groups, words] */
} Sets;

/* What a rank serves: pairs, and their second moment over pieces of the traffic. */
typedef struct {
    double load, moment;
} Rank;

static double overload(const Assign *p, Rank r) {
    double over = r.load - p->cap, uneven = r.moment - p->moment_cap;
    return (over > 0 ? over * p->price : 0) + (uneven > 0 ? uneven : 0);
}

/* A rank with item `in` instead of `out`, which stands in its place `at`. */
static Rank traded(const Assign *p, Rank r, int64_t rank, int64_t at, int32_t out, int32_t in) {
    const double *come = p->moments + in * p->items, *go = p->moments + out * p->items;
    const int32_t *held = p->now + rank * p->places;
    double sum = 0;
    for (int64_t k = 0; k < p->places; k++) sum += k == at ? 0 : come[held[k]] - go[held[k]];
    return (Rank){r.load + p->loads[in] - p->loads[out], r.moment + 2 * sum + come[in] - go[out]};
}

/* The sets of a group anew: what `from` to `to` of `place` holds. Adds to what was there if `more`. */
static void gather(const Assign *p, const uint64_t *bits, Sets s, int64_t group, int64_t rank, int64_t words, int more) {
    uint64_t *once = s.once + group * words, *twice = s.twice + group * words;
    if (!more) memcpy(once, s.pins + group * words, (size_t)words * 8), memset(twice, 0, (size_t)words * 8);
    for (int64_t k = 0; k < p->places; k++) {
        const uint64_t *b = bits + p->now[rank * p->places + k] * words;
        for (int64_t i = 0; i < words; i++) twice[i] |= once[i] & b[i], once[i] |= b[i];
    }
}

static void gather_node(const Assign *p, const uint64_t *bits, Sets s, int64_t node, int64_t words) {
    int more = 0;
    for (int64_t g = 0; g < p->ranks; g++)
        if (p->node[g] == node) gather(p, bits, s, node, g, words, more), more = 1;
}

static int64_t members(const uint64_t *set, int64_t words) {
    int64_t n = 0;
    for (int64_t i = 0; i < words; i++) n += __builtin_popcountll(set[i]);
    return n;
}

typedef struct {
    double visits, over; /* `over`: of what ranks serve above their caps, before the severity */
} Cost;

static double worth(Cost cost, double severity) { return cost.visits + severity * cost.over; }

/* Sets, loads and cost of `now`. */
static Cost whole(const Assign *p, const uint64_t *bits, Sets rank, Sets node, int64_t words, Rank *of) {
    Cost cost = {0, 0};
    for (int64_t g = 0; g < p->ranks; g++) {
        gather(p, bits, rank, g, g, words, 0);
        of[g] = (Rank){0, 0};
        for (int64_t k = 0; k < p->places; k++) {
            int32_t e = p->now[g * p->places + k];
            of[g].load += p->loads[e];
            for (int64_t j = 0; j < p->places; j++) of[g].moment += p->moments[e * p->items + p->now[g * p->places + j]];
        }
        cost.over += overload(p, of[g]);
        cost.visits += (double)members(rank.once + g * words, words);
    }
    for (int64_t n = 0; n < p->nodes; n++) {
        gather_node(p, bits, node, n, words);
        cost.visits += p->node_weight * (double)members(node.once + n * words, words);
    }
    return cost;
}

EXPORT int64_t moe_assign_abi(void) { return (int64_t)sizeof(Assign); }

/* `now` after the iterations and `best` as the best of all seen, itself among them; its cost, or -1: memory is short. */
EXPORT double moe_assign(const Assign *p) {
    int64_t words = (p->tokens + 63) / 64, groups = p->ranks + p->nodes, size = p->ranks * p->places;
    uint64_t *bits = calloc((size_t)(p->items * words + 1), 8), *sets = malloc((size_t)(2 * groups * words + 1) * 8);
    uint64_t *pins = calloc((size_t)(groups * words + 1), 8);
    Rank *of = malloc((size_t)p->ranks * sizeof *of);
    double result = -1;
    int32_t *kept = malloc((size_t)size * 4);
    if (!bits || !sets || !pins || !of || !kept) goto done;
    Sets rank = {sets, sets + groups * words, pins};
    Sets node = {rank.once + p->ranks * words, rank.twice + p->ranks * words, pins + p->ranks * words};
    for (int64_t t = 0; t < p->tokens; t++) {
        uint64_t bit = 1ull << t % 64;
        for (int64_t k = 0; k < p->top; k++)
            if (p->ids[t * p->top + k] >= 0) bits[p->ids[t * p->top + k] * words + t / 64] |= bit;
        if (p->pin[t] < 0) continue;
        pins[p->pin[t] * words + t / 64] |= bit;
        if (p->nodes) pins[(p->ranks + p->node[p->pin[t]]) * words + t / 64] |= bit;
    }
    Change change = fastest();
    memcpy(kept, p->now, (size_t)size * 4);
    memcpy(p->now, p->best, (size_t)size * 4);
    Cost best = whole(p, bits, rank, node, words, of);
    memcpy(p->now, kept, (size_t)size * 4);
    Cost cost = whole(p, bits, rank, node, words, of);
    Random random = seeded((uint64_t)p->seed);
    Pace pace = paced(&p->schedule, 60 + 2 * words);
    for (int64_t step = 0; step < pace.total && p->ranks > 1; step++, pace.temperature *= pace.cooling) {
        if (step % pace.every == 0) {
            look(&p->schedule, step, &pace);
            if (step >= pace.total) break;
        }
        if (worth(cost, pace.severity) < worth(best, pace.severity) - 1e-6)
            best = cost, memcpy(p->best, p->now, (size_t)size * 4);
        int64_t a = below(&random, p->ranks), b = below(&random, p->ranks - 1);
        b += b >= a;
        int64_t i = a * p->places + below(&random, p->places), j = b * p->places + below(&random, p->places);
        int32_t e = p->now[i], f = p->now[j];
        double most = -pace.temperature * log(uniform(&random) + 1e-300), delta = 0;
        Rank of_a = traded(p, of[a], a, i - a * p->places, e, f), of_b = traded(p, of[b], b, j - b * p->places, f, e);
        double over = overload(p, of_a) + overload(p, of_b) - overload(p, of[a]) - overload(p, of[b]);
        const uint64_t *out = bits + e * words, *in = bits + f * words;
        delta += (double)change(rank.once + a * words, rank.twice + a * words, out, in, words);
        delta += (double)change(rank.once + b * words, rank.twice + b * words, in, out, words);
        int64_t na = p->nodes ? p->node[a] : 0, nb = p->nodes ? p->node[b] : 0;
        if (na != nb) {
            int64_t more = change(node.once + na * words, node.twice + na * words, out, in, words);
            more += change(node.once + nb * words, node.twice + nb * words, in, out, words);
            delta += p->node_weight * (double)more;
        }
        if (delta + pace.severity * over > most) continue;
        p->now[i] = f, p->now[j] = e;
        gather(p, bits, rank, a, a, words, 0), gather(p, bits, rank, b, b, words, 0);
        if (na != nb) gather_node(p, bits, node, na, words), gather_node(p, bits, node, nb, words);
        of[a] = of_a, of[b] = of_b, cost.visits += delta, cost.over += over;
    }
    if (worth(cost, pace.severity) < worth(best, pace.severity) - 1e-6)
        best = cost, memcpy(p->best, p->now, (size_t)size * 4);
    result = worth(best, pace.severity);
done:
    free(bits), free(sets), free(pins), free(of), free(kept);
    return result;
}
