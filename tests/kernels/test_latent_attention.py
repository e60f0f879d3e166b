"""Attention over latents in the interpreter, against its twin and against keys and values that are expanded."""

import pytest
import torch
from kernels_experts import relative_error
from test_paged_attention import BOUNDS

from moe.kernels.latent_attention import latent_attention, latent_attention_reference
from moe.kernels.paged_attention import Pages


def setting(lengths, heads, width, rotary, block_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads + width)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    pool = tuple(torch.full(((sum(counts) + 1) * block_size, 1, n), torch.nan, dtype=dtype) for n in (width, rotary))
    for row, (length, count) in enumerate(zip(lengths, counts)):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        rows = tables[row, :count].long()[:, None] * block_size + torch.arange(block_size)
        for cache in pool:
            cache[rows.flatten()[: max(0, length - 1)]] = random(max(0, length - 1), 1, cache.shape[2])
    num = len(lengths)
    q, new = (tuple(random(*shape, n) for n in (width, rotary)) for shape in ((num, heads), (num,)))
    return q, new, pool, Pages(tables, torch.tensor(lengths, dtype=torch.int32), block_size, max(lengths))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "width", "rotary", "block_size"), [(4, 16, 8, 16), (17, 20, 6, 5), (1, 64, 16, 3)])
def test_equals_the_twin_and_writes_what_is_new(heads, width, rotary, block_size, dtype):
    q, new, pool, pages = setting([1, 3, 0, 300], heads, width, rotary, block_size, dtype)
    theirs = tuple(cache.clone() for cache in pool)
    found = latent_attention(q, new, pool, pages, 0.3)
    wanted = latent_attention_reference(q, new, theirs, pages, 0.3)
    assert relative_error(found, wanted) <= BOUNDS[dtype]
    assert torch.equal(found[2], torch.zeros_like(found[2]))
    for mine, other in zip(pool, theirs):
        assert torch.equal(mine.nan_to_num(99.0), other.nan_to_num(99.0))


def test_equals_expanded_keys_and_values():
    """The absorbed form is the published one: queries through W_uk, results through W_uv."""
    heads, width, rotary, plain, out = 3, 12, 4, 5, 6
    (_, turned), new, pool, pages = setting([33], heads, width, rotary, 8)
    generator = torch.Generator().manual_seed(1)
    up_keys, up_values = (torch.randn(heads, n, width, generator=generator) for n in (plain, out))
    q = torch.randn(1, heads, plain, generator=generator)
    mixed = latent_attention((torch.einsum("thn,hnl->thl", q, up_keys), turned), new, pool, pages, 0.4)
    found = torch.einsum("thl,hvl->thv", mixed, up_values)
    rows = (pages.tables[0].long()[:, None] * 8 + torch.arange(8)).flatten()[:33]
    c, r = (cache[rows, 0] for cache in pool)
    keys = torch.cat([torch.einsum("hnl,tl->htn", up_keys, c), r.expand(heads, -1, -1)], dim=2)
    values = torch.einsum("hvl,tl->htv", up_values, c)
    queries = torch.cat([q, turned], dim=2).transpose(0, 1)
    theirs = torch.nn.functional.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=0.4)
    assert relative_error(found, theirs[0].transpose(0, 1)) <= 2e-6


def test_a_row_has_the_same_bits_in_any_batch():
    q, new, pool, pages = setting([5, 520, 256], 2, 16, 8, 16)
    whole = latent_attention(q, new, tuple(c.clone() for c in pool), pages, 0.3)
    for row, length in enumerate([5, 520, 256]):
        one = slice(row, row + 1)
        alone = Pages(pages.tables[one], pages.lengths[one], 16, length)
        parts = [tuple(t[one] for t in both) for both in (q, new)]
        assert torch.equal(latent_attention(*parts, tuple(c.clone() for c in pool), alone, 0.3)[0], whole[row])
