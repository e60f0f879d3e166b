"""One layer's experts for the engine, by Triton: the grouped path, and the single launch for steps of few tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.kernels.combine import combine
from moe.kernels.fused import FusedExperts
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import is_interpreted
from moe.kernels.permute import SMALL_ROWS, rows_block
from moe.kernels.reference import check_expert_weights, put_beside_left
from moe.kernels.tiles import device_capability, pick_tiles
from moe.kernels.weights import ExpertWeights

MOST_ROWS = 64  # per expert; with more the tiles stay the same
FEW_TOKENS = 16  # up to these the single launch has a heap, and a kernel, of its own


class GroupedExperts:
    """Two grouped GEMMs and a combine. `num_experts`: of the layer, for the tile sizes (None: as many as slots)."""

    def __init__(self, weights: ExpertWeights, num_experts: int | None = None) -> None:
        check_expert_weights(weights)
        self.weights, self.num_experts = weights, num_experts

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        """y [T, K, H] in x's dtype (or in `out_y`), 0 where the slot id is -1, and where it is LEFT what `out_y` has.

        x: [T, H]; slot_ids: int [T, K].
        """
        if out_y is None:
            return grouped_experts(x, slot_ids, self.weights, num_experts=self.num_experts)
        y = grouped_experts(x, slot_ids.clamp(min=-1), self.weights, num_experts=self.num_experts)
        return put_beside_left(y, slot_ids, out_y)

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, y: Tensor | None = None) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype, in the order of k. y: of LEFT pairs, as `experts` gave it; changed."""
        return combine(self.experts(x, slot_ids, y), topk_weights, x.dtype)


class SingleLaunch:
    """The heap and scratch of the single launch on one rank, shared by all layers of one shape."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens ({max_tokens}) must be at least 1")
        self.max_tokens = max_tokens
        self._made: dict[FusedShape, tuple[Tensor, FusedExperts]] = {}

    def layer(self, weights: ExpertWeights) -> "FusedLayerExperts":
        return FusedLayerExperts(weights, self)

    def of(self, shape: FusedShape, device: torch.device) -> FusedExperts:
        if shape not in self._made:
            heap = torch.zeros(HeapLayout.of(shape).nbytes, dtype=torch.uint8, device=device)
            self._made[shape] = heap, FusedExperts(shape, torch.tensor([heap.data_ptr()], device=device))
        return self._made[shape][1]

    def check(self) -> None:
        """`RuntimeError` when a launch ended in an error; a host sync."""
        for _, fused in self._made.values():
            fused.check()


class FusedLayerExperts(GroupedExperts):
    """The single launch for up to `max_tokens` tokens that need no waves, the grouped path for everything else.

    is_last: of a step's layers; then the errors of all layers' launches are looked at, which is one host sync.
    """

    def __init__(self, weights: ExpertWeights, launch: SingleLaunch, num_experts: int | None = None) -> None:
        super().__init__(weights, num_experts)
        self.launch, self.is_last = launch, False

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, y: Tensor | None = None) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype, in the order of k; one launch beside the sort.

        `RuntimeError` from the last layer when a launch of this step ended in an error.
        """
        if y is None:
            out = self._computed(x, slot_ids, topk_weights)
        else:
            out = super().combine(x, slot_ids, topk_weights, y)
        if self.is_last:
            self.launch.check()
        return out

    @contextmanager
    def unchecked(self) -> Iterator[Callable[[], None]]:
        """Inside nobody looks at errors, which is a host sync; yields what does."""
        was, self.is_last = self.is_last, False
        try:
            yield self.launch.check
        finally:
            self.is_last = was

    def _computed(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if len(x) > self.launch.max_tokens:
            return super().combine(x, slot_ids, topk_weights)
        shape = self.shape_of(len(x), slot_ids.shape[1], x.shape[1], x.dtype)
        return self.launch.of(shape, x.device).run_slots(x, slot_ids, topk_weights, self.weights)

    def shape_of(self, num_tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> FusedShape:
        """One of two heaps: few tokens get one whose kernel walks few experts; never more than the layer has."""
        largest = self.launch.max_tokens
        tokens = FEW_TOKENS if num_tokens <= FEW_TOKENS < largest else largest
        num_slots = len(self.weights.down)
        return FusedShape(
            world_size=1,
            num_experts=min(num_slots, tokens * top_k, self.num_experts or num_slots),  # in use at most
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=self.weights.intermediate_size,
            max_tokens=tokens,
            dtype=dtype,
        )


def serving_tokens(top_k: int, num_experts: int, dtype: torch.dtype, capability: int) -> tuple[int, ...]:
    """The least numbers of tokens that between them meet every kernel of the grouped path, ascending.

    num_experts: that rows are spread over. Tiles depend on rows per expert, the sort on the number of rows, by steps.
    """
    seen, found = set(), []
    for tokens in range(1, max(SMALL_ROWS, MOST_ROWS * num_experts) // top_k + 2):
        rows = tokens * top_k
        tiles = {pick_tiles(rows / min(rows, num_experts), dtype, capability, tma=tma) for tma in (False, True)}
        key = frozenset(tiles), rows_block(rows) if rows <= SMALL_ROWS else None
        if key not in seen:
            seen.add(key)
            found.append(tokens)
    return tuple(found)


def compile_at_start(layers: Sequence[GroupedExperts], top_k: int, dtype: torch.dtype) -> None:
    """Launch every kernel that serving will meet once for every shape of layer, so that no step waits for a compiler.

    Runs on what is in the slots; the results are thrown away. Nothing under the interpreter.
    """
    if is_interpreted():
        return
    for layer in {_kernel_key(layer): layer for layer in layers}.values():
        weights, device = layer.weights, layer.weights.down.device
        num_experts = min(len(weights.down), layer.num_experts or len(weights.down))
        counts = set(serving_tokens(top_k, num_experts, dtype, device_capability(device)))
        paths = [GroupedExperts(weights, layer.num_experts)]
        if isinstance(layer, FusedLayerExperts):
            paths.append(FusedLayerExperts(weights, layer.launch, layer.num_experts))
            counts |= {FEW_TOKENS, layer.launch.max_tokens}
        for tokens in sorted(counts):
            x = torch.zeros(tokens, weights.down.shape[1], dtype=dtype, device=device)
            ids = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
            for path in paths:
                path.combine(x, ids, torch.zeros(tokens, top_k, device=device))


def _kernel_key(layer: GroupedExperts) -> tuple[object, ...]:
    weights = layer.weights
    codings = (c for c in (weights.gate_up_coding, weights.down_coding) if c is not None and c.code == "bf12")
    rare = tuple(c.scale.shape[-1] for c in codings)  # a stride, which the JIT looks at
    stored = weights.stored, rare, weights.gate_up.shape, weights.down.shape, weights.gate_up_bias is None
    return *stored, weights.activation, layer.num_experts
