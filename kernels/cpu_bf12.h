/* Products of packed x and W in bf12 (kernels/bf12.py), compiled once per instruction set, after cpu_panel.h.
 *
 * Weights become bf16 in registers, and are multiplied as those are: the same sums, bit for bit. More rows of x than a block
 * read what NR rows of W became from scratch memory, which stays in the cache.
 *
 * The includer also defines struct NAME(exponents), what makes upper and lower bytes of exponent codes, NAME(exponents_of),
 * which makes it from the highest, NAME(widen), which makes of the 128 weights at p bf16, 2 * WIDTH in each VEC, and
 * NAME(narrow), which makes a block of the 128 weights at v and returns whether any is rare.
 */

enum { BF12_BLOCK = 128, BF12_BYTES = 192, BF12_STEPS = BF12_BLOCK / 32 };

struct NAME(bf12_rows) { /* NR rows of W */
    const char *p[NR];     /* their blocks */
    const char *words[NR], *rare[NR];
    int64_t num[NR]; /* of rare weights, which are told from `rare` on */
};

/* Rows n0 to n0 + count, NR to an element of r; the last stand for those that do not exist. */
static void NAME(bf12_places)(const struct matrix *w, int64_t slot, int64_t n0, int64_t count, struct NAME(bf12_rows) *r) {
    const struct coding *q = &w->coding;
    int64_t parts = q->interleaved ? q->parts : 1, size = 4 * q->groups;
    const char *words[2] = {place_of(w, slot, n0).scale, parts == 2 ? place_of(w, slot, n0 + 1).scale : NULL};
    for (int64_t i = 0; i < (count + NR - 1) / NR * NR; i++) {
        int64_t own = least(i, count - 1);
        const char *first = (parts == 2 ? words[own % 2] + own / 2 * size : words[0] + own * size);
        r[i / NR].p[i % NR] = w->data + slot * w->slot + (n0 + own) * w->row;
        int64_t num = word_at(first) >> 8, room = q->groups - 1, at = room ? word_at(first + 4) : 0;
        int is_elsewhere = num > room && q->table && at + num <= q->table_slot / 4;
        r[i / NR].words[i % NR] = first;
        r[i / NR].rare[i % NR] = is_elsewhere ? q->table + 4 * at : first + 4;
        r[i / NR].num[i % NR] = is_elsewhere ? num : least(num, room); /* a damaged file may say more than there are */
    }
}

/* The first rare column of a row from column k0 on. */
SCALAR int64_t NAME(next_rare)(const char *list, int64_t num, int64_t k0) {
    for (int64_t i = 0; i < num; i++)
        if (word_at(list + 4 * i) >> 8 >= k0) return word_at(list + 4 * i) >> 8;
    return INT64_MAX;
}

/* The rare ones of columns [k0, k0 + n), which are at `to` in bf16. */
SCALAR void NAME(add_rare)(const char *list, int64_t num, int64_t k0, int64_t n, char *to) {
    for (int64_t i = 0; i < num; i++) {
        uint32_t rare = word_at(list + 4 * i);
        int64_t at = (int64_t)(rare >> 8) - k0;
        if (at < 0 || at >= n) continue;
        uint16_t v = (uint16_t)((half_at(to + 2 * at) & 0x807f) | (rare & 255) << 7);
        memcpy(to + 2 * at, &v, sizeof v);
    }
}

/* acc += the first `steps` * 32 columns of a block of each row. next: the first column that is rare in any of them. */
static inline __attribute__((always_inline)) TARGET void NAME(add_block)(int mr, int is_dot, int64_t steps, const float *x,
                                                                        const struct NAME(bf12_rows) *r, int64_t k0,
                                                                        const struct NAME(exponents) *e, int64_t *next,
                                                                        struct ahead *ahead, VEC acc[MR][NR][SUB]) {
    int64_t is_rare = *next < k0 + BF12_BLOCK;
    if (__builtin_expect(is_rare, 0)) *next = INT64_MAX;
    UNROLL(8)
    for (int n = 0; n < NR; n++) {
        UNROLL(3)
        for (int line = 0; line < BF12_BYTES / 64; line++, ahead->at += 64)
            if (ahead->past_l2)
                __builtin_prefetch(ahead->at, 0, 0);
            else
                __builtin_prefetch(ahead->at, 0, 2);
        IN_ORDER;
        VEC v[BF12_STEPS * SUB];
        NAME(widen)(r->p[n] + k0 / BF12_BLOCK * BF12_BYTES, e + n, v);
        if (__builtin_expect(is_rare, 0)) {
            if (NAME(next_rare)(r->rare[n], r->num[n], k0) < k0 + BF12_BLOCK) {
                char wide[2 * BF12_BLOCK];
                memcpy(wide, v, sizeof wide);
                NAME(add_rare)(r->rare[n], r->num[n], k0, BF12_BLOCK, wide);
                memcpy(v, wide, sizeof wide);
            }
            *next = least(*next, NAME(next_rare)(r->rare[n], r->num[n], k0 + BF12_BLOCK));
        }
        UNROLL(4)
        for (int s = 0; s < BF12_STEPS; s++) {
            if (s >= steps) break;
            IN_ORDER;
            UNROLL(8)
            for (int m = 0; m < mr; m++)
                UNROLL(8)
                for (int u = 0; u < SUB; u++) {
                    VEC w = v[s * SUB + u];
                    const float *at = x + (s * (is_dot ? 1 : 2) * mr + m) * LANES + u * WIDTH;
                    if (is_dot)
                        acc[m][n][u] = VDOT(acc[m][n][u], VLOAD(at), w);
                    else
                        acc[m][n][u] = VFMA(VLOAD(at + mr * LANES), VEVEN(w), VFMA(VLOAD(at), VODD(w), acc[m][n][u]));
                }
        }
    }
}

/* c[m][n] = x row m times row n of r, m < mr <= MR. */
static inline __attribute__((always_inline)) TARGET void NAME(bf12_panel)(int mr, int is_dot, const struct NAME(bf12_rows) *r,
                                                                         int64_t k, const float *x, struct ahead ahead,
                                                                         float *c, int64_t ldc) {
    struct NAME(exponents) e[NR];
    int64_t next = INT64_MAX, size = (is_dot ? 1 : 2) * mr * LANES;
    UNROLL(8)
    for (int n = 0; n < NR; n++) {
        e[n] = NAME(exponents_of)((uint8_t)word_at(r->words[n]));
        next = least(next, NAME(next_rare)(r->rare[n], r->num[n], 0));
    }
    for (int64_t k0 = 0; k0 < k; k0 += KC) {
        VEC acc[MR][NR][SUB];
        NO_SUMS(acc, mr, NR)
        int64_t end = least(k, k0 + KC), at = k0;
        for (; at + BF12_BLOCK <= end; at += BF12_BLOCK, x += BF12_STEPS * size) {
            NAME(add_block)(mr, is_dot, BF12_STEPS, x, r, at, e, &next, &ahead, acc);
        }
        if (at < end) {
            int64_t steps = (end - at + 31) / 32;
            NAME(add_block)(mr, is_dot, steps, x, r, at, e, &next, &ahead, acc);
            x += steps * size;
        }
        NAME(add_lanes)(mr, acc, c, ldc, k0 == 0);
    }
}

static TARGET void NAME(any_bf12_panel)(int64_t mr, int is_dot, const struct NAME(bf12_rows) *r, int64_t k, const float *x,
                                        struct ahead ahead, float *c, int64_t ldc) {
#define CASE(M)                                                    \
    case M:                                                        \
        if (!is_dot)                                               \
            NAME(bf12_panel)(M, 0, r, k, x, ahead, c, ldc);        \
        else if (HAS_DOT)                                          \
            NAME(bf12_panel)(M, 1, r, k, x, ahead, c, ldc);        \
        break;
    switch (mr) {
        CASES
    }
#undef CASE
}

/* Columns [k0, k0 + n) of row i of r as bf16; what is beyond the row, to a whole block, as zeros. */
static TARGET void NAME(widen_row)(const struct NAME(bf12_rows) *r, int i, int64_t k0, int64_t n, int64_t ahead, char *to) {
    struct NAME(exponents) e = NAME(exponents_of)((uint8_t)word_at(r->words[i]));
    const char *p = r->p[i] + k0 / BF12_BLOCK * BF12_BYTES;
    for (int64_t k = 0; k < n; k += BF12_BLOCK, p += BF12_BYTES) {
        VEC v[BF12_STEPS * SUB];
        for (int64_t line = 0; line < BF12_BYTES; line += 64) __builtin_prefetch(p + ahead + line, 0, 2);
        NAME(widen)(p, &e, v);
        memcpy(to + 2 * k, v, sizeof v);
    }
    NAME(add_rare)(r->rare[i], r->num[i], k0, n, to);
}

/* Like tile, for W in bf12; x is PAIRS or DOT. scratch: SCRATCH_FLOATS. */
static TARGET void NAME(tile_bf12)(int order, const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0,
                                   int64_t count, const struct then *then, float *c, int64_t ldc,
                                   float *scratch) {
    struct NAME(bf12_rows) places[DOWN_TILE / NR], *r = places;
    int64_t vectors = vectors_of(order, w->k), bytes = bytes_ahead(w->row, NR);
    const char *end = w->data + slot * w->slot + (n0 + count) * w->row;
    struct walk k = {.row = 2 * KC, .step = 4 * LANES, .ldc = ldc, .groups = 1};
    NAME(bf12_places)(w, slot, n0, count, r);
    for (int64_t n = 0; n < count; n += NR, r++) {
        if (rows <= MR) {
            struct ahead ahead = ahead_of(r->p[0], end, w->row, NR, 64, then);
            NAME(any_bf12_panel)(rows, order == DOT, r, w->k, x, ahead, c + n, ldc);
            continue;
        }
        for (int64_t k0 = 0; k0 < w->k; k0 += KC) {
            int64_t width = least(KC, w->k - k0);
            for (int i = 0; i < NR; i++) NAME(widen_row)(r, i, k0, width, bytes, (char *)scratch + i * k.row);
            k.steps = (width + 2 * LANES - 1) / (2 * LANES), k.first = k0 == 0;
            for (int64_t m = 0; m < rows; m += MR) {
                int64_t mr = least(MR, rows - m);
                const float *from = x + (m * vectors + vectors_of(order, k0) * mr) * LANES;
                NAME(any_panel)(mr, order == DOT ? NAME(dotted) : BF16, from, (const char *)scratch, &k, c + m * ldc + n);
            }
        }
    }
}

/* ---- bf16 to bf12 ---- */

/* A row of k weights: its codes, and its words but for those of more rare weights than there is room for. Returns them. */
static TARGET int64_t NAME(short_row)(const uint16_t *v, int64_t k, int highest, int64_t room, char *codes, char *words) {
    int64_t num = 0;
    for (int64_t k0 = 0; k0 < k; k0 += BF12_BLOCK, codes += BF12_BYTES) {
        uint16_t last[BF12_BLOCK] = {0};
        int64_t n = least(BF12_BLOCK, k - k0);
        if (n < BF12_BLOCK) memcpy(last, v + k0, (size_t)n * 2);
        if (!NAME(narrow)(n < BF12_BLOCK ? last : v + k0, highest, codes)) continue;
        for (int64_t i = k0; i < k0 + n; i++) {
            uint32_t e = v[i] >> 7 & 255, word = e + 256 * (uint32_t)i;
            if (!e || (uint32_t)(highest - (int)e) < 15) continue;
            if (num++ < room) memcpy(words + 4 * num, &word, 4);
        }
    }
    uint32_t first = (uint32_t)highest + 256 * (uint32_t)num, none = 0;
    memcpy(words, &first, 4);
    for (int64_t i = num; i < room; i++) memcpy(words + 4 + 4 * i, &none, 4);
    return num;
}

/* The highest of the 15 neighbours that most of a row's weights have; of several the highest. */
static int NAME(best_highest)(const uint16_t *v, int64_t k) {
    uint32_t count[256] = {0}, inside = 0, most = 0;
    int best = 14;
    for (int64_t i = 0; i < k; i++) count[v[i] >> 7 & 255]++;
    count[0] = 0;
    for (int e = 0; e < 256; e++) {
        inside += count[e] - (e < 15 ? 0 : count[e - 15]);
        if (e >= 14 && inside >= most) most = inside, best = e;
    }
    return best;
}

/* n rows of bf16. The highest exponent of a row is its own highest unless more are rare then than there is room for. words
 * of row i: row i / parts of part i % parts. Returns how many rows have more than that. */
static TARGET int64_t NAME(shorten)(const char *from, int64_t n, int64_t k, int64_t parts, int64_t room, char *codes,
                                    char *words) {
    int64_t over = 0, bytes = (k + BF12_BLOCK - 1) / BF12_BLOCK * BF12_BYTES;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t *v = (const uint16_t *)(const void *)(from + 2 * i * k);
        char *own = words + 4 * (1 + room) * (i % parts * (n / parts) + i / parts);
        uint16_t most = 0;
        for (int64_t j = 0; j < k; j++) {
            uint16_t e = v[j] & 0x7f80;
            most = e > most ? e : most;
        }
        int64_t num = NAME(short_row)(v, k, most >> 7, room, codes + i * bytes, own);
        if (num > room) num = NAME(short_row)(v, k, NAME(best_highest)(v, k), room, codes + i * bytes, own);
        over += num > room;
    }
    return over;
}
