/* What is done to rows of numbers before and after a product, included once per instruction set before cpu_panel.h. */

/* n elements into vectors of 16 that stand `stride` floats apart; the last is filled with zeros. */
static inline __attribute__((always_inline)) TARGET void NAME(spread)(int kind, const char *from, int64_t n, float *to,
                                                                     int64_t stride) {
    for (; n > 0; n -= LANES, from += LANES * size_of(kind), to += stride)
        if (n >= LANES)
            for (int64_t i = 0; i < LANES; i++) to[i] = widen_one(kind, from, i);
        else
            for (int64_t i = 0; i < LANES; i++) to[i] = i < n ? widen_one(kind, from, i) : 0.0f;
}

/* The same, of every 32 the odd ones first. */
static inline __attribute__((always_inline)) TARGET void NAME(spread_pairs)(int kind, const char *from, int64_t n,
                                                                           float *to, int64_t stride) {
    for (; n >= 2 * LANES; n -= 2 * LANES, from += 2 * LANES * size_of(kind), to += 2 * stride)
        for (int64_t i = 0; i < LANES; i++)
            to[i] = widen_one(kind, from, 2 * i + 1), to[stride + i] = widen_one(kind, from, 2 * i);
    if (n > 0)
        for (int64_t i = 0; i < LANES; i++) {
            to[i] = 2 * i + 1 < n ? widen_one(kind, from, 2 * i + 1) : 0.0f;
            to[stride + i] = 2 * i < n ? widen_one(kind, from, 2 * i) : 0.0f;
        }
}

/* The same, of every 128 a lane has 8 neighbours, in the order of EIGHTS. */
static inline __attribute__((always_inline)) TARGET void NAME(spread_eights)(int kind, const char *from, int64_t n,
                                                                            float *to, int64_t stride) {
    for (; n > 0; n -= 8 * LANES, from += 8 * LANES * size_of(kind), to += 8 * stride)
        for (int64_t j = 0; j < 8; j++)
            if (n >= 8 * LANES)
                for (int64_t i = 0; i < LANES; i++) to[j * stride + i] = widen_one(kind, from, 8 * i + EIGHTH(j));
            else
                for (int64_t i = 0; i < LANES; i++)
                    to[j * stride + i] = 8 * i + EIGHTH(j) < n ? widen_one(kind, from, 8 * i + EIGHTH(j)) : 0.0f;
}

static void NAME(copy_pairs)(const char *from, int64_t n, float *to, int64_t stride) {
    for (; n > 0; n -= 2 * LANES, from += 4 * LANES, to += stride) {
        if (n < 2 * LANES) memset(to, 0, 4 * LANES);
        memcpy(to, from, 2 * least(n, 2 * LANES));
    }
}

/* bf16 of every 128 into four vectors: in lane l of the j-th, 8l + j and above it 8l + 4 + j. */
static TARGET void NAME(copy_eights)(const char *from, int64_t n, float *to, int64_t stride) {
    for (; n > 0; n -= 8 * LANES, from += 16 * LANES, to += 4 * stride) {
        uint16_t x[8 * LANES] = {0};
        memcpy(x, from, 2 * (size_t)least(n, 8 * LANES));
        for (int64_t j = 0; j < 4; j++) {
            uint32_t both[LANES];
            for (int64_t i = 0; i < LANES; i++) both[i] = x[8 * i + j] | (uint32_t)x[8 * i + 4 + j] << 16;
            memcpy(to + j * stride, both, sizeof both);
        }
    }
}

/* bf16 of every 32 into a vector: in lane l, l and above it l + 16. */
static TARGET void NAME(copy_halves)(const char *from, int64_t n, float *to, int64_t stride) {
    for (; n > 0; n -= 2 * LANES, from += 4 * LANES, to += stride) {
        uint16_t x[2 * LANES] = {0};
        uint32_t both[LANES];
        memcpy(x, from, 2 * (size_t)least(n, 2 * LANES));
        for (int64_t i = 0; i < LANES; i++) both[i] = x[i] | (uint32_t)x[LANES + i] << 16;
        memcpy(to, both, sizeof both);
    }
}

static TARGET void NAME(pack_x)(int order, int kind, const char *from, int64_t n, float *to, int64_t stride) {
#define EACH(SPREAD)                              \
    if (kind == F32)                              \
        SPREAD(F32, from, n, to, stride);         \
    else if (kind == BF16)                        \
        SPREAD(BF16, from, n, to, stride);        \
    else                                          \
        SPREAD(F16, from, n, to, stride);
    if (order == NATURAL || order == HALVES) {
        EACH(NAME(spread))
        int64_t filled = (n + LANES - 1) / LANES;
        if (order == HALVES && filled % 2) memset(to + filled * stride, 0, 4 * LANES);
    } else if (order == PAIRS) {
        EACH(NAME(spread_pairs))
    } else if (order == EIGHTS) {
        EACH(NAME(spread_eights))
    } else if (order == DOT) {
        NAME(copy_pairs)(from, n, to, stride);
    } else if (order == DOT8) {
        NAME(copy_eights)(from, n, to, stride);
    } else {
        NAME(copy_halves)(from, n, to, stride);
    }
#undef EACH
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
