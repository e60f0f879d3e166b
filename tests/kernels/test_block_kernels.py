"""The kernels between a decoding layer's matrix products, interpreted, against plain torch; and a whole block."""

import pytest
import torch
from kernels_experts import relative_error

from moe.kernels.block_kernels import Turn, add_norm, add_norm_reference, turned, turned_reference
from moe.kernels.cpu_block import Block, Linear, Step, block_reference
from moe.kernels.device_block import DeviceBlock
from moe.kernels.paged_attention import Pages

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # 16 bits: a sum may round the other way


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("width", [1, 37, 64])
@pytest.mark.parametrize("once", [False, True])
def test_residual_and_norm(once, width, dtype):
    for rows in (0, 1, 3):
        h, add = (torch.randn(rows, width, generator=rng(n)).to(dtype) for n in (1, 2))
        weight, theirs = torch.randn(width, generator=rng()).to(dtype), h.clone()
        wanted = add_norm_reference(theirs, add, weight, 1e-6, round_once=once)
        found = add_norm(h, add, weight, 1e-6, round_once=once)
        assert torch.equal(h, theirs)  # the sum is rounded once
        if rows:
            assert relative_error(found, wanted) <= BOUNDS[dtype]
            if width > 1 and dtype != torch.float32:  # it is the place of rounding that was asked for
                other = add_norm_reference(theirs.clone(), None, weight, 1e-6, round_once=not once)
                assert (found != wanted).sum() < (found != other).sum() / 4
            assert relative_error(add_norm(h, None, weight, 1e-6, round_once=once), wanted) <= BOUNDS[dtype]
            assert torch.equal(h, theirs)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("norm", ["none", "per head", "over all"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), [(4, 2, 16, 16), (3, 1, 12, 8), (1, 1, 6, 2)])
def test_head_norms_and_positions(heads, kv_heads, dim, rotary, norm, dtype):
    widths = {"none": None, "per head": (dim, dim), "over all": (heads * dim, kv_heads * dim)}[norm]
    weights = [None, None] if widths is None else [torch.randn(w, generator=rng(w)).to(dtype) for w in widths]
    turn = Turn(heads, kv_heads, dim, rotary, *weights, 1e-5, round_once=rotary == 8)
    both = torch.randn(3, (heads + kv_heads) * dim, generator=rng()).to(dtype)
    q, k = both.split([heads * dim, kv_heads * dim], dim=1)  # rows lie apart
    angle = torch.rand(3, rotary, generator=rng(5))
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for mine, theirs in zip(turned(q, k, cos, sin, turn), turned_reference(q, k, cos, sin, turn)):
        assert relative_error(mine, theirs) <= BOUNDS[dtype]
    assert [len(t) for t in turned(q[:0], k[:0], cos[:0], sin[:0], turn)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_routed", [True, False])
@pytest.mark.parametrize("once", [False, True])
def test_a_whole_block_is_its_twin(once, is_routed, dtype):
    generator, hidden, heads, kv_heads, dim = rng(7), 24, 4, 2, 8

    def random(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    block = Block(
        q=Linear(random(heads * dim, hidden), random(heads * dim)),
        k=Linear(random(kv_heads * dim, hidden), None),
        v=Linear(random(kv_heads * dim, hidden), None),
        o=Linear(random(hidden, heads * dim), None),
        norm=random(hidden),
        next_norm=random(hidden),
        q_norm=random(dim),
        k_norm=random(dim),
        sinks=torch.tensor([0.1, -1.0, 0.5, 2.0]),
        router=Linear(random(6, hidden), None) if is_routed else None,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        rotary=6,
        window=5,
        top_k=2,
        normalize=True,
        round_weights=False,
        eps=1e-6,
        head_eps=1e-6,
        scale=0.3,
        round_once=once,
    )
    pool = [random(12, kv_heads, dim) for _ in range(2)]
    theirs = [t.clone() for t in pool]
    tables, lengths = torch.tensor([[1, 2], [0, 0]], dtype=torch.int32), torch.tensor([7, 3])
    h, add = random(2, hidden), random(2, hidden)
    cos, sin = random(2, 6), random(2, 6)
    step = Step(cos, sin, torch.arange(3), lengths, tables, 4)
    right_h, right = block_reference(block, *theirs, h, add, step)
    found = DeviceBlock(block, *pool)(h, add, cos, sin, Pages(tables, lengths.int(), 4, 7))
    bound = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(h, right_h) <= bound
    assert relative_error(found.x, right.x) <= bound
    for mine, other in zip(pool, theirs):
        assert relative_error(mine, other) <= bound
    if is_routed and dtype == torch.float32:
        assert torch.equal(found.ids, right.ids)
        assert relative_error(found.weights, right.weights) <= 1e-5
    assert (found.ids is None) == (not is_routed)
