/* Products of packed x and W in nested precision (kernels/nested.py), compiled once per instruction set, after cpu_codes.h.
 *
 * Sixteen columns at a time become fp32 weights in registers, in the order NATURAL: the weights, and the sums, of a matrix
 * of floats. Few rows of x read the planes where they lie; more read them decoded into scratch. Whole blocks of 256 columns
 * lie so that a load brings fields of 128 columns, and a shift the next 16; the columns after them lie one by one.
 *
 * The includer also defines struct NAME(group), what makes numbers of the codes of columns that share their scales, and
 * NAME(group_of), which makes it; of lanes u * WIDTH and on struct NAME(fields), the codes of half a block's eight vectors,
 * NAME(fields_of), which loads them, and NAME(next_nested), which makes weights of the next vector; of columns after the
 * blocks NAME(nested), of the v-th vector from the plane's beginning.
 */

enum { NAME(nested_block) = 16 }; /* vectors */

/* Rows of x up to which planes are read where they lie (measured). */
SCALAR int64_t NAME(few_nested)(int level) { return level < 4 ? 4 * MR : level == 4 ? 3 * MR : MR; }

struct NAME(nested) { /* one slot of a matrix */
    const struct matrix *w;
    int level;
    const char *plane[4], *scale[4]; /* of row 0 */
    int64_t row[4];                  /* bytes of a plane */
};

struct NAME(nested_rows) { /* NR rows of W, of each the planes of 2, 3, 4 and 8 bits */
    const char *plane[4 * NR], *tail[4 * NR]; /* tail: of the last columns, padded to 16 */
    const float *scale[NR];                 /* [4][apart] */
    char padded[4 * NR][8];
};

static struct NAME(nested) NAME(nested_of)(const struct matrix *w, int64_t slot) {
    static const int8_t bits[4] = {2, 1, 1, 4}, levels[4] = {2, 3, 4, 8};
    const struct coding *q = &w->coding;
    struct NAME(nested) p = {.w = w, .level = 2};
    int32_t said;
    memcpy(&said, q->residual[0] + slot * q->residual_slot[0], 4);
    p.plane[0] = w->data + slot * w->slot, p.scale[0] = q->scale + slot * q->scale_slot, p.row[0] = w->row;
    for (int i = 1; i < 4 && levels[i] <= said && q->residual[2 * i - 1]; i++) {
        p.level = levels[i], p.row[i] = (w->k * bits[i] + 7) / 8;
        p.plane[i] = q->residual[2 * i - 1] + slot * q->residual_slot[2 * i - 1];
        p.scale[i] = q->residual[2 * i] + slot * q->residual_slot[2 * i];
    }
    return p;
}

/* `count` scales of each plane in fp32 from the one at `at` on; to: [4][apart]. */
static TARGET void NAME(nested_scales)(const struct NAME(nested) *p, int64_t at, int64_t count, float *restrict to,
                                       int64_t apart) {
    NAME(widen_scales)(F16, p->scale[0] + 2 * at, count, 1.0f, to);
    for (int j = 1; j <= 2; j++)
        if (p->scale[j]) {
            const uint8_t *restrict from = (const uint8_t *)p->scale[j] + at;
            float *restrict own = to + j * apart;
            for (int64_t i = 0; i < count; i++) own[i] = to[i] * ((float)from[i] * 0.00390625f);
        }
    if (p->scale[3]) NAME(widen_scales)(F16, p->scale[3] + 2 * at, count, 1.0f, to + 3 * apart);
}

/* Rows n0 to n0 + count, NR to an element of r; the last stand for those that do not exist. to: [4][count * groups]. */
static TARGET void NAME(nested_places)(const struct NAME(nested) *p, int64_t n0, int64_t count,
                                       struct NAME(nested_rows) *r, float *to) {
    static const int8_t bytes[4] = {4, 2, 2, 8}; /* of 16 columns */
    const struct coding *q = &p->w->coding;
    int64_t rows = p->w->n / q->parts, groups = q->groups, whole = p->w->k / LANES;
    if (!q->interleaved) NAME(nested_scales)(p, n0 * groups, count * groups, to, count * groups);
    for (int64_t i = 0; q->interleaved && i < count; i++) {
        int64_t n = n0 + i, at = (n % q->parts * rows + n / q->parts) * groups;
        NAME(nested_scales)(p, at, groups, to + i * groups, count * groups);
    }
    for (int64_t i = 0; i < (count + NR - 1) / NR * NR; i++) {
        struct NAME(nested_rows) *of = r + i / NR;
        int64_t own = least(i, count - 1);
        of->scale[i % NR] = to + own * groups;
        for (int j = 0; j < 4 && p->plane[j]; j++) {
            const char *from = p->plane[j] + (n0 + own) * p->row[j];
            int64_t place = i % NR * 4 + j;
            of->plane[place] = from, of->tail[place] = of->padded[place];
            if (p->w->k == whole * LANES) continue;
            memset(of->padded[place], 0, 8);
            memcpy(of->padded[place], from + whole * bytes[j], (size_t)(p->row[j] - whole * bytes[j]));
        }
    }
}

/* To L1 the scales of the `count` rows after those from n0 on: see next_scales of cpu_codes.h. */
SCALAR void NAME(next_nested_scales)(const struct NAME(nested) *p, int64_t n0, int64_t count) {
    const struct coding *q = &p->w->coding;
    int64_t parts = q->interleaved ? q->parts : 1, rows = p->w->n / parts, num = count / parts * q->groups;
    for (int64_t i = 0; i < parts; i++)
        for (int j = 0; j < 4 && p->scale[j]; j++) {
            int64_t size = j % 3 ? 1 : 2; /* bytes of a scale */
            const char *next = p->scale[j] + size * ((i * rows + n0 / parts) * q->groups + num);
            for (int64_t b = 0; b < size * num; b += 64) __builtin_prefetch(next + b, 0, 3);
        }
}

static inline __attribute__((always_inline)) TARGET struct NAME(group) NAME(group_at)(int level, const float *scale,
                                                                                     int64_t apart) {
    return NAME(group_of)(level, scale[0], level < 3 ? 0 : scale[apart], level < 4 ? 0 : scale[2 * apart],
                          level < 8 ? 0 : scale[3 * apart]);
}

/* To L2 what is `ahead` bytes of two bits beyond the v-th vector of NR rows. */
SCALAR TARGET void NAME(look_ahead)(int level, const char *const *plane, int64_t v, int64_t ahead) {
    UNROLL(8)
    for (int n = 0; n < NR; n++, plane += 4) {
        __builtin_prefetch(plane[0] + 4 * v + ahead, 0, 2);
        if (level >= 3) __builtin_prefetch(plane[1] + 2 * v + ahead / 2, 0, 2);
        if (level >= 4) __builtin_prefetch(plane[2] + 2 * v + ahead / 2, 0, 2);
        if (level >= 8) __builtin_prefetch(plane[3] + 8 * v + 2 * ahead, 0, 2);
    }
}

/* c[m][n] = x row m times row n of r. */
static inline __attribute__((always_inline)) TARGET void NAME(nested_panel)(int mr, int level,
                                                                           const struct NAME(nested) *p,
                                                                           const struct NAME(nested_rows) *r,
                                                                           int64_t apart, const float *x, int64_t ahead,
                                                                           float *c, int64_t ldc) {
    int64_t k = p->w->k, whole = k / LANES, vectors = (k + LANES - 1) / LANES, columns = p->w->coding.columns;
    int64_t blocks = whole / NAME(nested_block) * NAME(nested_block); /* vectors of whole blocks */
    int64_t per_group = columns >= k ? vectors : columns / LANES;
    for (int64_t v = 0, group = 0, left = per_group, first = 1; v < vectors; first = 0) {
        int64_t end = least(v + KC / LANES, vectors);
        VEC acc[MR][NR][SUB];
        struct NAME(group) g[NR];
        NO_SUMS(acc, mr, NR)
#define STEP(value)                                                                    \
    UNROLL(4)                                                                          \
    for (int u = 0; u < SUB; u++)                                                      \
        UNROLL(8)                                                                      \
        for (int n = 0; n < NR; n++) {                                                 \
            VEC w = value;                                                             \
            UNROLL(8)                                                                  \
            for (int m = 0; m < mr; m++)                                               \
                acc[m][n][u] = VFMA(VLOAD(x + m * LANES + u * WIDTH), w, acc[m][n][u]); \
        }
#define GROUPS   \
    UNROLL(8)    \
    for (int n = 0; n < NR; n++) g[n] = NAME(group_at)(level, r->scale[n] + group, apart);
        while (v < least(end, blocks)) {
            int64_t block = v / NAME(nested_block), half = v / (NAME(nested_block) / 2) % 2, stop = v + NAME(nested_block) / 2;
            struct NAME(fields) f[NR][SUB];
            UNROLL(8)
            for (int n = 0; n < NR; n++)
                UNROLL(8)
                for (int u = 0; u < SUB; u++) f[n][u] = NAME(fields_of)(level, r->plane + 4 * n, block, (int)half, u);
            if (ahead) NAME(look_ahead)(level, r->plane, v, ahead);
            while (v < stop) {
                int64_t some = least(left, stop - v);
                GROUPS
                for (int64_t i = 0; i < some; i++, x += mr * LANES) { STEP(NAME(next_nested)(level, &f[n][u], &g[n])) }
                v += some, left -= some;
                if (left == 0) group++, left = per_group;
            }
        }
        while (v < end) {
            int64_t some = least(left, v < whole ? least(end, whole) - v : 1), at = v < whole ? v : 0;
            const char *const *plane = v < whole ? r->plane : r->tail;
            GROUPS
            if (ahead) NAME(look_ahead)(level, plane, at, ahead);
            for (int64_t i = at; i < at + some; i++, x += mr * LANES) { STEP(NAME(nested)(level, plane + 4 * n, i, u, &g[n])) }
            v += some, left -= some;
            if (left == 0) group++, left = per_group;
        }
#undef GROUPS
#undef STEP
        NAME(add_lanes)(mr, acc, c, ldc, first);
    }
}

static TARGET void NAME(any_nested_panel)(int64_t mr, const struct NAME(nested) *p, const struct NAME(nested_rows) *r,
                                          int64_t apart, const float *x, int64_t ahead, float *c, int64_t ldc) {
#define CASE(M)                                                           \
    case M:                                                               \
        if (p->level == 2)                                                \
            NAME(nested_panel)(M, 2, p, r, apart, x, ahead, c, ldc);      \
        else if (p->level == 3)                                           \
            NAME(nested_panel)(M, 3, p, r, apart, x, ahead, c, ldc);      \
        else if (p->level == 4)                                           \
            NAME(nested_panel)(M, 4, p, r, apart, x, ahead, c, ldc);      \
        else                                                              \
            NAME(nested_panel)(M, 8, p, r, apart, x, ahead, c, ldc);      \
        break;
    switch (mr) {
        CASES
    }
#undef CASE
}

/* The i-th row of r as k fp32 weights. */
static inline __attribute__((always_inline)) TARGET void NAME(nested_row)(int level, const struct NAME(nested) *p,
                                                                         const struct NAME(nested_rows) *r, int n,
                                                                         int64_t apart, float *to) {
    int64_t k = p->w->k, whole = k / LANES, columns = p->w->coding.columns, half = NAME(nested_block) / 2;
    int64_t blocks = whole / NAME(nested_block) * NAME(nested_block), per_group = columns >= k ? whole + 1 : columns / LANES;
    struct NAME(fields) f[SUB] = {0};
    for (int64_t v = 0, group = 0; v * LANES < k; group++) {
        struct NAME(group) g = NAME(group_at)(level, r->scale[n] + group, apart);
        int64_t end = v + per_group;
        for (; v < least(end, whole); v++, to += LANES)
            UNROLL(4)
            for (int u = 0; u < SUB; u++) {
                if (v < blocks && v % half == 0)
                    f[u] = NAME(fields_of)(level, r->plane + 4 * n, v / NAME(nested_block), v % NAME(nested_block) != 0, u);
                VEC w = v < blocks ? NAME(next_nested)(level, &f[u], &g) : NAME(nested)(level, r->plane + 4 * n, v, u, &g);
                memcpy(to + u * WIDTH, &w, sizeof w);
            }
        if (v == end || v * LANES >= k) continue;
        VEC w[SUB];
        for (int u = 0; u < SUB; u++) w[u] = NAME(nested)(level, r->tail + 4 * n, 0, u, &g);
        memcpy(to, w, (size_t)(k - v * LANES) * 4);
        v++;
    }
}

static TARGET void NAME(any_nested_row)(const struct NAME(nested) *p, const struct NAME(nested_rows) *r, int n,
                                        int64_t apart, float *to) {
    if (p->level == 2)
        NAME(nested_row)(2, p, r, n, apart, to);
    else if (p->level == 3)
        NAME(nested_row)(3, p, r, n, apart, to);
    else if (p->level == 4)
        NAME(nested_row)(4, p, r, n, apart, to);
    else
        NAME(nested_row)(8, p, r, n, apart, to);
}

/* Like tile, for W in nested precision; x is NATURAL. scratch: SCRATCH_FLOATS. */
static TARGET void NAME(tile_nested)(const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0,
                                     int64_t count, float *c, int64_t ldc, float *scratch) {
    struct NAME(nested) p = NAME(nested_of)(w, slot);
    struct NAME(nested_rows) r[DOWN_TILE / NR];
    int is_few = rows <= NAME(few_nested)(p.level);
    float *decoded = scratch + DOWN_TILE * KC; /* what is before it is free until a tile is multiplied */
    int64_t vectors = vectors_of(NATURAL, w->k), ahead = NR * w->row > AHEAD / 4 ? NR * w->row : AHEAD / 4;
    int64_t most = is_few ? SCRATCH_FLOATS / (4 * w->coding.groups) : CODE_FLOATS / w->k; /* rows that there is room for */
    if (most >= NR) most = most / NR * NR;
    for (int64_t i = 0, some; i < count; i += some, c += some) {
        some = least(most, count - i);
        int64_t apart = some * w->coding.groups;
        NAME(nested_places)(&p, n0 + i, some, r, scratch);
        NAME(next_nested_scales)(&p, n0 + i, some);
        if (is_few) {
            for (int64_t n = 0; n < some; n += NR)
                for (int64_t m = 0; m < rows; m += MR)
                    NAME(any_nested_panel)(least(MR, rows - m), &p, r + n / NR, apart, x + m * vectors * LANES,
                                           m ? 0 : ahead, c + m * ldc + n, ldc);
            continue;
        }
        struct matrix plain = {.data = (const char *)decoded, .row = w->k * 4, .n = some, .k = w->k, .kind = F32};
        for (int64_t n = 0; n < some; n++) NAME(any_nested_row)(&p, r + n / NR, (int)(n % NR), apart, decoded + n * w->k);
        NAME(tile)(NATURAL, x, rows, &plain, plain.data, 0, some, &NOTHING, c, ldc, scratch);
    }
}
