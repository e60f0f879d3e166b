"""Experts and linear layers stored as codes on the CPU: against float64, every instruction set, every kind of scale."""

import pytest
import torch
from kernels_codes import coded_experts, random_codes, random_coding
from torch.nn import functional as F

from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.formats import Coding, decode
from moe.kernels.reference import activation_reference, combine_reference, dequantized, experts_reference
from moe.kernels.weights import Activation, ExpertWeights

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the compiled helper is absent")

CODES = ("e4m3", "int8", "int4", "e2m1", "lut4")
WIDE = 1 << 20
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def tokens(count: int, top_k: int, w: ExpertWeights, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = torch.randn(count, w.hidden_size).to(dtype)
    return x, torch.randint(-1, len(w.gate_up), (count, top_k)), torch.rand(count, top_k)


def float64_experts(x: torch.Tensor, slot_ids: torch.Tensor, w: ExpertWeights) -> torch.Tensor:
    """y of fp32 x with every sum in float64, on the weights that the twin decodes."""
    y = torch.zeros(*slot_ids.shape, w.hidden_size, dtype=torch.float64)
    for slot in range(len(w.gate_up)):
        first, second = (matrix.double() for matrix in dequantized(w, slot))
        biases = [None if b is None else b[slot].double() for b in (w.gate_up_bias, w.down_bias)]
        t, k = torch.where(slot_ids == slot)
        h = activation_reference(F.linear(x[t].double(), first, biases[0]), w.activation).double()
        y[t, k] = F.linear(h, second, biases[1])
    return y


def check(w: ExpertWeights, counts: tuple[tuple[int, int], ...] = ((0, 2), (1, 4), (29, 3))) -> None:
    for isa, name in enumerate(instruction_sets()):
        experts = CpuExperts(w, isa=isa)
        for count, top_k in counts:
            x, slot_ids, topk_weights = tokens(count, top_k, w)
            y, exact = experts.experts(x, slot_ids), float64_experts(x, slot_ids, w)
            # fp32 sums of fp32 products; the activation itself is computed in fp32 on both sides
            assert float((y.double() - exact).norm()) <= 2e-6 * float(exact.norm()), name
            assert torch.equal(experts.combine(x, slot_ids, topk_weights), combine_reference(y, topk_weights))


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ((3, 128, 256), (1, WIDE)),  # a scale per channel
        ((3, 256, 128), (WIDE, WIDE)),  # per tensor
        ((3, 384, 192), (128, 128)),  # blocks, ragged in both directions
        ((3, 176, 90), (1, 32)),  # the end of a row fills no vector
        ((2, 2064, 160), (1, 128)),  # more than one chunk of a sum
        ((3, 192, 160), (1, 16)),
        ((3, 192, 64), (3, 64)),
        ((2, 1536, 32), (2, 768)),  # groups wider than a chunk's half, not a power of two
        ((3, 53, 37), (1, 8)),  # odd rows of nibbles; groups that are decoded first
        ((2, 120, 70), (5, 40)),
        ((1, 1, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize("code", CODES)
def test_shapes_and_groups(code, sizes, block):
    torch.manual_seed(0)
    check(coded_experts((code, code), sizes, (block, block)))


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16, E8M0, E4M3])
@pytest.mark.parametrize(("code", "columns"), [("int4", 32), ("int4", 128), ("int8", 64), ("e2m1", 16), ("e4m3", WIDE)])
def test_scales_zeros_and_factors(code, columns, scale_dtype, with_zeros):
    if with_zeros and code not in ("int4", "int8"):
        return
    torch.manual_seed(1)
    block = (1, columns)
    how = {"scale_dtype": scale_dtype, "with_zeros": with_zeros, "with_factor": scale_dtype == E4M3}
    check(coded_experts((code, code), (3, 272, 136), (block, block), bias_dtype=torch.bfloat16, **how))


@pytest.mark.parametrize("code", ["int4", "int8"])
def test_columns_grouped_freely(code):
    torch.manual_seed(2)
    check(coded_experts((code, code), (3, 160, 96), ((1, 32), (1, 16)), with_groups=True, with_zeros=True))


def test_groups_that_do_not_exist_change_numbers_and_nothing_else():
    """A packed file may say anything: no scale is read beyond those that there are."""
    torch.manual_seed(2)
    w = coded_experts(("int4", "int8"), (3, 160, 96), ((1, 32), (1, 16)), with_groups=True, with_zeros=True)
    x, slot_ids = torch.randn(5, 160), torch.randint(0, 3, (5, 2))
    made = []
    for group in (-(1 << 31), (1 << 31) - 1, None):
        for coding in (w.gate_up_coding, w.down_coding):
            assert coding is not None
            assert coding.group_of is not None
            coding.group_of.fill_(coding.scale.shape[-1] - 1 if group is None else group)
        made.append([CpuExperts(w, isa=isa).experts(x, slot_ids) for isa in range(len(instruction_sets()))])
    for below, beyond, there in zip(*made):
        assert torch.equal(below, there)
        assert torch.equal(beyond, there)


@pytest.mark.parametrize(
    "activation",
    [
        Activation(interleaved=True),
        Activation(kind="gpt_oss", interleaved=True, limit=0.7),
        Activation(kind="relu2", gated=False),
    ],
)
@pytest.mark.parametrize("codes", [("int4", "lut4"), ("lut4", "e4m3"), ("e4m3", None), (None, "e2m1")])
def test_matrices_of_different_codes_and_layouts(codes, activation):
    torch.manual_seed(3)
    blocks = ((1, 64), (16, 32))
    if None in codes:
        w = coded_experts(codes, (3, 160, 96), blocks, activation=activation)
    else:
        w = coded_experts(codes, (3, 160, 96), blocks, activation=activation, bias_dtype=torch.float16)
    check(w)


def test_scales_at_their_ends():
    """A scale of 2 ** -127, which is subnormal, and one of 2 ** 100; zeros that lie beyond the codes."""
    w = coded_experts(
        ("e2m1", "e2m1"),
        (1, 128, 64),
        ((1, 32), (1, 32)),
        scale_dtype=E8M0,
        activation=Activation(kind="relu", gated=False),
    )
    assert w.gate_up_coding is not None
    assert w.down_coding is not None
    w.down_coding.scale.view(torch.uint8).fill_(0)
    w.gate_up_coding.scale.view(torch.uint8).fill_(227)
    x = torch.ones(1, 128)
    for isa in range(len(instruction_sets())):
        y = CpuExperts(w, isa=isa).experts(x, torch.zeros(1, 1, dtype=torch.int64))
        exact = float64_experts(x, torch.zeros(1, 1, dtype=torch.int64), w)
        assert exact.abs().max() > 1e-9
        assert float((y.double() - exact).norm()) <= 2e-6 * float(exact.norm())


@pytest.mark.parametrize("columns", [64, 32, 24])  # whole lines, half ones, and groups that are decoded first
@pytest.mark.parametrize("role", ["weight", "scale"])
@pytest.mark.parametrize(("dtype", "x_dtype"), [(E4M3, torch.float32), (E4M3, torch.bfloat16), (E8M0, torch.float32)])
def test_every_byte_is_the_number_that_torch_says(dtype, x_dtype, role, columns):
    """As a weight (e4m3) or as a scale: 0x7f and 0xff of e4m3, 0xff of e8m0 are no numbers."""
    if dtype == E8M0 and role == "weight":
        return
    every, width = torch.arange(256, dtype=torch.uint8).view(dtype), 2 * columns
    value = every.float()
    assert int(value.isnan().sum()) == (2 if dtype == E4M3 else 1)
    for number in range(256):  # a row of its own: no number spreads from one row to another
        code = every[number] if role == "weight" else torch.tensor(1, dtype=torch.int8)
        scale = every[number] if role == "scale" else torch.tensor(1.0)
        kind = "e4m3" if role == "weight" else "int8"
        w = ExpertWeights(
            code.expand(1, 1, width).clone(),
            torch.ones(1, width, 1).to(E4M3),
            None,
            None,
            activation=Activation(kind="relu", gated=False),
            gate_up_coding=Coding(kind, (1, columns), scale.expand(1, 1, 1, 2).clone()),
            down_coding=Coding("e4m3", (1, WIDE), torch.ones(1, 1, width, 1)),
        )
        twin = dequantized(w, 0)[0][0, 0]
        torch.testing.assert_close(twin, value[number], rtol=0, atol=0, equal_nan=True)
        x = torch.zeros(1, width, dtype=x_dtype)
        x[0, columns] = -1.0 if value[number] < 0 else 1.0
        for isa, name in enumerate(instruction_sets()):
            y = CpuExperts(w, isa=isa).experts(x, torch.zeros(1, 1, dtype=torch.int64))
            expected = value[number].abs().expand(width)
            torch.testing.assert_close(y[0, 0], expected, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {number}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("code", "block"), [*[(code, (1, 32)) for code in CODES], ("e4m3", (64, 128)), ("int4", (1, 24))]
)
def test_a_token_does_not_feel_its_batch(code, block, dtype):
    """Bit for bit the same alone and among others, on any number of threads, with every instruction set."""
    torch.manual_seed(4)
    w = coded_experts((code, code), (4, 1100, 75), (block, block), with_zeros=code == "int4")
    x, slot_ids, _ = tokens(130, 3, w, dtype)
    slot_ids[40:] = slot_ids[40:] % 2  # two experts with many rows, two with few
    y = CpuExperts(w).experts(x, slot_ids)
    reference = experts_reference(x, slot_ids, w)
    bound = 1e-6 if dtype == torch.float32 else 4e-3  # another order of a sum may move a rounding of h by a unit
    assert float((y - reference).norm()) <= bound * float(reference.norm())
    threads = torch.get_num_threads()
    try:
        for isa, name in enumerate(instruction_sets()):
            experts = CpuExperts(w, isa=isa)
            torch.set_num_threads(3)
            together = experts.experts(x, slot_ids)
            torch.set_num_threads(1)
            for t in (0, 7, 129):
                assert torch.equal(experts.experts(x[t : t + 1], slot_ids[t : t + 1])[0], together[t]), name
            assert torch.equal(experts.experts(x[30:60], slot_ids[30:60]), together[30:60])
            if name != "plain":  # without fused multiply-add on x86
                assert torch.equal(together, y), name
    finally:
        torch.set_num_threads(threads)


def test_too_many_columns_are_refused():
    w = coded_experts(("int8", "int8"), (1, 65552, 1), ((1, WIDE), (1, WIDE)))
    with pytest.raises(ValueError, match="at most 65536 columns of codes"):
        CpuExperts(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_out", "width", "block"), [(130, 192, (1, 32)), (65, 1040, (64, 128)), (7, 33, (1, 8))])
@pytest.mark.parametrize("code", CODES)
def test_linear_layers(code, num_out, width, block, dtype):
    torch.manual_seed(5)
    codes = random_codes(code, (num_out,), width)
    coding = random_coding(code, (1, 1, num_out, width), block, with_zeros=code == "int4")
    bias, x = torch.randn(num_out), torch.randn(45, width).to(dtype)
    exact = F.linear(x.double(), decode(codes, coding, width, 0).double(), bias.double())
    # a rounding to the dtype, the sum in fp32, and the weights, which the twin rounds to fp32
    bound = torch.finfo(dtype).eps * exact.abs() + 4e-6
    for isa, name in enumerate(instruction_sets()):
        linear = CpuLinear(codes, bias, coding=coding, columns=width, isa=isa)
        y = linear(x)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= bound).all(), name
        assert torch.equal(torch.cat([linear(row[None]) for row in x[:9]]), y[:9]), name


def test_linear_refuses_what_is_damaged():
    codes, coding = random_codes("e2m1", (8,), 64), random_coding("e2m1", (1, 1, 8, 64), (1, 32), scale_dtype=E8M0)
    CpuLinear(codes, coding=coding, columns=64)
    with pytest.raises(ValueError, match=r"scales of weight are .* \(1, 1, 8, 2\)"):
        CpuLinear(codes[:, :16], coding=coding, columns=32)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 8, 32\); it must be \(1, 8, 31\)"):
        CpuLinear(codes, coding=coding, columns=62)
    coding.scale.view(torch.uint8)[0, 0, 3, 1] = 255
    with pytest.raises(ValueError, match="the scale of e2m1 codes is not finite"):
        CpuLinear(codes, coding=coding, columns=64)
