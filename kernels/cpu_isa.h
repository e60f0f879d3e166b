/* All vector code of one instruction set; what the includer defines is listed in cpu_panel.h, cpu_codes.h and cpu_nested.h. */

#include "cpu_elements.h"
#include "cpu_panel.h"
#include "cpu_attention.h"
#include "cpu_codes.h"
#include "cpu_nested.h"
#include "cpu_bf12.h"

const struct kernels NAME(kernels) = {
    ISA, MR, HAS_DOT, NAME(pack_x), NAME(tile), NAME(tile_codes), NAME(tile_nested), NAME(tile_bf12), NAME(shorten),
    NAME(add_bias), NAME(round), NAME(activate), NAME(combine), NAME(gather),
};
