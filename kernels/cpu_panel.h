/* Products of packed x and W, compiled once per instruction set (included by cpu_avx512.c, cpu_avx2.c, cpu_plain.c).
 *
 * The includer defines NAME(x), ISA (a string), TARGET, VEC, WIDTH (floats in a VEC), VZERO, VLOAD, VODD and VEVEN
 * (the odd and the even of the 2 * WIDTH bf16 in a VEC), VLOAD_BF16, VLOAD_F16, VFMA, MR, NR (rows of x and of W in a
 * register block) and, where it has them, SUM_BLOCK (a faster sum of lanes), IN_ORDER (what is before it is not computed
 * after it, nor the other way: decoded ahead of all sums, weights would fill the few registers), VDOT (vdpbf16ps),
 * VNIBBLES, VNEXT, DOT_TABLE, VTWO, VLESS_ZERO, VLINE_E4M3 and E4M3_TABLES (cpu_codes.h). The order of sums: cpu_experts.h.
 */

#define SUB (LANES / WIDTH) /* vectors that make up 16 lanes */
#ifdef VDOT
#define HAS_DOT 1
#else
#define HAS_DOT 0
#define VDOT(sum, a, b) (sum) /* never reached, nor are these */
#define VNIBBLES(line, j, table) (line)
#define VNEXT(line) (line)
#define VTWO(low, high) VZERO
#define VLINE_E4M3(p, lookup, to) (to)[0] = (to)[1] = VZERO
#define E4M3_TABLES(to) (void)0
#define VLESS_ZERO(line, j, zero) (line)
#define DOT_TABLE(from) NAME(table_at)(from)
#define DOT_TABLE_OF(table) (table)
#endif
#ifndef IN_ORDER
#define IN_ORDER (void)0
#endif
#define PRAGMA(x) _Pragma(#x)
#define UNROLL(n) PRAGMA(GCC unroll n)
#define NO_SUMS(acc, mr, nr)           \
    UNROLL(8)                          \
    for (int m = 0; m < (mr); m++)     \
        UNROLL(8)                      \
        for (int n = 0; n < (nr); n++) \
            UNROLL(8)                  \
            for (int u = 0; u < SUB; u++) (acc)[m][n][u] = VZERO;
enum { NAME(dotted) = 3 }; /* beside the kinds of storage: bf16 as it is */

/* Lanes u * WIDTH and on of the j-th vector that a step of W brings. */
static inline __attribute__((always_inline)) TARGET VEC NAME(fetch)(int kind, const char *p, int j, int u) {
    const void *at = p;
    if (kind == BF16) return j == 0 ? VODD(VLOAD((const float *)at + u * WIDTH)) : VEVEN(VLOAD((const float *)at + u * WIDTH));
    if (kind == F16) return VLOAD_F16((const uint16_t *)at + u * WIDTH);
    return VLOAD((const float *)at + u * WIDTH);
}

/* c[m][n] (+)= the sum of acc[m][n]'s lanes. */
static inline __attribute__((always_inline)) TARGET void NAME(add_lanes)(int mr, VEC acc[MR][NR][SUB], float *c,
                                                                        int64_t ldc, int64_t first) {
#ifdef SUM_BLOCK
    SUM_BLOCK(mr, acc, c, ldc, first);
#else
    for (int m = 0; m < mr; m++)
        for (int n = 0; n < NR; n++) {
            float lane[LANES];
            memcpy(lane, acc[m][n], sizeof lane);
            for (int half = LANES / 2; half; half /= 2)
                for (int i = 0; i < half; i++) lane[i] += lane[i + half];
            c[m * ldc + n] = first ? lane[0] : c[m * ldc + n] + lane[0];
        }
#endif
}

/* c[m][n] (+)= sum over `steps` of x row m times w row n, for `groups` groups of NR rows of w. past_l2: of k->ahead.
 * x: [steps][1, or 2 of bf16][mr][16] floats. w: row n of step s begins at w + n * row + s * step bytes. */
static inline __attribute__((always_inline)) TARGET void NAME(panel)(int mr, int kind, int past_l2, const float *x0,
                                                                    const char *w0, const struct walk *k, float *c) {
    int64_t row = k->row, step = k->step, ldc = k->ldc;
    for (int64_t g = 0; g < k->groups; g++, w0 += k->group, c += NR) {
        const float *x = x0;
        const char *w = w0, *ahead = k->ahead.at;
        VEC acc[MR][NR][SUB];
        NO_SUMS(acc, mr, NR)
        for (int64_t s = 0; s < k->steps; s++, w += step, ahead += k->ahead.step) {
            if (k->ahead.at)
                UNROLL(8)
                for (int n = 0; n < NR; n++)
                    if (past_l2)
                        __builtin_prefetch(ahead + n * k->ahead.row, 0, 0);
                    else
                        __builtin_prefetch(ahead + n * k->ahead.row, 0, 2);
            UNROLL(2)
            for (int j = 0; j < 2; j++) {
                if (j == 1 && kind != BF16) break;
                VEC wv[NR][SUB];
                UNROLL(8)
                for (int n = 0; n < NR; n++)
                    UNROLL(8)
                    for (int u = 0; u < SUB; u++) wv[n][u] = NAME(fetch)(kind, w + n * row, j, u);
                UNROLL(8)
                for (int m = 0; m < mr; m++)
                    UNROLL(8)
                    for (int u = 0; u < SUB; u++) {
                        VEC xv = VLOAD(x + m * LANES + u * WIDTH);
                        UNROLL(8)
                        for (int n = 0; n < NR; n++)
                            acc[m][n][u] = kind == NAME(dotted) ? VDOT(acc[m][n][u], xv, wv[n][u])
                                                                : VFMA(xv, wv[n][u], acc[m][n][u]);
                    }
                x += mr * LANES;
            }
        }
        NAME(add_lanes)(mr, acc, c, ldc, k->first);
    }
}

/* CASE(M) of each number of rows of x that a block may have. */
#if MR >= 4
#define CASES CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#elif MR == 3
#define CASES CASE(1) CASE(2) CASE(3)
#else
#define CASES CASE(1) CASE(2)
#endif

static TARGET void NAME(any_panel)(int64_t mr, int64_t kind, const float *x, const char *w, const struct walk *k,
                                   float *c) {
#define PANEL(M, KIND)                        \
    if (k->ahead.past_l2)                     \
        NAME(panel)(M, KIND, 1, x, w, k, c);  \
    else                                      \
        NAME(panel)(M, KIND, 0, x, w, k, c);
#define CASE(M)                        \
    case M:                            \
        if (kind == F32) {             \
            PANEL(M, F32)              \
        } else if (kind == BF16) {     \
            PANEL(M, BF16)             \
        } else if (kind == F16) {      \
            PANEL(M, F16)              \
        } else if (HAS_DOT) {          \
            PANEL(M, NAME(dotted))     \
        }                              \
        break;
    switch (mr) {
        CASES
    }
#undef CASE
#undef PANEL
}

/* Elements [k0, k1) of `count` rows of W: NR rows at a time as [vectors][NR][16], filled up with zeros. */
static TARGET void NAME(pack_w)(int order, const struct matrix *w, const char *from, int64_t count, int64_t k0,
                                int64_t k1, float *to) {
    int64_t size = size_of(w->kind), vectors = vectors_of(order, k1 - k0);
    for (int64_t q = 0; q < count; q += NR, to += vectors * NR * LANES)
        for (int64_t n = 0; n < NR; n++)
            if (q + n < count)
                NAME(pack_x)(order, (int)w->kind, from + (q + n) * w->row + k0 * size, k1 - k0, to + n * LANES, NR * LANES);
            else
                for (int64_t v = 0; v < vectors; v++) memset(to + (v * NR + n) * LANES, 0, LANES * sizeof(float));
}

/* Rows of x up to which W is used where it lies; more read it widened and packed (measured). */
SCALAR int64_t NAME(straight_rows)(int order, const struct matrix *w) {
    if (order == DOT) return ROWS;
    return w->kind == F32 ? 96 : 24;
}

/* C[m][n] = x row m * W row n0 + n for m < rows, n < count. x: blocks of MR rows, each [vectors][mr][16].
 * C has ldc columns, a multiple of 16 that is >= count: columns beyond count receive rubbish. */
static TARGET void NAME(tile)(int order, const float *x, int64_t rows, const struct matrix *w, const char *base,
                              int64_t n0, int64_t count, const struct then *then, float *c, int64_t ldc,
                              float *scratch) {
    int64_t size = size_of(w->kind), vectors = vectors_of(order, w->k), per_step = w->kind == BF16 ? 2 * LANES : LANES;
    int64_t is_whole = w->k % per_step == 0;
    int64_t straight = is_whole && rows <= NAME(straight_rows)(order, w) ? count / NR * NR : 0;
    int64_t kind = order == DOT ? NAME(dotted) : w->kind;
    base += n0 * w->row;
    struct walk k = {.row = w->row, .step = per_step * size, .ldc = ldc, .groups = 1};
    for (int64_t n = 0; n < straight; n += NR)
        for (int64_t k0 = 0; k0 < w->k; k0 += KC) {
            k.steps = least(KC, w->k - k0) / per_step, k.first = k0 == 0;
            for (int64_t m = 0; m < rows; m += MR) {
                int64_t mr = least(MR, rows - m);
                const float *from = x + (m * vectors + vectors_of(order, k0) * mr) * LANES;
                const char *row = base + n * w->row;
                k.ahead = m ? (struct ahead){0} : ahead_of(row, base + count * w->row, w->row, NR, k.step, then);
                if (k.ahead.at) k.ahead.at += k0 / per_step * k.ahead.step;
                NAME(any_panel)(mr, kind, from, row + k0 * size, &k, c + m * ldc + n);
            }
        }
    if (straight == count) return;
    k = (struct walk){.row = LANES * 4, .step = NR * LANES * 4, .ldc = ldc, .groups = (count - straight + NR - 1) / NR};
    for (int64_t k0 = 0; k0 < w->k; k0 += KC) {
        int64_t k1 = least(k0 + KC, w->k);
        k.steps = vectors_of(order, k1 - k0), k.first = k0 == 0, k.group = NR * k.steps * LANES * 4;
        NAME(pack_w)(order, w, base + straight * w->row, count - straight, k0, k1, scratch);
        for (int64_t m = 0; m < rows; m += MR) {
            int64_t mr = least(MR, rows - m);
            const float *from = x + (m * vectors + vectors_of(order, k0) * mr) * LANES;
            NAME(any_panel)(mr, order == DOT ? NAME(dotted) : F32, from, (const char *)scratch, &k, c + m * ldc + straight);
        }
    }
}
