/* Which copy serves which pair of a batch: the rule of placement/replicas.py, its slow twin, compared exactly. */
#include <stdlib.h>

#include "cover.h"

#define SWEEPS 2

typedef struct {
    int64_t tokens, top, experts, ranks, home_first;
    int64_t at;              /* the home of all tokens, or -1 */
    const int64_t *ids;      /* [tokens, top], -1 = none */
    const int64_t *home;     /* [tokens], where `at` is -1 */
    const uint64_t *masks;   /* [experts] */
    const int32_t *physical; /* [experts, ranks] */
    int64_t *chosen;         /* [tokens, top] */
} Serve;

typedef struct {
    uint64_t options;
    int64_t pair;
    int32_t expert, rank;
} Open;

EXPORT int64_t moe_serve_abi(void) { return (int64_t)sizeof(Serve); }

/* 0, -1 where memory is short, -2 where an id is out of range. */
EXPORT int64_t moe_serve(const Serve *p) {
    int64_t load[MAX_RANKS] = {0}, n = 0, even = p->ranks + p->ranks % 2, rounds = even - 1;
    Open *open = malloc((size_t)(p->tokens * p->top + 1) * sizeof *open);
    if (!open) return -1;
    for (int64_t t = 0; t < p->tokens; t++) {
        int16_t ids[MAX_TOP];
        int64_t home = p->at < 0 ? p->home[t] : p->at, sum = 0;
        for (int64_t k = 0; k < p->top; k++) {
            int64_t e = p->ids[t * p->top + k];
            if (e >= p->experts) {
                free(open);
                return -2;
            }
            ids[k] = (int16_t)(e < 0 ? -1 : e);
        }
        uint64_t used = visits_of(p->masks, ids, p->top, home, p->ranks).used;
        for (int64_t k = 0; k < p->top; k++) sum += ids[k] < 0 ? 0 : ids[k];
        for (int64_t k = 0; k < p->top; k++) {
            int64_t e = ids[k], at = t * p->top + k;
            p->chosen[at] = -1;
            if (e < 0) continue;
            uint64_t options = options_of(p->masks[e], used, home, p->home_first);
            int64_t g = (home + sum + e + 1) % p->ranks;
            while (!(options >> g & 1)) g = g + 1 == p->ranks ? 0 : g + 1;
            load[g]++;
            p->chosen[at] = p->physical[e * p->ranks + g];
            if (options & (options - 1)) open[n++] = (Open){options, at, (int32_t)e, (int32_t)g};
        }
    }
    for (int64_t round = 0; n && round < SWEEPS * rounds; round++) {
        int64_t quota[MAX_RANKS], partner[MAX_RANKS], any = 0;
        for (int64_t g = 0; g < p->ranks; g++) { /* circle method: every two ranks meet once a sweep */
            int64_t other = g == even - 1 ? -1 : (round % rounds + rounds - g) % rounds;
            if (other == g) other = even - 1;
            if (other < 0)
                for (int64_t j = 0; j < rounds; j++)
                    if (2 * j % rounds == round % rounds) other = j;
            partner[g] = other;
        }
        for (int64_t g = 0; g < p->ranks; g++) {
            int64_t other = partner[g], more = other < p->ranks ? load[g] - load[other] : 0;
            quota[g] = more > 1 ? more / 2 : 0;
            any += quota[g];
        }
        if (!any) continue;
        for (int64_t i = 0; i < n; i++) {
            int64_t g = open[i].rank, to = partner[g];
            if (!quota[g] || !(open[i].options >> to & 1)) continue;
            quota[g]--, load[g]--, load[to]++;
            open[i].rank = (int32_t)to;
        }
    }
    for (int64_t i = 0; i < n; i++) p->chosen[open[i].pair] = p->physical[open[i].expert * p->ranks + open[i].rank];
    free(open);
    return 0;
}
