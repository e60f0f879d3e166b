"""A layer's experts at run time: routing in, weights from slots, one row per token out.

    topk_ids ─▶ which experts ─▶ cache.acquire ─▶ wave: experts, slots ─▶ kernel ─▶ y[t, k] ─▶ Σ_k w·y
                                      └── next wave while slots are fewer than experts

A wave fills only the (token, k) pairs of its experts; the sum over k is taken once, in order, after the last wave. So
slots and waves cannot change a bit of the result.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.kernels.cpu import CpuExperts
from moe.kernels.names import KernelName
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.weights import ExpertWeights
from moe.layer.lookahead import Lookahead
from moe.layer.parallel import ExpertParallel
from moe.layer.routing import Routing, RoutingSeam
from moe.offload.cache import ExpertCache


class LayerKernel(Protocol):
    """One layer's expert compute over all slots."""

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        """y [T, K, H] fp32; pairs whose slot id is -1 are 0."""

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype, in the order of k."""


class ReferenceKernel:
    """The specification itself, for tests and for what no fast kernel can run."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        y = experts_reference(x, slot_ids, self.weights)
        return y if out_y is None else out_y.copy_(y)

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return combine_reference(self.experts(x, slot_ids), topk_weights, x.dtype)


def chosen_kernel(name: KernelName, device: torch.device) -> KernelName:
    """`name`, or what "auto" means on this device."""
    if name != "auto":
        return name
    return "cpu" if device.type == "cpu" else "measured"


def layer_kernels(
    name: KernelName,
    layers: Sequence[ExpertWeights],
    num_experts: Sequence[int],
    top_k: int,
    dtype: torch.dtype,
    table: Path,
) -> list[LayerKernel]:
    """The kernel of every layer.

    num_experts: that a layer chooses from; dtype: of activations; table: the file of crossovers for `measured`.

    Raises ValueError for a kernel that cannot run on the weights' device. `measured` may time both paths, once for
    each shape on this machine: seconds.
    """
    device = layers[0].gate_up.device
    name = chosen_kernel(name, device)
    if name == "reference":
        return [ReferenceKernel(weights) for weights in layers]
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"kernel 'cpu' cannot run on {device}; leave kernel at 'auto'")
        return [CpuExperts(weights) for weights in layers]
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"kernel {name!r} needs a GPU (or TRITON_INTERPRET=1, for tests); use 'cpu'")
    try:
        from moe.layer import kernel_choice
    except ImportError as error:
        raise ValueError(f"kernel {name!r} needs triton, which is not installed ({error})") from None
    return [*kernel_choice.make(name, layers, num_experts, top_k, dtype, table)]


class SlotExperts:
    """The experts of all layers over one cache. routing: who may change or see what goes to them."""

    def __init__(
        self,
        cache: ExpertCache,
        kernels: Sequence[LayerKernel],
        parallel: ExpertParallel | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.cache, self.kernels, self.parallel, self.lookahead = cache, list(kernels), parallel, lookahead
        # One more than there are experts: id -1 reads the last entry, which stays -1.
        self._slot_of = [np.full(n + 1, -1, np.int32) for n in cache.num_experts]
        self._has_settled = False  # all experts are resident for good, and _slot_of says where
        self.routing = RoutingSeam()
        if lookahead is not None:
            self.routing.observers.append(lookahead)

    def use_ranks(self, parallel: ExpertParallel | None) -> None:
        """Shares the experts with these ranks from now on; what is in slots stays. None: alone."""
        self.parallel = parallel
        if self.lookahead is not None:
            self.lookahead.use_ranks(parallel)

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
        """`compute(x [T, H], topk_ids [T, K], topk_weights [T, K], scale_input) -> [T, H]` of one layer."""

        def compute(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, scale_input: bool) -> Tensor:
            return self.compute(index, x, topk_ids, topk_weights, scale_input)

        return compute

    def compute(
        self, layer: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, scale_input: bool = False
    ) -> Tensor:
        """x: [T, H]; topk_ids: int [T, K], -1 = no expert; T may be 0. Returns [T, H] in x's dtype.

        scale_input: the weights scale each expert's input instead of its output (Llama 4). Raises OSError if an
        expert cannot be read.
        """
        routing = self.routing.through(x, Routing(layer, topk_ids, topk_weights, scale_input))
        ids: npt.NDArray[np.int64] = routing.topk_ids.numpy(force=True)  # host sync on an accelerator
        if scale_input:
            rows = (x[:, None] * routing.topk_weights[..., None]).flatten(0, 1)
            ones = torch.ones_like(routing.topk_weights)
            y = self._parallel_or_here(layer, rows, ids.reshape(-1, 1), ones.view(-1, 1), ids.shape[1])
            return combine_reference(y.view(*routing.topk_ids.shape, -1), ones, x.dtype)
        return self._parallel_or_here(layer, x, ids, routing.topk_weights)

    def pairs(self, layer: int, x: Tensor, ids: npt.NDArray[np.int64]) -> Tensor:
        """y of every pair of these rows with experts of this rank, fp32 [T, K, H], 0 where the id is -1."""
        return self._run(layer, x, ids, None)

    def join(self, hidden_size: int, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> None:
        """Takes part in all layers of a forward that only other ranks have. shapes: (rows per token, K) by layer."""
        for layer, (rows_per_token, top_k) in enumerate(shapes):
            x = torch.zeros(0, hidden_size, dtype=dtype, device=self.cache.device)
            weights = torch.zeros(0, top_k, device=self.cache.device)
            if self.lookahead is not None:  # its gathers are collectives; nothing else has anything to see
                self.lookahead.routed(x, Routing(layer, weights.long(), weights))
            self._parallel_or_here(layer, x, np.zeros((0, top_k), np.int64), weights, rows_per_token)

    def _parallel_or_here(
        self, layer: int, x: Tensor, ids: npt.NDArray[np.int64], topk_weights: Tensor, rows_per_token: int = 1
    ) -> Tensor:
        def run(rows: Tensor, own: npt.NDArray[np.int64]) -> Tensor:
            return self._run(layer, rows, own, None)

        if self.parallel is None:
            y = self._run(layer, x, ids, topk_weights)
        else:
            y = self.parallel.compute(layer, x, ids, topk_weights, run, rows_per_token)
        self._read_ahead()  # where no wave came
        return y

    def _run(self, layer: int, x: Tensor, ids: npt.NDArray[np.int64], topk_weights: Tensor | None) -> Tensor:
        """The combined rows [T, H] in x's dtype, or without weights y of every pair, fp32 [T, K, H]."""
        kernel, slot_of = self.kernels[layer], self._slot_of[layer]
        wanted = _distinct(ids)
        if self._has_settled or self._settle():
            self.cache.count_hits(layer, len(wanted))
            slot_ids = torch.from_numpy(slot_of[ids]).to(x.device)
            return kernel.experts(x, slot_ids) if topk_weights is None else kernel.combine(x, slot_ids, topk_weights)
        y: Tensor | None = None
        with closing(self.cache.acquire(layer, wanted)) as waves:
            for wave in waves:
                self._read_ahead()
                slot_of[wave.experts] = wave.slots
                slot_ids = torch.from_numpy(slot_of[ids]).to(x.device)
                slot_of[wave.experts] = -1
                if topk_weights is not None and len(wave.experts) == len(wanted):
                    return kernel.combine(x, slot_ids, topk_weights)
                y = self._add_wave(kernel, x, slot_ids, y)
        if y is None:  # no token, or none that has an expert
            y = torch.zeros(*ids.shape, x.shape[1], device=x.device)
        return y if topk_weights is None else combine_reference(y, topk_weights, x.dtype)

    def _read_ahead(self) -> None:
        if self.lookahead is not None:
            self.lookahead.read()

    def _settle(self) -> bool:
        if self.cache.is_all_resident:
            for layer, slot_of in enumerate(self._slot_of):
                slot_of[:-1] = self.cache.resident_slots(layer)
            self._has_settled = True
        return self._has_settled

    @staticmethod
    def _add_wave(kernel: LayerKernel, x: Tensor, slot_ids: Tensor, y: Tensor | None) -> Tensor:
        """Fills the pairs of this wave; the others keep what earlier waves gave them, or 0.

        Only the tokens that need the wave are computed: costs nothing for the others.
        """
        if y is None:
            return kernel.experts(x, slot_ids)
        rows = (slot_ids >= 0).any(dim=1).nonzero().squeeze(1)
        y[rows] += kernel.experts(x[rows], slot_ids[rows])  # adds to zeros only: exact
        return y


def _distinct(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # The top-k of one token are distinct, but for routers that look them up (DeepSeek-V4's by the token's id).
    is_distinct = len(ids) == 1 and len(set(ids[0].tolist())) == ids.shape[1]
    wanted: npt.NDArray[np.int64] = ids[0] if is_distinct else np.unique(ids)
    return wanted[wanted >= 0]
