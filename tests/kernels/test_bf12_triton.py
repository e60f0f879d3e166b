"""bf16 in 12 bits by both Triton paths: every bit comes back in a tile, and results have the bits of bf16's."""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from kernels_codes import coded_experts
from kernels_experts import fused_experts, relative_error
from test_bf12 import ACTIVATIONS, any_bits, coded, experts, normal

from moe.kernels.combine import combine
from moe.kernels.formats import Coding
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.matrix import Matrix, Part, _codes, argument, tile_pointers
from moe.kernels.reference import experts_reference
from moe.kernels.tiles import TileConfig, can_use_tma, tiles_for
from moe.kernels.weights import Activation, ExpertWeights

GAP = 64  # bytes between slots: words of codes are read


@triton.jit
def _decode_kernel(m, out, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    for n0 in range(0, N, BLOCK_N):
        slot, cols = tl.program_id(0), n0 + tl.arange(0, BLOCK_N)
        start = tile_pointers(m, slot, cols, N, BLOCK_K)
        for k0 in range(0, K, BLOCK_K):
            w = _codes(m, start, slot, n0, k0, cols, N, K, BLOCK_N, BLOCK_K)
            ks = k0 + tl.arange(0, BLOCK_K)
            at = out + slot * N * K + cols[None, :] * K + ks[:, None]
            tl.store(at, w.to(tl.uint16, bitcast=True), mask=(ks < K)[:, None] & (cols < N)[None, :])


def matrix_of(codes: torch.Tensor, coding: Coding, columns: int) -> Matrix:
    return argument(Part(codes, None, coding, 0, columns, slice(None)), torch.bfloat16, tma_box=None, has_e4m3=True)


def decoded(codes: torch.Tensor, coding: Coding, columns: int, blocks: tuple[int, int]) -> torch.Tensor:
    """By the kernels' own loads, tile by tile: int16 [S, n, k]. blocks: rows and columns of a tile."""
    out = torch.full((*codes.shape[:2], columns), -1, dtype=torch.int16).view(torch.uint16)
    _decode_kernel[(len(codes),)](matrix_of(codes, coding, columns), out, codes.shape[1], columns, *blocks)
    return out.view(torch.int16)


def kinds(n: int, k: int) -> dict[str, torch.Tensor]:
    """Matrices [n, k] of rows as they may be, and as they hardly are."""
    torch.manual_seed(n * k)
    spoilt = normal(n, k)
    few = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 2.0**-130, 3e38, -(2.0**-126)]).bfloat16()
    spoilt[n // 2, : len(few)] = few[:k]
    odd, some = normal(n, k), torch.arange(min(k, 28))  # of a row: the interpreter takes long for each rare weight
    odd.scatter_(1, (torch.randint(k, (n, 1)) + some) % k, any_bits(n, k))
    full = torch.ones(n, k).bfloat16()
    full[:, :: max(1, k // 3)] = 2.0**-60  # the same number of rare weights in each row
    return {
        "normal": normal(n, k),
        "many rare": normal(n, k, 3.0),  # more than are looked for without a loop
        "full": full,
        "zero": torch.zeros(n, k).bfloat16(),
        "smallest": (torch.randn(n, k) * 2.0**-125).bfloat16(),  # zero and subnormal beside exponents below 15
        "no numbers": spoilt,
        "any bits": odd,
    }


@pytest.mark.parametrize(
    ("sizes", "block_k"),
    [((1, 7), 128), ((33, 130), 128), ((5, 321), 128), ((16, 256), 64), ((5, 200), 64), ((3, 200), 32), ((3, 140), 16)],
)
def test_every_bit_comes_back(sizes, block_k):
    names = set()
    for name, w in kinds(*sizes).items():
        codes, coding = coded(torch.stack((w, w.flip(1))), 1, gap=GAP, room=2 if name == "full" else 0)
        names.add(matrix_of(codes, coding, sizes[1]).RARE.value)
        found = decoded(codes, coding, sizes[1], (16, block_k))
        assert torch.equal(found[0], w.view(torch.int16)), name
        assert torch.equal(found[1], w.flip(1).view(torch.int16)), name
    assert names == {"none", "few", "many"} or sizes == (1, 7)


def config_for(dtype: torch.dtype, *, few: bool) -> TileConfig:
    """The same tiles for floats and for bf12, so that all sums have one order."""
    return TileConfig(16 if few else 64, 64, 64, 128 if dtype == torch.bfloat16 else 64, 4, 1)


RESULTS = [  # long rows once: what follows the sums does not know their length
    *product(ACTIVATIONS, [((128, 64), torch.bfloat16, (0, 1, 17)), ((100, 70), torch.bfloat16, (1, 130))]),
    *product(ACTIVATIONS, [((1, 33), torch.float16, (5,))]),
    (ACTIVATIONS[1], ((300, 130), torch.float32, (17,))),
    (ACTIVATIONS[2], ((130, 257), torch.bfloat16, (17,))),
]


@pytest.mark.parametrize(("act", "case"), RESULTS, ids=lambda v: v.kind if isinstance(v, Activation) else str(v[0]))
def test_results_have_the_bits_of_bf16(act, case):
    sizes, dtype, tokens = case
    torch.manual_seed(8)
    plain, short = experts(*sizes, act, 3.0 if sizes == (100, 70) else 1.0, bias=act.kind == "gpt_oss", gap=GAP)
    for count in tokens:
        x, ids = torch.randn(count, sizes[0]).to(dtype), torch.randint(-1, 3, (count, 2))
        config = config_for(dtype, few=count <= 16)
        want, got = (grouped_experts(x, ids, weights, config=config) for weights in (plain, short))
        assert torch.equal(want, got)
        assert got.isfinite().all()
        chosen = grouped_experts(x, ids, short)
        assert relative_error(chosen, experts_reference(x, ids, short)) <= (1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_infinities_and_what_is_no_number_go_through():
    torch.manual_seed(9)
    plain, _ = experts(128, 64, Activation())
    plain.down[1, 3, :3] = torch.tensor([float("inf"), float("nan"), -float("inf")]).bfloat16()
    plain.gate_up[2, 5] = 0
    (first, first_coding), (down, down_coding) = coded(plain.gate_up, 2, gap=GAP), coded(plain.down, 1, gap=GAP)
    short = ExpertWeights(first, down, None, None, Activation(), first_coding, down_coding)
    x, ids = torch.randn(5, 128).bfloat16(), torch.randint(0, 3, (5, 2))
    want, got = (grouped_experts(x, ids, weights, config=config_for(x.dtype, few=True)) for weights in (plain, short))
    assert want.isnan().any()
    assert not want.isnan().all()
    assert torch.equal(want.nan_to_num(), got.nan_to_num())
    assert torch.equal(want.isnan(), got.isnan())


@pytest.mark.parametrize("act", ACTIVATIONS[:2], ids=lambda a: a.kind)
def test_single_launch_and_grouped_path_agree(act):
    torch.manual_seed(10)
    _, short = experts(176, 90, act, 2.0, bias=True, gap=GAP)
    for tokens in (1, 17):
        x, ids, topk_weights = (
            torch.randn(tokens, 176).bfloat16(),
            torch.randint(0, 3, (tokens, 2)),
            torch.rand(tokens, 2),
        )
        out = fused_experts(x, ids, topk_weights, torch.arange(3), short)
        assert torch.equal(out, combine(grouped_experts(x, ids, short), topk_weights, x.dtype))


def test_beside_a_matrix_of_another_format():
    """Floats, as pack leaves what would not become smaller; groups of 32, which take short steps over columns."""
    torch.manual_seed(11)
    plain, short = experts(160, 96, Activation(), gap=GAP)
    other = coded_experts(("int4", "int4"), (3, 160, 96), ((1, 32), (1, 32)))
    x, ids = torch.randn(5, 160).bfloat16(), torch.randint(0, 3, (5, 2))
    config = config_for(x.dtype, few=True)
    for more, block_k in (
        ({"gate_up": plain.gate_up, "gate_up_coding": None}, 128),
        ({"down": plain.down, "down_coding": None}, 128),
        ({"down": other.down, "down_coding": other.down_coding}, 32),
    ):
        both = [weights._replace(**more) for weights in (plain, short)]
        assert tiles_for(config, both[1], x.dtype).block_k == block_k
        want, got = (grouped_experts(x, ids, weights, config=config) for weights in both)
        assert torch.equal(want, got)


def test_damaged_words_change_numbers_and_nothing_else():
    """More rare weights than there is room for, in columns that do not exist: no other row's words are read."""
    w = normal(20, 130)
    w[:, 7] = 2.0**-90
    codes, coding = coded(w[None], 1, gap=GAP, room=2)
    words = coding.scale
    words[..., 0] = (words[..., 0] & 255) + 256 * 200
    assert torch.equal(decoded(codes, coding, 130, (16, 128))[0], w.view(torch.int16))
    for value in (-1, 0x7FFFFFFF, 0xFF00 | 200, -(1 << 31)):
        words.fill_(value)
        assert decoded(codes, coding, 130, (16, 128)).shape == w[None].shape


def test_what_a_kernel_is_compiled_for():
    """Layers differ in how many rare weights a row may have: a stride, not a kernel each."""
    torch.manual_seed(12)
    w = normal(64, 128).view(1, 64, 128)
    made = []
    for room in (3, 5, 20):
        codes, coding = coded(w, 1, gap=GAP, room=room)
        short = ExpertWeights(codes, codes.view(1, 64, -1), None, None, Activation(gated=False), coding, coding)
        made.append(matrix_of(codes, coding, 128))
        assert short.stored == "bf12"
        assert not can_use_tma(short, torch.bfloat16, 100, 128)
    constants = [[v.value for v in m if isinstance(v, tl.constexpr)] for m in made]
    assert constants[0] == constants[1] != constants[2]
    assert [m.stride_words - made[0].stride_words for m in made] == [0, 2, 17]
