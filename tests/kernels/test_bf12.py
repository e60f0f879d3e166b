"""bf16 in 12 bits: every bit comes back, and products have the bits of bf16 on every instruction set."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_codes import apart

from moe.kernels import cpu_encode
from moe.kernels.bf12 import bytes_of_row, decode_bf12, encode_bf12, most_rare, rare_words
from moe.kernels.cpu import CpuExperts, instruction_sets, load_helper
from moe.kernels.cpu_encode import most_rare_of, shorten
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
    words = encode_bf12(w, 2).words
    assert int(words[0, 0]) >> 8 == 3
    assert torch.equal(words[0, 1:], rare_words(w[0], int(words[0, 0]) & 255)[:2])


def spread(n: int, k: int) -> torch.Tensor:
    """Normal rows, and every third one with more rare weights than the last; one of any bits, one of zeros."""
    w = normal(n, k)
    for row in range(0, n, 3):
        w[row, : min(k, 2 * row)] *= 2.0**-40
    w[n // 2] = any_bits(1, k)[0]
    w[-1] = 0
    return w


@needs_helper
@pytest.mark.parametrize("isa", range(len(instruction_sets())))
def test_the_compiled_encoder_writes_what_its_twin_does(isa):
    for n, k in ((40, 300), (2, 1), (24, 128), (30, 1025)):
        for room in (0, 3, 7):
            for parts, woven in ((1, False), (2, False), (2, True)):
                w = spread(n, k)
                codes = torch.empty(n, bytes_of_row(k), dtype=torch.uint8)
                words = torch.full((parts, n // parts, 1 + room), -1, dtype=torch.int32)
                over = shorten(w, codes, words, interleaved=woven, isa=isa)
                want = encode_bf12(w, room)
                told = want.words.view(-1, parts, 1 + room).transpose(0, 1) if woven else want.words.view(words.shape)
                assert torch.equal(codes, want.codes)
                assert torch.equal(words, told)
                assert over == int((told[..., 0] >> 8 > room).sum())
    assert most_rare_of(w) == most_rare(w)


def test_without_the_helper_the_twin_writes(monkeypatch):
    w, made = spread(40, 300), []
    for helper in (load_helper, lambda: None):
        monkeypatch.setattr(cpu_encode, "load_helper", helper)
        codes, words = torch.empty(40, bytes_of_row(300), dtype=torch.uint8), torch.empty(2, 20, 4, dtype=torch.int32)
        made.append((shorten(w, codes, words, interleaved=True), codes, words, most_rare_of(w)))
    assert made[0][0] == made[1][0] > 0
    assert torch.equal(made[0][1], made[1][1])
    assert torch.equal(made[0][2], made[1][2])
    assert made[0][3] == made[1][3]


def test_what_does_not_fit_together_is_refused():
    w = normal(4, 128)
    codes, words = torch.empty(4, 192, dtype=torch.uint8), torch.empty(2, 2, 4, dtype=torch.int32)
    for bad in ((w[:, ::2], codes, words), (w, codes[:3], words), (w, codes, words[:1])):
        with pytest.raises(ValueError, match=r"are not of|contiguous"):
            shorten(*bad)


def in_table(codes_of: torch.Tensor, room: int) -> tuple[torch.Tensor, Coding]:
    """One part, [S, n, k], with `room` words a row; what does not fit is in a table of all slots."""
    told, table = [], [torch.tensor([7, 7])]  # something before
    for w in codes_of:
        made = encode_bf12(w, room)
        for row in (made.words[:, 0] >> 8 > room).nonzero()[:, 0].tolist():
            words = rare_words(w[row], int(made.words[row, 0]) & 255)
            made.words[row, 1] = sum(map(len, table))
            table.append(words)
        told.append(made)
    words = torch.stack([made.words for made in told])[:, None]
    coding = Coding("bf12", (1, WHOLE), apart(words), table=torch.cat(table).int()[None])
    return apart(torch.stack([made.codes for made in told])), coding


@needs_helper
@pytest.mark.parametrize("isa", range(len(instruction_sets())))
def test_rows_with_more_rare_weights_than_room_are_told_in_a_table(isa):
    act = Activation(gated=False, kind="relu2")
    first, down = (torch.stack([spread(n, k) for _ in range(3)]) for n, k in ((70, 300), (300, 70)))
    for w in (first, down):
        w[:, w.shape[1] // 2] = 1  # any bits may be no numbers
        w /= 2.0**30
    each = [in_table(w, 3) for w in (first, down)]
    assert all(int((coding.scale[:, 0, :, 0] >> 8).max()) > 30 for _, coding in each)
    (codes, coding), (down_codes, down_coding) = each
    short = ExpertWeights(codes, down_codes, None, None, act, coding, down_coding)
    check_expert_weights(short)
    for w, of, how in ((first, codes, coding), (down, down_codes, down_coding)):
        for slot in range(3):
            assert torch.equal(decode(of[slot], how, w.shape[2], slot), w[slot].float())
    kernels = CpuExperts(ExpertWeights(first, down, None, None, act), isa=isa), CpuExperts(short, isa=isa)
    for tokens in (1, 5, 61):
        x, ids = torch.randn(tokens, 300).bfloat16(), torch.randint(0, 3, (tokens, 2))
        want, got = (kernel.experts(x, ids) for kernel in kernels)
        assert torch.equal(want, got)
        assert bool(want.isfinite().all())


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
    _, plain = experts(300, 64, Activation())
    table = torch.full((1, 50), -1, dtype=torch.int32)
    told = plain._replace(
        gate_up_coding=plain.gate_up_coding._replace(table=table), down_coding=plain.down_coding._replace(table=table)
    )
    for value, short in product((-1, 0x7FFFFFFF, 0xFF00 | 200, 1 << 31, 0x900), (plain, told)):
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
        (coding._replace(table=torch.zeros(2, 9, dtype=torch.int32)), "tables of gate_up"),
    ):
        with pytest.raises(ValueError, match=says):
            check_expert_weights(short._replace(gate_up_coding=bad))
