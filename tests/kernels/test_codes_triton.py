"""Experts stored as codes by both Triton paths, against the reference: every code, scale, grouping and dtype of x.

The same weights with activations in float32 tell a wrong weight from a rounding; bfloat16 and float16 have ways of
their own to stay exact.
"""

import functools

import pytest
import torch
from kernels_codes import coded_experts
from kernels_experts import fused_experts, random_ids, relative_error
from test_nested import matrices as nested_matrices

from moe.kernels import grouped_gemm, tiles
from moe.kernels.combine import combine
from moe.kernels.formats import Coding
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.matrix import reading
from moe.kernels.reference import experts_reference
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation, ExpertWeights

# y differs by the order of fp32 sums and scalings; where that tips the rounding of an intermediate, by an ulp of it.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
CODES = ("e4m3", "int8", "int4", "e2m1", "lut4")
WIDE = 1 << 20
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def check(weights, dtype, tokens=5, top_k=2, *, single=False):
    top_k = min(top_k, len(weights.down))
    x, ids = torch.randn(tokens, weights.hidden_size).to(dtype), random_ids(tokens, top_k, len(weights.down))
    y, want = grouped_experts(x, ids, weights), experts_reference(x, ids, weights)
    assert y.isfinite().all()
    assert relative_error(y, want) <= BOUND[dtype]
    if single:
        topk_weights = torch.rand(tokens, top_k)
        out = fused_experts(x, ids, topk_weights, torch.arange(len(weights.down)), weights)
        assert torch.equal(out, combine(y, topk_weights, dtype))


@pytest.mark.parametrize(
    ("sizes", "block", "dtype"),
    [
        ((3, 40, 24), (1, WIDE), torch.bfloat16),  # a scale per channel
        ((3, 72, 40), (WIDE, WIDE), torch.float16),  # per tensor
        ((3, 176, 90), (1, 32), torch.bfloat16),  # ends of rows inside a tile and inside a group
        ((2, 130, 33), (3, 16), torch.float32),  # an odd number of nibbles
        ((2, 160, 200), (128, 128), torch.bfloat16),
        ((2, 53, 37), (5, 24), torch.bfloat16),  # groups that divide no tile
        ((2, 53, 37), (5, 24), torch.float16),
        ((1, 1, 1), (1, 1), torch.float32),
    ],
)
@pytest.mark.parametrize("code", CODES)
def test_shapes_and_groups(code, sizes, block, dtype):
    torch.manual_seed(0)
    check(coded_experts((code, code), sizes, (block, block)), dtype, single=sizes == (3, 176, 90))


@pytest.mark.parametrize(
    ("code", "columns", "scale_dtype", "with_zeros", "dtype"),
    [
        ("int4", 32, torch.bfloat16, False, torch.bfloat16),
        ("int4", 64, torch.float16, True, torch.float16),
        ("int8", WIDE, torch.bfloat16, True, torch.bfloat16),
        ("e2m1", 16, E4M3, False, torch.bfloat16),
        ("e2m1", 16, E4M3, False, torch.float16),
        ("e2m1", 32, E8M0, False, torch.bfloat16),
        ("e2m1", 32, E8M0, False, torch.float16),
        ("e4m3", 32, E8M0, False, torch.bfloat16),
    ],
)
def test_scales_zeros_and_factors(code, columns, scale_dtype, with_zeros, dtype):
    torch.manual_seed(1)
    how = {"scale_dtype": scale_dtype, "with_zeros": with_zeros, "with_factor": scale_dtype == E4M3}
    check(coded_experts((code, code), (3, 80, 72), ((1, columns),) * 2, bias_dtype=torch.bfloat16, **how), dtype)


@pytest.mark.parametrize(("code", "dtype"), [("int4", torch.bfloat16), ("int8", torch.float16)])
def test_columns_grouped_freely(code, dtype):
    torch.manual_seed(2)
    how = {"with_groups": True, "with_zeros": True}
    check(coded_experts((code, code), (3, 160, 96), ((1, 32), (1, 16)), **how), dtype, single=True)


def test_groups_that_do_not_exist_change_numbers_and_nothing_else():
    """No scale is read beyond those that there are, as by the CPU's kernel."""
    torch.manual_seed(2)
    w = coded_experts(("int4", "int8"), (3, 64, 48), ((1, 32), (1, 16)), with_groups=True, with_zeros=True)
    x, ids, made = torch.randn(5, 64), random_ids(5, 2, 3), []
    for group in (-(1 << 31), (1 << 31) - 1, None):
        for coding in (w.gate_up_coding, w.down_coding):
            coding.group_of.fill_(coding.scale.shape[-1] - 1 if group is None else group)
        made.append(grouped_experts(x, ids, w))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])


@pytest.mark.parametrize(
    "activation",
    [
        Activation(interleaved=True),
        Activation(kind="gpt_oss", interleaved=True, limit=0.7),
        Activation(kind="relu2", gated=False),
    ],
)
@pytest.mark.parametrize("codes", [("int4", "lut4"), ("e4m3", None), (None, "e2m1")])
def test_matrices_of_different_codes_and_layouts(codes, activation):
    torch.manual_seed(3)
    how = {} if None in codes else {"bias_dtype": torch.float16}
    check(coded_experts(codes, (3, 96, 64), ((1, 64), (16, 32)), activation=activation, **how), torch.bfloat16)


def test_many_tiles():
    torch.manual_seed(4)
    weights = coded_experts(("int4", "e2m1"), (3, 48, 40), ((1, 32), (1, 32)))
    x, ids = torch.randn(40, 48).bfloat16(), random_ids(40, 2, 3, skew="one")
    y = grouped_experts(x, ids, weights, config=TileConfig(16, 16, 32, 32, 4, 1))
    assert relative_error(y, experts_reference(x, ids, weights)) <= BOUND[torch.bfloat16]


def test_scales_at_their_ends():
    """A power of two that is subnormal (which the interpreter loses in bfloat16), and 2 ** 100."""
    act = Activation(kind="relu", gated=False)
    weights = coded_experts(("e2m1", "e2m1"), (1, 128, 64), ((1, 32), (1, 32)), scale_dtype=E8M0, activation=act)
    weights.gate_up_coding.scale.view(torch.uint8).fill_(227)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        weights.down_coding.scale.view(torch.uint8).fill_(0 if dtype == torch.float32 else 3)
        x = torch.ones(1, 128, dtype=dtype)
        want = experts_reference(x, ids, weights)
        assert want.abs().max() > 1e-9
        assert relative_error(grouped_experts(x, ids, weights), want) <= BOUND[dtype]


def test_e4m3_where_the_chip_has_none(monkeypatch):
    """The same numbers from the bits alone, for GPUs before sm_89."""
    torch.manual_seed(6)
    weights = coded_experts(("e4m3", "e4m3"), (2, 64, 32), ((1, WIDE), (16, 16)))
    x, ids = torch.randn(5, 64), random_ids(5, 2, 2)
    native = grouped_experts(x, ids, weights)
    monkeypatch.setattr(grouped_gemm, "matrices", functools.partial(matrices_from_bits, tiles.matrices))
    assert torch.equal(grouped_experts(x, ids, weights), native)


@pytest.mark.parametrize(
    ("sizes", "group", "most", "dtype"),
    [
        ((33, 40), 32, 8, torch.float32),  # rows whose fields do not fill their last byte
        ((272, 16), 16, 4, torch.float16),  # groups smaller than a tile; a block of columns and more
        ((48, 33), 64, 2, torch.bfloat16),
    ],
)
def test_nested_precision(sizes, group, most, dtype):
    """Slots of all levels in one call, of all planes and of few: those above a slot's level are not read."""
    torch.manual_seed(7)
    (hidden, inter), made = sizes, []
    for parts, n, k in ((2, inter, hidden), (1, hidden, inter)):
        codes, coding = nested_matrices(5, parts, n, k, group)
        planes = coding.residual
        for level, first in ((8, 5), (4, 3), (3, 1)):
            for name in planes._fields[first : first + 2] if most < level else ():
                planes = planes._replace(**{name: None})
        levels = planes.bits.clamp(max=most)
        unread = levels[:, :, None] < 8
        if planes.scale8 is not None:
            planes = planes._replace(scale8=planes.scale8.masked_fill(unread[..., None], torch.nan))
        made += [codes, coding._replace(residual=planes._replace(bits=levels))]
    act = Activation(interleaved=most == 4)
    check(ExpertWeights(made[0], made[2], None, None, act, made[1], made[3]), dtype, single=True)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_e4m3_that_is_no_number(monkeypatch, code):
    """From bits it shows in every result that it is part of, as in the twin: 480 would be a weight.

    Chips with such numbers widen it themselves; Triton's interpreter, which runs that here, takes it for 480.
    """
    torch.manual_seed(6)
    weights = coded_experts(("e4m3", "e4m3"), (2, 64, 32), ((1, WIDE), (16, 16)))
    weights.down.view(torch.uint8)[1, 5, 3] = code
    x, ids = torch.randn(5, 64), random_ids(5, 2, 2)
    want = experts_reference(x, ids, weights).isnan()
    assert want.any()
    assert not want.all()
    monkeypatch.setattr(grouped_gemm, "matrices", functools.partial(matrices_from_bits, tiles.matrices))
    assert torch.equal(grouped_experts(x, ids, weights).isnan(), want)


def matrices_from_bits(matrices, weights, dtype, config, capability, *, tma):
    made = matrices(weights, dtype, config, 80, tma=tma)
    assert made.gate.CODE.value == "e4m3 bits"
    return made


@pytest.mark.parametrize(
    ("code", "block", "scale", "columns", "dtype", "expected"),
    [
        ("e4m3", (128, 128), torch.float32, 256, torch.bfloat16, "blocks"),
        ("e4m3", (128, 128), torch.float32, 96, torch.bfloat16, "row"),
        ("e2m1", (1, 32), E8M0, 2880, torch.bfloat16, "exact"),
        ("e2m1", (1, 32), E8M0, 2880, torch.float16, "blocks"),  # 2 ** -127 is no float16
        ("e2m1", (1, 16), E4M3, 2880, torch.float16, "exact"),
        ("e2m1", (1, 32), torch.bfloat16, 2880, torch.bfloat16, "blocks"),
        ("int4", (1, 24), torch.float16, 2880, torch.bfloat16, "wide"),
        ("lut4", (1, 64), torch.float32, 2880, torch.bfloat16, "wide"),
        ("nested", (1, 64), torch.float16, 2880, torch.bfloat16, "wide"),
    ],
)
def test_how_a_matrix_is_read(code, block, scale, columns, dtype, expected):
    assert reading(Coding(code, block, torch.ones(1, 1, 1, 1).to(scale)), columns, dtype) == expected


def test_wrong_scales_are_noticed():
    """A control: the comparisons above see zeros, factors and scales of a neighbour."""
    torch.manual_seed(5)
    weights = coded_experts(("int4", "int4"), (3, 64, 32), ((1, 32), (1, 32)), with_zeros=True, with_factor=True)
    coding = weights.gate_up_coding
    x, ids = torch.randn(9, 64), random_ids(9, 2, 3)
    want = experts_reference(x, ids, weights)
    for name in ("scale", "zero", "factor"):
        other = coding._replace(**{name: getattr(coding, name).flip(0).contiguous()})
        assert relative_error(grouped_experts(x, ids, weights._replace(gate_up_coding=other)), want) > 0.05, name
