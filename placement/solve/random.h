/* Random numbers of the annealers: xorshift128+, the same everywhere. */
#include <stdint.h>

typedef struct {
    uint64_t a, b;
} Random;

static inline uint64_t next(Random *r) {
    uint64_t x = r->a, y = r->b;
    r->a = y;
    x ^= x << 23;
    r->b = x ^ y ^ (x >> 17) ^ (y >> 26);
    return r->b + y;
}

static inline Random seeded(uint64_t seed) {
    Random r = {seed * 0x9E3779B97F4A7C15ull + 1, seed ^ 0xD1B54A32D192ED03ull};
    for (int i = 0; i < 20; i++) next(&r);
    return r;
}

static inline int64_t below(Random *r, int64_t n) { return (int64_t)(((next(r) >> 32) * (uint64_t)n) >> 32); }
static inline double uniform(Random *r) { return (double)(next(r) >> 11) * (1.0 / 9007199254740992.0); }
