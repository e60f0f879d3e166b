"""The compiled CPU experts against the torch reference, and the laws they promise bit for bit."""

import ctypes
import logging
import math
import threading

import pytest
import torch

from moe.kernels import cpu
from moe.kernels.cpu import CpuExperts, instruction_sets, load_helper
from moe.kernels.reference import LEFT, combine_reference, experts_reference
from moe.kernels.weights import Activation, ExpertWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [
    *[Activation(kind=kind) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "gpt_oss")],
    *[Activation(kind=kind, gated=False) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")],
    *[Activation(kind=kind, interleaved=True) for kind in ("silu", "relu2")],
    Activation(kind="gpt_oss", interleaved=True, alpha=1.3, limit=0.7),
]

needs_helper = pytest.mark.skipif(load_helper() is None, reason="not compiled: python setup.py build_ext --inplace")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slab(slots=5, hidden=40, intermediate=24, dtype=torch.float32, activation=None, biased=False):
    """Experts as offload lays them out: views of blobs, the slot stride larger than the expert; NaN in between."""
    activation = activation or Activation()
    n, g = intermediate * (2 if activation.gated else 1), seeded(7)
    shapes = [(n, hidden), (hidden, intermediate)] + ([(n,), (hidden,)] if biased else [])
    blobs = torch.full((slots, sum(math.prod(s) + 9 for s in shapes) + 13), math.nan, dtype=dtype)
    views, start = [], 3  # not aligned to anything
    for shape in shapes:
        view = blobs[:, start : start + math.prod(shape)].view(slots, *shape)
        view.copy_(torch.randn(view.shape, generator=g) * shape[-1] ** -0.5)
        views.append(view)
        start += math.prod(shape) + 9
    return ExpertWeights(views[0], views[1], *(views[2:] or (None, None)), activation)


def tokens(count, top_k, w, dtype=torch.float32, missing=True):
    g, slots = seeded(count * 10 + top_k), len(w.gate_up)
    x = torch.randn(count, w.down.shape[1], generator=g).to(dtype)
    slot_ids = torch.randint(-1 if missing else 0, slots, (count, top_k), generator=g)
    return x, slot_ids, torch.rand(count, top_k, generator=g)


def agrees(y, reference, dtype):
    """fp32: only the order of sums differs. Otherwise such a difference can also flip a rounding of h by one unit."""
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    return float((y - reference).norm()) <= bound * float(reference.norm())


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_helper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(40, 24), (33, 17), (64, 48), (7, 5), (1088, 72)])
def test_against_the_reference(dtype, storage, hidden, intermediate):
    for isa in range(len(instruction_sets())):
        w = slab(5, hidden, intermediate, storage, biased=True)
        experts = CpuExperts(w, isa=isa)
        for count, top_k in [(0, 2), (1, 1), (1, 4), (63, 3)]:
            x, slot_ids, topk_weights = tokens(count, top_k, w, dtype)
            reference = experts_reference(x, slot_ids, w)
            y = experts.experts(x, slot_ids)
            assert y.shape == reference.shape
            assert torch.equal(y[slot_ids < 0], reference[slot_ids < 0])
            assert agrees(y, reference, dtype)
            out = experts.combine(x, slot_ids, topk_weights)
            assert out.dtype == dtype
            assert torch.equal(out, combine_reference(y, topk_weights, dtype))


def in_waves(experts, x, slot_ids, topk_weights, number):
    """y and the sums over k of pairs that are computed a part at a time, as slots hold their experts."""
    waves, y = slot_ids % number, None
    for wave in range(number):
        ids = torch.where(waves == wave, slot_ids, torch.where((waves < wave) & (slot_ids >= 0), LEFT, -1))
        before = None if y is None else y.clone()
        y = experts.experts(x, ids, y)
    return y, experts.combine(x, ids, topk_weights, before)


@needs_helper
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_in_waves_are_those_of_one_call(dtype):
    w = slab(5, 40, 24, dtype, biased=True)
    for isa in [*range(len(instruction_sets())), None]:
        experts = CpuExperts(w, isa=isa or 0)
        if isa is None:
            experts._helper = None  # the plain twin
        for count, top_k in [
            (0, 2),
            (1, 1),
            (1, 4),
            (63, 3),
            *([(45_000, 4)] if isa == 0 else []),
        ]:  # the last in chunks
            x, slot_ids, topk_weights = tokens(count, top_k, w, dtype)
            whole, out = experts.experts(x, slot_ids), experts.combine(x, slot_ids, topk_weights)
            y, summed = in_waves(experts, x, slot_ids, topk_weights, 3)
            assert torch.equal(y, whole)
            assert torch.equal(summed, out)
    x, slot_ids, topk_weights = tokens(2, 2, w, dtype, missing=False)
    slot_ids[1, 1] = LEFT
    for call in (lambda: CpuExperts(w).experts(x, slot_ids), lambda: CpuExperts(w).combine(x, slot_ids, topk_weights)):
        with pytest.raises(ValueError, match="slot id -2 must be -1 or"):
            call()
    with pytest.raises(ValueError, match=r"y is torch.float32 \(2, 2, 39\); it must be float32 \(2, 2, 40\)"):
        CpuExperts(w).combine(x, slot_ids, topk_weights, torch.zeros(2, 2, 39))


@needs_helper
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}-{a.gated}-{a.interleaved}")
@pytest.mark.parametrize("biased", [False, True])
def test_every_activation(activation, biased):
    for dtype in (torch.float32, torch.bfloat16):
        w = slab(3, 48, 37, dtype, activation, biased)
        x, slot_ids, _ = tokens(17, 2, w, dtype)
        assert agrees(CpuExperts(w).experts(3 * x, slot_ids), experts_reference(3 * x, slot_ids, w), dtype)


@needs_helper
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 239, 240, 241, 500])
def test_block_edges(rows):
    """Every number of rows in a register block, both paths for W, and more rows than a task holds; one expert empty."""
    w = slab(3, 48, 40)
    x, _, _ = tokens(rows, 1, w)
    slot_ids = torch.ones(rows, 1, dtype=torch.int32)
    assert agrees(CpuExperts(w).experts(x, slot_ids), experts_reference(x, slot_ids, w), torch.float32)


@needs_helper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(48, 40), (2064, 32), (37, 21), (1024, 64)])
def test_a_token_does_not_feel_its_batch(hidden, intermediate, dtype, threads):
    """Bit for bit the same alone and among others, for any slot numbers, any number of threads and any vector width."""
    w = slab(6, hidden, intermediate, torch.bfloat16, biased=True)
    x, slot_ids, topk_weights = tokens(150, 3, w, dtype, missing=False)
    slot_ids[40:] = slot_ids[40:] % 2  # two experts with many rows, four with few
    torch.set_num_threads(1)
    alone = torch.cat([CpuExperts(w).experts(x[t : t + 1], slot_ids[t : t + 1]) for t in range(150)])
    torch.set_num_threads(threads)
    assert torch.equal(CpuExperts(w).experts(x, slot_ids), alone)
    assert torch.equal(CpuExperts(w).experts(x[20:57], slot_ids[20:57]), alone[20:57])
    assert torch.equal(CpuExperts(w).experts(x.flip(0), slot_ids.flip(0)).flip(0), alone)
    out = CpuExperts(w).combine(x, slot_ids, topk_weights)
    assert torch.equal(CpuExperts(w).combine(x[50:], slot_ids[50:], topk_weights[50:]), out[50:])
    renamed = [4, 2, 0, 5, 1, 3]  # slot s of the new slab holds expert renamed[s]
    moved = w._replace(**{name: getattr(w, name)[renamed] for name in ("gate_up", "down", "gate_up_bias", "down_bias")})
    assert torch.equal(CpuExperts(moved).experts(x, torch.tensor(renamed).argsort()[slot_ids]), alone)
    for isa, name in enumerate(instruction_sets()):
        experts = CpuExperts(w, isa=isa)
        y = experts.experts(x, slot_ids)
        assert torch.equal(experts.experts(x[:1], slot_ids[:1]), y[:1])
        if name != "plain":  # without fused multiply-add on x86
            assert torch.equal(y, alone), name


@needs_helper
def test_the_law_can_fail():
    """Control: the comparison above sees another order of the same sums."""
    w = slab(1, 2064, 32)
    x, slot_ids, _ = tokens(64, 1, w, missing=False)
    assert not torch.equal(experts_reference(x, slot_ids, w), CpuExperts(w).experts(x, slot_ids))


@needs_helper
def test_chunks_of_tokens_change_nothing():
    """More rows than the scratch memory of one chunk (64 MiB) holds."""
    w = slab(2, 1024, 16, torch.bfloat16)
    x, slot_ids, topk_weights = tokens(1100, 8, w)  # 8 * (2 * 1024 + 16) * 4 bytes per token
    out = CpuExperts(w).combine(x, slot_ids, topk_weights)
    assert torch.equal(out[1000:], CpuExperts(w).combine(x[1000:], slot_ids[1000:], topk_weights[1000:]))
    assert agrees(out[:8], combine_reference(experts_reference(x[:8], slot_ids[:8], w), topk_weights[:8]), x.dtype)
    slot_ids[1099, 7] = 2
    with pytest.raises(ValueError, match=r"slot id 2 must be -1 or lie in \[0, 2\)"):
        CpuExperts(w).experts(x, slot_ids)


@needs_helper
def test_strided_and_narrow_input():
    w = slab(dtype=torch.bfloat16)
    x, slot_ids, topk_weights = tokens(9, 2, w, torch.bfloat16)
    expected = CpuExperts(w).combine(x, slot_ids, topk_weights)
    wide = torch.cat([x, x + 1], dim=1)[:, :40]
    assert not wide.is_contiguous()
    for again in [
        (wide, slot_ids, topk_weights),
        (x.mT.contiguous().mT, slot_ids.mT.contiguous().mT, topk_weights.mT.contiguous().mT),
        (x, slot_ids.int(), topk_weights),
    ]:
        assert torch.equal(CpuExperts(w).combine(*again), expected)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = topk_weights.to(dtype)
        expected = combine_reference(CpuExperts(w).experts(x, slot_ids), narrow, x.dtype)
        assert torch.equal(CpuExperts(w).combine(x, slot_ids, narrow), expected)
    y = torch.empty(9, 2, 40)
    assert CpuExperts(w).experts(x, slot_ids, y) is y
    assert torch.equal(y, CpuExperts(w).experts(x, slot_ids))


@needs_helper
def test_calls_from_several_python_threads():
    w = slab(5, 64, 48)
    experts = CpuExperts(w)
    work = [tokens(count, 3, w) for count in (1, 2, 30, 200)]
    expected = [experts.combine(*args) for args in work]
    wrong: list[int] = []

    def repeat(i):
        wrong.extend(i for _ in range(30) if not torch.equal(experts.combine(*work[i]), expected[i]))

    callers = [threading.Thread(target=repeat, args=(i,)) for i in range(len(work))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@needs_helper
def test_elementwise_accuracy():
    helper = load_helper()
    helper.moe_cpu_elementwise.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def run(what, v):
        out = torch.empty_like(v)
        helper.moe_cpu_elementwise(what, v.data_ptr(), out.data_ptr(), v.numel())
        return out

    v = torch.cat([torch.linspace(-20, 20, 200001), torch.randn(100000, generator=seeded(1))])
    d = v.double()
    exact = {  # bound: relative error; the tail of gelu_tanh also has the rounding of its cubic argument
        0: (d / (1 + torch.exp(-d)), 2.5e-7),
        1: (d * 0.5 * torch.special.erfc(-d / math.sqrt(2)), 5e-7),
        5: (torch.exp(d), 1.5e-7),
    }
    for what, (truth, bound) in exact.items():
        inside = truth.abs() > 1e-37  # below lie the subnormal numbers
        error = ((run(what, v).double() - truth) / truth)[inside & (truth != 0)].abs().max()
        assert error < bound, (what, error)
    tanh = d * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (d + 0.044715 * d**3))
    assert (run(2, v).double() - tanh).abs().max() < 2e-6  # one unit of 20
    assert ((run(2, v).double() - tanh) / tanh)[d.abs() < 1].abs().nan_to_num().max() < 4e-7
    assert torch.equal(run(5, torch.tensor([-1000.0, 1000.0])).isfinite(), torch.tensor([True, True]))
    for what in (0, 1, 2, 5, 6, 7):
        assert run(what, torch.tensor([math.nan])).isnan().all()
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for what, dtype in [(6, torch.bfloat16), (7, torch.float16)]:
        values = every.view(dtype).float()
        near = [values, values * (1 + 2**-9), values * (1 - 2**-12), torch.nextafter(values, torch.tensor(math.inf))]
        middle = (values.sort().values[1:].double() + values.sort().values[:-1].double()) / 2  # ties
        for sample in [*near, middle.float(), torch.tensor([65519.9, 65520.0, 1e30, 2.0**-25, 2.0**-26, 1e-40])]:
            assert torch.equal(run(what, sample).nan_to_num(1.5), sample.to(dtype).float().nan_to_num(1.5))


def test_custom_activation_runs_in_torch_and_says_so(caplog):
    w = slab(activation=Activation(kind="custom", function=lambda v: v[..., ::2].sin() * v[..., 1::2]))
    x, slot_ids, topk_weights = tokens(9, 2, w)
    cpu._say_custom_is_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        y = CpuExperts(w).experts(x, slot_ids)
        out = CpuExperts(w).combine(x, slot_ids, topk_weights)
    assert torch.equal(y, experts_reference(x, slot_ids, w))
    assert torch.equal(out, combine_reference(y, topk_weights))
    assert [r.getMessage() for r in caplog.records] == [
        "experts with a custom activation run in plain torch: the compiled helper cannot call Python"
    ]


def test_a_missing_helper_is_named_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    load_helper.cache_clear()
    try:
        w = slab()
        x, slot_ids, topk_weights = tokens(9, 2, w)
        with caplog.at_level(logging.WARNING):
            assert instruction_sets() == []
            y, out = torch.empty(9, 2, 40), CpuExperts(w).combine(x, slot_ids, topk_weights)
            assert torch.equal(CpuExperts(w).experts(x, slot_ids, y), experts_reference(x, slot_ids, w))
        assert torch.equal(out, combine_reference(y, topk_weights))
        assert len(caplog.records) == 1
        assert "no _cpu_experts*.so in" in caplog.text
        load_helper.cache_clear()
        (tmp_path / "_cpu_experts.so").write_bytes(b"not a library")
        with caplog.at_level(logging.WARNING):
            assert load_helper() is None
        assert "plain torch" in caplog.records[-1].getMessage()
    finally:
        load_helper.cache_clear()


def test_errors_name_the_numbers():
    w = slab()
    x, slot_ids, topk_weights = tokens(4, 2, w)
    for call, words in [
        (lambda: CpuExperts(w).experts(x[:, :39], slot_ids), "hidden size 39"),
        (lambda: CpuExperts(w).experts(x, slot_ids.clamp(min=0) - 2), "slot id -2"),
        (lambda: CpuExperts(w).experts(x, slot_ids.clamp(min=0) + 5), "slot id"),
        (lambda: CpuExperts(w).experts(x, slot_ids, torch.empty(4, 2, 39)), r"\(4, 2, 39\)"),
        (lambda: CpuExperts(w).combine(x, slot_ids, topk_weights[:, :1]), r"\(4, 1\)"),
        (lambda: CpuExperts(w).combine(x, slot_ids, topk_weights.double()), "float64"),
        (
            lambda: CpuExperts(w._replace(gate_up=w.gate_up.double(), down=w.down.double())).experts(x, slot_ids),
            "float64",
        ),
        (lambda: CpuExperts(w).experts(x.to("meta"), slot_ids), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
