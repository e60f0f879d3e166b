/* Where the scales, zero points and tables of a row of codes are. */

#ifndef MOE_CPU_PLACE_H
#define MOE_CPU_PLACE_H

#include "cpu_scalars.h"

static const float INT4_TABLE[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const float E2M1_TABLE[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                     -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

struct place {
    const char *scale, *zero;
    const float *table; /* of nibbles */
    const int32_t *group_of;
    float factor;
    int64_t in_block; /* rows of this block before it */
};

/* n: the row as stored; gate and up (parts) stand one after the other, or in turn. */
SCALAR struct place place_of(const struct matrix *w, int64_t slot, int64_t n) {
    const struct coding *q = &w->coding;
    int64_t rows = w->n / q->parts, part = q->interleaved ? n % q->parts : n / rows;
    int64_t row = q->interleaved ? n / q->parts : n % rows;
    int64_t at = (part * q->row_blocks + row / q->rows) * q->groups, size = scale_size(q->scale_kind);
    struct place p = {.scale = q->scale + slot * q->scale_slot + at * size, .factor = 1.0f, .in_block = row % q->rows};
    if (q->zero) p.zero = q->zero + slot * q->zero_slot + at;
    if (q->factor) memcpy(&p.factor, q->factor + slot * q->factor_slot + part * 4, 4);
    if (q->group_of) p.group_of = (const int32_t *)(const void *)(q->group_of + slot * q->group_slot) + part * w->k;
    p.table = q->code == LUT4 ? (const float *)(const void *)(q->table + slot * q->table_slot) + part * 16
              : q->code == E2M1 ? E2M1_TABLE : INT4_TABLE;
    return p;
}

SCALAR uint32_t word_at(const char *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

SCALAR uint16_t half_at(const char *p) {
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

#endif
