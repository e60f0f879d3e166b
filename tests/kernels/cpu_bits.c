/* Prints hashes of what experts and dense layers give for every kind of storage, and what routers, forecasts of them and
 * blocks give, by the instruction set that argv[1] names. Plain C, so that it runs where no Python does; test_cpu_bits.py
 * compares machines.
 */

#include <stdio.h>

#include "cpu_block.c" /* for their structs */
#include "cpu_expected.c"

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

/* Blocks of 128 columns of bf16 in 12 bits, of about 1 / 10, at `to`; at `words` of each row two rare ones. */
static struct matrix make_bf12(char *to, int32_t *words, int64_t parts, int64_t rows, int64_t k) {
    int64_t row = (k + 127) / 128 * 192, num = parts * rows, groups = 3;
    struct matrix w = {.data = to, .slot = num * row, .row = row, .n = num, .k = k, .is_coded = 1};
    fill(to, SLOTS * w.slot);
    for (int64_t r = 0; r < SLOTS * num; r++, words += groups) {
        words[0] = 123 + 256 * 2;
        for (int64_t i = 1, at = 0; i < groups; i++) {
            at = i == 1 ? next() % (k / 2) : k / 2 + next() % (k / 2);
            words[i] = (int32_t)(100 + next() % 25 + 256 * at);
        }
    }
    for (int64_t r = 0; r < SLOTS * num; r++) /* what is beyond a row is zeros, of code 15 */
        for (int64_t c = k; c < row / 192 * 128; c++) {
            int64_t in = c % 64, byte = in % 32 / 8 * 16 + in / 32 * 8 + in % 8;
            char *block = to + r * row + c / 128 * 192;
            block[c % 128 / 64 * 64 + byte] = 0;
            block[128 + byte] = (char)(block[128 + byte] | (c % 128 / 64 ? 0xf0 : 0x0f));
        }
    w.coding = (struct coding){.scale = (const char *)(words - SLOTS * num * groups), .scale_slot = num * groups * 4, .code = BF12,
                               .scale_kind = WORDS, .rows = 1, .columns = 1 << 30, .groups = groups, .row_blocks = rows, .parts = parts};
    return w;
}

/* A matrix [rows, k] in each slot at `to`: of `kind`, or of `code` with groups of `columns`. */
static struct matrix make(char *to, float *scales, int8_t *zeros, int64_t parts, int64_t rows, int64_t k, int kind, int code,
                          int64_t columns) {
    static float table[16], factor[2] = {0.5f, 0.25f};
    int64_t row = code < 0 ? k * size_of(kind) : code >= INT4 ? (k + 1) / 2 : k, groups = (k + columns - 1) / columns;
    if (code == BF12) return make_bf12(to, (int32_t *)(void *)scales, parts, rows, k);
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

static int is_finite = 1;

/* Of n numbers of `kind`. */
static unsigned long hash_of(const void *p, int64_t kind, int64_t n) {
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < n; i++) {
        float v = widen_one(kind, p, i);
        is_finite &= v - v == 0;
        hash = (hash ^ as_bits(v)) * 1099511628211u;
    }
    return (unsigned long)hash;
}

/* n numbers of `kind` of about `size`. */
static void *made(int64_t kind, int64_t n, float size) {
    char *p = malloc((size_t)(n * 4));
    for (int64_t i = 0; i < n; i++) {
        float v = size * small();
        if (kind == F32)
            ((float *)(void *)p)[i] = v;
        else
            ((uint16_t *)(void *)p)[i] = kind == BF16 ? float_to_bf16(v) : float_to_half(v);
    }
    return p;
}

static struct matrix dense(int64_t kind, int64_t n, int64_t k) {
    struct matrix w = {.data = made(kind, n * k, 0.3f), .slot = n * k * size_of(kind), .row = k * size_of(kind), .n = n, .k = k};
    w.kind = kind;
    return w;
}

/* bf16 becomes bf12: normal rows, one with more rare weights than there is room for, one of any bits. */
static int print_shortened(int64_t isa) {
    enum { N = 6, COLUMNS = 300, ROOM_FOR = 3, BYTES = (COLUMNS + 127) / 128 * 192 };
    for (int64_t parts = 1; parts <= 2; parts++) {
        uint16_t *v = made(BF16, N * COLUMNS, 1.0f);
        static char codes[N * BYTES], words[N * 4 * (1 + ROOM_FOR)];
        for (int i = 0; i < COLUMNS; i++) {
            if (i % 40 == 0) v[COLUMNS + i] = 1;
            if (i % 50 == 7) v[2 * COLUMNS + i] = (uint16_t)(0x2000 + i);
            v[3 * COLUMNS + i] = (uint16_t)next();
        }
        int64_t over = moe_kernels(isa)->shorten((const char *)v, N, COLUMNS, parts, ROOM_FOR, codes, words);
        uint64_t hash = 14695981039346656037u;
        for (int i = 0; i < N * BYTES; i++) hash = (hash ^ (uint8_t)codes[i]) * 1099511628211u;
        for (int i = 0; i < (int)sizeof words; i++) hash = (hash ^ (uint8_t)words[i]) * 1099511628211u;
        printf("shortened %d %d %016lx\n", (int)parts, (int)over, (unsigned long)hash);
        free(v);
    }
    return 0;
}

enum { ROUTED = 13, EXPERTS = 24, CHOSEN = 4, WIDTH = 11 };

static int print_routers(int64_t isa) {
    for (int64_t kind = F32; kind <= F16; kind++) {
        struct matrix router = dense(kind, EXPERTS, H);
        int64_t from = kind == F32 ? BF16 : kind, among[ROUTED * WIDTH], ids[ROUTED * CHOSEN]; /* fp32 takes any x */
        void *rows = made(from, ROUTED * H, 1.0f);
        float *spread = made(F32, EXPERTS, 1.0f), expected[EXPERTS], weights[ROUTED * CHOSEN];
        for (int i = 0; i < EXPERTS; i++) spread[i] = 1.0f + spread[i] * spread[i];
        for (int i = 0; i < ROUTED * WIDTH; i++) among[i] = (i / WIDTH + i % WIDTH * 2) % EXPERTS;
        for (int how = 0; how < 2; how++) {
            memset(expected, 0, sizeof expected);
            if (moe_cpu_expected(&router, rows, H * size_of(from), from, ROUTED, CHOSEN, 0.3f, how ? spread : NULL, expected, 1, isa)) return 3;
            printf("expected %d %d %016lx\n", (int)kind, how, hash_of(expected, F32, EXPERTS));
            struct choice c = {rows, H * size_of(from), from, ROUTED, how ? among : NULL, WIDTH, CHOSEN, how, ids, weights};
            if (moe_cpu_choose(&router, &c, 1, isa)) return 3;
            for (int i = 0; i < ROUTED * CHOSEN; i++) weights[i] += (float)ids[i];
            printf("choose %d %d %016lx\n", (int)kind, how, hash_of(weights, F32, ROUTED * CHOSEN));
        }
    }
    return 0;
}

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, HIDDEN = 80, TOKENS = 40, SEQUENCES = 2, BLOCK = 8, BLOCKS = 7 };

/* A prompt of 39 tokens and, beside it, one token after 50 others. */
static int print_blocks(int64_t isa) {
    int64_t first[] = {0, TOKENS - 1, TOKENS}, lengths[] = {TOKENS - 1, 51};
    int32_t blocks[SEQUENCES * BLOCKS];
    for (int i = 0; i < SEQUENCES * BLOCKS; i++) blocks[i] = (i * 5 + 3) % (SEQUENCES * BLOCKS);
    for (int64_t kind = F32; kind <= BF16; kind++)
        for (int how = 0; how < 2; how++) { /* a window, sinks and norms of heads, or none of them */
            int64_t pool = SEQUENCES * BLOCKS * BLOCK * KV_HEADS * DIM, ids[TOKENS * 2];
            struct block b = {.q = dense(kind, HEADS * DIM, HIDDEN), .k = dense(kind, KV_HEADS * DIM, HIDDEN),
                              .v = dense(kind, KV_HEADS * DIM, HIDDEN), .o = dense(kind, HIDDEN, HEADS * DIM),
                              .router = dense(kind, EXPERTS, HIDDEN), .norm = made(kind, HIDDEN, 1.0f), .next_norm = made(kind, HIDDEN, 1.0f),
                              .keys = made(kind, pool, 1.0f), .values = made(kind, pool, 1.0f), .heads = HEADS, .kv_heads = KV_HEADS,
                              .dim = DIM, .rotary = DIM, .norm_width = DIM, .kind = kind, .top_k = 2, .normalize = how, .round_weights = 0,
                              .eps = 1e-5f, .head_eps = 1e-6f, .scale = 0.25f};
            if (how) b.q_norm = made(kind, DIM, 1.0f), b.k_norm = made(kind, DIM, 1.0f), b.sinks = made(F32, HEADS, 1.0f), b.window = 20;
            float weights[TOKENS * 2];
            struct step s = {.h = made(kind, TOKENS * HIDDEN, 1.0f), .x = made(kind, TOKENS * HIDDEN, 0.0f),
                             .add = how ? made(kind, TOKENS * HIDDEN, 1.0f) : NULL, .cos = made(kind, TOKENS * DIM, 1.0f),
                             .sin = made(kind, TOKENS * DIM, 1.0f), .first = first, .lengths = lengths, .blocks = blocks, .ids = ids,
                             .weights = (char *)weights, .work = malloc((size_t)moe_cpu_block_work(&b, TOKENS, HIDDEN)), .tokens = TOKENS,
                             .sequences = SEQUENCES, .max_blocks = BLOCKS, .block_size = BLOCK, .hidden = HIDDEN, .threads = 1, .isa = isa};
            if (moe_cpu_block(&b, &s)) return 3;
            for (int i = 0; i < TOKENS * 2; i++) weights[i] += (float)ids[i];
            printf("block %d %d %016lx", (int)kind, how, hash_of(s.h, kind, TOKENS * HIDDEN));
            printf(" %016lx %016lx\n", hash_of(s.x, kind, TOKENS * HIDDEN), hash_of(weights, F32, TOKENS * 2));
        }
    return 0;
}

int main(int argc, char **argv) {
    static char up[ROOM], down[ROOM];
    static float scales[2][ROOM / 4], x[T * H], out[T * K * H], weights[T * K];
    static int8_t zeros[2][ROOM];
    static uint16_t narrow[T * H];
    int64_t ids[T * K], isa = 0;
    while (argc > 1 && moe_cpu_isa(isa) && strcmp(moe_cpu_isa(isa), argv[1])) isa++;
    if (!moe_cpu_isa(isa)) return 2;
    for (int i = 0; i < T * H; i++) x[i] = small(), narrow[i] = float_to_bf16(x[i]);
    for (int i = 0; i < T * K; i++) ids[i] = next() % SLOTS, weights[i] = small();
    for (int kind = F32; kind <= F16 + CODES; kind++)
        for (int64_t columns = 8; columns <= 1024; columns *= 2) {
            int code = kind > F16 ? kind - F16 - 1 : -1;
            if ((code == NESTED && columns % 16) || (code == BF12 && columns > 8)) continue;
            struct layer l = {.slots = SLOTS, .gated = 1, .act = SILU};
            l.up = make(up, scales[0], zeros[0], 2, I, H, kind, code, columns);
            l.down = make(down, scales[1], zeros[1], 1, H, I, kind, code, columns);
            for (int how = 0; how < 8; how++) { /* with weights or without; few rows of an expert or many; x of fp32 or bf16 */
                struct call c = {.x = x, .x_row = H * 4, .slot_ids = ids, .ids_are_64 = 1, .tokens = how & 2 ? 2 : T, .top_k = K, .out = out, .threads = 1};
                if (how & 1) c.topk_weights = weights;
                if (how & 4) c.x = narrow, c.x_row = H * 2, c.x_kind = BF16;
                if (moe_cpu_experts(&l, &c, isa)) return 3;
                int64_t kind_out = how & 1 ? c.x_kind : F32;
                printf("%d %d %ld %d %016lx\n", kind, code, (long)columns, how, hash_of(out, kind_out, c.tokens * H * (how & 1 ? 1 : K)));
            }
            for (int64_t rows = 1; rows <= T; rows += T - 1) {
                if (moe_cpu_linear(&l.down, x, H * 4, F32, rows, out, 1, isa)) return 3;
                printf("linear %d %d %ld %ld %016lx\n", kind, code, (long)columns, (long)rows, hash_of(out, F32, rows * H));
            }
        }
    int status = print_routers(isa);
    if (!status) status = print_blocks(isa);
    if (!status) status = print_shortened(isa);
    return status ? status : is_finite ? 0 : 4;
}
