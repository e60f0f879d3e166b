/* Products of packed x and W stored as codes (kernels/formats.py), compiled once per instruction set, after cpu_panel.h.
 *
 * Codes become numbers in registers. Elements that share a scale (a span) are summed first, lane by lane, and the sum times
 * the scale is added to the lane's total: acc = fma(sum of x * (value - zero), scale, acc). Two orders (cpu_experts.h):
 *
 *   NATURAL  an element a byte: spans of 16 to KC elements, which have one scale
 *   EIGHTS   an element a nibble: spans of 128, of which a lane has 8 neighbours and, where groups are smaller, its own scale
 *
 * Few rows of x read codes where they lie; more read them decoded into scratch, with the same sums. The end of a row that
 * fills no vector is copied, padded, and summed apart. Columns that are grouped otherwise (act-order, odd groups) are
 * decoded into fp32 weights and multiplied as those are.
 *
 * The includer also defines VSUB, VSET (one float in all lanes), VPICK (lanes by index), TABLE (16 floats), CODE_NR and the
 * functions table_at, nibble, byte_e4m3, byte_int8, sum_codes.
 */

enum { NAME(decoded) = CODES }; /* beside the codes: fp32 values in scratch */

struct NAME(spans) { /* of the rows of one register block */
    const float *scale[CODE_NR], *zero[CODE_NR]; /* per_span floats a span */
    int64_t per_span, vectors, last;             /* vectors of 16 elements in a span, and in the last one of a walk */
    int32_t lane[LANES];                         /* EIGHTS: which of the floats is this lane's */
    TABLE table[CODE_NR];
};

/* Lanes u * WIDTH and on of vector j of a span at p. */
static inline __attribute__((always_inline)) TARGET VEC NAME(value)(int code, int wide, const char *p, int64_t j, int u,
                                                                   TABLE table) {
    if (code == E4M3) return NAME(byte_e4m3)(p, wide, j, u);
    if (code == INT8) return NAME(byte_int8)(p + j * LANES + u * WIDTH);
    if (code == NAME(decoded)) return VLOAD((const float *)(const void *)p + j * CODE_NR * LANES + u * WIDTH);
    return NAME(nibble)(p, (int)j, u, table);
}

static inline __attribute__((always_inline)) TARGET VEC NAME(of_span)(int by_lane, const float *from,
                                                                     const struct NAME(spans) *p, int u) {
    return by_lane ? VPICK(from, p->lane + u * WIDTH) : VSET(*from);
}

/* One span: acc[m][n] += scale * sum of x * (value - zero). */
static inline __attribute__((always_inline)) TARGET void NAME(span_of)(int mr, int code, int has_zero, int by_lane, int wide,
                                                                      const float *x, const char *w, int64_t row,
                                                                      int64_t vectors, const struct NAME(spans) *p,
                                                                      int64_t at, VEC acc[MR][CODE_NR][SUB]) {
#pragma GCC unroll 4
    for (int u = 0; u < SUB; u++) {
        VEC sum[MR][CODE_NR], zero[CODE_NR];
#pragma GCC unroll 8
        for (int n = 0; n < CODE_NR; n++) {
            zero[n] = !has_zero ? VZERO : NAME(of_span)(by_lane, p->zero[n] + at, p, u);
#pragma GCC unroll 8
            for (int m = 0; m < mr; m++) sum[m][n] = VZERO;
        }
#define VECTOR(j)                                                                                       \
    for (int n = 0; n < CODE_NR; n++) {                                                                 \
        VEC value = NAME(value)(code, wide, w + n * row, (j), u, p->table[n]);                          \
        if (has_zero) value = VSUB(value, zero[n]);                                                     \
        _Pragma("GCC unroll 8") for (int m = 0; m < mr; m++)                                            \
            sum[m][n] = VFMA(VLOAD(x + ((j) * mr + m) * LANES + u * WIDTH), value, sum[m][n]);          \
    }
        if (by_lane) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
#pragma GCC unroll 8
                VECTOR(j)
            }
        } else if (wide) {
            for (int64_t j = 0; j < vectors; j += 2) {
#pragma GCC unroll 8
                VECTOR(j)
#pragma GCC unroll 8
                VECTOR(j + 1)
            }
        } else {
            for (int64_t j = 0; j < vectors; j++) {
#pragma GCC unroll 8
                VECTOR(j)
            }
        }
#undef VECTOR
#pragma GCC unroll 8
        for (int n = 0; n < CODE_NR; n++) {
            VEC scale = NAME(of_span)(by_lane, p->scale[n] + at, p, u);
#pragma GCC unroll 8
            for (int m = 0; m < mr; m++) acc[m][n][u] = VFMA(sum[m][n], scale, acc[m][n][u]);
        }
    }
}

/* c[m][n] (+)= the sum over k->steps spans of CODE_NR rows of W; by_lane: EIGHTS. */
static inline __attribute__((always_inline)) TARGET void NAME(code_panel)(int mr, int code, int has_zero, int by_lane,
                                                                         const float *x, const char *w,
                                                                         const struct walk *k,
                                                                         const struct NAME(spans) *p, float *c) {
    int64_t row = k->row, ahead = k->ahead;
    VEC acc[MR][CODE_NR][SUB];
#pragma GCC unroll 8
    for (int m = 0; m < mr; m++)
#pragma GCC unroll 8
        for (int n = 0; n < CODE_NR; n++)
#pragma GCC unroll 8
            for (int u = 0; u < SUB; u++) acc[m][n][u] = VZERO;
    for (int64_t s = 0, at = 0; s < k->steps; s++, w += k->step, at += p->per_span) {
        int64_t vectors = by_lane ? 8 : s == k->steps - 1 ? p->last : p->vectors;
        if (ahead)
            for (int64_t b = 0; b < (by_lane ? 64 : vectors * LANES); b += 64)
#pragma GCC unroll 8
                for (int n = 0; n < CODE_NR; n++) __builtin_prefetch(w + n * row + b + ahead, 0, 2);
        if (code == E4M3 && vectors % 2 == 0)
            NAME(span_of)(mr, code, has_zero, by_lane, 1, x, w, row, vectors, p, at, acc);
        else
            NAME(span_of)(mr, code, has_zero, by_lane, 0, x, w, row, vectors, p, at, acc);
        x += vectors * mr * LANES;
    }
    NAME(sum_codes)(mr, acc, c, k->ldc, k->first);
}

static TARGET void NAME(any_code_panel)(int64_t mr, int code, int has_zero, int by_lane, const float *x, const char *w,
                                        const struct walk *k, const struct NAME(spans) *p, float *c) {
#define PANEL(M, CODE, ZERO, LANE) NAME(code_panel)(M, CODE, ZERO, LANE, x, w, k, p, c)
#define CASE(M)                                        \
    case M:                                            \
        if (code == NAME(decoded) && by_lane)          \
            PANEL(M, NAME(decoded), 0, 1);             \
        else if (code == NAME(decoded))                \
            PANEL(M, NAME(decoded), 0, 0);             \
        else if (by_lane && has_zero)                  \
            PANEL(M, INT4, 1, 1);                      \
        else if (by_lane)                              \
            PANEL(M, INT4, 0, 1);                      \
        else if (code == E4M3)                         \
            PANEL(M, E4M3, 0, 0);                      \
        else if (has_zero)                             \
            PANEL(M, INT8, 1, 0);                      \
        else                                           \
            PANEL(M, INT8, 0, 0);                      \
        break;
    switch (mr) {
        CASE(1)
#if MR >= 2
        CASE(2)
#endif
#if MR >= 3
        CASE(3)
#endif
#if MR >= 4
        CASE(4)
        CASE(5)
        CASE(6)
#endif
    }
#undef CASE
#undef PANEL
}

/* ---- scales and zero points ---- */

/* What all rows of one matrix have in common. */
struct NAME(plan) {
    int by_lane, is_fast;
    int64_t span, per_span, floats, unit; /* elements in a span; floats of a row; elements that vectors are made of */
};

static struct NAME(plan) NAME(plan_of)(const struct matrix *w) {
    const struct coding *q = &w->coding;
    int64_t columns = least(q->columns, w->k);
    int is_whole_row = q->columns >= w->k;
    struct NAME(plan) p = {.by_lane = is_nibble(q), .unit = is_nibble(q) ? 8 * LANES : LANES, .is_fast = codes_are_fast(w)};
    p.span = p.by_lane ? 8 * LANES : KC;
    if (!p.by_lane && !is_whole_row) p.span = least(columns & -columns, KC);
    p.per_span = p.by_lane && !is_whole_row && columns < p.span ? p.span / columns : 1;
    p.floats = (w->k + p.span - 1) / p.span * p.per_span;
    return p;
}

static TARGET void NAME(widen_scales)(int kind, const char *from, int64_t n, float factor, float *to) {
#define EACH(KIND)                                                                      \
    case KIND:                                                                          \
        for (int64_t i = 0; i < n; i++) to[i] = scale_to_float(KIND, from, i) * factor; \
        break;
    switch (kind) {
        EACH(F32)
        EACH(BF16)
        EACH(F16)
        EACH(E8M0)
        EACH(E4M3_SCALE)
        EACH(INT8_ZERO)
    }
#undef EACH
}

/* The scales or zero points of a row as the panels read them: p->floats, and room for LANES more that mean nothing. */
static TARGET void NAME(lay_out)(const struct NAME(plan) *p, const struct coding *q, int kind, const char *from,
                                 float factor, float *to) {
    int64_t gap = p->floats - q->groups;
    if (p->per_span > 1 || gap <= 0) { /* a group a float already */
        NAME(widen_scales)(kind, from, q->groups, factor, to);
        for (int64_t i = q->groups; i < p->floats; i++) to[i] = 0.0f; /* beyond K, where x is 0 */
        return;
    }
    NAME(widen_scales)(kind, from, q->groups, factor, to + gap); /* and then forwards, never over what is still needed */
    if (q->groups == 1)
        for (int64_t s = 0; s < p->floats; s++) to[s] = to[gap];
    else
        for (int64_t s = 0; s < p->floats; s++) to[s] = to[gap + s * p->span / q->columns];
}

/* Of row n of this slot; both stay as they are where the row before had the same. */
static TARGET void NAME(scales_of)(const struct NAME(plan) *p, const struct matrix *w, int64_t slot, int64_t n,
                                   float *scale, float *zero) {
    const struct coding *q = &w->coding;
    struct place at = place_of(w, slot, n);
    float factor = (q->factor ? at.factor : 1.0f) * (q->code == E4M3 ? 256.0f : 1.0f); /* byte_e4m3 is 2^-8 too small */
    NAME(lay_out)(p, q, (int)q->scale_kind, at.scale, factor, scale);
    if (q->zero) NAME(lay_out)(p, q, INT8_ZERO, at.zero, 1.0f, zero);
}

/* ---- one tile ---- */

enum { NAME(few_rows) = 3 * MR }; /* rows of x up to which codes are read where they lie (measured) */

/* Row n of a piece as [vectors][CODE_NR][16] floats, less its zero points. */
static TARGET void NAME(decode)(const struct NAME(plan) *p, const struct matrix *w, const struct NAME(spans) *s, int n,
                                const char *from, int64_t elements, float *to) {
    const struct coding *q = &w->coding;
    int64_t per_span = p->span / LANES, vectors = (elements + LANES - 1) / LANES;
    for (int64_t v = 0; v < vectors; v++) {
        int64_t at = v / per_span * p->per_span, j = v % per_span;
        const char *span = from + (p->by_lane ? v / 8 * 64 : (v - j) * LANES);
#pragma GCC unroll 4
        for (int u = 0; u < SUB; u++) {
            VEC value = p->by_lane        ? NAME(nibble)(span, (int)j, u, s->table[n])
                        : q->code == E4M3 ? NAME(byte_e4m3)(span, 0, j, u)
                                          : NAME(byte_int8)(span + j * LANES + u * WIDTH);
            if (q->zero) value = VSUB(value, NAME(of_span)(p->by_lane, s->zero[n] + at, s, u));
            memcpy(to + (v * CODE_NR + n) * LANES + u * WIDTH, &value, sizeof value);
        }
    }
}

struct NAME(job) { /* a tile; its pieces: whole spans of up to KC elements, then what is left of the row */
    struct NAME(plan) plan;
    const struct matrix *w;
    const float *x;
    int64_t rows, vectors, ldc;
};

struct NAME(piece) { /* elements [k0, k1) of CODE_NR rows of W */
    struct walk k;
    struct NAME(spans) s;
    const char *from;
    int64_t k0, elements; /* rounded up to whole vectors */
    char end[CODE_NR * 64];
};

/* base: of the first of `count` <= CODE_NR rows. */
static TARGET void NAME(begin)(struct NAME(piece) *e, const struct NAME(job) *t, const struct NAME(spans) *s,
                               const char *base, int64_t count, int64_t k0, int64_t k1) {
    const struct NAME(plan) *p = &t->plan;
    int64_t bits = p->by_lane ? 4 : 8, row = t->w->row, units = (k1 - k0 + p->unit - 1) / p->unit;
    e->k = (struct walk){.row = row, .step = p->span * bits / 8, .ldc = t->ldc, .first = k0 == 0};
    e->s = *s, e->k0 = k0, e->elements = units * p->unit, e->from = base + k0 * bits / 8;
    e->k.steps = (e->elements + p->span - 1) / p->span;
    e->s.vectors = p->span / LANES, e->s.last = (e->elements - (e->k.steps - 1) * p->span) / LANES;
    if (count < CODE_NR) e->k.row = 0; /* the first row again; nobody reads its result */
    if (e->elements != k1 - k0) {      /* the end of a row: less than a vector of codes, never read beyond */
        memset(e->end, 0, sizeof e->end);
        for (int64_t n = 0; n < count; n++) memcpy(e->end + n * 64, e->from + n * row, ((k1 - k0) * bits + 7) / 8);
        e->from = e->end, e->k.row = 64;
    }
    int64_t at = k0 / p->span * p->per_span;
    for (int n = 0; n < CODE_NR; n++) e->s.scale[n] += at, e->s.zero[n] += at;
}

static TARGET void NAME(block)(const struct NAME(job) *t, struct NAME(piece) *e, int code, int has_zero, int64_t m,
                               float *c) {
    int64_t mr = least(MR, t->rows - m);
    const float *x = t->x + (m * t->vectors + e->k0 / LANES * mr) * LANES;
    NAME(any_code_panel)(mr, code, has_zero, t->plan.by_lane, x, e->from, &e->k, &e->s, c + m * t->ldc);
}

/* Codes are read where they lie: CODE_NR rows of W, piece by piece, times all rows of x. */
static TARGET void NAME(straight)(const struct NAME(job) *t, const struct NAME(spans) *s, const char *base,
                                  int64_t count, float *c) {
    const struct coding *q = &t->w->coding;
    int code = t->plan.by_lane ? INT4 : (int)q->code;
    for (int64_t k0 = 0, k1, whole = t->w->k / t->plan.unit * t->plan.unit; k0 < t->w->k; k0 = k1) {
        struct NAME(piece) e;
        k1 = k0 < whole ? least(k0 + KC, whole) : t->w->k;
        NAME(begin)(&e, t, s, base, count, k0, k1);
        for (int64_t m = 0; m < t->rows; m += MR) {
            e.k.ahead = m ? 0 : CODE_NR * t->w->row > AHEAD ? CODE_NR * t->w->row : AHEAD;
            NAME(block)(t, &e, code, q->zero != NULL, m, c);
        }
    }
}

/* Codes are decoded first: a piece of all rows of W, times block by block of x. s: of every CODE_NR rows. */
static TARGET void NAME(by_decoding)(const struct NAME(job) *t, const struct NAME(spans) *s, const char *base,
                                     int64_t count, float *c, float *decoded) {
    for (int64_t k0 = 0, k1, whole = t->w->k / t->plan.unit * t->plan.unit; k0 < t->w->k; k0 = k1) {
        struct NAME(piece) e[DOWN_TILE / CODE_NR];
        k1 = k0 < whole ? least(k0 + KC, whole) : t->w->k;
        for (int64_t n = 0; n < count; n += CODE_NR) {
            struct NAME(piece) *now = e + n / CODE_NR;
            float *to = decoded + n * KC;
            NAME(begin)(now, t, s + n / CODE_NR, base + n * t->w->row, least(CODE_NR, count - n), k0, k1);
            for (int i = 0; i < CODE_NR; i++)
                NAME(decode)(&t->plan, t->w, &now->s, i, now->from + i * now->k.row, now->elements, to);
            now->from = (const char *)to, now->k.row = LANES * 4, now->k.step = t->plan.span * CODE_NR * 4;
        }
        for (int64_t m = 0; m < t->rows; m += MR)
            for (int64_t n = 0; n < count; n += CODE_NR)
                NAME(block)(t, e + n / CODE_NR, NAME(decoded), 0, m, c + n);
    }
}

/* Like tile, for W stored as codes that are fast. */
static TARGET void NAME(tile_codes)(const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0,
                                    int64_t count, float *c, int64_t ldc, float *scratch) {
    const struct coding *q = &w->coding;
    struct NAME(job) t = {NAME(plan_of)(w), w, x, rows, vectors_of(is_nibble(q) ? EIGHTS : NATURAL, w->k), ldc};
    const char *base = w->data + slot * w->slot + n0 * w->row;
    int64_t room = t.plan.floats + LANES;
    int decodes = rows > NAME(few_rows) && 2 * room * DOWN_TILE <= CODE_FLOATS;
    float *scales = scratch + DOWN_TILE * KC; /* CODE_FLOATS */
    struct NAME(spans) all[DOWN_TILE / CODE_NR];
    for (int64_t n = 0; n < count; n += CODE_NR) {
        struct NAME(spans) *s = all + n / CODE_NR;
        s->per_span = t.plan.per_span;
        for (int i = 0; i < LANES; i++) s->lane[i] = (int32_t)(i * t.plan.per_span / LANES);
        for (int64_t i = 0; i < CODE_NR; i++) {
            int64_t row = n0 + least(n + i, count - 1);
            float *scale = scales + ((decodes ? n : 0) + i) * 2 * room;
            s->scale[i] = scale, s->zero[i] = scale + room;
            NAME(scales_of)(&t.plan, w, slot, row, scale, scale + room);
            if (is_nibble(q)) s->table[i] = NAME(table_at)(place_of(w, slot, row).table);
        }
        if (!decodes) NAME(straight)(&t, s, base + n * w->row, least(CODE_NR, count - n), c + n);
    }
    if (decodes) NAME(by_decoding)(&t, all, base, count, c, scratch);
}
