/* Prints a hash of what experts give for every kind of storage, by the instruction set that argv[1] names. Plain C, so that
 * it runs where no Python does; test_cpu_bits.py compares machines.
 */

#include <stdio.h>

#include "cpu_experts.h"

int64_t moe_cpu_experts(const struct layer *l, const struct call *whole, int64_t isa);
const char *moe_cpu_isa(int64_t i);

enum { SLOTS = 3, H = 272, I = 72, T = 23, K = 2, ROOM = SLOTS * 2 * I * H * 4 };

static uint32_t state = 7;

static uint32_t next(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static float small(void) { return (float)(next() % 2001) / 1000.0f - 1.0f; }

static char *fill(char *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = (char)next();
    return to + count;
}

static char *fill_f16(char *to, int64_t count) { /* of about 1 / 100 */
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits = (uint16_t)(0x2000 | (next() & 0x3ff));
        memcpy(to + 2 * i, &bits, 2);
    }
    return to + 2 * count;
}

/* Planes of 2, 1, 1 and 4 bits at `to`, their scales at `scales`; slots say that they are of 2 or 4, of 3 and of 8 bits. */
static struct matrix make_nested(char *to, char *scales, char *levels, int64_t parts, int64_t rows, int64_t k, int64_t columns) {
    int64_t groups = (k + columns - 1) / columns, each = parts * rows * groups, row = (2 * k + 7) / 8;
    int32_t bits[SLOTS] = {columns % 3 ? 2 : 4, 3, 8};
    struct coding q = {.scale = scales, .scale_slot = 2 * each, .code = NESTED, .scale_kind = F16, .rows = 1, .columns = columns};
    q.groups = groups, q.row_blocks = rows, q.parts = parts;
    struct matrix w = {.data = to, .slot = parts * rows * row, .row = row, .n = parts * rows, .k = k, .is_coded = 1};
    to = fill(to, SLOTS * w.slot), scales = fill_f16(scales, SLOTS * each);
    memcpy(levels, bits, sizeof bits);
    q.residual[0] = levels, q.residual_slot[0] = 4;
    for (int i = 1; i < 7; i += 2) {
        int64_t plane = parts * rows * (((i == 5 ? 4 : 1) * k + 7) / 8);
        q.residual[i] = to, q.residual_slot[i] = plane, q.residual[i + 1] = scales;
        q.residual_slot[i + 1] = i == 5 ? 2 * each : each;
        to = fill(to, SLOTS * plane), scales = i == 5 ? fill_f16(scales, SLOTS * each) : fill(scales, SLOTS * each);
    }
    w.coding = q;
    return w;
}

/* A matrix [rows, k] in each slot at `to`: of `kind`, or of `code` with groups of `columns`. */
static struct matrix make(char *to, float *scales, int8_t *zeros, int64_t parts, int64_t rows, int64_t k, int kind, int code,
                          int64_t columns) {
    static float table[16], factor[2] = {0.5f, 0.25f};
    int64_t row = code < 0 ? k * size_of(kind) : code >= INT4 ? (k + 1) / 2 : k, groups = (k + columns - 1) / columns;
    if (code == NESTED) return make_nested(to, (char *)scales, (char *)zeros, parts, rows, k, columns);
    for (int64_t i = 0; i < SLOTS * parts * rows * row; i++) to[i] = (char)((next() & 0xff) % 0x7f);
    if (code < 0)
        for (int64_t i = 0; i < SLOTS * parts * rows * k; i++) {
            float v = small();
            uint32_t bits;
            memcpy(&bits, &v, 4);
            if (kind == F32)
                ((float *)(void *)to)[i] = v;
            else /* as fp16: a number of about 1 */
                ((uint16_t *)(void *)to)[i] = (uint16_t)(kind == BF16 ? bits >> 16 : (bits >> 31 << 15) | 0x3800 | (bits >> 8 & 0x3ff));
        }
    for (int64_t i = 0; i < SLOTS * parts * rows * groups; i++) scales[i] = small() / 16, zeros[i] = (int8_t)(next() % 15 - 7);
    for (int i = 0; i < 16; i++) table[i] = small();
    struct matrix w = {.data = to, .slot = parts * rows * row, .row = row, .n = parts * rows, .k = k, .kind = kind};
    w.is_coded = code >= 0;
    w.coding = (struct coding){.scale = (const char *)scales, .scale_slot = parts * rows * groups * 4, .code = code, .rows = 1,
                               .columns = columns, .groups = groups, .row_blocks = rows, .parts = parts};
    if (code == INT4 || code == INT8) w.coding.zero = (const char *)zeros, w.coding.zero_slot = parts * rows * groups;
    if (code == E2M1) w.coding.factor = (const char *)factor;
    if (code == LUT4) w.coding.table = (const char *)table; /* the parts share one: of gate, then what follows it */
    if (code == LUT4) w.coding.parts = 1, w.coding.row_blocks = parts * rows;
    return w;
}

int main(int argc, char **argv) {
    static char up[ROOM], down[ROOM];
    static float scales[2][ROOM / 4], x[T * H], out[T * K * H], weights[T * K];
    static int8_t zeros[2][ROOM];
    int64_t ids[T * K], isa = 0;
    while (argc > 1 && moe_cpu_isa(isa) && strcmp(moe_cpu_isa(isa), argv[1])) isa++;
    if (!moe_cpu_isa(isa)) return 2;
    for (int i = 0; i < T * H; i++) x[i] = small();
    for (int i = 0; i < T * K; i++) ids[i] = next() % SLOTS, weights[i] = small();
    for (int kind = F32; kind <= F16 + CODES; kind++)
        for (int64_t columns = 8; columns <= 1024; columns *= 2) {
            int code = kind > F16 ? kind - F16 - 1 : -1;
            if (code == NESTED && columns % 16) continue;
            struct layer l = {.slots = SLOTS, .gated = 1, .act = SILU};
            l.up = make(up, scales[0], zeros[0], 2, I, H, kind, code, columns);
            l.down = make(down, scales[1], zeros[1], 1, H, I, kind, code, columns);
            for (int with_weights = 0; with_weights < 2; with_weights++) {
                struct call c = {.x = x, .x_row = H * 4, .slot_ids = ids, .ids_are_64 = 1, .tokens = T, .top_k = K, .out = out, .threads = 1};
                if (with_weights) c.topk_weights = weights;
                if (moe_cpu_experts(&l, &c, isa)) return 3;
                uint64_t hash = 14695981039346656037u;
                for (int64_t i = 0; i < T * H * (with_weights ? 1 : K); i++) {
                    uint32_t bits;
                    memcpy(&bits, out + i, 4);
                    if (out[i] != out[i]) return 4;
                    hash = (hash ^ bits) * 1099511628211u;
                }
                printf("%d %d %ld %d %016lx\n", kind, code, (long)columns, with_weights, (unsigned long)hash);
            }
        }
    return 0;
}
