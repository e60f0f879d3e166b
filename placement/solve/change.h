/* How many more tokens touch a group (a rank, a node) once one item leaves it and another comes, from sets of tokens as
 * bits: `once`, those that touch it, `twice`, those that touch it for two reasons or more, and those of the two items.
 */
#include <stdint.h>

typedef int64_t (*Change)(const uint64_t *, const uint64_t *, const uint64_t *, const uint64_t *, int64_t);

static inline __attribute__((always_inline)) int64_t
change_of(const uint64_t *once, const uint64_t *twice, const uint64_t *out, const uint64_t *in, int64_t words) {
    int64_t come = 0, go = 0;
    for (int64_t i = 0; i < words; i++) {
        uint64_t sole = out[i] & ~twice[i];
        come += __builtin_popcountll(in[i] & (~once[i] | sole));
        go += __builtin_popcountll(sole);
    }
    return come - go;
}

#define CHANGE(name, target)                                                                                       \
    target static int64_t name(                                                                                    \
        const uint64_t *once, const uint64_t *twice, const uint64_t *out, const uint64_t *in, int64_t words        \
    ) {                                                                                                            \
        return change_of(once, twice, out, in, words);                                                             \
    }
CHANGE(change_plain, )
#if defined(__x86_64__) && defined(__GNUC__)
CHANGE(change_popcnt, __attribute__((target("popcnt"))))
CHANGE(change_avx512, __attribute__((target("avx512f,avx512vpopcntdq"))))
#endif

static Change fastest(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512vpopcntdq")) return change_avx512;
    if (__builtin_cpu_supports("popcnt")) return change_popcnt;
#endif
    return change_plain;
}
