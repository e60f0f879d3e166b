/* Products of packed x and W stored as codes (kernels/formats.py), compiled once per instruction set, after cpu_panel.h.
 *
 * Codes become numbers in registers. Elements that share a scale (a span) are summed first, lane by lane, and the sum times
 * the scale is added to the lane's total: acc = fma(sum of x * (value - zero), scale, acc). Two orders (cpu_experts.h):
 *
 *   HALVES   an element a byte: spans of 32 to KC elements, which have one scale
 *   NATURAL  likewise, where groups are no multiples of 32: spans of 16
 *   EIGHTS   an element a nibble: spans of 128, of which a lane has 8 neighbours and, where groups are smaller, its own scale
 *   DOT8, DOT16   the same sums of both, two elements an instruction: x and the values of the codes are bf16
 *
 * Few rows of x read codes where they lie; more read them decoded into scratch, with the same sums. The end of a row that
 * fills no vector is copied, padded, and summed apart. Columns that are grouped otherwise (act-order, odd groups) are
 * decoded into fp32 weights and multiplied as those are.
 *
 * The includer also defines VSUB, VSET (one float in all lanes), VPICK (lanes by index), TABLE (16 floats), CODE_NR (rows of W
 * at once) and the functions table_at, nibble, byte_e4m3, byte_int8; and may define what follows.
 */
#ifndef CODE_SUB
#define CODE_SUB 1 /* of the SUB vectors of 16 lanes, how many at once */
#endif
#ifndef HAS_NIBBLES
#define HAS_NIBBLES 0 /* nibble is told which code it reads, else LUT4, by a table */
#endif
#ifndef NO_NUMBER /* codes that are no numbers are looked for apart, or never: then FINITE_E4M3 sees to them */
#define NO_NUMBER(p, n) 0
#define FINITE_E4M3(p, half, u) NAME(byte_e4m3)(p, half, u)
#endif
#ifndef SUM_CODES
#define SUM_CODES NAME(sum_codes)
#endif

/* Beside the codes: fp32 values in scratch; and of DOT8 and DOT16, which are all beyond it. */
enum { NAME(decoded) = CODES, NAME(dot_nibble), NAME(dot_int8), NAME(dot_e4m3), NAME(dot_decoded) };
/* Rows of x up to which codes are read where they lie, again for every MR of them (measured: int8, fp8 and nibbles in
 * lines take 0.60, 0.69 and 0.73 x as long so at 24 rows, 0.85, 0.97 and 0.91 x at 64). */
enum { NAME(few_rows) = 3 * MR };
#ifdef VAT
enum { NAME(few_byte_rows) = 12 * MR, NAME(few_line_rows) = 12 * MR };
#else
enum { NAME(few_byte_rows) = 3 * MR };
#endif

struct NAME(codes) { /* what all rows of a matrix have in common */
    const struct matrix *w;
    int by_lane, code, decoded; /* code: as any_code_panel takes it; decoded: in scratch */
    int in_pairs;               /* bytes: HALVES or DOT16 */
    int64_t unit, span, bits; /* elements that vectors are made of, and that share their scales; bits of one */
    int64_t per_span, floats; /* scales from span to span; of a row */
    int64_t lane_step;        /* elements of x in a lane of a vector: 2 in DOT8 and DOT16, else 1 */
    int32_t lane[LANES];      /* EIGHTS: which of a span's scales is this lane's */
    VEC lookup[4];            /* DOT16: bytes of what e4m3's codes are in bf16 */
};

struct NAME(rows) { /* of CODE_NR rows of W: a scale (EIGHTS: up to 8) a span, zero points likewise, values of nibbles */
    const float *scale[CODE_NR], *zero[CODE_NR], *table[CODE_NR];
};

struct NAME(sum) { /* over elements [0, n) of those rows, whole vectors; groups of CODE_NR rows; strides in bytes */
    int64_t n, row, step, first, ldc, groups, group;
    const char *end; /* of the tile */
    const struct then *then; /* NULL: nothing is prefetched */
};

/* Lanes u * WIDTH and on of vector j of a span at p. half: 1 and 2 are the vectors j and j + 1 of a pair, 0 is neither. */
static inline __attribute__((always_inline)) TARGET VEC NAME(value)(int code, int half, const char *p, int64_t j, int u,
                                                                   TABLE table) {
    if (code == E4M3) return FINITE_E4M3(p + j * LANES, half, u);
    if (half == 2) j++;
    if (code == INT8) return NAME(byte_int8)(p + j * LANES + u * WIDTH);
    if (code == NAME(decoded)) return VLOAD((const float *)(const void *)p + j * CODE_NR * LANES + u * WIDTH);
    return NAME(nibble)(code, p, EIGHTH((int)j), u, table);
}

/* The j-th vector of a span of DOT8 or DOT16, where SUB is 1. */
SCALAR TARGET VEC NAME(two_values)(int code, int has_zero, const char *p, int64_t j, VEC zero, TABLE table) {
    (void)has_zero, (void)table; /* of sets without them */
    if (code == NAME(dot_decoded)) return VLOAD((const float *)(const void *)p + j * CODE_NR * LANES);
    if (code == NAME(dot_nibble)) {
        VEC line = VLOAD((const float *)(const void *)p);
        return has_zero ? VLESS_ZERO(line, j, zero) : VNIBBLES(line, j, table);
    }
    VEC low, high;
    p += 2 * j * LANES;
    if (code == NAME(dot_e4m3))
        low = NAME(byte_e4m3)(p, 1, 0), high = NAME(byte_e4m3)(p, 2, 0);
    else
        low = VSUB(NAME(byte_int8)(p), zero), high = VSUB(NAME(byte_int8)(p + LANES), zero);
    (void)low, (void)high;
    return VTWO(low, high);
}

/* The j-th and the next, of bytes a line. lookup: of e4m3. */
SCALAR TARGET void NAME(four_values)(int code, int has_zero, const char *p, int64_t j, VEC zero, TABLE table,
                                     const VEC *lookup, VEC to[2]) {
    (void)lookup;
    if (code == NAME(dot_e4m3))
        VLINE_E4M3(p + 2 * j * LANES, lookup, to);
    else
        for (int i = 0; i < 2; i++) to[i] = NAME(two_values)(code, has_zero, p, j + i, zero, table);
}

static inline __attribute__((always_inline)) TARGET VEC NAME(of_span)(int by_lane, const float *from,
                                                                     const int32_t *lane, int u) {
    return by_lane ? VPICK(from, lane + u * WIDTH) : VSET(*from);
}

/* One span: acc[m][n] += scale * sum of x * (value - zero). at: its first scale. */
static inline __attribute__((always_inline)) TARGET void NAME(add_span)(int mr, int code, int has_zero, int by_lane,
                                                                       const float *x, const char *w, int64_t row,
                                                                       int64_t vectors,
                                                                       const struct NAME(rows) *r, const int32_t *lane,
                                                                       int64_t at, struct ahead *ahead, int in_pairs,
                                                                       const TABLE *table, const VEC *lookup,
                                                                       VEC acc[MR][CODE_NR][SUB]) {
    const int some = code == E4M3 ? 1 : CODE_SUB; /* as many sums at once as hide how long one takes */
    for (int u0 = 0; u0 < SUB; u0 += some) {
        VEC sum[MR][CODE_NR][CODE_SUB], zero[CODE_NR][CODE_SUB];
        UNROLL(8)
        for (int n = 0; n < CODE_NR; n++)
            UNROLL(4)
            for (int u = 0; u < some; u++) {
                zero[n][u] = has_zero ? NAME(of_span)(by_lane, r->zero[n] + at, lane, u0 + u) : VZERO;
                UNROLL(8)
                for (int m = 0; m < mr; m++) sum[m][n][u] = VZERO;
            }
#define VECTOR(j, half)                                                                                                 \
    UNROLL(4)                                                                                                           \
    for (int u = 0; u < some; u++)                                                                                  \
        UNROLL(8)                                                                                                       \
        for (int n = 0; n < CODE_NR; n++) {                                                                             \
            VEC value = NAME(value)(code, half, w + n * row, (j), u0 + u, table[n]);                                    \
            if (has_zero) value = VSUB(value, zero[n][u]);                                                              \
            UNROLL(8)                                                                                                   \
            for (int m = 0; m < mr; m++)                                                                                \
                sum[m][n][u] =                                                                                          \
                    VFMA(VLOAD(x + (((j) + half / 2) * mr + m) * LANES + (u0 + u) * WIDTH), value, sum[m][n][u]);       \
            if (code == INT8) IN_ORDER; /* of others nothing was gained */                                              \
        }
#define PREFETCH                                                     \
    if (u0 == 0 && ahead->at) {                                      \
        UNROLL(8)                                                    \
        for (int n = 0; n < CODE_NR; n++)                            \
            if (ahead->past_l2)                                      \
                __builtin_prefetch(ahead->at + n * ahead->row, 0, 0); \
            else                                                     \
                __builtin_prefetch(ahead->at + n * ahead->row, 0, 2); \
        ahead->at += ahead->step;                                    \
    }                                                                \
    if (code == INT8) IN_ORDER;
        int64_t j = 0;
#define ADD_DOT(j, value)                   \
    UNROLL(8)                               \
    for (int m = 0; m < mr; m++) sum[m][n][0] = VDOT(sum[m][n][0], VLOAD(x + ((j) * mr + m) * LANES), value);
#define TWO(j)                                                                                                \
    UNROLL(8)                                                                                                 \
    for (int n = 0; n < CODE_NR; n++) {                                                                       \
        VEC value = NAME(two_values)(code, has_zero, w + n * row, (j), zero[n][0], table[n]);                  \
        (void)value; /* of sets without VDOT */                                                               \
        ADD_DOT(j, value)                                                                                       \
    }
        if (code > NAME(decoded) && by_lane) {
            if (code == NAME(dot_nibble)) { PREFETCH }
            VEC line[CODE_NR], value[CODE_NR];
            UNROLL(8)
            for (int n = 0; n < CODE_NR; n++) line[n] = VLOAD((const float *)(const void *)(w + n * row));
            UNROLL(4)
            for (int i = 0; i < 4; i++) {
                UNROLL(8)
                for (int n = 0; n < CODE_NR; n++)
                    if (code == NAME(dot_decoded))
                        value[n] = NAME(two_values)(code, 0, w + n * row, i, zero[n][0], table[n]);
                    else if (has_zero)
                        value[n] = VLESS_ZERO(line[n], i, zero[n][0]);
                    else
                        value[n] = VNIBBLES(line[n], 0, table[n]), line[n] = VNEXT(line[n]);
                UNROLL(8)
                for (int m = 0; m < mr; m++) { /* of each row of x a vector is loaded once */
                    VEC xv = VLOAD(x + (i * mr + m) * LANES);
                    (void)xv; /* of sets without VDOT */
                    UNROLL(8)
                    for (int n = 0; n < CODE_NR; n++) sum[m][n][0] = VDOT(sum[m][n][0], xv, value[n]);
                }
            }
            j = vectors;
        } else if (code > NAME(decoded)) {
            int64_t i = 0;
            for (; i + 2 <= vectors / 2; i += 2) {
                if (code != NAME(dot_decoded)) { PREFETCH }
                UNROLL(8)
                for (int n = 0; n < CODE_NR; n++) {
                    VEC value[2];
                    NAME(four_values)(code, has_zero, w + n * row, i, zero[n][0], table[n], lookup, value);
                    ADD_DOT(i, value[0]) ADD_DOT(i + 1, value[1])
                }
            }
            if (i < vectors / 2) { TWO(i) }
            j = vectors;
        } else if (by_lane) {
            PREFETCH
            UNROLL(8)
            for (int i = 0; i < 8; i++) { VECTOR(i, 0) }
            j = vectors;
        }
        for (; j + 4 <= vectors; j += 4) { /* a line of codes of each row */
            if (code != NAME(decoded)) { PREFETCH }
            if (in_pairs) {
                VECTOR(j, 2) VECTOR(j, 1) VECTOR(j + 2, 2) VECTOR(j + 2, 1)
            } else {
                VECTOR(j, 1) VECTOR(j, 2) VECTOR(j + 2, 1) VECTOR(j + 2, 2)
            }
        }
        if (in_pairs && j < vectors) {
            VECTOR(j, 2) VECTOR(j, 1)
            j = vectors;
        }
        for (; j < vectors; j++) { VECTOR(j, 0) }
#undef PREFETCH
#undef VECTOR
#undef TWO
#undef ADD_DOT
        UNROLL(4)
        for (int u = 0; u < some; u++)
            UNROLL(8)
            for (int n = 0; n < CODE_NR; n++) {
                VEC scale = NAME(of_span)(by_lane, r->scale[n] + at, lane, u0 + u);
                UNROLL(8)
                for (int m = 0; m < mr; m++) acc[m][n][u0 + u] = VFMA(sum[m][n][u], scale, acc[m][n][u0 + u]);
            }
    }
}

/* c[m][n] (+)= x row m times a row of W, group by group of rows, in chunks of KC. at: the scale of the first span. */
static inline __attribute__((always_inline)) TARGET void NAME(code_panel)(int mr, int code, int has_zero, int by_lane,
                                                                         const struct NAME(codes) *q,
                                                                         const struct NAME(sum) *k, const float *x0,
                                                                         const char *w0, const struct NAME(rows) *r,
                                                                         int64_t at0, float *c) {
    int64_t row = k->row, step = k->step, per_span = q->per_span, whole = q->span / LANES;
    const VEC lookup[4] = {q->lookup[0], q->lookup[1], q->lookup[2], q->lookup[3]};
    for (int64_t g = 0; g < k->groups; g++, w0 += k->group, r++, c += CODE_NR) {
        const float *x = x0;
        const char *w = w0;
        struct ahead ahead = {0};
        if (k->then) ahead = ahead_of(w0, k->end, row, CODE_NR, 64, k->then);
        TABLE table[CODE_NR];
        UNROLL(8)
        for (int n = 0; n < CODE_NR; n++)
            table[n] = code == NAME(dot_nibble) ? DOT_TABLE(r->table[n]) : NAME(table_at)(r->table[n]);
        for (int64_t left = k->n / LANES, first = k->first, at = at0; left > 0; first = 0) {
            int64_t some = least(left, KC / LANES), bytes = some * LANES;
            const char *from = w;
            (void)bytes, (void)from; /* of most codes */
            VEC acc[MR][CODE_NR][SUB];
            NO_SUMS(acc, mr, CODE_NR)
            left -= some;
            for (int64_t vectors; some > 0; some -= vectors, w += step, at += per_span) {
                vectors = by_lane ? 8 : least(whole, some);
                NAME(add_span)(mr, code, has_zero, by_lane, x, w, row, vectors, r, q->lane, at, &ahead, q->in_pairs, table,
                               lookup, acc);
                x += vectors * mr * LANES / (code > NAME(decoded) ? 2 : 1);
            }
            SUM_CODES(mr, acc, c, k->ldc, first);
            if (code == E4M3)
                for (int n = 0; n < CODE_NR; n++)
                    if (NO_NUMBER(from + n * row, bytes))
                        for (int m = 0; m < mr; m++) c[m * k->ldc + n] = as_float(0x7fc00000u);
        }
    }
}

static TARGET void NAME(any_code_panel)(int64_t mr, int code, const struct NAME(codes) *q, const struct NAME(sum) *k,
                                        const float *x, const char *w, const struct NAME(rows) *r, int64_t at,
                                        float *c) {
    int has_zero = q->w->coding.zero != NULL;
#define PANEL(M, CODE, ZERO, LANE) NAME(code_panel)(M, CODE, ZERO, LANE, q, k, x, w, r, at, c)
#define CASE(M)                                  \
    case M:                                      \
        if (HAS_DOT && code == NAME(dot_decoded) && q->by_lane) \
            PANEL(M, NAME(dot_decoded), 0, 1);   \
        else if (HAS_DOT && code == NAME(dot_decoded)) \
            PANEL(M, NAME(dot_decoded), 0, 0);   \
        else if (HAS_DOT && code == NAME(dot_nibble) && has_zero) \
            PANEL(M, NAME(dot_nibble), 1, 1);    \
        else if (HAS_DOT && code == NAME(dot_nibble)) \
            PANEL(M, NAME(dot_nibble), 0, 1);    \
        else if (HAS_DOT && code == NAME(dot_e4m3)) \
            PANEL(M, NAME(dot_e4m3), 0, 0);      \
        else if (HAS_DOT && code == NAME(dot_int8) && has_zero) \
            PANEL(M, NAME(dot_int8), 1, 0);      \
        else if (HAS_DOT && code == NAME(dot_int8)) \
            PANEL(M, NAME(dot_int8), 0, 0);      \
        else if (code == NAME(decoded) && q->by_lane) \
            PANEL(M, NAME(decoded), 0, 1);       \
        else if (code == NAME(decoded))          \
            PANEL(M, NAME(decoded), 0, 0);       \
        else if (q->by_lane && has_zero)         \
            PANEL(M, HAS_NIBBLES ? INT4 : LUT4, 1, 1); \
        else if (HAS_NIBBLES && code == INT4)    \
            PANEL(M, INT4, 0, 1);                \
        else if (HAS_NIBBLES && code == E2M1)    \
            PANEL(M, E2M1, 0, 1);                \
        else if (q->by_lane)                     \
            PANEL(M, LUT4, 0, 1);                \
        else if (code == E4M3)                   \
            PANEL(M, E4M3, 0, 0);                \
        else if (has_zero)                       \
            PANEL(M, INT8, 1, 0);                \
        else                                     \
            PANEL(M, INT8, 0, 0);                \
        break;
    switch (mr) {
        CASES
    }
#undef CASE
#undef PANEL
}

/* ---- scales and zero points ---- */

static TARGET struct NAME(codes) NAME(codes_of)(int order, const struct matrix *w) {
    const struct coding *q = &w->coding;
    int nibbles = is_nibble(q);
    struct NAME(codes) p = {.w = w, .by_lane = nibbles, .code = nibbles && !HAS_NIBBLES ? LUT4 : (int)q->code};
    if (order >= DOT) p.code = nibbles ? NAME(dot_nibble) : q->code == E4M3 ? NAME(dot_e4m3) : NAME(dot_int8);
    p.decoded = order >= DOT ? NAME(dot_decoded) : NAME(decoded), p.lane_step = order >= DOT ? 2 : 1;
    p.in_pairs = order == HALVES || order == DOT16;
    if (order == DOT16 && q->code == E4M3) E4M3_TABLES(p.lookup);
    p.bits = nibbles ? 4 : 8, p.unit = nibbles ? 8 * LANES : p.in_pairs ? 2 * LANES : LANES, p.span = nibbles ? p.unit : KC, p.floats = 1;
    if (q->columns >= w->k) return p; /* one group: nothing moves from span to span */
    if (!nibbles) p.span = least(q->columns & -q->columns, KC);
    p.per_span = q->columns < p.span ? p.span / q->columns : 1;
    p.floats = (w->k + p.span - 1) / p.span * p.per_span; /* lanes beyond the end of a row have scales too: zeros */
    for (int i = 0; i < LANES; i++) p.lane[i] = (int32_t)(i * p.per_span / LANES);
    return p;
}

static TARGET void NAME(widen_scales)(int kind, const char *from, int64_t n, float factor, float *to) {
    int64_t done = 0; /* of what compilers turn into vectors badly */
    for (; (kind == BF16 || kind == E4M3_SCALE || kind == F16 || kind == INT8_ZERO) && done + LANES <= n; done += LANES)
        UNROLL(4)
        for (int u = 0; u < SUB; u++) {
            VEC scale;
            if (kind == BF16)
                scale = VLOAD_BF16((const uint16_t *)(const void *)from + done + u * WIDTH) * VSET(factor);
            else if (kind == INT8_ZERO)
                scale = NAME(byte_int8)(from + done + u * WIDTH) * VSET(factor);
            else if (kind == F16)
                scale = VLOAD_F16((const uint16_t *)(const void *)from + done + u * WIDTH) * VSET(factor);
            else
                scale = NAME(byte_e4m3)(from + done, 0, u) * VSET(256.0f) * VSET(factor);
            memcpy(to + done + u * WIDTH, &scale, sizeof scale);
        }
#define EACH(KIND)                                                                         \
    case KIND:                                                                             \
        for (int64_t i = done; i < n; i++) to[i] = scale_to_float(KIND, from, i) * factor; \
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

/* `blocks` rows of scales or zero points, q->floats each: groups wider than a span are told again for each of its spans, and
 * lanes of a row's last span that are beyond its end have 0, never what scratch held or another row's. */
static TARGET void NAME(lay_out)(const struct NAME(codes) *q, int kind, const char *from, int64_t blocks, float factor,
                                 float *to) {
    int64_t groups = q->w->coding.groups, columns = q->w->coding.columns;
    if (q->floats == groups) {
        NAME(widen_scales)(kind, from, blocks * groups, factor, to);
        return;
    }
    if (columns > q->span) { /* all first, then forwards, never over what is still needed */
        const float *own = to + blocks * (q->floats - groups);
        NAME(widen_scales)(kind, from, blocks * groups, factor, to + blocks * (q->floats - groups));
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t left = q->floats, some; left > 0; left -= some, to += some) {
                float scale = *own++;
                some = least(columns / q->span, left);
                for (int64_t i = 0; i < some; i++) to[i] = scale;
            }
        return;
    }
    for (int64_t b = 0; b < blocks; b++, to += q->floats, from += groups * scale_size(kind)) {
        NAME(widen_scales)(kind, from, groups, factor, to);
        for (int64_t i = groups; i < q->floats; i++) to[i] = 0.0f;
    }
}

/* Rows n, n + step and on, which are of one part, into r from row i on. to: floats for them. Returns the next free. */
static TARGET float *NAME(scales_of)(const struct NAME(codes) *q, int64_t slot, int64_t n, int64_t step, int64_t count,
                                     struct NAME(rows) *r, int64_t i, float *to) {
    const struct coding *own = &q->w->coding;
    struct place at = place_of(q->w, slot, n);
    int64_t blocks = (at.in_block + count - 1) / own->rows + 1;
    float *zero = own->zero ? to + blocks * q->floats : to;
    float factor = at.factor * (own->code == E4M3 ? 256.0f : 1.0f); /* byte_e4m3 is 2^-8 too small */
    NAME(lay_out)(q, (int)own->scale_kind, at.scale, blocks, factor, to);
    if (own->zero) NAME(lay_out)(q, INT8_ZERO, at.zero, blocks, 1.0f, zero);
    for (int64_t left = own->rows - at.in_block, now = 0; count; count--, left--, i += step) {
        if (left == 0) left = own->rows, now += q->floats;
        struct NAME(rows) *of = r + i / CODE_NR;
        of->scale[i % CODE_NR] = to + now, of->zero[i % CODE_NR] = zero + now, of->table[i % CODE_NR] = at.table;
    }
    return zero + blocks * q->floats;
}

static TARGET void NAME(all_scales)(const struct NAME(codes) *q, int64_t slot, int64_t n0, int64_t count,
                                    struct NAME(rows) *r, float *to) {
    int64_t parts = q->w->coding.parts, rows = q->w->n / parts;
    if (q->w->coding.interleaved)
        for (int64_t i = 0; i < least(parts, count); i++)
            to = NAME(scales_of)(q, slot, n0 + i, parts, (count - i + parts - 1) / parts, r, i, to);
    else
        for (int64_t i = 0, some; i < count; i += some) { /* up to the end of a part */
            some = least(count - i, rows - (n0 + i) % rows);
            to = NAME(scales_of)(q, slot, n0 + i, 1, some, r, i, to);
        }
    struct NAME(rows) *last = r + (count - 1) / CODE_NR;
    for (int64_t i = count % CODE_NR; i && i < CODE_NR; i++) /* rows that do not exist: nobody reads their results */
        last->scale[i] = last->scale[0], last->zero[i] = last->zero[0], last->table[i] = last->table[0];
}

/* To L1 the scales and zero points of `count` rows of W that are read next: no row of codes hides how long they take.
 * (Inlined: GCC drops calls of what only prefetches.) */
SCALAR void NAME(next_scales)(const struct NAME(codes) *q, const struct then *then, int64_t count) {
    const struct coding *own = &q->w->coding;
    int64_t parts = own->interleaved ? own->parts : 1, num = count / parts / own->rows * own->groups;
    int64_t size = scale_size(own->scale_kind), apart = own->row_blocks * own->groups;
    for (int64_t i = 0; i < parts; i++) {
        for (int64_t j = 0; then->scale && j < num * size; j += 64)
            __builtin_prefetch(then->scale + i * apart * size + j, 0, 3);
        for (int64_t j = 0; then->zero && j < num; j += 64) __builtin_prefetch(then->zero + i * apart + j, 0, 3);
    }
}

/* ---- one tile ---- */

struct NAME(tile_job) {
    struct NAME(codes) q;
    const float *x;
    int64_t rows, vectors, ldc;
    const char *end; /* of the codes */
    const struct then *then;
};

static TARGET void NAME(blocks)(const struct NAME(tile_job) *t, int code, struct NAME(sum) *k, int64_t k0, const char *w,
                                const struct NAME(rows) *r, int64_t m, float *c) {
    int64_t mr = least(MR, t->rows - m), at = k0 / t->q.span * t->q.per_span;
    const float *x = t->x + (m * t->vectors + k0 / LANES / t->q.lane_step * mr) * LANES;
    NAME(any_code_panel)(mr, code, &t->q, k, x, w, r, at, c + m * t->ldc);
}

/* The codes of up to CODE_NR rows from element k0 to the end of the row, less than a vector, padded. */
static void NAME(copy_end)(const struct NAME(codes) *q, const char *w, int64_t count, int64_t k0, char *end) {
    memset(end, 0, CODE_NR * 64);
    for (int64_t n = 0; n < count; n++)
        memcpy(end + n * 64, w + n * q->w->row + k0 * q->bits / 8, ((q->w->k - k0) * q->bits + 7) / 8);
}

/* Codes are read where they lie: `count` rows of W, from a whole number of vectors each or from their padded ends. */
static TARGET void NAME(straight)(const struct NAME(tile_job) *t, const struct NAME(rows) *r, const char *w,
                                  int64_t count, float *c) {
    const struct NAME(codes) *q = &t->q;
    int64_t whole = q->w->k / q->unit * q->unit, row = q->w->row, full = count / CODE_NR;
    struct NAME(sum) k = {.n = whole, .row = row, .step = q->span * q->bits / 8, .first = 1, .ldc = t->ldc};
    k.end = t->end, k.then = t->then, k.group = CODE_NR * row;
    struct NAME(sum) last = k;
    k.groups = full, last.groups = count % CODE_NR != 0, last.row = 0, last.then = NULL; /* its first row again */
    for (int64_t m = 0; whole && m < t->rows; m += MR, k.then = NULL) {
        NAME(blocks)(t, q->code, &k, 0, w, r, m, c);
        NAME(blocks)(t, q->code, &last, 0, w + full * k.group, r + full, m, c + full * CODE_NR);
    }
    if (whole == q->w->k) return;
    k = (struct NAME(sum)){.n = q->unit, .row = 64, .first = whole == 0, .ldc = t->ldc, .groups = 1};
    for (int64_t n = 0; n < count; n += CODE_NR) {
        char end[CODE_NR * 64];
        NAME(copy_end)(q, w + n * row, least(CODE_NR, count - n), whole, end);
        for (int64_t m = 0; m < t->rows; m += MR) NAME(blocks)(t, q->code, &k, whole, end, r + n / CODE_NR, m, c + n);
    }
}

/* Elements [k0, k0 + n) of a row as [vectors][CODE_NR][16] floats, less its zero points; of DOT8, of two bf16. */
static TARGET void NAME(decode)(const struct NAME(codes) *q, const struct NAME(rows) *r, int i, const char *from,
                                int64_t k0, int64_t n, float *to) {
    int64_t per_span = q->span / LANES / q->lane_step, at = k0 / q->span * q->per_span, j = 0;
    int has_zero = q->w->coding.zero != NULL;
    TABLE table = q->code == NAME(dot_nibble) ? DOT_TABLE(r->table[i]) : NAME(table_at)(r->table[i]);
    for (int64_t left = n / LANES / q->lane_step; left > 0; left--, to += CODE_NR * LANES) {
        if (q->code > NAME(decoded)) {
            VEC zero = has_zero ? NAME(of_span)(q->by_lane, r->zero[i] + at, q->lane, 0) : VZERO;
            VEC values = NAME(two_values)(q->code, has_zero, from, j, zero, table);
            memcpy(to + i * LANES, &values, sizeof values);
        } else
            UNROLL(4)
            for (int u = 0; u < SUB; u++) {
                VEC value = q->by_lane         ? NAME(nibble)(q->code, from, EIGHTH((int)j), u, table)
                            : q->code == E4M3 ? NAME(byte_e4m3)(from + j * LANES, 0, u)
                                              : NAME(byte_int8)(from + j * LANES + u * WIDTH);
                if (has_zero) value = VSUB(value, NAME(of_span)(q->by_lane, r->zero[i] + at, q->lane, u));
                memcpy(to + i * LANES + u * WIDTH, &value, sizeof value);
            }
        if (++j == per_span) j = 0, from += q->span * q->bits / 8, at += q->per_span;
    }
}

/* Codes are decoded first, a chunk of all `count` rows of W, and multiplied block by block of x. */
static TARGET void NAME(by_decoding)(const struct NAME(tile_job) *t, const struct NAME(rows) *r, const char *w,
                                     int64_t count, float *c, float *decoded) {
    const struct NAME(codes) *q = &t->q;
    int64_t whole = q->w->k / q->unit * q->unit;
    for (int64_t k0 = 0, n; k0 < q->w->k; k0 += n) {
        n = k0 < whole ? least(KC, whole - k0) : q->unit;
        for (int64_t g = 0; g < count; g += CODE_NR)
            for (int i = 0; i < CODE_NR; i++) {
                char end[CODE_NR * 64];
                const char *from = w + (g + (g + i < count ? i : 0)) * q->w->row;
                if (k0 == whole) NAME(copy_end)(q, from, 1, k0, end);
                NAME(decode)(q, r + g / CODE_NR, i, k0 == whole ? end : from + k0 * q->bits / 8, k0, n, decoded + g * KC);
            }
        struct NAME(sum) k = {.n = n, .row = LANES * 4, .step = q->span * CODE_NR * 4 / q->lane_step, .first = k0 == 0, .ldc = t->ldc};
        k.group = CODE_NR * KC * 4, k.groups = (count + CODE_NR - 1) / CODE_NR;
        for (int64_t m = 0; m < t->rows; m += MR)
            NAME(blocks)(t, q->decoded, &k, k0, (const char *)decoded, r, m, c);
    }
}

#include "cpu_nibbles.h"

/* Like tile, for W stored as codes that are fast. */
static TARGET void NAME(tile_codes)(int order, const float *x, int64_t rows, const struct matrix *w, int64_t slot, int64_t n0,
                                    int64_t count, const struct then *then, float *c, int64_t ldc, float *scratch) {
    const char *end = w->data + slot * w->slot + (n0 + count) * w->row;
    struct NAME(tile_job) t = {NAME(codes_of)(order, w), x, rows, vectors_of(order, w->k), ldc, end, then};
    struct NAME(rows) r[DOWN_TILE / CODE_NR];
    int64_t most = (CODE_FLOATS - LANES) / (2 * t.q.floats) / CODE_NR * CODE_NR; /* rows whose scales there is room for */
    int64_t few = t.q.bits == 8 ? NAME(few_byte_rows) : NAME(few_rows), done = 0;
#ifdef VAT
    done = NAME(in_lines)(&t.q, rows, n0, count);
    if (done) NAME(tile_lines)(&t, slot, n0, done, c, scratch + DOWN_TILE * KC);
    c += done;
#endif
    for (int64_t i = done, some; i < count; i += some, c += some) {
        const char *from = w->data + slot * w->slot + (n0 + i) * w->row;
        some = least(most, count - i);
        NAME(all_scales)(&t.q, slot, n0 + i, some, r, scratch + DOWN_TILE * KC);
        struct then more = i + some < count ? moe_then(w, slot, n0 + i + some) : *then;
        NAME(next_scales)(&t.q, &more, some);
        if (rows > few)
            NAME(by_decoding)(&t, r, from, some, c, scratch);
        else
            NAME(straight)(&t, r, from, some, c);
    }
}
