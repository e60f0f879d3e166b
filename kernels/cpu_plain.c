/* Four floats at a time: NEON with fused multiply-add, otherwise (x86 before 2013) multiply, then add. */

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu_scalars.h"

typedef float float4 __attribute__((vector_size(16)));

SCALAR float4 load4(const float *p) {
    float4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

#define NAME(x) moe_plain_##x
#define ISA "plain"
#define TARGET
#define VEC float4
#define WIDTH 4
#define VZERO ((float4){0})
#define VLOAD(p) load4(p)
#define VLOAD_ODD(p) \
    ((float4){bf16_to_float((p)[1]), bf16_to_float((p)[3]), bf16_to_float((p)[5]), bf16_to_float((p)[7])})
#define VLOAD_EVEN(p) \
    ((float4){bf16_to_float((p)[0]), bf16_to_float((p)[2]), bf16_to_float((p)[4]), bf16_to_float((p)[6])})
#define VLOAD_F16(p) \
    ((float4){half_to_float((p)[0]), half_to_float((p)[1]), half_to_float((p)[2]), half_to_float((p)[3])})
#if defined(__aarch64__)
#define VFMA(a, b, c) ((float4)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define MR 3
#define NR 2
#else
#define VFMA(a, b, c) ((c) + (a) * (b))
#define MR 2
#define NR 1
#endif

#include "cpu_isa.h"
