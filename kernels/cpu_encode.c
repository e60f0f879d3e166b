/* bf16 to bf12 (kernels/bf12.py), as experts arrive; the code is in cpu_bf12.h. */

#include "cpu_experts.h"

/* from: bf16 [n, k], contiguous; codes: n rows of whole blocks; words: [parts, n / parts, 1 + room] of 4 bytes. Returns how
 * many rows have more rare weights than there is room for: the count in their first word says so. */
EXPORT int64_t moe_cpu_shorten(const char *from, int64_t n, int64_t k, int64_t parts, int64_t room, char *codes, char *words,
                               int64_t isa) {
    return moe_kernels(isa)->shorten(from, n, k, parts, room, codes, words);
}
