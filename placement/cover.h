/* Which ranks a token visits: the first half of the serving rule, shared by serve.c and solve/anneal.c. The slow twin is
 * placement/replicas.py, which says the rule.
 */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_RANKS 64
#define MAX_TOP 64

typedef struct {
    uint64_t used;  /* ranks that are visited whatever the dealing does, home among them */
    int64_t lonely; /* experts that no visited rank has: each costs a visit of its own */
} Visits;

/* masks: ranks of each expert; ids: [top], -1 = none. */
static inline Visits visits_of(const uint64_t *masks, const int16_t *ids, int64_t top, int64_t home, int64_t ranks) {
    uint64_t used = 1ull << home, open[MAX_TOP];
    int64_t n = 0, left = 0, sum = 0;
    for (int64_t k = 0; k < top; k++) {
        if (ids[k] < 0) continue;
        uint64_t mask = masks[ids[k]];
        sum += ids[k];
        if (mask & (mask - 1)) open[n++] = mask;
        else used |= mask;
    }
    for (int64_t k = 0; k < n; k++)
        if (!(open[k] & used)) open[left++] = open[k];
    int64_t start = (home + sum + 1) % ranks;
    while (left > 1) {
        int64_t most = 1, best = -1, kept = 0;
        uint64_t once = 0, twice = 0;
        for (int64_t k = 0; k < left; k++) twice |= once & open[k], once |= open[k];
        if (!twice) break;
        for (int64_t j = 0; j < ranks; j++) {
            int64_t g = start + j >= ranks ? start + j - ranks : start + j, gain = 0;
            if (!(twice >> g & 1)) continue;
            for (int64_t k = 0; k < left; k++) gain += (int64_t)(open[k] >> g & 1);
            if (gain > most) most = gain, best = g;
        }
        used |= 1ull << best;
        for (int64_t k = 0; k < left; k++)
            if (!(open[k] & used)) open[kept++] = open[k];
        left = kept;
    }
    return (Visits){used, left};
}

/* Ranks that may serve an expert of a token. */
static inline uint64_t options_of(uint64_t mask, uint64_t used, int64_t home, int64_t home_first) {
    if (home_first && (mask >> home & 1)) return 1ull << home;
    return mask & used ? mask & used : mask;
}
