"""Experts from host memory into the slots of a device, while the device computes.

    store ─read─▶ pinned buffer ─▶ copies: wait for the slot's last reader · copy · arrived ─▶ slot
                        └─ used again when its copy has ended       compute: wait for arrived · kernels · last reader

A read counts as arrived when its copy is set out: the next read begins meanwhile, and the host waits for no copy. What
keeps the order are two events a slot, one each way; `offload/lanes.py` is the double that tests them without a device.
Experts that lie in locked host memory need no buffer (offload/host_copies.py). What is read ahead goes by a stream of
its own, one copy after another has ended: streams' priorities mean nothing to a copy engine, so that nothing else
keeps a miss from waiting for more than one of them.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe.offload.slot_map import Ids

NUM_BUFFERS = 2  # of a reader: one is read into while the other is copied
_PORTABLE_AND_MAPPED = 1 | 2  # cudaHostRegister's flags


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Makes the host wait until the stream has come there."""


class Streams(Protocol):
    """Queues of a device: copies, and those ahead, which any thread adds to, and what the calling thread computes."""

    def copy(self, after: Iterable[Event], target: Tensor, source: Tensor, *, ahead: bool = False) -> Event:
        """Queues a copy that begins when `after` have come. source: host memory, as it is until the returned event."""

    def mark(self) -> Event:
        """Comes when all that compute was given so far is done."""

    def wait(self, event: Event) -> None:
        """What compute is given from now on begins when `event` has come."""

    def host_memory(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] that `copy` takes without a detour."""

    def lock(self, memory: Tensor) -> None:
        """Makes such of host memory that is there, and lets kernels read it, until `close`. Raises ValueError."""

    def close(self) -> None: ...


class CudaStreams:
    """A GPU's: compute is the calling thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Priorities order kernels, and copies that are kernels; -1 is above that of compute and of what is read ahead.
        self._copies: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._ahead: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._locked: list[Tensor] = []

    def copy(self, after: Iterable[Any], target: Tensor, source: Tensor, *, ahead: bool = False) -> Any:
        stream = self._ahead if ahead else self._copies
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def lock(self, memory: Tensor) -> None:
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE_AND_MAPPED)
        if int(code):
            raise ValueError(
                f"{memory.nbytes} bytes of host memory cannot be locked for copies ({cuda.cudaGetErrorString(code)}); "
                "set offload.store=file"
            )
        self._locked.append(memory)

    def close(self) -> None:
        for stream in (self._copies, self._ahead):
            stream.synchronize()
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        while self._locked:
            cuda.cudaHostUnregister(self._locked.pop().data_ptr())


class _Buffer:
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copied: Event | None = None


class Filling(Protocol):
    """How bytes come into the slots of one slab. Readers call `fill`; the thread that computes calls the others."""

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int], *, ahead: bool = False) -> int:
        """Has `read` fill `target`, uint8 [nbytes] that are the slot's, which nobody uses. Returns what it returns."""

    def before_use(self, slots: Ids) -> None:
        """What is computed from now on may read these slots: their experts have arrived."""

    def after_use(self, slots: Ids) -> None:
        """What was computed so far is the last to read these slots; they may be filled again after it."""

    def close(self) -> None: ...


class InPlace:
    """Slots in host memory: read into directly, and there when the read has ended."""

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int], *, ahead: bool = False) -> int:
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
        self._last_ahead: Event | None = None
        self._sending_ahead = threading.Lock()

    def send(self, slots: Ids, target: Tensor, source: Tensor, *, ahead: bool = False) -> Event:
        """Sets out one copy that fills all these slots. target: uint8, theirs; source: as `Streams.copy` takes it.

        ahead: the calling thread waits until the last such copy has ended.
        """
        filled = (self._arrived[slot] for slot in slots.tolist())  # and not used since: perhaps by another stream
        each = (*(self._last_use[slot] for slot in slots.tolist()), *filled)
        after = {id(event): event for event in each if event is not None}
        if ahead:
            with self._sending_ahead:
                if self._last_ahead is not None:
                    self._last_ahead.synchronize()
                event = self._last_ahead = self.streams.copy(after.values(), target, source, ahead=True)
        else:
            event = self.streams.copy(after.values(), target, source)
        for slot in slots.tolist():
            self._arrived[slot] = event
        return event

    def fill(self, slot: int, target: Tensor, read: Callable[[Tensor], int], *, ahead: bool = False) -> int:
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
        buffer.copied = self.send(np.array([slot], np.int32), target, source, ahead=ahead)
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
