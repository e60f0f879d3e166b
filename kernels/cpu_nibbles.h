/* Nibbles by few rows of x, where their scales lie as those of most checkpoints do: the sums of cpu_codes.h, of which
 * this is part, with less between the lines of codes.
 *
 * Scales are not widened before a tile's rows but before a few of them, and asked for as far ahead as the codes are:
 * what binds is memory, and it is never without something to do.
 *
 * An includer whose vectors have 16 lanes defines VNEXT (a line of codes, its next nibbles at the lowest bits), VAT (a
 * lookup of 16 floats by them) and DOT_TABLE_OF (a table in fp32 as VNIBBLES takes it).
 */
#ifdef VAT

enum { NAME(lines_at_once) = 4 }; /* rows of W, of up to LINE_MR rows of x */
enum { NAME(line_mr) = 3 };

struct NAME(lines) { /* strides in bytes */
    const struct NAME(codes) *q;
    const char *w, *end, *scale; /* of the first row; the end of the tile */
    const int8_t *zero;
    const float *table;
    float factor, *scales; /* room for the scales and zero points of lines_at_once rows */
    int64_t row, scale_row, count, ldc;
    const struct then *then; /* NULL: nothing is prefetched */
};

SCALAR TARGET TABLE NAME(line_table)(int is_dot, TABLE table) { return is_dot ? DOT_TABLE_OF(table) : table; }

/* Zero points; where all lanes of a span have the same, the table of values is moved by it. */
enum { NAME(no_zero), NAME(zero_of_span), NAME(zero_of_lane) };

/* c[m][n] = x row m times row n of W, of `mr` and `nr`. past_l2: of `ahead`. */
SCALAR TARGET void NAME(line_panel)(int mr, int nr, int is_dot, int zeros, int past_l2, const struct NAME(lines) *t,
                                    struct ahead ahead, const float *x, const char *w, float *c) {
    const int64_t row = t->row, floats = t->q->floats, per_span = t->q->per_span, ldc = t->ldc;
    const int vectors = is_dot ? 4 : 8;
    const TABLE plain = NAME(table_at)(t->table), shared = NAME(line_table)(is_dot, plain);
    const float *scale = t->scales, *zero = t->scales + nr * floats;
    const int32_t *lane = t->q->lane;
    int64_t first = 1;
    for (int64_t left = t->q->w->k / (8 * LANES), some; left > 0; left -= some, first = 0) {
        VEC acc[MR][4][1];
        NO_SUMS(acc, mr, nr)
        some = least(left, KC / (8 * LANES));
        for (int64_t i = 0; i < some; i++, w += 64, x += vectors * mr * LANES, ahead.at += ahead.step) {
            VEC line[4], sum[MR][4];
            TABLE table[4];
            VEC of_lane[4];
            UNROLL(8)
            for (int n = 0; n < nr; n++) {
                if (past_l2)
                    __builtin_prefetch(ahead.at + n * ahead.row, 0, 0);
                else
                    __builtin_prefetch(ahead.at + n * ahead.row, 0, 2);
                line[n] = VLOAD((const float *)(const void *)(w + n * row));
                table[n] = shared;
                if (zeros == NAME(zero_of_span))
                    table[n] = NAME(line_table)(is_dot, VSUB(plain, VSET(zero[n * floats])));
                if (zeros == NAME(zero_of_lane)) of_lane[n] = VPICK(zero + n * floats, lane);
                UNROLL(8)
                for (int m = 0; m < mr; m++) sum[m][n] = VZERO;
            }
            UNROLL(8)
            for (int j = 0; j < vectors; j++) {
                VEC value[4];
                UNROLL(8)
                for (int n = 0; n < nr; n++)
                    if (is_dot && zeros == NAME(zero_of_lane))
                        value[n] = VLESS_ZERO(line[n], j, of_lane[n]);
                    else if (zeros == NAME(zero_of_lane))
                        value[n] = VSUB(VAT(line[n], EIGHTH(j), shared), of_lane[n]);
                    else if (is_dot)
                        value[n] = VNIBBLES(line[n], 0, table[n]), line[n] = VNEXT(line[n]);
                    else
                        value[n] = VAT(line[n], EIGHTH(j), table[n]);
                UNROLL(8)
                for (int m = 0; m < mr; m++) {
                    VEC xv = VLOAD(x + (j * mr + m) * LANES);
                    UNROLL(8)
                    for (int n = 0; n < nr; n++)
                        sum[m][n] = is_dot ? VDOT(sum[m][n], xv, value[n]) : VFMA(xv, value[n], sum[m][n]);
                }
            }
            UNROLL(8)
            for (int n = 0; n < nr; n++) {
                VEC s = VPICK(scale + n * floats, lane);
                UNROLL(8)
                for (int m = 0; m < mr; m++) acc[m][n][0] = VFMA(sum[m][n], s, acc[m][n][0]);
            }
            scale += per_span, zero += per_span;
        }
        if (nr == 4) {
            SUM_BLOCK(mr, acc, c, ldc, first);
        } else {
            VEC two[MR][2][1];
            UNROLL(8)
            for (int m = 0; m < mr; m++) two[m][0][0] = acc[m][0][0], two[m][1][0] = acc[m][1][0];
            SUM_CODES(mr, two, c, ldc, first);
        }
    }
}

SCALAR TARGET void NAME(line_rows)(int mr, int is_dot, int zeros, const struct NAME(lines) *t, const float *x,
                                   float *c) {
    const struct coding *own = &t->q->w->coding;
    const int nr = mr <= NAME(line_mr) ? NAME(lines_at_once) : 2;
    const char *w = t->w, *scale = t->scale;
    const int8_t *zero = t->zero;
    int64_t floats = t->q->floats, groups = own->groups, rows_ahead = bytes_ahead(t->row, nr) / t->row;
    for (int64_t n = 0; n < t->count; n += nr, w += nr * t->row, scale += nr * t->scale_row, c += nr) {
        struct ahead ahead = {w, 0, 0, 1}; /* what is in L1: nothing */
        if (floats == groups) {
            NAME(widen_scales)((int)own->scale_kind, scale, nr * floats, t->factor, t->scales);
            if (zeros) NAME(widen_scales)(INT8_ZERO, (const char *)zero, nr * floats, 1.0f, t->scales + nr * floats);
        } else {
            NAME(lay_out)(t->q, (int)own->scale_kind, scale, nr, t->factor, t->scales);
            if (zeros) NAME(lay_out)(t->q, INT8_ZERO, (const char *)zero, nr, 1.0f, t->scales + nr * floats);
        }
        if (t->then) {
            int64_t beyond = n + rows_ahead - t->count;
            const char *later = beyond < 0 ? scale + rows_ahead * t->scale_row : t->then->scale + beyond * t->scale_row;
            ahead = ahead_of(w, t->end, t->row, nr, 64, t->then);
            for (int64_t j = 0; j < nr * t->scale_row; j += 64) __builtin_prefetch(later + j, 0, 3);
            if (zeros) {
                const char *next = beyond < 0 ? (const char *)zero + rows_ahead * groups : t->then->zero + beyond * groups;
                for (int64_t j = 0; j < nr * groups; j += 64) __builtin_prefetch(next + j, 0, 3);
            }
        }
        if (ahead.past_l2)
            NAME(line_panel)(mr, nr, is_dot, zeros, 1, t, ahead, x, w, c);
        else
            NAME(line_panel)(mr, nr, is_dot, zeros, 0, t, ahead, x, w, c);
        if (zeros) zero += nr * groups;
    }
}

#define EACH_ZEROS(IF, M, DOT)                                                   \
    if ((IF) && zeros == NAME(no_zero)) NAME(line_rows)(M, DOT, NAME(no_zero), t, x, c);           \
    if ((IF) && zeros == NAME(zero_of_span)) NAME(line_rows)(M, DOT, NAME(zero_of_span), t, x, c); \
    if ((IF) && zeros == NAME(zero_of_lane)) NAME(line_rows)(M, DOT, NAME(zero_of_lane), t, x, c);
#define CASE(M)                                                                                      \
    static TARGET void NAME(lines_##M)(const struct NAME(lines) *t, const float *x, float *c) {      \
        int is_dot = HAS_DOT && t->q->code == NAME(dot_nibble);                                      \
        int zeros = !t->zero ? NAME(no_zero) : t->q->per_span > 1 ? NAME(zero_of_lane) : NAME(zero_of_span); \
        EACH_ZEROS(is_dot, M, HAS_DOT)                                                               \
        EACH_ZEROS(!is_dot, M, 0)                                                                    \
    }
CASES
#undef CASE
#undef EACH_ZEROS

/* How many rows of W of a tile, its first ones, may be read so: 0 if scales or zero points lie otherwise. */
static int64_t NAME(in_lines)(const struct NAME(codes) *q, int64_t rows, int64_t n0, int64_t count) {
    const struct matrix *w = q->w;
    const struct coding *own = &w->coding;
    int64_t of_part = w->n / own->parts, whole = count / NAME(lines_at_once) * NAME(lines_at_once);
    if (!q->by_lane || rows > NAME(few_line_rows) || w->k % q->unit) return 0;
    if (own->rows != 1 || (own->interleaved && own->parts > 1) || n0 % of_part + whole > of_part) return 0;
    return whole;
}

static TARGET void NAME(tile_lines)(const struct NAME(tile_job) *job, int64_t slot, int64_t n0, int64_t count, float *c,
                                    float *scratch) {
    const struct NAME(codes) *q = &job->q;
    const struct matrix *w = q->w;
    struct place at = place_of(w, slot, n0);
    int64_t size = scale_size((int)w->coding.scale_kind), row = w->row;
    struct NAME(lines) t = {.q = q, .w = w->data + slot * w->slot + n0 * row, .scale = at.scale, .table = at.table,
                            .zero = (const int8_t *)at.zero, .factor = at.factor, .scales = scratch, .row = row,
                            .scale_row = w->coding.groups * size, .count = count, .ldc = job->ldc, .end = job->end,
                            .then = job->then};
    for (int64_t m = 0; m < job->rows; m += MR, t.then = NULL) {
        const float *from = job->x + m * vectors_of(q->code > NAME(decoded) ? DOT8 : EIGHTS, w->k) * LANES;
        switch (least(MR, job->rows - m)) {
#define CASE(M) case M: NAME(lines_##M)(&t, from, c + m * job->ldc); break;
            CASES
#undef CASE
        }
    }
}

#endif
