"""The single launch with virtual ranks, against the torch reference and bit for bit against the grouped path."""

import pytest
import torch
from kernels_experts import fused_experts, random_ids, random_weights, relative_error

from moe.kernels.combine import combine
from moe.kernels.fused import FusedExperts
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation

SMALL = TileConfig(16, 32, 32, 32, 4, 1)
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}  # an output may round the other way


class Ranks:
    """Virtual ranks over one slab with two slots to spare, and the answer of the reference."""

    def __init__(self, shape: FusedShape, seed: int = 0, activation: Activation | None = None, biases=False, **options):
        self.shape = shape
        self.heaps = torch.zeros(shape.world_size, HeapLayout.of(shape).nbytes, dtype=torch.uint8)
        bases = torch.tensor([heap.data_ptr() for heap in self.heaps])
        self.fused = FusedExperts(shape, bases, num_ranks=shape.world_size, **options)
        self.weights = random_weights(
            shape.num_experts + 2,
            shape.hidden_size,
            shape.intermediate_size,
            shape.dtype,
            activation=activation,
            biases=biases,
            gap=5,
        )
        order = torch.randperm(shape.num_experts + 2, generator=torch.Generator().manual_seed(seed))
        self.slots = order[: shape.num_experts].to(torch.int32)

    def inputs(self, num_tokens: int, seed: int, skew: str):
        shape, generator = self.shape, torch.Generator().manual_seed(seed)
        x = torch.randn(shape.world_size, num_tokens, shape.hidden_size, generator=generator).to(shape.dtype)
        ids = torch.stack(
            [
                random_ids(num_tokens, shape.top_k, shape.num_experts, seed=100 * seed + rank, skew=skew)
                for rank in range(shape.world_size)
            ]
        )
        return x, ids, torch.rand(ids.shape, generator=generator)

    def run(self, x, ids, topk_weights):
        out = self.fused(x, ids, topk_weights, self.slots.view(self.shape.world_size, -1), self.weights)
        self.fused.check()
        return out

    def slot_ids(self, ids):
        return torch.where(ids >= 0, self.slots[ids.clamp(min=0).long()], -1)

    def reference(self, x, ids, topk_weights):
        y = experts_reference(x.flatten(0, 1), self.slot_ids(ids).flatten(0, 1), self.weights)
        return combine_reference(y, topk_weights.flatten(0, 1), self.shape.dtype).view(x.shape)


def make_shape(world_size, num_experts, top_k, hidden, inter, tokens, dtype=torch.float32, **more):
    return FusedShape(
        world_size=world_size,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=inter,
        max_tokens=tokens,
        dtype=dtype,
        **more,
    )


@pytest.mark.parametrize(
    ("dtype", "world", "experts", "top_k", "hidden", "inter", "tokens", "split"),
    [
        (torch.float32, 1, 1, 1, 32, 32, 1, False),
        (torch.bfloat16, 1, 5, 3, 33, 17, 7, False),
        (torch.float32, 2, 4, 2, 40, 24, 7, True),
        (torch.float16, 2, 4, 2, 40, 24, 3, False),
        (torch.bfloat16, 4, 8, 2, 32, 32, 3, False),
    ],
)
def test_equals_reference_over_epochs(dtype, world, experts, top_k, hidden, inter, tokens, split):
    ranks = Ranks(make_shape(world, experts, top_k, hidden, inter, tokens, dtype), split=split)
    for epoch, skew in enumerate(["one", "holes", "none"][: 3 if world < 4 else 2]):
        inputs = ranks.inputs(tokens, epoch, skew)
        assert relative_error(ranks.run(*inputs), ranks.reference(*inputs)) <= BOUND[dtype]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("world", "experts", "top_k", "tokens", "programs", "split"),
    [
        (8, 16, 2, 2, 3, True),
        (3, 6, 2, 20, 3, True),
        (2, 64, 4, 3, 1, False),
        (1, 64, 8, 3, 3, False),
        (2, 2, 1, 63, 1, False),
    ],
)
def test_equals_reference_larger(world, experts, top_k, tokens, programs, split):
    ranks = Ranks(make_shape(world, experts, top_k, 40, 24, tokens), split=split, programs=programs, config=SMALL)
    for epoch, skew in enumerate(["one", "holes"]):
        inputs = ranks.inputs(tokens, epoch, skew)
        assert relative_error(ranks.run(*inputs), ranks.reference(*inputs)) <= BOUND[torch.float32]


def test_bit_equal_to_the_grouped_path():
    dtype = torch.bfloat16
    ranks = Ranks(make_shape(2, 4, 3, 48, 40, 5, dtype), config=SMALL, split=True, programs=2)
    x, ids, topk_weights = ranks.inputs(5, 0, "holes")
    y = grouped_experts(x.flatten(0, 1), ranks.slot_ids(ids).flatten(0, 1), ranks.weights, config=SMALL)
    want = combine(y, topk_weights.flatten(0, 1), dtype).view(x.shape)
    assert torch.equal(ranks.run(x, ids, topk_weights), want)


def test_blocks_of_tokens_share_flags():
    """More than 128 tokens: 16 of them share one arrival flag and one counter of results."""
    shape = make_shape(2, 2, 2, 16, 16, 130)
    assert shape.dispatch_block == 16
    ranks = Ranks(shape, split=False, config=TileConfig(128, 16, 16, 16, 4, 1))
    inputs = ranks.inputs(37, 0, "holes")
    assert relative_error(ranks.run(*inputs), ranks.reference(*inputs)) <= BOUND[torch.float32]


def test_some_ranks_have_no_tokens_and_some_experts_no_rows():
    ranks = Ranks(make_shape(3, 6, 2, 16, 16, 4))
    x, ids, topk_weights = ranks.inputs(4, 0, "none")
    ids[1] = -1  # a rank that only computes
    ids[ids >= 4] = -1  # a rank that only sends
    out = ranks.run(x, ids, topk_weights)
    assert relative_error(out, ranks.reference(x, ids, topk_weights)) <= BOUND[torch.float32]
    assert (out[1] == 0).all()


def test_no_tokens_anywhere_then_some():
    ranks = Ranks(make_shape(2, 4, 2, 16, 16, 4))
    assert ranks.run(*ranks.inputs(0, 0, "none")).shape == (2, 0, 16)
    inputs = ranks.inputs(3, 1, "none")
    assert relative_error(ranks.run(*inputs), ranks.reference(*inputs)) <= BOUND[torch.float32]


def test_activation_and_biases():
    activation = Activation(kind="gpt_oss", interleaved=True, limit=1.0)
    ranks = Ranks(make_shape(2, 4, 2, 24, 20, 5), activation=activation, biases=True)
    inputs = ranks.inputs(5, 0, "none")
    assert relative_error(ranks.run(*inputs), ranks.reference(*inputs)) <= BOUND[torch.float32]


def test_results_travel_in_the_dtype_of_x():
    ranks = Ranks(make_shape(2, 4, 3, 32, 32, 5, torch.bfloat16))
    x, ids, topk_weights = ranks.inputs(5, 0, "none")
    y = experts_reference(x.flatten(0, 1), ranks.slot_ids(ids).flatten(0, 1), ranks.weights).bfloat16()
    want = combine_reference(y, topk_weights.flatten(0, 1)).view(x.shape)
    assert relative_error(ranks.run(x, ids, topk_weights), want) <= BOUND[torch.bfloat16]


def test_one_rank_by_one_function():
    weights = random_weights(6, 24, 20)
    x, ids, topk_weights = torch.randn(9, 24), random_ids(9, 2, 4, skew="holes"), torch.rand(9, 2)
    slots = torch.tensor([5, 0, 3, 2])
    want = experts_reference(x, torch.where(ids >= 0, slots[ids.clamp(min=0).long()], -1), weights)
    out = fused_experts(x, ids, topk_weights, slots, weights)
    assert relative_error(out, combine_reference(want, topk_weights)) <= BOUND[torch.float32]


def test_an_expert_that_is_not_resident_is_an_error_and_no_hang():
    ranks = Ranks(make_shape(2, 4, 2, 16, 16, 4))
    inputs = ranks.inputs(4, 0, "one")
    ranks.slots[0] = -1
    with pytest.raises(RuntimeError, match="in no slot"):
        ranks.run(*inputs)


def test_lost_peer_ends_in_an_error():
    """Rank 0 of two alone: every wait is bounded, and after the first error none lasts."""
    shape = make_shape(2, 4, 2, 16, 16, 4)
    heaps = torch.zeros(2, HeapLayout.of(shape).nbytes, dtype=torch.uint8)
    fused = FusedExperts(shape, torch.tensor([heap.data_ptr() for heap in heaps]), poll_limit=50)
    x, ids = torch.randn(4, 16), random_ids(4, 2, 4)
    fused(x, ids, torch.rand(4, 2), torch.arange(2), random_weights(2, 16, 16))
    with pytest.raises(RuntimeError, match=r"failed: row counts of a peer did not arrive.*50 polls"):
        fused.check()


def test_bad_input():
    shape = make_shape(1, 4, 2, 16, 16, 4)
    ranks = Ranks(shape)
    with pytest.raises(ValueError, match=r"5 tokens exceed max_tokens \(4\)"):
        ranks.run(torch.zeros(1, 5, 16), torch.zeros(1, 5, 2, dtype=torch.int32), torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="have shapes"):
        ranks.run(torch.zeros(1, 4, 17), torch.zeros(1, 4, 2, dtype=torch.int32), torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="float16, this heap was made for"):
        ranks.run(torch.zeros(1, 4, 16).half(), torch.zeros(1, 4, 2, dtype=torch.int32), torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="5 experts do not split over 2 ranks"):
        make_shape(2, 5, 2, 16, 16, 4)
    with pytest.raises(ValueError, match=r"bases must be int64 \[1\]"):
        FusedExperts(shape, torch.zeros(2, dtype=torch.int64))
