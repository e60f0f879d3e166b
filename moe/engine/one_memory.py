"""One memory for KV blocks and experts' slots, on the host: the border between them moves between two steps.

Nothing moves in memory but experts and blocks beside the border: both have addresses for the most that they may ever
be, and pages beyond the border are the system's. Who says where it lies: `moving_split.py` where all requests are
known, `lent_kv.py` where they are not.
"""

from dataclasses import dataclass, field
from typing import Protocol

from moe.engine.layer_major import Sizes
from moe.engine.scheduler import Scheduler
from moe.layer.experts import SlotExperts
from moe.models.kv import PagedKV


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
    """memory: bytes that KV and slots have together; sizes: of experts as of the cache's slots (`slot_sizes`)."""

    def __init__(self, sizes: Sizes, memory: float, scheduler: Scheduler, kv: PagedKV, experts: SlotExperts) -> None:
        assert kv.device.type == "cpu", kv.device
        self.sizes, self.memory = sizes, memory
        self.scheduler, self.kv, self.experts = scheduler, kv, experts
        self.stats = SplitStats()

    @property
    def nbytes(self) -> int:
        """What KV and slots have now."""
        return self.kv.taken_by(self.kv.pool.num_blocks) + self.experts.cache.slot_bytes

    def slots_beside(self, blocks: int) -> int:
        """The most that the memory holds beside so many blocks, as far as there are addresses for them."""
        return min(self.sizes.slots_in(self.memory - self.kv.taken_by(blocks)), self.experts.cache.map.room)

    def give(self, blocks: int, slots: int) -> None:
        """So many from now on, together no more than the memory; no fewer blocks than are used.

        Experts that are given up are those that the policy would miss least.
        """
        cache, pool, own = self.experts.cache, self.kv.pool, self.sizes.num_experts
        if (blocks, slots) == (pool.num_blocks, cache.num_slots):
            return
        kv_bytes, slot_bytes = self.kv.taken_by(pool.num_blocks), cache.slot_bytes
        cache.unpin()
        cache.limit.lower_to(slots, own)  # of each size of experts, where there are several
        self.scheduler.renumber(self.kv.resize(blocks))
        cache.limit.raise_to(slots, own)
        self.experts.settle()
        self.stats.splits += 1
        self.stats.kv_gained_bytes += max(0, self.kv.taken_by(pool.num_blocks) - kv_bytes)
        self.stats.slots_gained_bytes += max(0, cache.slot_bytes - slot_bytes)
        assert self.nbytes <= self.memory, (self.nbytes, self.memory)
