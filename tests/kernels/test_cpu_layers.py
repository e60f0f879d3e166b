"""All layers in one compiled call against the same blocks and experts, called one by one: the same bits and counts."""

from itertools import product

import pytest
import torch

from moe.kernels.cpu import CpuExperts, load_helper
from moe.kernels.cpu_block import CpuBlock
from moe.kernels.cpu_layers import CpuLayers, LayerInSlots, why_not
from moe.kernels.weights import Activation, ExpertWeights
from tests.kernels.test_cpu_block import WHOLE, Pool, hidden_of, make

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")
HIDDEN, EXPERTS = 96, 7
SHAPES = {  # of each layer
    "alike": [{"top_k": 3}] * 3,
    "other numbers": [{"top_k": 1, "normalize": True}, {"top_k": 4, "round_weights": True}, {"top_k": 2, "window": 9}],
}


def experts(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(EXPERTS + 2, *shape, generator=g) / 8 for shape in ((2 * 40, HIDDEN), (HIDDEN, 40)))
    return CpuExperts(ExpertWeights(up.to(dtype), down.to(dtype), None, None, Activation()))


def layers_of(shape, dtype):
    blocks = [make(dtype, heads=2 + 2 * n, kv_heads=2, dim=16, **one) for n, one in enumerate(SHAPES[shape])]
    pools = [Pool(block, dtype) for block in blocks]
    compiled = [CpuBlock(block, pool.keys, pool.values) for block, pool in zip(blocks, pools)]
    slots = [torch.randperm(EXPERTS + 2, generator=torch.Generator().manual_seed(n))[: EXPERTS + 1] for n in range(3)]
    rows = [(of.int(), torch.zeros(EXPERTS + 1, dtype=torch.int32)) for of in slots]
    return pools, compiled, [LayerInSlots(experts(dtype, n), *row) for n, row in enumerate(rows)]


@pytest.mark.parametrize(("shape", "dtype"), [*product(SHAPES, [torch.float32, torch.bfloat16])])
def test_one_call_says_what_many_say(shape, dtype):
    pools, blocks, layers = layers_of(shape, dtype)
    their_pools, their_blocks, their_layers = layers_of(shape, dtype)
    whole = CpuLayers(blocks, layers)
    for parts in (WHOLE, [(2, 20, 21), (0, 37, 40), (1, 1, 2)], [(1, 2, 3)]):
        h = torch.cat([hidden_of(blocks[0].block, dtype, *part) for part in parts])
        right, add = h.clone(), None
        work = torch.empty(max(block.work_bytes(len(h)) for block in blocks), dtype=torch.uint8)
        for pool, block, of in zip(their_pools, their_blocks, their_layers):
            x, ids, weights = block(right, add, pool.step(parts), work)
            of.asked.index_add_(0, ids.flatten(), torch.ones(ids.numel(), dtype=torch.int32))
            add = of.experts.combine(x, of.slots[ids], weights)
        out = whole(h, pools[0].step(parts), work)
        assert torch.equal(out, add)
        assert torch.equal(h, right)
    for pool, other in zip(pools, their_pools):
        assert torch.equal(pool.keys.nan_to_num(), other.keys.nan_to_num())
        assert torch.equal(pool.values.nan_to_num(), other.values.nan_to_num())
    for of, other in zip(layers, their_layers):
        assert torch.equal(of.asked, other.asked)
        assert of.asked.sum() > 0


def test_why_not():
    _, blocks, layers = layers_of("alike", torch.float32)
    assert why_not(blocks, layers) is None
    assert "3 blocks and 2 layers" in why_not(blocks, layers[:2])
    few = [layers[0]._replace(slots=layers[0].slots[: EXPERTS - 1]), *layers[1:]]
    assert "layer 0 chooses from 7 experts and has slots of 6" in why_not(blocks, few)
    _, of_bf16, _ = layers_of("alike", torch.bfloat16)
    assert "layer 1 has rows of 96 torch.bfloat16, unlike" in why_not([blocks[0], of_bf16[1], blocks[2]], layers)
    narrow = make(torch.float32, heads=2, kv_heads=2, dim=16, hidden=64)
    pool = Pool(narrow, torch.float32)
    others = [*blocks[:2], CpuBlock(narrow, pool.keys, pool.values)]
    assert "layer 2 has rows of 64 torch.float32, unlike" in why_not(others, layers)
    dense = make(torch.float32, heads=2, kv_heads=2, dim=16, experts=0)
    pool = Pool(dense, torch.float32)
    with pytest.raises(ValueError, match="layer 1 has no router of its own"):
        CpuLayers([blocks[0], CpuBlock(dense, pool.keys, pool.values), blocks[2]], layers)


def test_a_slot_that_is_not_there_is_named():
    pools, blocks, layers = layers_of("alike", torch.float32)
    layers[1].slots.fill_(EXPERTS + 2)
    h = hidden_of(blocks[0].block, torch.float32, 0, 0, 3).clone()
    work = torch.empty(blocks[0].work_bytes(3) * 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"slot {EXPERTS + 2} "):
        CpuLayers(blocks, layers)(h, pools[0].step([(0, 0, 3)]), work)
