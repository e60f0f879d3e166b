/* The vector code of cpu_experts.c, included once per instruction set.
 *
 * The includer defines NAME(x), ISA (a string), TARGET, VEC, WIDTH (floats in a VEC), VZERO, VLOAD, VLOAD_BF16, VLOAD_F16, VFMA,
 * MR, NR (rows of x and of W in a register block) and, where it has a faster one, SUM_BLOCK.
 *
 * Every sum over K has one order, whatever the block, the path and the vector width: within each chunk of KC elements,
 * lane l of 16 sums the elements k = l mod 16 in turn, then lanes i and i+8, i+4, i+2, i+1 are added; chunks are added
 * in turn. So a result depends on its own row of x alone, and is the same on every machine with fused multiply-add.
 */

#define SUB (LANES / WIDTH) /* vectors that make up 16 lanes */

/* c[m][n] (+)= sum over `steps` * 16 elements of x row m times w row n, for `groups` groups of NR rows of w.
 * x: [steps][mr][16] floats. w: row n of step s begins at w + n * row + s * step bytes, in storage `kind`. */
static inline __attribute__((always_inline)) TARGET void NAME(panel)(int mr, int kind, const float *x0, const char *w0,
                                                                    const struct walk *k, float *c) {
    int64_t row = k->row, step = k->step, ldc = k->ldc, ahead = k->ahead;
    for (int64_t g = 0; g < k->groups; g++, w0 += k->group, c += NR) {
        const float *x = x0;
        const char *w = w0;
        VEC acc[MR][NR][SUB];
#pragma GCC unroll 8
        for (int m = 0; m < mr; m++)
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++)
#pragma GCC unroll 8
                for (int u = 0; u < SUB; u++) acc[m][n][u] = VZERO;
        for (int64_t s = 0; s < k->steps; s++) {
            VEC wv[NR][SUB];
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++)
#pragma GCC unroll 8
                for (int u = 0; u < SUB; u++) {
                    const char *p = w + n * row;
                    if (u == 0 && ahead) __builtin_prefetch(p + ahead, 0, 2); /* to L2: L1 has too few pending misses */
                    if (kind == F32)
                        wv[n][u] = VLOAD((const float *)(const void *)p + u * WIDTH);
                    else if (kind == BF16)
                        wv[n][u] = VLOAD_BF16((const uint16_t *)(const void *)p + u * WIDTH);
                    else
                        wv[n][u] = VLOAD_F16((const uint16_t *)(const void *)p + u * WIDTH);
                }
#pragma GCC unroll 8
            for (int m = 0; m < mr; m++)
#pragma GCC unroll 8
                for (int u = 0; u < SUB; u++) {
                    VEC xv = VLOAD(x + m * LANES + u * WIDTH);
#pragma GCC unroll 8
                    for (int n = 0; n < NR; n++) acc[m][n][u] = VFMA(xv, wv[n][u], acc[m][n][u]);
                }
            x += mr * LANES;
            w += step;
        }
#ifdef SUM_BLOCK
        SUM_BLOCK(mr, acc, c, ldc, k->first);
#else
        for (int m = 0; m < mr; m++)
            for (int n = 0; n < NR; n++) {
                float lane[LANES];
                memcpy(lane, acc[m][n], sizeof lane);
                for (int half = LANES / 2; half; half /= 2)
                    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
                c[m * ldc + n] = k->first ? lane[0] : c[m * ldc + n] + lane[0];
            }
#endif
    }
}

static TARGET void NAME(any_panel)(int64_t mr, int64_t kind, const float *x, const char *w, const struct walk *k,
                                   float *c) {
#define CASE(M)                                 \
    case M:                                     \
        if (kind == F32)                        \
            NAME(panel)(M, F32, x, w, k, c);    \
        else if (kind == BF16)                  \
            NAME(panel)(M, BF16, x, w, k, c);   \
        else                                    \
            NAME(panel)(M, F16, x, w, k, c);    \
        break;
    switch (mr) {
        CASE(1)
#if MR >= 2
        CASE(2)
#endif
#if MR >= 3
        CASE(3)
#endif
#if MR >= 4
        CASE(4)
        CASE(5)
        CASE(6)
#endif
    }
#undef CASE
}

static inline __attribute__((always_inline)) TARGET void NAME(widen16)(int kind, const char *from, float *to) {
    for (int u = 0; u < SUB; u++) {
        int64_t i = u * WIDTH;
        VEC v = kind == F32    ? VLOAD((const float *)from + i)
                : kind == BF16 ? VLOAD_BF16((const uint16_t *)from + i)
                               : VLOAD_F16((const uint16_t *)from + i);
        memcpy(to + i, &v, sizeof v);
    }
}

/* n elements into groups of 16 that stand `stride` floats apart; the last group is filled with zeros. */
static inline __attribute__((always_inline)) TARGET void NAME(spread)(int kind, const char *from, int64_t n, float *to,
                                                                     int64_t stride) {
    int64_t size = kind == F32 ? 4 : 2;
    for (; n >= LANES; n -= LANES, from += LANES * size, to += stride) NAME(widen16)(kind, from, to);
    if (n > 0)
        for (int64_t i = 0; i < LANES; i++) to[i] = i < n ? widen_one(kind, from, i) : 0.0f;
}

static TARGET void NAME(pack_x)(int kind, const char *from, int64_t n, float *to, int64_t stride) {
    if (kind == F32)
        NAME(spread)(F32, from, n, to, stride);
    else if (kind == BF16)
        NAME(spread)(BF16, from, n, to, stride);
    else
        NAME(spread)(F16, from, n, to, stride);
}

/* Elements [k0, k1) of `count` rows of W: NR rows at a time as [steps][NR][16] floats, filled up with zeros. */
static TARGET void NAME(pack_w)(const struct matrix *w, const char *from, int64_t count, int64_t k0, int64_t k1,
                                float *to) {
    int64_t size = w->kind == F32 ? 4 : 2, steps = (k1 - k0 + LANES - 1) / LANES;
    for (int64_t q = 0; q < count; q += NR, to += steps * NR * LANES)
        for (int64_t n = 0; n < NR; n++)
            if (q + n < count)
                NAME(pack_x)((int)w->kind, from + (q + n) * w->row + k0 * size, k1 - k0, to + n * LANES, NR * LANES);
            else
                for (int64_t s = 0; s < steps; s++) memset(to + (s * NR + n) * LANES, 0, LANES * sizeof(float));
}

/* C[m][n] = x row m * W row n0 + n for m < rows, n < count. x: blocks of MR rows, each [K16/16][mr][16].
 * C has ldc columns, a multiple of 16 that is >= count: columns beyond count receive rubbish. */
static TARGET void NAME(tile)(const float *x, int64_t rows, const struct matrix *w, const char *base, int64_t n0,
                              int64_t count, float *c, int64_t ldc, float *scratch) {
    int64_t k16 = (w->k + LANES - 1) / LANES * LANES, size = w->kind == F32 ? 4 : 2;
    int64_t few = w->kind == F32 ? STRAIGHT_ROWS_F32 : STRAIGHT_ROWS_16;
    int64_t straight = w->k == k16 && rows <= few ? count / NR * NR : 0;
    base += n0 * w->row;
    struct walk k = {.row = w->row, .step = LANES * size, .ldc = ldc, .groups = 1};
    for (int64_t n = 0; n < straight; n += NR) /* few rows of x: W is read once, from where it lies */
        for (int64_t k0 = 0; k0 < k16; k0 += KC) {
            int64_t kc = k16 - k0 < KC ? k16 - k0 : KC;
            k.steps = kc / LANES, k.first = k0 == 0;
            for (int64_t m = 0; m < rows; m += MR) {
                int64_t mr = rows - m < MR ? rows - m : MR;
                k.ahead = m ? 0 : NR * w->row > AHEAD ? NR * w->row : AHEAD; /* the hardware loses streams at pages */
                NAME(any_panel)(mr, w->kind, x + m * k16 + k0 * mr, base + n * w->row + k0 * size, &k, c + m * ldc + n);
            }
        }
    if (straight == count) return;
    k = (struct walk){.row = LANES * 4, .step = NR * LANES * 4, .ldc = ldc, .groups = (count - straight + NR - 1) / NR};
    for (int64_t k0 = 0; k0 < k16; k0 += KC) { /* many rows of x: W widened and packed first */
        int64_t kc = k16 - k0 < KC ? k16 - k0 : KC;
        k.steps = kc / LANES, k.first = k0 == 0, k.group = NR * kc * 4;
        NAME(pack_w)(w, base + straight * w->row, count - straight, k0, k0 + kc < w->k ? k0 + kc : w->k, scratch);
        for (int64_t m = 0; m < rows; m += MR) {
            int64_t mr = rows - m < MR ? rows - m : MR;
            NAME(any_panel)(mr, F32, x + m * k16 + k0 * mr, (const char *)scratch, &k, c + m * ldc + straight);
        }
    }
}

static TARGET void NAME(round)(int kind, float *v, int64_t n) {
    if (kind == BF16)
        for (int64_t i = 0; i < n; i++) v[i] = bf16_to_float(float_to_bf16(v[i]));
    else if (kind == F16)
        for (int64_t i = 0; i < n; i++) v[i] = half_to_float(float_to_half(v[i]));
}

static TARGET void NAME(add_bias)(float *c, int64_t ldc, int64_t rows, const float *bias, int64_t n) {
    for (int64_t m = 0; m < rows; m++, c += ldc)
        for (int64_t i = 0; i < n; i++) c[i] = c[i] + bias[i];
}

/* gate = act(gate) * up, or act(gate) when up is NULL. */
static TARGET void NAME(activate)(const struct layer *l, float *restrict gate, const float *restrict up, int64_t n) {
    float alpha = l->alpha, limit = l->limit;
    switch (l->act) {
    case SILU:
        for (int64_t i = 0; i < n; i++) gate[i] = silu(gate[i]);
        break;
    case GELU:
        for (int64_t i = 0; i < n; i++) gate[i] = gelu(gate[i]);
        break;
    case GELU_TANH:
        for (int64_t i = 0; i < n; i++) gate[i] = gelu_tanh(gate[i]);
        break;
    case RELU:
        for (int64_t i = 0; i < n; i++) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i];
        break;
    case RELU2:
        for (int64_t i = 0; i < n; i++) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i] * gate[i];
        break;
    case GPT_OSS:
        for (int64_t i = 0; i < n; i++) {
            float g = gate[i] > limit ? limit : gate[i];
            float u = up[i] > limit ? limit : up[i];
            u = u < -limit ? -limit : u;
            gate[i] = (u + 1.0f) * (g * sigmoid(alpha * g));
        }
        return;
    }
    if (up)
        for (int64_t i = 0; i < n; i++) gate[i] = gate[i] * up[i];
}

/* out = round(sum of weight[k] * y[k], k ascending); a NULL y[k] is skipped. */
static TARGET void NAME(combine)(int kind, const float *const *y, const float *weight, int64_t top_k, int64_t n,
                                 char *out) {
    float acc[256];
    for (int64_t j0 = 0; j0 < n; j0 += 256) {
        int64_t m = n - j0 < 256 ? n - j0 : 256;
        for (int64_t j = 0; j < m; j++) acc[j] = 0.0f;
        for (int64_t k = 0; k < top_k; k++)
            if (y[k])
                for (int64_t j = 0; j < m; j++) acc[j] = acc[j] + weight[k] * y[k][j0 + j];
        if (kind == F32)
            memcpy((float *)(void *)out + j0, acc, m * sizeof(float));
        else if (kind == BF16)
            for (int64_t j = 0; j < m; j++) ((uint16_t *)(void *)out)[j0 + j] = float_to_bf16(acc[j]);
        else
            for (int64_t j = 0; j < m; j++) ((uint16_t *)(void *)out)[j0 + j] = float_to_half(acc[j]);
    }
}

static const struct kernels NAME(kernels) = {
    ISA, MR, NAME(pack_x), NAME(tile), NAME(add_bias), NAME(round), NAME(activate), NAME(combine),
};

#undef SUB
#undef SUM_BLOCK
#undef NAME
#undef ISA
#undef TARGET
#undef VEC
#undef WIDTH
#undef VZERO
#undef VLOAD
#undef VLOAD_BF16
#undef VLOAD_F16
#undef VFMA
#undef MR
#undef NR
