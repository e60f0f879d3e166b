"""Experts that stay in their slots, as tensors on the device: looked up and counted there, the host asks for nothing.

The device twin of the slot map. It is right for as long as its experts are held (`ExpertCache.pin`), which the map's
own law takes care of: a slot that is held is never given away.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.offload.layer_stats import LayerStats
from moe.offload.slot_map import Ids


class Visits(NamedTuple):
    """What one layer was asked: how often, and for how many experts, distinct within each visit, in all."""

    visits: int
    experts: int


class DeviceSlots:
    """of_layer: int32 [E] by layer, the slot of each expert, -1 where it is not one of these; E may differ.

    One thread looks up; any may read the counts. Takes 8 bytes an expert.
    """

    def __init__(self, of_layer: Sequence[Ids], device: torch.device) -> None:
        # Column E of a layer, and all after it, say that there is no slot: id -1 reads the last.
        table = np.full((len(of_layer), max(map(len, of_layer)) + 1), -1, np.int32)
        for row, slots in zip(table, of_layer):
            row[: len(slots)] = slots
        with torch.inference_mode(False):  # or they could be written to only inside of it
            self._table = torch.from_numpy(table).to(device)
            self._asked = torch.zeros_like(self._table)  # in this forward: how often each expert was looked up
            self._experts = torch.zeros(len(table), dtype=torch.int64, device=device)
            self._one = self._table.new_ones(1)
        self._rows = list(zip(self._table.unbind(), self._asked.unbind()))
        self.visits = [0] * len(table)  # by layer; a forward that is replayed from a graph does not count its own
        self._last_layer = -1
        self._counting = threading.Lock()

    def look_up(self, layer: int, ids: Tensor) -> Tensor:
        """The slots of `ids`, int32, -1 where there is none. ids: int64 of any shape, -1 = no expert; may be empty.

        Two launches, and a few more when a forward begins; no sync.
        """
        if layer <= self._last_layer:
            self._end_forward()
        self._last_layer = layer
        table, asked = self._rows[layer]
        asked.put_(ids, self._one.expand(ids.shape), accumulate=True)
        self.visits[layer] += 1
        return table.take(ids)

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """By layer, int32 [E + 1] and more: the slot of each expert, and how often it was asked for in this forward.

        For code that looks all layers of a forward up by itself: it counts there, and `begin` is called before.
        """
        return self._rows

    def begin(self) -> None:
        """A forward begins, all of whose layers are looked up in `rows`."""
        if self._last_layer >= 0:
            self._end_forward()
        self._last_layer = len(self._rows) - 1
        self.visits = [visits + 1 for visits in self.visits]

    def counts(self) -> list[Visits]:
        """By layer, since the start or the last `reset`. A host sync."""
        with self._counting:
            experts = self._experts + self._num_asked()
        return [Visits(*pair) for pair in zip(self.visits, experts.tolist())]

    def added_to(self, stats: Sequence[LayerStats]) -> list[LayerStats]:
        """These figures and the counts. A host sync."""
        return [replace(s, hits=s.hits + of.experts, waves=s.waves + of.visits) for s, of in zip(stats, self.counts())]

    def reset(self) -> None:
        with self._counting:
            self._asked.zero_()
            self._experts.zero_()
        self.visits = [0] * len(self.visits)

    def _end_forward(self) -> None:
        with self._counting:
            self._experts += self._num_asked()
            self._asked.zero_()

    def _num_asked(self) -> Tensor:
        return (self._asked[:, :-1] > 0).sum(1)
