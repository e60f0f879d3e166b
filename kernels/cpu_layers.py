"""All layers of a step on CPUs in one compiled call, blocks and experts, where all experts are in memory.

What Python does between two calls of a layer takes as long as a small layer's own work. `CpuBlock` and `CpuExperts`,
called in turn, are the twin: the same bits.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.cpu import CpuExperts, load_helper
from moe.kernels.cpu_block import BlockResult, CpuBlock, Step
from moe.kernels.cpu_struct import STAGE


class LayerInSlots(NamedTuple):
    """A layer's experts, all in slots. slots: int32 [E + 1], of each expert; asked: int32 [E + 1], counted on."""

    experts: CpuExperts
    slots: Tensor
    asked: Tensor


class CpuLayers:
    """All layers of a model, ready to be called. Holds all tensors; their addresses may not change.

    Raises ValueError, with the reason, for layers that the helper cannot compute in one call.
    """

    def __init__(self, blocks: Sequence[CpuBlock], layers: Sequence[LayerInSlots]) -> None:
        if reason := why_not(blocks, layers):
            raise ValueError(f"no layers in one call: {reason}")
        helper = load_helper()
        assert helper is not None
        self._held, self._run, self._first = (list(blocks), list(layers)), helper.moe_cpu_layers, blocks[0]
        self._top_k = max(block.block.top_k for block in blocks)
        self._stages = b"".join(
            STAGE.pack(_at(block.packed), _at(of.experts.packed), of.slots.data_ptr(), of.asked.data_ptr())
            for block, of in zip(blocks, layers)
        )

    def __call__(self, h: Tensor, step: Step, work: Tensor) -> Tensor:
        """What the last layer's experts add to h, [T, H]. h: as a block takes it, changed in place.

        work: uint8, as much as any of the blocks needs.
        """
        blocks, _ = self._held
        out, pairs = torch.empty_like(h), (len(h), self._top_k)
        slots = torch.empty(pairs, dtype=torch.int32)
        of_layer = BlockResult(torch.empty_like(h), torch.empty(pairs, dtype=torch.int64), torch.empty(pairs))
        packed = self._first.pack_step(h, None, step, work, of_layer)
        status: int = self._run(self._stages, len(blocks), packed, slots.data_ptr(), out.data_ptr())
        if status < 0:
            raise MemoryError(f"no scratch memory, or no thread, for {len(h)} rows")
        if status:
            raise ValueError(f"slot {int(slots.view(-1)[status - 1])} of an expert does not exist")
        return out


def why_not(blocks: Sequence[CpuBlock], layers: Sequence[LayerInSlots]) -> str | None:
    """The reason why the helper cannot compute these layers in one call; None if it can."""
    if len(blocks) != len(layers):
        return f"there are {len(blocks)} blocks and {len(layers)} layers of experts in compiled code"
    for number, (block, layer) in enumerate(zip(blocks, layers)):
        if block.block.router is None:
            return f"layer {number} has no router of its own"
        if not layer.experts.packed:
            return f"the experts of layer {number} run in plain torch"
        if (block.dtype, block.hidden) != (blocks[0].dtype, layer.experts.weights.hidden_size):
            return f"layer {number} has rows of {block.hidden} {block.dtype}, unlike layer 0 or its own experts"
        num_experts = len(block.block.router.weight)
        if min(len(layer.slots), len(layer.asked)) < num_experts:
            return f"layer {number} chooses from {num_experts} experts and has slots of {len(layer.slots)}"
    return None


def _at(packed: bytes) -> int:
    """Where it is; whoever holds it must keep it."""
    address = ctypes.cast(ctypes.c_char_p(packed), ctypes.c_void_p).value
    assert address is not None
    return address
