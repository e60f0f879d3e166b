"""Paged attention in the interpreter against its twin, against torch, and against itself in other batches."""

import pytest
import torch
from kernels_experts import relative_error

from moe.kernels import paged_attention as module
from moe.kernels.paged_attention import Pages, Scores, paged_attention, paged_attention_reference

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # 16 bits: weights are rounded before values
CASES = {  # heads, key heads, width, block size, scores
    "plain": (4, 2, 16, 16, Scores(0.25)),
    "odd, shared by three": (6, 2, 12, 5, Scores(0.3)),
    "one key head": (5, 1, 20, 7, Scores(0.2)),
    "window": (2, 2, 16, 16, Scores(0.25, window=70)),
    "cap": (2, 1, 16, 3, Scores(0.5, softcap=3.0)),
    "sinks and window": (4, 2, 8, 4, Scores(0.5, window=9, sinks=torch.tensor([0.5, -1.0, 4.0, 0.0]))),
}


def setting(lengths, heads, kv_heads, width, block_size, dtype=torch.float32, seed=0):
    """q, new keys and values, the pool with poisoned free rows, and where sequences lie in it, in no order."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    tables = torch.full((len(lengths), max(counts, default=1)), -1, dtype=torch.int32)
    pool = [torch.full(((sum(counts) + 1) * block_size, kv_heads, width), torch.nan, dtype=dtype) for _ in range(2)]
    for row, (length, count) in enumerate(zip(lengths, counts)):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        rows = tables[row, :count].long()[:, None] * block_size + torch.arange(block_size)
        for cache in pool:
            cache[rows.flatten()[: length - 1]] = random(length - 1, kv_heads, width)
    num = len(lengths)
    pages = Pages(tables, torch.tensor(lengths, dtype=torch.int32), block_size, max(lengths, default=1))
    return random(num, heads, width), (random(num, kv_heads, width), random(num, kv_heads, width)), pool, pages


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_twin_and_writes_what_is_new(name, dtype):
    *sizes, scores = CASES[name]
    q, new, pool, pages = setting([1, 3, 64, 300], *sizes, dtype=dtype)
    others = tuple(cache.clone() for cache in pool)
    found = paged_attention(q, new, tuple(pool), pages, scores)
    wanted = paged_attention_reference(q, new, others, pages, scores)
    assert relative_error(found, wanted) <= BOUNDS[dtype]
    for mine, theirs in zip(pool, others):
        assert torch.equal(mine.nan_to_num(99.0), theirs.nan_to_num(99.0))


def test_equals_torch():
    q, new, pool, pages = setting([33], 4, 2, 16, 8, seed=3)
    found = paged_attention(q, new, tuple(pool), pages, Scores(0.25))
    rows = (pages.tables[0].long()[:, None] * 8 + torch.arange(8)).flatten()[:33]
    k, v = (cache[rows].transpose(0, 1)[None] for cache in pool)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, scale=0.25, enable_gqa=True
    )
    assert relative_error(found[:, :, :], theirs[0].transpose(0, 1)) <= 1e-6


def test_a_row_has_the_same_bits_in_any_batch():
    lengths = [5, 520, 256, 1]
    q, new, pool, pages = setting(lengths, 4, 2, 8, 16)
    whole = paged_attention(q, new, tuple(c.clone() for c in pool), pages, Scores(0.3))
    for row, length in enumerate(lengths):
        for longest in (length, 1000):
            alone = Pages(pages.tables[row : row + 1], pages.lengths[row : row + 1], 16, longest)
            one = slice(row, row + 1)
            found = paged_attention(
                q[one], (new[0][one], new[1][one]), tuple(c.clone() for c in pool), alone, Scores(0.3)
            )
            assert torch.equal(found[0], whole[row])


def test_no_sequence_and_strided_rows():
    q, new, pool, pages = setting([3, 9], 4, 2, 8, 4)
    wanted = paged_attention_reference(q, new, tuple(c.clone() for c in pool), pages, Scores(0.3))
    packed = q.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers' queries lie
    assert relative_error(paged_attention(packed, new, tuple(pool), pages, Scores(0.3)), wanted) <= 1e-6
    none = Pages(pages.tables[:0], pages.lengths[:0], 4, 1)
    assert paged_attention(q[:0], (new[0][:0], new[1][:0]), tuple(pool), none, Scores(0.3)).shape == (0, 4, 8)


def test_what_it_cannot_do_is_said():
    shape = torch.Size((10, 2, 8))
    assert "float64" in module.why_not(torch.float64, 4, shape, shape)
    assert "equal" in module.why_not(torch.float32, 4, shape, torch.Size((10, 2, 4)))
    assert "5 heads" in module.why_not(torch.float32, 5, shape, shape)
    assert module.why_not(torch.float32, 4, shape, shape) is None
