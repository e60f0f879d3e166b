/* What is before the experts of a layer, and a step of tokens through it; kernels/cpu_block.py fills them. */

#ifndef MOE_CPU_BLOCK_H
#define MOE_CPU_BLOCK_H

#include "cpu_experts.h"

struct block { /* one layer */
    struct matrix q, k, v, o, router;
    const void *norm, *next_norm, *q_norm, *k_norm; /* weights; q_norm, k_norm: NULL where heads have no norm */
    char *keys, *values;                            /* the pool: [rows, kv_heads, dim] of the kind of h */
    const float *sinks;                             /* [heads], NULL: none */
    int64_t heads, kv_heads, dim, rotary;           /* rotary: the first elements of a head that turn with positions */
    int64_t norm_width;                             /* of q_norm: dim, or heads * dim */
    int64_t window, kind;                           /* window: keys that a query sees, itself included; 0: all */
    int64_t top_k, normalize, round_weights;        /* top_k 0: no router */
    int64_t round_once;                             /* norms round only after their weight */
    float eps, head_eps, scale;
};

struct step { /* all layers of one step: T tokens of S sequences, a sequence's tokens side by side */
    char *h, *x;            /* [T, H]: the residual stream, in and out; what goes to the experts */
    const char *add;        /* [T, H]: what the layer before still has to add; NULL: nothing */
    const char *cos, *sin;  /* [T, rotary] */
    const int64_t *first;   /* [S + 1] each sequence's first token; T at the end */
    const int64_t *lengths; /* [S] keys of each sequence, the new ones included */
    const int32_t *blocks;  /* [S, max_blocks]: where a sequence's keys are in the pool, in blocks */
    int64_t *ids;           /* [T, top_k] */
    char *weights;          /* [T, top_k] fp32, or of the kind of h */
    char *work;             /* moe_cpu_block_work bytes */
    int64_t tokens, sequences, max_blocks, block_size, hidden, threads, isa;
};

/* 0: done; -1: out of memory or threads. */
int64_t moe_cpu_block(const struct block *b, const struct step *s);

#endif
