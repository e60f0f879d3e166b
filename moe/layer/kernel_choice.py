"""The Triton paths as the engine's layer kernels: grouped GEMM, single launch, or the faster one as measured."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe.kernels.crossover import TOKENS, CrossoverTable, LayerKey, machine_name
from moe.kernels.matrix import parts_of
from moe.kernels.names import KernelName
from moe.kernels.triton_experts import FusedLayerExperts, GroupedExperts, SingleLaunch, compile_at_start
from moe.kernels.weights import ExpertWeights

MAX_SINGLE_LAUNCH_TOKENS = 256  # the heap is made for these; beyond, the grouped path
MEASURED_TOKENS = tuple(t for t in TOKENS if t <= MAX_SINGLE_LAUNCH_TOKENS)


class MeasuredExperts(FusedLayerExperts):
    """The single launch or the grouped path, whichever the machine's table says for this number of tokens."""

    def __init__(self, weights: ExpertWeights, launch: SingleLaunch, key: LayerKey, table: CrossoverTable) -> None:
        super().__init__(weights, launch, key.num_experts)
        self.key, self.table = key, table

    def _computed(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor) -> Tensor:
        # Both paths follow the reference's order over k.
        if self.table.choose(self.key, len(x)) == "single":
            return FusedLayerExperts._computed(self, x, slot_ids, topk_weights)
        return GroupedExperts.combine(self, x, slot_ids, topk_weights)


def make(
    name: KernelName,
    layers: Sequence[ExpertWeights],
    num_experts: Sequence[int],
    top_k: int,
    dtype: torch.dtype,
    table_file: Path,
) -> list[GroupedExperts]:
    """One kernel per layer. num_experts: of each layer, for the tile sizes.

    Times both paths for shapes that `table_file` does not know on this machine.
    """
    if name == "grouped":
        grouped = [GroupedExperts(weights, n) for weights, n in zip(layers, num_experts)]
        compile_at_start(grouped, top_k, dtype)
        return grouped
    launch = SingleLaunch(MAX_SINGLE_LAUNCH_TOKENS)
    if name == "single_launch":
        fused = [FusedLayerExperts(weights, launch, n) for weights, n in zip(layers, num_experts)]
        compile_at_start(fused, top_k, dtype)
        fused[-1].is_last = True
        return [*fused]
    device = layers[0].gate_up.device
    table = CrossoverTable(table_file, machine_name(device))
    made: list[MeasuredExperts] = []
    for weights, count in zip(layers, num_experts):
        key = LayerKey(
            num_experts=count,
            top_k=top_k,
            hidden_size=weights.down.shape[1],
            intermediate_size=weights.intermediate_size,
            world_size=1,
            dtype=str(dtype).removeprefix("torch."),
            stored=weights.stored,
        )
        kernel = MeasuredExperts(weights, launch, key, table)
        if not table.is_measured(key):
            _measure(kernel, dtype)
        made.append(kernel)
    compile_at_start(made, top_k, dtype)
    made[-1].is_last = True  # only now: a check would be timed too
    return [*made]


def slow_formats(layers: Sequence[ExpertWeights], dtype: torch.dtype) -> list[str]:
    """A sentence about formats that Triton's kernels multiply without matrix instructions; none for bfloat16."""
    if dtype == torch.bfloat16:
        return []
    slow = sorted({weights.stored for weights in layers if "wide" in {p.reading(dtype) for p in parts_of(weights)}})
    if not slow:
        return []
    return [f"experts stored as {'; '.join(slow)} run without matrix instructions in {dtype}; dtype=bfloat16 uses them"]


def _measure(kernel: MeasuredExperts, dtype: torch.dtype) -> None:
    """Random rows over random slots: what is in the slots does not matter to the time."""
    key, device = kernel.key, kernel.weights.down.device
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for count in MEASURED_TOKENS:
        x = torch.randn(count, key.hidden_size, generator=generator).to(device, dtype)
        num_slots = min(key.num_experts, len(kernel.weights.down))
        ids = torch.rand(count, num_slots, generator=generator).topk(min(key.top_k, num_slots)).indices
        weights = torch.full(ids.shape, 1 / key.top_k)
        inputs[count] = x, ids.to(device, torch.int32), weights.to(device)

    single = FusedLayerExperts(kernel.weights, kernel.launch, kernel.num_experts)
    kernel.table.measure(
        key,
        lambda count: single.combine(*inputs[count]),
        lambda count: GroupedExperts.combine(kernel, *inputs[count]),
        device,
        tokens=MEASURED_TOKENS,
    )
