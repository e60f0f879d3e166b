"""The single launch over all ranks as an engine's expert path: tokens, experts and results in one kernel per layer.

It takes the place of dispatch, experts and combine in steps of few tokens. Every rank decides alike: by the largest
number of tokens of any rank, which all know, and by rank 0's crossover table for this world size. It can serve only
where every rank keeps all its experts in slots; other steps take the dispatcher, with the same numbers.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moe.comm.control import Control
from moe.comm.errors import Task
from moe.comm.lost import lost_peer
from moe.comm.symmetric import MappedHeap, SymmetricDispatcher, SymmetricHeap, padded
from moe.comm.symmetric_torch import TorchSymmetricHeap
from moe.comm.together import map_together
from moe.kernels.crossover import CrossoverTable, LayerKey, Measured, machine_name, medians_us
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.weights import ExpertWeights
from moe.layer.experts import SlotExperts
from moe.layer.kernel_choice import MAX_SINGLE_LAUNCH_TOKENS, MEASURED_TOKENS

REPEATS = 20  # of each path and number of tokens


def why_not_single_launch(
    experts: SlotExperts, control: Control, layers: Sequence[ExpertWeights], dispatcher: str
) -> str | None:
    """The reason, equal on all ranks, why these ranks cannot share a launch; None if they can. A collective."""
    parallel, cache = experts.parallel, experts.cache
    assert parallel is not None
    if dispatcher in ("coherent", "hierarchical"):
        return f"it takes the place of parallel.dispatcher=all_to_all, this run has {dispatcher}"
    if parallel.groups.num_nodes > 1:
        return f"a symmetric heap joins the ranks of one node, these are on {parallel.groups.num_nodes}"
    if any(weights.activation.kind == "custom" for weights in layers):
        return "its activation function runs only in torch"
    missing = -control.smallest(-cache.map.num_lacking(parallel.hosted))
    if missing > 0:
        return f"all experts of every rank must be in slots and a rank lacks {missing}; raise offload.budget"
    return None


class RankLaunch:
    """This rank's side of every layer's launch. All ranks must make it, with the same arguments: collectives.

    shapes: (rows per token, K of a row) by layer. sizes: by layer, the largest numbers of rows of any rank that it
    takes. Heaps and scratch are shared by the layers of one shape.
    """

    def __init__(
        self,
        experts: SlotExperts,
        control: Control,
        layers: Sequence[ExpertWeights],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
    ) -> None:
        assert experts.parallel is not None
        self.experts, self.parallel, self.control, self.layers = experts, experts.parallel, control, list(layers)
        plan, device = self.parallel.plan, experts.cache.device
        self.shapes = [
            FusedShape(
                world_size=plan.num_ranks,
                num_experts=plan.num_physical,
                top_k=top_k,
                hidden_size=weights.down.shape[1],
                intermediate_size=weights.intermediate_size,
                max_tokens=MAX_SINGLE_LAUNCH_TOKENS,
                dtype=dtype,
            )
            for weights, (_, top_k) in zip(layers, shapes)
        ]
        self.slots = []
        for layer in range(len(layers)):
            slot_of = F.pad(experts.cache.resident_slots(layer), (0, 1), value=-1)  # id -1: a place left empty
            local = self.parallel.logical_here(layer, torch.arange(plan.physical_per_rank, device=device)).cpu()
            assert ((slot_of[local] >= 0) == (local >= 0)).all(), (layer, slot_of, local)
            self.slots.append(slot_of[local].to(device))
        self.launches = {shape: self._make(shape) for shape in dict.fromkeys(self.shapes)}
        self.sizes = [frozenset(range(MAX_SINGLE_LAUNCH_TOKENS + 1))] * len(layers)

    def takes(self, layer: int, rows: int) -> bool:
        """Whether a step is launched in which no rank has more than `rows` rows."""
        return rows in self.sizes[layer]

    def run(self, layer: int, x: Tensor, physical_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """out[t] = Σ_k topk_weights[t, k] · expert(physical_ids[t, k])(x[t]), [T, H]. All ranks must call; T may be 0.

        CommError if a launch has failed: on the CPU of this layer, elsewhere after the last one, by a host sync.
        """
        launch = self.launches[self.shapes[layer]]
        started = time.monotonic()
        out = launch.run(x, physical_ids, topk_weights, self.slots[layer], self.layers[layer])
        if x.device.type == "cpu":
            self.check(Task("the single launch", layer), started)
        elif layer == len(self.layers) - 1:
            self.check(Task(f"the single launch of layers 0 to {layer}"), started)
        return out

    def check(self, what: Task, started: float) -> None:
        """CommError when a peer was lost or an expert was not resident; a host sync."""
        groups = self.parallel.groups
        for launch in self.launches.values():
            try:
                launch.check()
            except RuntimeError as error:
                patience_s = groups.timeout_s  # a limit of polls ends on one rank before it does on another
                raise lost_peer(groups, what, started, error, groups.world_ranks, patience_s=patience_s) from error

    def use_measured(self, num_experts: int, table_file: Path) -> None:
        """Take only the steps that the launch wins, as rank 0's table says; measure what that lacks. A collective.

        num_experts: logical ones of a layer.
        """
        groups = self.parallel.groups
        table = CrossoverTable(table_file, machine_name(self.experts.cache.device))
        keys = [
            LayerKey(
                num_experts=num_experts,
                top_k=shape.top_k,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                world_size=shape.world_size,
                dtype=str(shape.dtype).removeprefix("torch."),
                stored=weights.stored,
            )
            for shape, weights in zip(self.shapes, self.layers)
        ]
        for layer, key in enumerate(keys):
            if keys.index(key) < layer:
                self.sizes[layer] = self.sizes[keys.index(key)]
                continue
            if not self.control.numbers_of_first([1] * table.is_measured(key)):
                rows = [self._measure(layer, key, count) for count in MEASURED_TOKENS]
                if groups.rank == 0:
                    table.replace(key, rows)
            wins: list[int] = []
            if groups.rank == 0:
                counts = range(self.shapes[layer].max_tokens + 1)
                wins = [n for n in counts if table.choose(key, n) == "single"]
            self.sizes[layer] = frozenset(self.control.numbers_of_first(wins))

    def _measure(self, layer: int, key: LayerKey, count: int) -> Measured:
        """Both paths with `count` random rows on every rank. A collective."""
        parallel, device = self.parallel, self.experts.cache.device
        generator = torch.Generator().manual_seed(parallel.groups.rank)
        x = torch.randn(count, key.hidden_size, generator=generator).to(device, self.shapes[layer].dtype)
        ids = torch.rand(count, key.num_experts, generator=generator).topk(key.top_k).indices
        physical = parallel.physical(layer, ids.to(device))
        weights = torch.full(ids.shape, 1 / key.top_k, device=device)
        known = (count,) * key.world_size

        def dispatched() -> Tensor:
            sent = parallel.dispatcher.dispatch(x, physical, weights, layer=layer, tokens_per_rank=known)
            y = self.experts.pairs(layer, sent.rows, parallel.logical_here(layer, sent.local_ids))
            return parallel.dispatcher.combine(y, sent.handle)

        launched = partial(self.run, layer, x, physical, weights)
        single_us, grouped_us = medians_us([launched, dispatched], device, REPEATS)
        self.check(Task("measuring the single launch", layer), time.monotonic())
        self.experts.cache.reset_stats()
        parallel.dispatcher.traffic.reset()
        return Measured(layer=key, tokens=count, single_us=single_us, grouped_us=grouped_us)

    def _make(self, shape: FusedShape) -> SymmetricDispatcher:
        groups, nbytes = self.parallel.groups, HeapLayout.of(shape).nbytes
        heap: SymmetricHeap
        if groups.device.type == "cuda":
            assert groups.world is not None
            heap = TorchSymmetricHeap(nbytes, groups.world, groups.device)
        else:
            size = groups.world_size * padded(nbytes)
            mapped = map_together(groups, size, lambda path: MappedHeap(path, groups.rank, groups.world_size, nbytes))
            if mapped is None:
                raise OSError(
                    f"the single launch of {groups.world_size} ranks needs {size / 2**20:.1f} MiB of shared memory, "
                    "which /dev/shm does not have left; make it larger, or set kernel=grouped"
                )
            heap = mapped
        return SymmetricDispatcher(shape, heap, timeout_s=groups.timeout_s)
