/* The second product of attention, compiled once per instruction set (cpu_panel.h says what the includer defines). */

enum { NAME(side) = WIDTH == 16 ? 4 : 2 }; /* vectors of a row at once: with 4 rows they and those of v fit the registers */

/* kind: F32 or BF16, a constant, as rows is, so that sums stay in registers. */
SCALAR TARGET void NAME(gather_rows)(int rows, int kind, const struct gather *g, int64_t row) {
    const float *shrink = g->shrink + row, *share = g->share + row * g->ld;
    for (int64_t i = 0; i < g->width; i += WIDTH * NAME(side)) {
        float *acc = g->acc + row * g->width + i;
        VEC sum[4][NAME(side)];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int u = 0; u < NAME(side); u++) sum[m][u] = VLOAD(acc + m * g->width + u * WIDTH) * VSET(shrink[m]);
        for (int64_t j = 0; j < g->keys; j++) {
            const char *from = g->v + g->places[j];
            VEC value[NAME(side)];
#pragma GCC unroll 4
            for (int u = 0; u < NAME(side); u++)
                value[u] = kind == F32 ? VLOAD((const float *)(const void *)from + i + u * WIDTH)
                                       : VLOAD_BF16((const uint16_t *)(const void *)from + i + u * WIDTH);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                VEC part = VSET(share[m * g->ld + j]);
#pragma GCC unroll 4
                for (int u = 0; u < NAME(side); u++) sum[m][u] = VFMA(part, value[u], sum[m][u]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int u = 0; u < NAME(side); u++) memcpy(acc + m * g->width + u * WIDTH, &sum[m][u], sizeof(VEC));
    }
}

static TARGET void NAME(gather)(const struct gather *g) {
    int64_t m = 0;
    if (g->kind == F32) {
        for (; m + 4 <= g->rows; m += 4) NAME(gather_rows)(4, F32, g, m);
        for (; m < g->rows; m++) NAME(gather_rows)(1, F32, g, m);
    } else {
        for (; m + 4 <= g->rows; m += 4) NAME(gather_rows)(4, BF16, g, m);
        for (; m < g->rows; m++) NAME(gather_rows)(1, BF16, g, m);
    }
}
