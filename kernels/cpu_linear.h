/* Dense layers on CPUs. */

#ifndef MOE_CPU_LINEAR_H
#define MOE_CPU_LINEAR_H

#include "cpu_experts.h"

enum { MOST_LINEAR = 3 };

struct linear {
    const struct matrix *w; /* its slot 0 */
    char *out;              /* [rows, w->n] of the kind of x, contiguous */
};

/* Up to MOST_LINEAR matrices of one width times the same rows of x, which lie x_row bytes apart, in one piece of work.
 * 0: done; -1: out of memory or threads. */
int64_t moe_linears(const struct linear *all, int64_t num, const void *x, int64_t x_row, int64_t x_kind, int64_t rows,
                    int64_t threads, int64_t isa);

#endif
