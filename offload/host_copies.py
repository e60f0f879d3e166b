"""Experts that lie in host memory, in the layout of slots, go from there into a device's slots: no reader, no buffer.

store's blobs of a layer   [ e0 | e1 | e2 | e3 | … ]   locked once, shared by the processes of a node (shared.py)
                              └────┬────┘   └─ copies: as many as there are runs of neighbours on both sides
slots                    [ … | s4 | s5 | … | s9 ]
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moe.offload.copies import Filling, SlotCopies
from moe.offload.readers import Arrival, Job
from moe.offload.stores import ExpertStore, RamStore


class HostCopies:
    """blobs: by layer uint8 [E, nbytes], locked until `copies` is closed; rows: by layer uint8 [S, ≥ nbytes], slots.

    Raises ValueError, and closes `copies`, if they cannot be locked.
    """

    def __init__(self, copies: SlotCopies, blobs: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        self.blobs, self._copies, self._rows = list(blobs), copies, list(rows)
        self.num_copies = 0  # so far
        try:
            for memory in self.blobs:
                if memory.nbytes:
                    copies.streams.lock(memory)
        except ValueError:
            copies.close()
            raise

    def fill(self, jobs: Sequence[Job], *, ahead: bool = False) -> list[Arrival]:
        """Sets out the copies of distinct experts of one layer, whose slots may be exchanged among them. Does not wait.

        ahead: nobody has asked for them yet; then it waits until the last copy ahead has ended.
        """
        if not jobs:
            return []
        blobs, rows = self.blobs[jobs[0].layer], self._rows[jobs[0].layer]
        jobs = sorted(jobs, key=lambda job: job.expert)
        for job, slot in zip(jobs, sorted(job.slot for job in jobs)):
            job.slot = slot
        experts, slots = (np.array([getattr(job, of) for job in jobs], np.int32) for of in ("expert", "slot"))
        nbytes = blobs.shape[1]
        can_join = nbytes == rows.shape[1]  # else what is copied is not whole in the slots
        breaks = np.flatnonzero((np.diff(experts) != 1) | (np.diff(slots) != 1) | (not can_join)) + 1
        for run in np.split(np.arange(len(jobs)), breaks):
            e, s, n = int(experts[run[0]]), int(slots[run[0]]), len(run)
            self._copies.send(slots[run], rows[s : s + n, :nbytes], blobs[e : e + n], ahead=ahead)
            self.num_copies += 1
        return [Arrival(job, nbytes, None) for job in jobs]


def host_copies(filling: Filling, store: ExpertStore, rows: Sequence[Tensor]) -> HostCopies | None:
    """None where slots are in host memory themselves, or experts are not. Raises ValueError if it cannot be locked."""
    if isinstance(filling, SlotCopies) and isinstance(store, RamStore):
        return HostCopies(filling, store.blobs, rows)
    return None
