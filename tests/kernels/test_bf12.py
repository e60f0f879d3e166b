"""bf16 in 12 bits: every bit comes back, and products have the bits of bf16 on every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_codes import apart

from moe.kernels.bf12 import bytes_of_row, decode_bf12, encode_bf12, most_rare
from moe.kernels.cpu import CpuExperts, instruction_sets, load_helper
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.formats import Coding, decode
from moe.kernels.reference import check_expert_weights, experts_reference
from moe.kernels.weights import Activation, ExpertWeights

WHOLE = 1 << 30
needs_helper = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is not there")


def normal(n: int, k: int, spread: float = 1.0) -> torch.Tensor:
    """Rows of several sizes; spread: what exponents are stretched by, so that more are rare."""
    w = torch.randn(n, k) * torch.exp2(torch.randint(-30, 30, (n, 1)).float())
    return (w.sign() * w.abs().pow(spread)).bfloat16()


def any_bits(n: int, k: int) -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, (n, k)).to(torch.int16).view(torch.bfloat16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 300), st.sampled_from(["normal", "wide", "any"]))
def test_every_bit_comes_back(seed, n, k, kind):
    torch.manual_seed(seed)
    w = any_bits(n, k) if kind == "any" else normal(n, k, 8.0 if kind == "wide" else 1.0)
    rare = most_rare(w)
    codes, words = encode_bf12(w, rare)
    assert codes.shape == (n, bytes_of_row(k))
    assert words.shape == (n, 1 + rare)
    assert same_bits(decode_bf12(codes, words, k), w)
    assert same_bits(decode_bf12(*encode_bf12(w, rare + 5), k), w)


def test_what_is_special_comes_back():
    w = torch.tensor([[0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 2.0**-126, 2.0**-133, -(2.0**-130), 3e38]])
    w = w.bfloat16()
    assert most_rare(w) == 3  # 1, -1, the smallest normal number; zeros and subnormals have a code of their own
    assert same_bits(decode_bf12(*encode_bf12(w, 3), 11), w)
    with pytest.raises(ValueError, match="3 rare weights, there is room for 2"):
        encode_bf12(w, 2)


def test_three_quarters_of_the_bytes():
    w = (torch.randn(256, 1024) * 0.02).bfloat16()
    assert most_rare(w) <= 3
    codes, words = encode_bf12(w, 3)
    assert (codes.nbytes + words.nbytes) / w.nbytes < 0.76


def coded(
    w: torch.Tensor, parts: int, *, interleaved: bool = False, gap: int = 13, room: int = 0
) -> tuple[torch.Tensor, Coding]:
    """w: [S, P * n, k]. gap: between slots; room: for so many rare weights more than a row has."""
    rare = max(most_rare(of) for of in w) + room
    each = [encode_bf12(of, rare) for of in w]
    words = [
        e.words.unflatten(0, (-1, parts)).transpose(0, 1) if interleaved else e.words.unflatten(0, (parts, -1))
        for e in each
    ]
    return apart(torch.stack([e.codes for e in each]), gap), Coding("bf12", (1, WHOLE), apart(torch.stack(words), gap))


def experts(
    hidden: int, inter: int, act: Activation, spread: float = 1.0, bias: bool = False, gap: int = 13
) -> tuple[ExpertWeights, ExpertWeights]:
    """The same, of floats and of bf12."""
    parts, slots = 2 if act.gated else 1, 3
    made = []
    for n, k in ((parts * inter, hidden), (hidden, inter)):
        w = normal(slots * n, k, spread).float()
        made.append((w / w.abs().max()).bfloat16().view(slots, n, k))
    first, down = made
    biases = [torch.randn(slots, n).bfloat16() if bias else None for n in (parts * inter, hidden)]
    codes, coding = coded(first, parts, interleaved=act.gated and act.interleaved, gap=gap)
    down_codes, down_coding = coded(down, 1, gap=gap)
    plain = ExpertWeights(first, down, *biases, act)
    return plain, ExpertWeights(codes, down_codes, *biases, act, coding, down_coding)


ACTIVATIONS = [Activation(), Activation(kind="gpt_oss", interleaved=True), Activation(kind="relu2", gated=False)]


@needs_helper
@pytest.mark.parametrize("isa", range(len(instruction_sets())))
@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("sizes", [(128, 64), (100, 70), (1, 33), (1200, 130), (2100, 257)])
def test_products_have_the_bits_of_bf16(isa, act, sizes):
    for spread in (1.0, 3.0):
        plain, short = experts(*sizes, act, spread, bias=act.kind == "gpt_oss")
        check_expert_weights(short)
        kernels = CpuExperts(plain, isa=isa), CpuExperts(short, isa=isa)
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for tokens in (1, 2, 5, 17, 61):
                x = torch.randn(tokens, sizes[0]).to(dtype)
                ids = torch.randint(-1, 3, (tokens, 2))
                want, got = (kernel.experts(x, ids) for kernel in kernels)
                assert torch.equal(want, got), (dtype, tokens, spread)


def test_the_reference_reads_it():
    plain, short = experts(130, 70, Activation())
    x, ids = torch.randn(4, 130), torch.randint(0, 3, (4, 2))
    assert torch.equal(experts_reference(x, ids, plain), experts_reference(x, ids, short))
    for weights, coding in ((plain.gate_up, short.gate_up_coding), (plain.down, short.down_coding)):
        assert coding is not None
        codes = short.gate_up if weights is plain.gate_up else short.down
        assert torch.equal(decode(codes[1], coding, weights.shape[2], 1), weights[1].float())


@needs_helper
@pytest.mark.parametrize("isa", range(len(instruction_sets())))
def test_linear_layers(isa):
    for n, k in ((65, 130), (200, 1024), (3, 2500)):
        w = (torch.randn(n, k) * 0.05).bfloat16()
        w[n // 2, ::7] = 2.0**-60
        bias = torch.randn(n).bfloat16()
        codes, coding = coded(w[None], 1)
        plain, short = CpuLinear(w, bias, isa=isa), CpuLinear(codes[0], bias, coding=coding, columns=k, isa=isa)
        for rows in (1, 3, 40, 300):
            x = torch.randn(rows, k).bfloat16()
            assert torch.equal(plain(x), short(x)), (n, k, rows)


@needs_helper
def test_damaged_words_change_numbers_and_nothing_else():
    """A file may say anything: more rare weights than there is room for, columns that do not exist."""
    _, short = experts(300, 64, Activation())
    for value in (-1, 0x7FFFFFFF, 0xFF00 | 200, 1 << 31):
        for of in (short.gate_up_coding, short.down_coding):
            assert of is not None
            of.scale.fill_(value - (1 << 32) if value >= 1 << 31 else value)
        for isa in range(len(instruction_sets())):
            for tokens in (1, 30):
                x, ids = torch.randn(tokens, 300).bfloat16(), torch.zeros(tokens, 1, dtype=torch.int64)
                y = CpuExperts(short, isa=isa).experts(x, ids)
                assert y.shape == (tokens, 1, 300)
        assert experts_reference(x, ids, short).shape == (30, 1, 300)


def test_bad_pieces_are_refused():
    _, short = experts(128, 64, Activation())
    coding = short.gate_up_coding
    assert coding is not None
    for bad, says in (
        (coding._replace(scale=coding.scale.float()), "int32"),
        (coding._replace(scale=coding.scale[:, :, 1:]), "scales of gate_up"),
    ):
        with pytest.raises(ValueError, match=says):
            check_expert_weights(short._replace(gate_up_coding=bad))
