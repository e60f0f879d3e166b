"""The compiled block against plain torch, and its bits: alone, in a batch, in chunks."""

import pytest
import torch

from moe.kernels.cpu import instruction_sets, load_helper
from moe.kernels.cpu_block import Block, CpuBlock, Linear, Step, block_reference, why_not

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
BLOCK_SIZE, POOL_BLOCKS = 5, 64
SHAPES = {
    "grouped": {"heads": 8, "kv_heads": 2, "dim": 32},
    "odd": {"heads": 3, "kv_heads": 3, "dim": 20, "rotary": 12},
    "many to one": {"heads": 20, "kv_heads": 1, "dim": 64, "window": 9},
    "read as stored": {"heads": 6, "kv_heads": 3, "dim": 64},
    "read as stored, several pieces": {"heads": 2, "kv_heads": 2, "dim": 128, "window": 33},
    "sinks": {"heads": 4, "kv_heads": 2, "dim": 16, "sinks": True, "bias": True},
    "head norms": {"heads": 4, "kv_heads": 4, "dim": 32, "head_norm": "dim", "normalize": True},
    "rounds once": {"heads": 4, "kv_heads": 4, "dim": 32, "head_norm": "dim", "round_once": True},
    "whole norms": {"heads": 4, "kv_heads": 4, "dim": 32, "head_norm": "whole", "round_weights": True},
    "dense": {"heads": 4, "kv_heads": 2, "dim": 16, "experts": 0},
}


def make(dtype, heads, kv_heads, dim, *, hidden=96, experts=7, top_k=3, rotary=None, window=0, sinks=False, bias=False,
         head_norm=None, normalize=False, round_weights=False, round_once=False):  # fmt: skip
    g = torch.Generator().manual_seed(heads * dim)

    def random(*shape):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    def linear(n, k):
        return Linear(random(n, k), random(n) if bias else None)

    norms = {"dim": dim, "whole": heads * dim, None: 0}[head_norm]
    return Block(
        q=linear(heads * dim, hidden), k=linear(kv_heads * dim, hidden), v=linear(kv_heads * dim, hidden),
        o=linear(hidden, heads * dim), norm=1 + random(hidden), next_norm=1 + random(hidden),
        q_norm=1 + random(norms) if norms else None, k_norm=1 + random(norms) if norms else None,
        sinks=torch.randn(heads, generator=g) if sinks else None,
        router=linear(experts, hidden) if experts else None,
        heads=heads, kv_heads=kv_heads, dim=dim, rotary=rotary or dim, window=window, top_k=top_k if experts else 0,
        normalize=normalize, round_weights=round_weights, eps=1e-5, head_eps=1e-6, scale=dim**-0.5,
        round_once=round_once,
    )  # fmt: skip


class Pool:
    """Keys and values of sequences in shuffled blocks, and steps that compute parts of them."""

    def __init__(self, block, dtype):
        shape = (POOL_BLOCKS * BLOCK_SIZE, block.kv_heads, block.dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        self.block, self.dtype = block, dtype
        self.tables = torch.randperm(POOL_BLOCKS, generator=torch.Generator().manual_seed(1)).view(4, -1).int()

    def step(self, parts):
        """parts: (sequence, start, end) each."""
        first = torch.tensor([0, *(end - start for _, start, end in parts)]).cumsum(0)
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        half = self.block.rotary // 2
        angles = positions[:, None] * torch.logspace(0, -3, half)[None].repeat(1, 2)
        tables = self.tables[[s for s, _, _ in parts]].contiguous()
        lengths = torch.tensor([end for _, _, end in parts])
        return Step(angles.cos().to(self.dtype), angles.sin().to(self.dtype), first, lengths, tables, BLOCK_SIZE)


def hidden_of(block, dtype, sequence, start, end):
    g = torch.Generator().manual_seed(sequence)
    return torch.randn(64, len(block.norm), generator=g).to(dtype)[start:end]


def run(block, pool, parts, isa=0, add=None):
    h = torch.cat([hidden_of(block, pool.dtype, *part) for part in parts])
    compiled = CpuBlock(block, pool.keys, pool.values, isa=isa)
    step = pool.step(parts)
    work = torch.empty(compiled.work_bytes(len(h)), dtype=torch.uint8)
    return h, compiled(h, add, step, work)


WHOLE = [(0, 0, 37), (1, 0, 1), (2, 0, 20)]


@pytest.mark.parametrize("isa", range(len(instruction_sets())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_plain_torch(shape, dtype, isa):
    block = make(dtype, **SHAPES[shape])
    ours, theirs = Pool(block, dtype), Pool(block, dtype)
    for parts in (WHOLE, [(2, 20, 21), (0, 37, 40), (1, 1, 2)]):
        tokens = sum(e - s for _, s, e in parts)
        add = torch.randn(tokens, len(block.norm), generator=torch.Generator().manual_seed(tokens)).to(dtype)
        h, got = run(block, ours, parts, isa, add)
        before = torch.cat([hidden_of(block, dtype, *part) for part in parts])
        right_h, right = block_reference(block, theirs.keys, theirs.values, before, add, theirs.step(parts))
        bound = 2e-5 if dtype == torch.float32 else 4e-2  # bf16: a handful of roundings of 2^-9, one of them moved
        for mine, other in ((h, right_h), (got.x, right.x), (ours.keys, theirs.keys), (ours.values, theirs.values)):
            mine, other = mine.float().nan_to_num(), other.float().nan_to_num()
            assert (mine - other).abs().max() <= bound * other.abs().max()
        if block.router is not None:
            assert got.weights.dtype == right.weights.dtype
            same = (got.ids == right.ids).all(dim=1)
            assert same.all() if dtype == torch.float32 else same.float().mean() > 0.6  # near ties
            assert torch.allclose(got.weights.float(), right.weights.float(), rtol=8e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_do_not_depend_on_neighbours_or_chunks(shape, dtype):
    block = make(dtype, **SHAPES[shape])
    together = Pool(block, dtype)
    h, whole = run(block, together, WHOLE)
    apart = Pool(block, dtype)
    for cut in ([(0, 0, 1)], [(0, 1, 8), (2, 0, 3)], [(0, 8, 36)], [(2, 3, 20), (0, 36, 37)]):
        h_part, part = run(block, apart, cut)
        at = 0
        for sequence, start, end in cut:
            offset = {0: 0, 2: 38}[sequence]
            here = slice(at, at + end - start)
            assert torch.equal(h_part[here], h[offset + start : offset + end])
            assert torch.equal(part.x[here], whole.x[offset + start : offset + end])
            if part.ids is not None:
                assert torch.equal(part.ids[here], whole.ids[offset + start : offset + end])
                assert torch.equal(part.weights[here], whole.weights[offset + start : offset + end])
            at += end - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_instruction_sets_agree_bit_for_bit(shape, dtype):
    fused = [n for n, name in enumerate(instruction_sets()) if name != "plain"]  # plain multiplies, then adds, on x86
    block = make(dtype, **SHAPES[shape])
    results = []
    for isa in fused:
        pool = Pool(block, dtype)
        results += [[run(block, pool, parts, isa) for parts in (WHOLE, [(0, 37, 39), (2, 20, 21)])]]
    for other in results[1:]:
        for (h, mine), (right_h, right) in zip(other, results[0]):
            assert torch.equal(h, right_h)
            assert torch.equal(mine.x, right.x)


def test_threads_change_nothing():
    block = make(torch.float32, heads=8, kv_heads=8, dim=64, hidden=512, experts=200, top_k=8, head_norm="dim")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pool = Pool(block, torch.float32)
        steps = [run(block, pool, parts) for parts in ([(0, 0, 60), (3, 0, 1), (1, 0, 50)], [(0, 60, 61)])]
        told = [t for h, got in steps for t in (h, got.x, got.ids, got.weights)]
        results.append([*told, pool.keys.nan_to_num(), pool.values.nan_to_num()])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, right) for mine, right in zip(other, results[0], strict=True))


def test_what_cannot_be_computed_says_so():
    block = make(torch.float32, heads=2, kv_heads=1, dim=16)
    pool = Pool(block, torch.float32)
    assert why_not(block, pool.keys, pool.values) is None
    assert "bfloat16" in why_not(block, pool.keys.half(), pool.values)
    assert "at most 256" in why_not(block._replace(dim=300), pool.keys, pool.values)
    assert "chooses 9 of 7" in why_not(block._replace(top_k=9), pool.keys, pool.values)
    with pytest.raises(ValueError, match="no compiled block"):
        CpuBlock(block._replace(rotary=3), pool.keys, pool.values)
