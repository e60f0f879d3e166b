"""The memory of the slots: one slab, cut into runs of slots of one size (offload/slot_runs.py)."""

import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from moe.offload.layout import ALIGNMENT
from moe.offload.slot_runs import SlotRun, slot_runs
from moe.offload.stores import aligned_bytes, give_back

log = logging.getLogger(__name__)


class Slab:
    """rooms: slots that each run may ever have, and is numbered for. memory: uint8 [nbytes(runs, rooms)]."""

    def __init__(self, runs: Sequence[SlotRun], rooms: Sequence[int], memory: Tensor) -> None:
        assert len(memory) == self.nbytes(runs, rooms), (len(memory), runs, rooms)
        self.runs, self.rooms, self.memory = list(runs), list(rooms), memory
        self.slots_of_run = [run.num_slots for run in runs]
        self._first = list(accumulate(rooms, initial=0))
        self._begin = list(accumulate((run.nbytes * room for run, room in zip(runs, rooms)), initial=0))
        of_layer = {layer: i for i, run in enumerate(runs) for layer in run.layers}
        self.run_of_layer = [of_layer[layer] for layer in range(len(of_layer))]

    @staticmethod
    def made(
        sizes: Sequence[int],
        counts: Sequence[int],
        num_experts: Sequence[int],
        num_slots: int,
        device: torch.device,
        *,
        huge: bool = True,
    ) -> "Slab":
        """Shared out among sizes of experts; `num_slots` on a device, on the host room for all: untouched it is free.

        sizes: bytes of an expert by layer; counts: experts by layer that will ask for slots. huge: large pages. Where
        addresses are limited on the host, there is room for `num_slots` alone. Raises OSError where there is not.
        """
        runs = slot_runs(sizes, counts, num_slots)
        rooms = [run.num_slots for run in runs]
        if device.type != "cpu":
            memory = torch.zeros(Slab.nbytes(runs, rooms), dtype=torch.uint8, device=device)
            assert memory.data_ptr() % 16 == 0, memory.data_ptr()
            return Slab(runs, rooms, memory)
        most = [sum(num_experts[n] for n in run.layers) for run in runs]
        try:
            memory, rooms = aligned_bytes(Slab.nbytes(runs, most), huge), most
        except OSError as error:
            if most == rooms:
                raise
            log.info("there will never be more than %d expert slots: %s", num_slots, error)
            memory = aligned_bytes(Slab.nbytes(runs, rooms), huge)
        assert memory.data_ptr() % ALIGNMENT == 0, memory.data_ptr()
        return Slab(runs, rooms, memory)

    @staticmethod
    def nbytes(runs: Sequence[SlotRun], rooms: Sequence[int]) -> int:
        return sum(run.nbytes * room for run, room in zip(runs, rooms))

    def give_back(self, slots_of_run: Sequence[int]) -> None:
        """Slots of each run from so many on take no memory until they are written again. On the host."""
        for run, begin, used, end in zip(self.runs, self._begin, slots_of_run, self._begin[1:]):
            give_back(self.memory[begin + used * run.nbytes : end])

    def of_layer(self, layer: int) -> Tensor:
        """uint8 [slots up to the end of the layer's run, bytes of one]: row s is slot s. Earlier rows mean nothing.

        A view: it begins before the run, inside of slots that are larger, so that rows are numbered like slots.
        """
        i = self.run_of_layer[layer]
        size, end = self.runs[i].nbytes, self._first[i + 1]
        return torch.as_strided(self.memory, (end, size), (size, 1), self._begin[i] - self._first[i] * size)
