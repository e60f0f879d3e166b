/* Prints a hash of what experts give for every kind of storage, by the instruction set that argv[1] names. Plain C, so that
 * it runs where no Python does; test_cpu_bits.py compares machines.
 */

#include <stdio.h>

#include "cpu_experts.h"

int64_t moe_cpu_experts(const struct layer *l, const struct call *whole, int64_t isa);
const char *moe_cpu_isa(int64_t i);

enum { SLOTS = 3, H = 176, I = 72, T = 23, K = 2, ROOM = SLOTS * 2 * I * H * 4 };

static uint32_t state = 7;

static uint32_t next(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static float small(void) { return (float)(next() % 2001) / 1000.0f - 1.0f; }

/* A matrix [rows, k] in each slot at `to`: of `kind`, or of `code` with groups of `columns`. */
static struct matrix make(char *to, float *scales, int8_t *zeros, int64_t parts, int64_t rows, int64_t k, int kind, int code,
                          int64_t columns) {
    static float table[16], factor[2] = {0.5f, 0.25f};
    int64_t row = code < 0 ? k * size_of(kind) : code >= INT4 ? (k + 1) / 2 : k, groups = (k + columns - 1) / columns;
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
            if (code == NESTED) continue; /* planes that lie elsewhere */
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
