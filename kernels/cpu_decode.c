/* Codes decoded into fp32 weights before they are multiplied: act-order, groups of odd sizes. */

#include "cpu_place.h"

/* Row n of this slot as k fp32 weights: (value - zero) * (scale * factor), each operation rounded. */
static void decode_row(const struct matrix *w, int64_t slot, int64_t n, float *to) {
    const struct coding *q = &w->coding;
    const uint8_t *code = (const uint8_t *)w->data + slot * w->slot + n * w->row;
    struct place p = place_of(w, slot, n);
    for (int64_t k = 0; k < w->k; k++) {
        int64_t group = p.group_of ? least((uint32_t)p.group_of[k], q->groups - 1) : k / q->columns; /* a file may say anything */
        float value;
        if (is_nibble(q))
            value = p.table[code[k / 2] >> k % 2 * 4 & 15];
        else
            value = q->code == E4M3 ? 256.0f * e4m3_part(code[k]) : (float)(int8_t)code[k];
        if (p.zero) value -= scale_to_float(INT8_ZERO, p.zero, group);
        to[k] = value * (scale_to_float((int)q->scale_kind, p.scale, group) * p.factor);
    }
}

void moe_decoded_tile(const struct kernels *k, const float *x, int64_t rows, const struct matrix *w, int64_t slot,
                      int64_t n0, int64_t count, float *c, int64_t ldc, float *scratch) {
    float *decoded = scratch + DOWN_TILE * KC;
    int64_t most = CODE_FLOATS / w->k; /* rows at once; Python refuses more than CODE_FLOATS columns */
    if (most >= 4) most = most / 4 * 4;
    for (int64_t n = 0; n < count; n += most) {
        int64_t some = least(most, count - n);
        struct matrix plain = {.data = (const char *)decoded, .row = w->k * 4, .n = some, .k = w->k, .kind = F32};
        for (int64_t i = 0; i < some; i++) decode_row(w, slot, n0 + n + i, decoded + i * w->k);
        k->tile(NATURAL, x, rows, &plain, plain.data, 0, some, &NOTHING, c + n, ldc, scratch);
    }
}
