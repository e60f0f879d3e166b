"""One memory for KV blocks and experts' slots, on the host: the border between them moves between two steps.

Nothing moves in memory but experts and blocks beside the border: both have addresses for the most that they may ever
be, and pages beyond the border are the system's. Who says where it lies: `moving_split.py` where all requests are
known, `lent_kv.py` where they are not.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Protocol

from moe.engine.scheduler import Scheduler
from moe.layer.experts import SlotExperts
from moe.models.kv import PagedKV
from moe.offload.budget import slots_within
from moe.offload.slot_runs import slab_bytes


@dataclass(slots=True)
class SplitStats:
    """What was moved."""

    splits: int = field(default=0, metadata={"help": "Times that memory moved between KV and slots"})
    kv_gained_bytes: int = field(default=0, metadata={"help": "Moved from slots to KV", "unit": "bytes"})
    slots_gained_bytes: int = field(default=0, metadata={"help": "Moved from KV to slots", "unit": "bytes"})


class Split(Protocol):
    """Who says where the border lies."""

    @property
    def stats(self) -> SplitStats: ...

    def step(self) -> None:
        """Before each step is planned."""


class OneMemory:
    """memory: bytes that KV and slots have together. Among ranks each has its own, for its part of the experts."""

    def __init__(self, memory: float, scheduler: Scheduler, kv: PagedKV, experts: SlotExperts) -> None:
        assert kv.device.type == "cpu", kv.device
        self.memory, self.scheduler, self.kv, self.experts = memory, scheduler, kv, experts
        self.stats = SplitStats()

    @property
    def nbytes(self) -> int:
        """What KV and slots have now."""
        return self.kv.taken_by(self.kv.pool.num_blocks) + self.experts.cache.slot_bytes

    @property
    def most(self) -> int:
        """Bytes that both can use: KV all that it may have, and this rank's experts a slot each."""
        own = self.experts.num_own
        return self.kv.taken_by(self.kv.pool.room) + slab_bytes(self.experts.cache.slot_sizes, own, sum(own))

    def slots_beside(self, blocks: int) -> int:
        """The most that the memory holds beside so many blocks, as far as there are addresses and experts for them;
        those that are there stay if it holds them: another generation may give this rank their experts again.
        """
        cache, left = self.experts.cache, max(0, self.memory - self.kv.taken_by(blocks))
        most = min(slots_within(left, cache.slot_sizes, self.experts.num_own), cache.map.room)
        return cache.num_slots if most < cache.num_slots and cache.slot_bytes <= left else most

    def blocks_beside(self, slots: int) -> int:
        """The most that the memory holds beside so many slots, one at least."""
        cache = self.experts.cache
        is_there, own = slots == cache.num_slots, self.experts.num_own
        left = self.memory - (cache.slot_bytes if is_there else slab_bytes(cache.slot_sizes, own, slots))
        return max(1, bisect_right(range(1, self.kv.pool.room + 1), left, key=self.kv.taken_by))

    def give(self, blocks: int, slots: int) -> None:
        """So many from now on, together no more than the memory; no fewer blocks than are used.

        Experts that are given up are those that the policy would miss least.
        """
        cache, pool, own = self.experts.cache, self.kv.pool, self.experts.num_own
        if (blocks, slots) == (pool.num_blocks, cache.num_slots):
            return
        kv_bytes, slot_bytes, changes = self.kv.taken_by(pool.num_blocks), cache.slot_bytes, slots != cache.num_slots
        if changes:
            cache.unpin()
            cache.limit.lower_to(slots, own)  # of each size of experts, where there are several
        self.scheduler.renumber(self.kv.resize(blocks))
        if changes:
            cache.limit.raise_to(slots, own)
            self.experts.settle()
        self.stats.splits += 1
        self.stats.kv_gained_bytes += max(0, self.kv.taken_by(pool.num_blocks) - kv_bytes)
        self.stats.slots_gained_bytes += max(0, cache.slot_bytes - slot_bytes)
        assert self.nbytes <= self.memory, (self.nbytes, self.memory)
