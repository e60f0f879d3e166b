"""How many slots there are, which may change between two steps: nothing moves but experts beside a border.

On the host a run of slots has addresses for all of its experts, and memory for those that were filled. Fewer slots: the
policy says which experts go, what stays moves below the new border, and pages beyond it are the system's.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from moe.offload.slab import Slab
from moe.offload.slot_map import SlotMap
from moe.offload.slot_runs import slot_shares


class SlotLimit:
    """Of one cache. blobs: by layer, uint8 [slots, bytes], of all slots. make_room(layer, count): frees so many slots
    for experts of a layer.

    own, of all methods: experts by layer that ask for slots now; None: all. It shares slots out among sizes of experts.
    """

    def __init__(
        self, slots: SlotMap, slab: Slab, blobs: Sequence[Tensor], make_room: Callable[[int, int], None]
    ) -> None:
        self._map, self._slab, self._blobs, self._make_room = slots, slab, blobs, make_room

    def raise_to(self, num_slots: int, own: Sequence[int] | None = None) -> None:
        """More slots from now on: on the host up to one per expert, elsewhere what was reserved.

        A run keeps what it has, so there may be more in all. Raises ValueError for fewer slots than there are, or more
        than there is room for.
        """
        if not self._map.num_slots <= num_slots <= self._map.room:
            raise ValueError(
                f"the number of slots ({num_slots}) must be between what there are ({self._map.num_slots}) and what "
                f"was reserved ({self._map.room})"
            )
        shares = map(min, self._shares(num_slots, own), self._map.rooms)
        self._map.raise_limit([*map(max, self._map.slots_of_run, shares)])

    def lower_to(self, num_slots: int, own: Sequence[int] | None = None) -> None:
        """Fewer slots from now on, on the host, between two acquires; waits for what is being read ahead.

        A run that has no more than its share keeps what it has. Raises ValueError where a size of experts would have no
        slot.
        """
        fewer = self._shares(num_slots, own)
        if not min(fewer):
            raise ValueError(f"num_slots ({num_slots}) must give each of {len(fewer)} sizes of experts a slot")
        fewer = [*map(min, self._map.slots_of_run, fewer)]
        for run, now, count in zip(self._slab.runs, self._map.slots_of_run, fewer):
            self._make_room(run.layers[0], now - count)
        for slot, to in self._map.lower_limit(fewer):
            blobs = self._blobs[self._map.layer_of(int(self._map.key_of[to]))]
            blobs[to].copy_(blobs[slot])
        self._slab.give_back(fewer)

    def _shares(self, num_slots: int, own: Sequence[int] | None) -> list[int]:
        counts = self._map.num_experts if own is None else own
        return slot_shares(self._slab.runs, counts, num_slots)
