"""Who computes the rows of a layer that are this rank's: by slots that are known on the device, or by waves.

    Resident   ids ─▶ slots = table[layer][ids] ─▶ kernel    all of this rank's are in slots for good, or the device
                                                             fetches what is missing from host memory
    Waves      ids ─▶ host ─▶ cache.acquire ─▶ wave: experts, slots ─▶ kernel ─▶ y[t, k] ─▶ Σ_k w·y
                                      └── next wave while slots are fewer than experts

A wave fills only the (token, k) pairs of its experts; the sum over k is taken once, in order, after the last wave. So
slots and waves cannot change a bit of the result, nor who runs, nor whose rows are computed first (`pairs`).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from math import inf
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.kernels.cpu import CpuExperts
from moe.kernels.cpu_block import CpuBlock
from moe.kernels.cpu_layers import CpuLayers, LayerInSlots, why_not
from moe.kernels.reference import LEFT
from moe.layer.home_first import HomeFirst, Ids
from moe.layer.routing import on_host
from moe.offload.cache import ExpertCache
from moe.offload.device_cache import DeviceCache
from moe.offload.device_slots import DeviceSlots


class LayerKernel(Protocol):
    """One layer's expert compute over all slots."""

    def experts(self, x: Tensor, slot_ids: Tensor, out_y: Tensor | None = None) -> Tensor:
        """y [T, K, H]; pairs whose slot id is -1 are 0, and where it is LEFT they are as `out_y` has them."""

    def combine(self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor, y: Tensor | None = None) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype, in the order of k. y: of LEFT pairs, as `experts` gave it; changed."""


class LayerRunner(Protocol):
    """Computes any layer's rows by logical ids. x: [T, H]; ids: int64 [T, K] on x's device, -1 = none; T may be 0."""

    def run(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The combined rows [T, H] in x's dtype."""

    def pairs(self, layer: int, x: Tensor, ids: Tensor, home_first: HomeFirst) -> Generator[Tensor, None, None]:
        """y of every pair, fp32 [T, K, H], once, when the first rows are in it; the others are when it ends."""


class Resident:
    """Slots are known on the device: all experts are there for good, or it fetches them by itself. No host sync.

    nobody: bool [N, 1] on the device, places of the batch that no token has, whose experts are not asked for, or None;
    a place may have several rows.
    """

    def __init__(self, slots: DeviceSlots | DeviceCache, kernels: Sequence[LayerKernel]) -> None:
        self.slots, self.kernels = slots, kernels
        self.nobody: Tensor | None = None
        self._whole: tuple[Sequence[CpuBlock], CpuLayers | None] | None = None

    def in_one_call(self, blocks: Sequence[CpuBlock]) -> CpuLayers | None:
        """The next forward's layers, each behind its block, in one compiled call; None where that cannot be."""
        if not isinstance(self.slots, DeviceSlots) or self.nobody is not None:
            return None
        if self._whole is None or self._whole[0] is not blocks:
            kernels = [kernel for kernel in self.kernels if isinstance(kernel, CpuExperts)]
            layers = [LayerInSlots(kernel, *of) for kernel, of in zip(kernels, self.slots.rows)]
            self._whole = blocks, None if why_not(blocks, layers) else CpuLayers(blocks, layers)
        whole = self._whole[1]
        if whole is not None:
            self.slots.begin()
        return whole

    def run(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        if self.nobody is not None:
            ids = ids.masked_fill(self.nobody.expand(-1, len(ids) // len(self.nobody)).reshape(-1, 1), -1)
        return self.kernels[layer].combine(x, self.slots.look_up(layer, ids), topk_weights)

    def pairs(self, layer: int, x: Tensor, ids: Tensor, home_first: HomeFirst) -> Generator[Tensor, None, None]:
        kernel, slots = self.kernels[layer], self.slots.look_up(layer, ids)
        if x.is_cpu and home_first.num_first < len(x) and home_first.least_later < inf:  # elsewhere a host sync
            asked = ids.numpy()
            _, later = home_first.turns(asked)
            if len(later) >= home_first.least_later:
                y = torch.empty(*ids.shape, x.shape[1])
                yield from _in_two(kernel, x, slots.numpy(), np.isin(asked, later), y)
                return
        yield kernel.experts(x, slots)


class Waves:
    """Experts come into slots as they are asked for. meanwhile: called when a layer's own misses are on their way.

    A host sync a layer on an accelerator. Raises OSError if an expert cannot be read.
    """

    def __init__(self, cache: ExpertCache, kernels: Sequence[LayerKernel], meanwhile: Callable[[], None]) -> None:
        self.cache, self.kernels, self._meanwhile = cache, kernels, meanwhile
        # One more than there are experts: id -1 reads the last entry, which stays -1.
        self._slot_of = [np.full(n + 1, -1, np.int32) for n in cache.num_experts]

    def run(self, layer: int, x: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
        kernel, asked = self.kernels[layer], on_host(ids)  # host sync
        wanted = _distinct(asked)
        left, y = len(wanted), None
        with closing(self._by_wave(layer, asked, wanted)) as waves:
            for experts, slots in waves:
                left -= len(experts)
                if not left:
                    return kernel.combine(x, torch.from_numpy(slots).to(x.device), topk_weights, y)
                y = kernel.experts(x, torch.from_numpy(slots).to(x.device), y)
        return torch.zeros_like(x)  # no token, or none that has an expert

    def pairs(self, layer: int, x: Tensor, ids: Tensor, home_first: HomeFirst) -> Generator[Tensor, None, None]:
        kernel, asked = self.kernels[layer], on_host(ids)  # host sync
        first, later = home_first.turns(asked)
        left, has_first = {*first.tolist()}, not len(first)
        y = (torch.zeros if has_first else torch.empty)(*ids.shape, x.shape[1], device=x.device)
        if has_first:
            yield y
        with closing(self._by_wave(layer, asked, np.concatenate([first, later]))) as waves:
            for experts, slots in waves:
                left.difference_update(experts.tolist())
                if has_first or left or len(np.intersect1d(experts, later)) < home_first.least_later:
                    kernel.experts(x, torch.from_numpy(slots).to(x.device), y)
                    if not has_first and not left:
                        has_first = True
                        yield y
                else:
                    has_first = True
                    yield from _in_two(kernel, x, slots, np.isin(asked, later), y)

    def _by_wave(
        self, layer: int, asked: Ids, wanted: Ids
    ) -> Generator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]], None, None]:
        """A wave's experts, and the slots of all pairs: -1 before their wave, LEFT after it. int32 as `asked`."""
        slot_of = self._slot_of[layer]
        try:
            with closing(self.cache.acquire(layer, wanted)) as waves:
                for wave in waves:
                    self._meanwhile()
                    slot_of[wave.experts] = wave.slots
                    yield wave.experts, slot_of[asked]
                    slot_of[wave.experts] = LEFT
        finally:
            slot_of[wanted] = -1


def _in_two(
    kernel: LayerKernel, x: Tensor, slots: npt.NDArray[np.int32], is_later: npt.NDArray[np.bool_], y: Tensor
) -> Generator[Tensor, None, None]:
    """Pairs [T, K] that are not later, y, and the others."""
    kernel.experts(x, torch.from_numpy(np.where(is_later & (slots >= 0), -1, slots)).to(x.device), y)
    yield y
    kernel.experts(x, torch.from_numpy(np.where(is_later, slots, LEFT)).to(x.device), y)


def _distinct(ids: Ids) -> Ids:
    # The top-k of one token are distinct, but for routers that look them up (DeepSeek-V4's by the token's id).
    is_distinct = len(ids) == 1 and len(set(ids[0].tolist())) == ids.shape[1]
    wanted: Ids = ids[0] if is_distinct else np.unique(ids)
    return wanted[wanted >= 0]
