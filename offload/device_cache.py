"""A cache that the device keeps by itself: slots, policy and misses, until the host takes them back.

    host: SlotMap, policy ─lend─▶ device: SlotState ─ look_up: route, gather (kernels/slot_lookup.py) ─▶ slot ids
                          ◀─take back─ what is where, and scores

The host decides nothing meanwhile and its map holds every slot. So a step with misses waits for nobody and may be a
graph; experts come from host memory over the bus, by the compute stream, in the order in which they are needed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.offload.copies import Filling
from moe.offload.layer_stats import LayerStats
from moe.offload.policy import Lfu, Lru, Policy
from moe.offload.slot_map import SlotMap
from moe.offload.stores import ExpertStore, RamStore


class DeviceCache:
    """blobs: by layer uint8 [E, nbytes] in host memory that kernels can read; rows: the slots, uint8 [S, ≥ nbytes].

    Takes slots and policy from `slots` and `policy`, which nobody may use until `give_back`.
    """

    def __init__(
        self, slots: SlotMap, policy: Lfu | Lru, blobs: Sequence[Tensor], rows: Sequence[Tensor], filling: Filling
    ) -> None:
        from moe.kernels import slot_lookup  # triton is optional

        self._kernels: Any = slot_lookup
        self._map, self._policy, self._blobs, self._rows = slots, policy, list(blobs), list(rows)
        self._num_experts = [len(of) for of in blobs]
        self._first = slots.first_key.tolist()
        self.visits = [0] * len(blobs)  # by layer; a forward that is replayed from a graph does not count its own
        slots.lend()
        self._filling, self._every = filling, np.arange(slots.num_slots, dtype=np.int32)
        filling.before_use(self._every)
        device = rows[0].device
        sources = [blob.data_ptr() for of in blobs for blob in of]
        most = max(self._num_experts)
        with torch.inference_mode(False):  # or they could be written to only inside of it

            def put(numbers: Any, dtype: torch.dtype) -> Tensor:
                return torch.as_tensor(np.array(numbers), dtype=dtype).to(device)

            self._sources = put(sources, torch.int64)
            self._state = slot_lookup.SlotState(
                put(slots.slot_of, torch.int32),
                put(slots.key_of[: slots.num_slots], torch.int32),
                put(policy.scores, torch.float64),
                put(policy.layer_of, torch.int32),
                put(policy.rule, torch.float64),
                put([policy.now], torch.float64),
                torch.zeros(len(blobs), 2, dtype=torch.int64, device=device),
            )
            self._scratch = slot_lookup.Scratch(
                *(torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((most,), (2, most), (1,)))
            )

    def look_up(self, layer: int, ids: Tensor) -> Tensor:
        """The slots of `ids`, int32, -1 where the id is; what was missing is on its way in stream order.

        ids: int64 of any shape; may be empty. Two launches, no sync.
        """
        self.visits[layer] += 1
        if not ids.numel():
            return ids.int()
        count, nbytes = self._num_experts[layer], self._blobs[layer].shape[1]
        found: Tensor = self._kernels.route(ids, layer, self._first[layer], count, self._state, self._scratch)
        self._kernels.gather(self._scratch, min(count, ids.numel()), self._sources, self._rows[layer], nbytes)
        return found

    def added_to(self, stats: Sequence[LayerStats]) -> list[LayerStats]:
        """These figures and what was asked here since the start or the last `reset`. A host sync."""
        each = zip(stats, self._state.counts.tolist(), self.visits, self._blobs)
        return [
            replace(
                s,
                hits=s.hits + hits,
                misses=s.misses + misses,
                waves=s.waves + visits,
                bytes_read=s.bytes_read + misses * blobs.shape[1],
            )
            for s, (hits, misses), visits, blobs in each
        ]

    def reset(self) -> None:
        self._state.counts.zero_()
        self.visits = [0] * len(self.visits)

    def keys_of_slots(self) -> Tensor:
        """int64 [S] on the host, -1 = free. A host sync."""
        return self._state.key_of.long().cpu()

    def slots_of(self, layer: int) -> Tensor:
        """int32 [E] of a layer, -1 = not there."""
        return self._state.slot_of[self._first[layer] : self._first[layer + 1]]

    def give_back(self) -> None:
        """Map and policy go on from here. A host sync."""
        self._map.take_back(self.keys_of_slots().numpy())
        self._policy.scores[:] = self._state.scores.numpy(force=True)
        self._policy.now = float(self._state.clock)
        self._filling.after_use(self._every)


def lend(
    slots: SlotMap, policy: Policy, store: ExpertStore, rows: Sequence[Tensor], filling: Filling
) -> DeviceCache | None:
    """None where the device cannot keep them: slots of several sizes or fewer than a layer has, another policy, or
    experts that do not lie in host memory."""
    if not isinstance(store, RamStore):
        return None
    from moe.kernels.slot_lookup import MOST_SLOTS

    fits = max(map(len, store.blobs)) <= slots.num_slots <= MOST_SLOTS and len(slots.rooms) == 1
    if not fits or not isinstance(policy, (Lfu, Lru)):
        return None
    return DeviceCache(slots, policy, store.blobs, rows, filling)
