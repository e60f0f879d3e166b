"""A layer's experts at run time: routing in, weights from slots, one row per token out.

    Routing ─▶ RoutingSeam ─▶ [ranks: tokens to their experts] ─▶ Resident, or Waves ─▶ Σ_k w·y

Which of the two runs (moe/layer/runners.py) follows from what is resident, and changes when that changes.
"""

import math
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe.kernels.cpu import CpuExperts
from moe.kernels.cpu_block import CpuBlock
from moe.kernels.cpu_layers import CpuLayers
from moe.kernels.names import KernelName
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.weights import ExpertWeights
from moe.layer.home_first import HomeFirst
from moe.layer.lookahead import Lookahead
from moe.layer.parallel import ExpertParallel
from moe.layer.routing import Routing, RoutingSeam, StepContext
from moe.layer.runners import LayerKernel, LayerRunner, Resident, Waves
from moe.offload.cache import ExpertCache
from moe.offload.device_cache import DeviceCache
from moe.offload.device_slots import DeviceSlots


class ReferenceKernel:
    """The specification itself, for tests and for what no fast kernel can run."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        return experts_reference(x, slot_ids, self.weights, out_y)

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, y: Tensor | None = None) -> Tensor:
        return combine_reference(self.experts(x, slot_ids, y), topk_weights, x.dtype)


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


def kernel_notes(name: KernelName, layers: Sequence[ExpertWeights], dtype: torch.dtype) -> list[str]:
    """What a user should know about these weights on this kernel: formats that it can only read slowly."""
    if name in ("reference", "cpu"):
        return []
    from moe.layer import kernel_choice

    return kernel_choice.slow_formats(layers, dtype)


_FILLED = 8  # experts at a time
_MOST_TRIES = 16  # in which none comes: what cannot be read, and nobody has asked for, is left alone


class SlotExperts:
    """The experts of all layers over one cache, alone until `use_ranks`. routing: what it goes through."""

    def __init__(
        self,
        cache: ExpertCache,
        kernels: Sequence[LayerKernel],
        routing: RoutingSeam | None = None,
        lookahead: Lookahead | None = None,
    ) -> None:
        self.cache, self.kernels, self.lookahead = cache, list(kernels), lookahead
        self.parallel: ExpertParallel | None = None
        self.waves = Waves(cache, self.kernels, self._read_ahead)
        self.runner: LayerRunner = self.waves
        self.routing = routing or RoutingSeam()
        if lookahead is not None:
            self.routing.observers.append(lookahead)
        self.settle()

    def use_ranks(self, parallel: ExpertParallel | None) -> None:
        """Shares the experts with these ranks from now on; what is in slots stays. None: alone."""
        self.parallel = parallel
        if self.lookahead is not None:
            self.lookahead.use_ranks(parallel)
        self.settle()

    @property
    def num_own(self) -> list[int]:
        """Experts of this rank, by layer; alone all of them."""
        return self.cache.num_experts if self.parallel is None else [len(of) for of in self.parallel.hosted]

    def settle(self) -> None:
        """Chooses who runs from here on: `Resident` if all experts of this rank are in slots, which then stay there, or
        if the device can fetch them by itself.

        Between two steps. It is done again by itself, when the plan changes and when the last expert has come.
        """
        self._plan = None if self.parallel is None else self.parallel.plan
        own = None if self.parallel is None else self.parallel.hosted
        self.cache.unpin()
        self._fills, self._tries = self.cache.map.num_fills, 0
        pinned: DeviceSlots | DeviceCache | None = None
        if not self.cache.map.num_lacking(own):
            pinned = self.cache.pin(own)
        on_device = self.parallel is None and not self.routing.observers and self.kernels_by_device
        if pinned is None and on_device:
            pinned = self.cache.lend()
        self.runner = self.waves if pinned is None else Resident(pinned, self.kernels)

    def in_one_call(self, blocks: Sequence[CpuBlock]) -> CpuLayers | None:
        """The next forward's layers, each behind its block, in one compiled call. None where there can be none: not all
        experts are in slots of the CPU, others share them, or somebody looks at routing or changes it.
        """
        if self._has_changed:
            self.settle()
        is_seen = self.parallel is not None or self.routing.stages or self.routing.observers
        return self.runner.in_one_call(blocks) if isinstance(self.runner, Resident) and not is_seen else None

    def fetch_share(self) -> None:
        """Reads what the plan has newly given to this rank, where all of its experts fit: a migration's bytes are then
        read in the steps that it gave them. Where they do not fit, a token that needs one has it read, as any other.

        Raises OSError if one cannot be read.
        """
        assert self.parallel is not None
        if self.cache.num_slots >= sum(map(len, self.parallel.hosted)):
            self.cache.unpin()
            self.cache.preload(self.parallel.hosted)
            self.settle()

    def fill(self, *, at_once: bool = False) -> None:
        """Between two steps: where each expert of this rank has a slot, some of those that lack are read ahead, first
        those of the last layers, until all are there and stay. at_once: all of them; raises OSError where one fails.
        """
        cache, own = self.cache, None if self.parallel is None else self.parallel.hosted
        if cache.pinned is not None or cache.num_slots < sum(self.num_own) or cache.map.num_lacking(own):
            return
        if at_once:
            cache.preload(own)
            self.settle()
        elif cache.num_readers and not cache.ahead.is_reading and self._tries < _MOST_TRIES:
            self._tries += 1
            for layer, experts in cache.map.absent(_FILLED, own):
                cache.prefetch(layer, experts[: cache.map.num_free(layer)])  # what another plan left goes when it must

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
        ids, weights = routing.topk_ids.long(), routing.topk_weights
        if scale_input:
            rows = (x[:, None] * weights[..., None]).flatten(0, 1)
            ones = torch.ones_like(weights)
            y = self._parallel_or_here(layer, rows, ids.reshape(-1, 1), ones.view(-1, 1), ids.shape[1])
            return combine_reference(y.view(*ids.shape, -1), ones, x.dtype)
        return self._parallel_or_here(layer, x, ids, weights)

    def pairs(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """y of every pair of these rows with experts of this rank, fp32 [T, K, H], 0 where the id is -1.

        x: [T, H]; ids: int64 [T, K], logical.
        """
        (y,) = self.home_first(layer, x, ids, len(x))
        return y

    def home_first(
        self, layer: int, x: Tensor, ids: Tensor, num_first: int, later_bytes: float = math.inf
    ) -> Generator[Tensor, None, None]:
        """`pairs`, once, as soon as the first `num_first` rows are there; the others are when it ends.

        later_bytes: of weights that only the others ask for, from which on these are computed by a call of their own.
        """
        turns = HomeFirst(num_first, later_bytes / self.cache.blob_bytes)
        return self._settled(layer).pairs(layer, x, ids, turns)

    def join(self, hidden_size: int, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> None:
        """Takes part in all layers of a forward that only other ranks have. shapes: (rows per token, K) by layer."""
        self.routing.begin(StepContext())
        for layer, (rows_per_token, top_k) in enumerate(shapes):
            x = torch.zeros(0, hidden_size, dtype=dtype, device=self.cache.device)
            weights = torch.zeros(0, top_k, device=self.cache.device)
            routing = self.routing.through(x, Routing(layer, weights.long(), weights))
            self._parallel_or_here(layer, x, routing.topk_ids.long(), routing.topk_weights, rows_per_token)

    def _parallel_or_here(
        self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor, rows_per_token: int = 1
    ) -> Tensor:
        if self.parallel is None:
            y = self._settled(layer).run(layer, x, ids, topk_weights)
        else:
            y = self.parallel.compute(layer, x, ids, topk_weights, self.home_first, rows_per_token)
        self._read_ahead()  # where no wave came
        return y

    def _settled(self, layer: int) -> LayerRunner:
        if layer == 0 and self._has_changed:
            self.settle()
        return self.runner

    @property
    def kernels_by_device(self) -> bool:
        """Whether Triton's kernels compute, on a GPU or interpreted."""
        return not isinstance(self.kernels[0], (ReferenceKernel, CpuExperts))

    @property
    def _has_changed(self) -> bool:
        """Whether another may run than the last time anyone looked."""
        plan = None if self.parallel is None else self.parallel.plan
        return plan is not self._plan or self._fills != self.cache.map.num_fills

    def _read_ahead(self) -> None:
        if self.lookahead is not None:
            self.lookahead.read()
