"""Codes of few rows of x, read where they lie, nibbles line by line (cpu_nibbles.h): the bits that many rows have,
which are decoded first, and those of instruction sets that read no lines."""

import pytest
import torch
from kernels_codes import coded_experts, random_codes, random_coding

from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.weights import Activation

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the compiled helper is absent")

ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 18, 19, 40, 72, 73)  # 18 and, with AVX-512, 72: the most that are few
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
SCALES = (torch.float32, torch.bfloat16, torch.float16, E8M0, E4M3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize(
    ("code", "columns", "with_zeros"),
    [
        *(("int4", columns, with_zeros) for columns in (16, 32, 64, 128) for with_zeros in (False, True)),
        *(("e2m1", 16, False), ("e2m1", 32, False), ("lut4", 64, False), ("int4", 256, True), ("int4", 1 << 20, False)),
        *(("int8", 128, True), ("int8", 1 << 20, False), ("e4m3", 128, False)),
    ],
)
def test_few_rows_of_a_linear_layer_have_the_bits_of_many(code, columns, with_zeros, scale_dtype, dtype):
    torch.manual_seed(0)
    rows_of_w, width = 70, 1152  # a tile of 64 and one of 6; more than one chunk of a sum
    codes = random_codes(code, (rows_of_w,), width)
    how = {"scale_dtype": scale_dtype, "with_zeros": with_zeros, "with_factor": scale_dtype == E4M3}
    coding = random_coding(code, (1, 1, rows_of_w, width), (1, columns), **how)
    x = torch.randn(90, width).to(dtype)
    first = None
    for isa, name in enumerate(instruction_sets()):
        linear = CpuLinear(codes, coding=coding, columns=width, isa=isa)
        many = linear(x)
        for rows in ROWS:
            assert torch.equal(linear(x[:rows]), many[:rows]), (name, rows)
        if name != "plain":  # without fused multiply-add on x86
            first = many if first is None else first
            assert torch.equal(many, first), name


@pytest.mark.parametrize(
    "activation", [Activation(), Activation(interleaved=True), Activation(kind="relu2", gated=False)]
)
@pytest.mark.parametrize(
    ("code", "block"), [("int4", (1, 32)), ("lut4", (1, 64)), ("e2m1", (2, 32)), ("e4m3", (2, 128))]
)
def test_few_tokens_of_experts_have_the_bits_of_many(code, block, activation):
    """Tiles of 32, and of 2 or 6 rows at the end of a part; slots further apart than they are long."""
    torch.manual_seed(1)
    for inter in (128, 38):
        w = coded_experts((code, code), (3, 384, inter), (block, block), activation=activation)
        x, slot_ids = torch.randn(180, 384).bfloat16(), torch.randint(0, 3, (180, 2))
        for isa, name in enumerate(instruction_sets()):
            experts = CpuExperts(w, isa=isa)
            many = experts.experts(x, slot_ids)
            for first, rows in ((0, 1), (1, 5), (6, 12), (18, 60)):
                few = experts.experts(x[first : first + rows], slot_ids[first : first + rows])
                assert torch.equal(few, many[first : first + rows]), (name, rows)
