/* All layers of a step whose experts are all in memory, in one call:
 *
 *   block ─▶ x, ids, weights ─▶ slots[ids] ─▶ experts ─▶ what the next block adds first
 *
 * The same calls, in the same order, as when Python makes them one by one (kernels/cpu_layers.py); what Python does
 * between them takes as long as a small layer's own work.
 */

#include "cpu_block.h"

struct stage { /* one layer */
    const struct block *block;
    const struct layer *experts;
    const int32_t *slots; /* of each expert */
    int32_t *asked;       /* how often each was asked for; counted on */
};

int64_t moe_cpu_experts(const struct layer *l, const struct call *whole, int64_t isa);

/* sizeof both structs, so that a library of another version is noticed. */
EXPORT int64_t moe_cpu_layers_abi(void) { return (int64_t)(sizeof(struct stage) * 1000 + sizeof(struct step)); }

/* slots: scratch, int32 [T, top_k]; out: [T, H], what the last layer's experts add. s: its `add` is of the first layer.
 * 0: done; -1: out of memory or threads; otherwise 1 + the flat index of a slot id that does not exist. */
EXPORT int64_t moe_cpu_layers(const struct stage *stages, int64_t layers, const struct step *s, int32_t *slots,
                              char *out) {
    struct step step = *s;
    for (const struct stage *one = stages; one < stages + layers; one++) {
        const struct block *b = one->block;
        int64_t status = moe_cpu_block(b, &step);
        if (status) return status;
        for (int64_t i = 0; i < s->tokens * b->top_k; i++) {
            slots[i] = one->slots[s->ids[i]];
            one->asked[s->ids[i]]++;
        }
        struct call call = {.x = s->x, .x_row = s->hidden * size_of(b->kind), .x_kind = b->kind, .slot_ids = slots,
                            .topk_weights = s->weights, .topk_kind = b->round_weights ? b->kind : F32,
                            .tokens = s->tokens, .top_k = b->top_k, .out = out, .threads = s->threads};
        status = moe_cpu_experts(one->experts, &call, s->isa);
        if (status) return status;
        step.add = out;
    }
    return 0;
}
