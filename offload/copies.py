"""Experts from host memory into the slots of a device, while the device computes.

    store ─read─▶ pinned buffer ─▶ copies: wait for the slot's last reader · copy · arrived ─▶ slot
                        └─ used again when its copy has ended       compute: wait for arrived · kernels · last reader

A read counts as arrived when its copy is set out: the next read begins meanwhile, and the host waits for no copy. What
keeps the order are two events a slot, one each way; `offload/lanes.py` is the double that tests them without a device.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe.offload.slot_map import Ids

NUM_BUFFERS = 2  # of a reader: one is read into while the other is copied


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Makes the host wait until the stream has come there."""


class Streams(Protocol):
    """Two queues of a device: copies, which any thread adds to, and what the calling thread computes."""

    def copy(self, after: Event, target: Tensor, source: Tensor) -> Event:
        """Queues a copy that begins when `after` has come. source: host memory, as it is until the returned event."""

    def mark(self) -> Event:
        """Comes when all that compute was given so far is done."""

    def wait(self, event: Event) -> None:
        """What compute is given from now on begins when `event` has come."""

    def host_memory(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] that `copy` takes without a detour."""

    def close(self) -> None: ...


class CudaStreams:
    """A GPU's: compute is the calling thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, after: Any, target: Tensor, source: Tensor) -> Any:
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def close(self) -> None:
        self._copies.synchronize()


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copied: Event | None = None


class Filling(Protocol):
    """How bytes come into the slots of one slab. Readers call `fill`; the thread that computes calls the others."""

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int]) -> int:
        """Has `read` fill `target`, uint8 [nbytes] that are the slot's, which nobody uses. Returns what it returns."""

    def before_use(self, slots: Ids) -> None:
        """What is computed from now on may read these slots: their experts have arrived."""

    def after_use(self, slots: Ids) -> None:
        """What was computed so far is the last to read these slots; they may be filled again after it."""

    def close(self) -> None: ...


class InPlace:
    """Slots in host memory: read into directly, and there when the read has ended."""

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int]) -> int:
        return read(target)

    def before_use(self, slots: Ids) -> None: ...
    def after_use(self, slots: Ids) -> None: ...
    def close(self) -> None: ...


class SlotCopies:
    """Slots in a device's memory, by pinned buffers and two events a slot. blob_bytes: of the largest expert."""

    def __init__(self, num_slots: int, blob_bytes: int, streams: Streams) -> None:
        self.blob_bytes, self.streams = blob_bytes, streams
        self._last_use = [streams.mark()] * num_slots  # the slab's own zeros come first
        self._arrived: list[Event | None] = [None] * num_slots  # that compute has not waited for yet
        self._own = threading.local()

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int]) -> int:
        """Reads into a buffer and sets out its copy to the slot; the host waits for neither."""
        buffers: list[_Buffer] | None = getattr(self._own, "buffers", None)
        if buffers is None:
            rows = [self.streams.host_memory(self.blob_bytes) for _ in range(NUM_BUFFERS)]
            buffers = self._own.buffers = [_Buffer(row) for row in rows]
        buffer = buffers.pop(0)
        buffers.append(buffer)
        if buffer.copied is not None:
            buffer.copied.synchronize()
        source = buffer.memory[: len(target)]
        moved = read(source)
        buffer.copied = self._arrived[slot] = self.streams.copy(self._last_use[slot], target, source)
        return moved

    def before_use(self, slots: Ids) -> None:
        for slot in slots.tolist():
            event = self._arrived[slot]
            if event is not None:
                self.streams.wait(event)
                self._arrived[slot] = None

    def after_use(self, slots: Ids) -> None:
        if np.size(slots):
            mark = self.streams.mark()
            for slot in slots.tolist():
                self._last_use[slot] = mark

    def close(self) -> None:
        self.streams.close()


def filling_of(device: torch.device, num_slots: int, blob_bytes: int) -> Filling:
    return SlotCopies(num_slots, blob_bytes, CudaStreams(device)) if device.type == "cuda" else InPlace()
