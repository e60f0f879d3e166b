/* Codes decoded into fp32 weights before they are multiplied: act-order, groups of odd sizes, planes of nested precision. */

#include "cpu_place.h"

/* Row n of this slot as k fp32 weights: (value - zero) * (scale * factor), each operation rounded. */
static void decode_row(const struct matrix *w, int64_t slot, int64_t n, float *to) {
    const struct coding *q = &w->coding;
    const uint8_t *code = (const uint8_t *)w->data + slot * w->slot + n * w->row;
    struct place p = place_of(w, slot, n);
    for (int64_t k = 0; k < w->k; k++) {
        int64_t group = p.group_of ? p.group_of[k] : k / q->columns;
        float value;
        if (is_nibble(q))
            value = p.table[code[k / 2] >> k % 2 * 4 & 15];
        else
            value = q->code == E4M3 ? 256.0f * e4m3_part(code[k]) : (float)(int8_t)code[k];
        if (p.zero) value -= scale_to_float(INT8_ZERO, p.zero, group);
        to[k] = value * (scale_to_float((int)q->scale_kind, p.scale, group) * p.factor);
    }
}

/* A plane of nested precision (kernels/nested.py): where row n of it is, and the scale of group 0 there. */
struct plane {
    const char *codes, *scale;
};

static struct plane plane_of(const struct matrix *w, int i, int64_t slot, int64_t n, int64_t at, int bits) {
    const struct coding *q = &w->coding;
    if (q->residual[i] == NULL) return (struct plane){NULL, NULL};
    return (struct plane){q->residual[i] + slot * q->residual_slot[i] + n * ((w->k * bits + 7) / 8),
                          q->residual[i + 1] + slot * q->residual_slot[i + 1] + at * (bits == 4 ? 2 : 1)};
}

/* Up to 16 fields of so many bits each, from field k on. */
SCALAR uint64_t fields(const char *plane, int64_t k, int64_t count, int bits) {
    uint64_t found = 0;
    if (count >= 16)
        memcpy(&found, plane + k * bits / 8, 2 * (size_t)bits);
    else
        memcpy(&found, plane + k * bits / 8, (size_t)(count * bits + 7) / 8);
    return found;
}

static inline __attribute__((always_inline)) void nested_row(int level, const struct matrix *w, int64_t slot, int64_t n,
                                                             float *to) {
    struct place p = place_of(w, slot, n);
    const char *base = w->data + slot * w->slot + n * w->row;
    int64_t at = (p.scale - (w->coding.scale + slot * w->coding.scale_slot)) / 2;
    struct plane third = plane_of(w, 1, slot, n, at, 1), fourth = plane_of(w, 3, slot, n, at, 1);
    struct plane last = plane_of(w, 5, slot, n, at, 4);
    float scale = 0, s3 = 0, s4 = 0, s8 = 0;
    for (int64_t k = 0, group = -1; k < w->k; k += 16) {
        int64_t left = w->k - k, now = k / w->coding.columns;
        if (now != group) {
            group = now, scale = widen_one(F16, p.scale, group);
            if (level >= 3) s3 = scale * ((float)((const uint8_t *)third.scale)[group] * 0.00390625f);
            if (level >= 4) s4 = scale * ((float)((const uint8_t *)fourth.scale)[group] * 0.00390625f);
            if (level >= 8) s8 = widen_one(F16, last.scale, group);
        }
        uint32_t two = (uint32_t)fields(base, k, left, 2), b3 = 0, b4 = 0;
        uint64_t four = 0;
        if (level >= 3) b3 = (uint32_t)fields(third.codes, k, left, 1);
        if (level >= 4) b4 = (uint32_t)fields(fourth.codes, k, left, 1);
        if (level >= 8) four = fields(last.codes, k, left, 4);
        uint32_t half[2] = {(uint32_t)four, (uint32_t)(four >> 32)};
        float value[16];
        for (int i = 0; i < 16; i++) {
            value[i] = (float)((int32_t)(2 * (two >> 2 * i & 3u)) - 3) * scale;
            if (level >= 3) value[i] = value[i] + (float)((int32_t)(2 * (b3 >> i & 1u)) - 1) * s3;
            if (level >= 4) value[i] = value[i] + (float)((int32_t)(2 * (b4 >> i & 1u)) - 1) * s4;
            if (level >= 8) value[i] = value[i] + ((float)(int32_t)(half[i / 8] >> 4 * (i % 8) & 15u) - 7.5f) * s8;
        }
        memcpy(to + k, value, (size_t)least(left, 16) * 4);
    }
}

/* Row n of this slot, of nested precision, as k fp32 weights. */
static CLONES void nested_to_float(const struct matrix *w, int64_t slot, int64_t n, float *to) {
    int32_t level;
    memcpy(&level, w->coding.residual[0] + slot * w->coding.residual_slot[0], 4);
    if (level >= 8 && w->coding.residual[5])
        nested_row(8, w, slot, n, to);
    else if (level >= 4 && w->coding.residual[3])
        nested_row(4, w, slot, n, to);
    else if (level >= 3 && w->coding.residual[1])
        nested_row(3, w, slot, n, to);
    else
        nested_row(2, w, slot, n, to);
}

void moe_decoded_tile(const struct kernels *k, const float *x, int64_t rows, const struct matrix *w, int64_t slot,
                      int64_t n0, int64_t count, float *c, int64_t ldc, float *scratch) {
    float *decoded = scratch + DOWN_TILE * KC;
    int64_t most = CODE_FLOATS / w->k; /* rows at once; Python refuses more than CODE_FLOATS columns */
    if (most >= 4) most = most / 4 * 4;
    void (*row_to_float)(const struct matrix *, int64_t, int64_t, float *) =
        w->coding.code == NESTED ? nested_to_float : decode_row;
    for (int64_t n = 0; n < count; n += most) {
        int64_t some = least(most, count - n);
        struct matrix plain = {.data = (const char *)decoded, .row = w->k * 4, .n = some, .k = w->k, .kind = F32};
        for (int64_t i = 0; i < some; i++) row_to_float(w, slot, n0 + n + i, decoded + i * w->k);
        k->tile(NATURAL, x, rows, &plain, plain.data, 0, some, c + n, ldc, scratch);
    }
}
