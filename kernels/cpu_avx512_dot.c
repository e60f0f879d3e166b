/* AVX-512 with vdpbf16ps. */

#define WITH_DOT
#include "cpu_avx512.c"
