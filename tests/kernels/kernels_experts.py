"""Random experts and routings for the kernel tests."""

import torch
from torch import Tensor

from moe.kernels.fused import FusedExperts
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.weights import Activation, ExpertWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weights(
    num_slots: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype = torch.float32,
    *,
    activation: Activation | None = None,
    biases: bool = False,
    gap: int = 0,
    seed: int = 0,
) -> ExpertWeights:
    """Experts whose slots lie `gap` elements apart, as in a slab of aligned blobs; the gaps are NaN."""
    activation = activation or Activation()
    generator = torch.Generator().manual_seed(seed)
    n = inter * (2 if activation.gated else 1)
    shapes = [(n, hidden), (hidden, inter), (n,), (hidden,)]
    sizes = [n * hidden, hidden * inter, n, hidden]
    slab = torch.full((num_slots, sum(sizes) + gap), torch.nan, dtype=dtype)
    views, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        view = slab[:, start : start + size].view(num_slots, *shape)
        view.copy_(torch.randn(view.shape, generator=generator) / shape[-1] ** 0.5)
        views.append(view)
        start += size
    gate_up, down, gate_up_bias, down_bias = views
    return ExpertWeights(gate_up, down, gate_up_bias if biases else None, down_bias if biases else None, activation)


def random_ids(num_tokens: int, top_k: int, num_experts: int, *, seed: int = 0, skew: str = "none") -> Tensor:
    """Distinct experts per token. skew: "none", "one" (expert 0 is always among them), "holes" (a third is -1)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if skew == "one":
        scores[:, 0] += 1
    ids = scores.topk(top_k, dim=-1).indices.to(torch.int32)
    if skew == "holes":
        ids[torch.rand(ids.shape, generator=generator) < 0.33] = -1
    return ids


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ in float64; the plain norm when `want` is zero."""
    difference, norm = (got.double() - want.double()).norm(), want.double().norm()
    return float(difference / norm if norm > 0 else difference)


def fused_experts(x: Tensor, ids: Tensor, topk_weights: Tensor, slots: Tensor, weights: ExpertWeights) -> Tensor:
    """The single launch on one rank without peers, for one call; keep a `FusedExperts` to call it again and again.

    x: [T, H], ids: int32 [T, K] in [0, E), -1 = none; topk_weights: [T, K]; slots: int32 [E]. Returns [T, H].
    """
    shape = FusedShape(
        world_size=1,
        num_experts=len(slots),
        top_k=ids.shape[1],
        hidden_size=x.shape[1],
        intermediate_size=weights.intermediate_size,
        max_tokens=max(1, len(x)),
        dtype=x.dtype,
    )
    heap = torch.zeros(HeapLayout.of(shape).nbytes, dtype=torch.uint8, device=x.device)
    experts = FusedExperts(shape, torch.tensor([heap.data_ptr()], device=x.device))
    out = experts(x, ids, topk_weights, slots, weights)
    experts.check()  # host sync; also keeps the heap alive until the launch has ended
    return out
