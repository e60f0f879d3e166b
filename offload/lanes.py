"""A double of a device's streams on the CPU: queues that run by themselves, each step after a random delay.

Whatever the device may do in its freedom, this may do too; an order that holds only by luck is found. compute: a queue
as well, for tests that give it work by `run`; without, the calling thread computes, as the engine does on CPU tensors.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue

import torch
from torch import Tensor


class LaneEvent:
    """Comes when its lane gets there."""

    def __init__(self) -> None:
        self._come = threading.Event()

    def synchronize(self) -> None:
        self._come.wait()  # no limit: as of a device's

    def come(self) -> None:
        self._come.set()

    def has_come(self) -> bool:
        return self._come.is_set()


class _Lane:
    def __init__(self, seed: int, most_seconds: float) -> None:
        self._random, self._most = random.Random(seed), most_seconds
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="lane", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()  # no limit: as of a device's

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:  # no limit: `close` ends it
            time.sleep(self._random.random() * self._most)
            work()


class LaneStreams:
    """`copies.Streams` by threads. most_seconds: of the delay before each step."""

    def __init__(self, seed: int = 0, most_seconds: float = 0.002, *, compute: bool = False) -> None:
        self._copies = _Lane(seed, most_seconds)
        self._ahead = _Lane(seed + 2, 2 * most_seconds)
        self.locked: list[Tensor] = []
        self._compute = _Lane(seed + 1, most_seconds) if compute else None

    def copy(self, after: Iterable[LaneEvent], target: Tensor, source: Tensor, *, ahead: bool = False) -> LaneEvent:
        event, before = LaneEvent(), list(after)

        def work() -> None:
            for one in before:
                one.synchronize()
            target.copy_(source)
            event.come()

        (self._ahead if ahead else self._copies).put(work)
        return event

    def mark(self) -> LaneEvent:
        event = LaneEvent()
        self.run(event.come)
        return event

    def wait(self, event: LaneEvent) -> None:
        self.run(event.synchronize)

    def run(self, work: Callable[[], None]) -> None:
        """Gives compute something to do."""
        if self._compute is None:
            work()
        else:
            self._compute.put(work)

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def lock(self, memory: Tensor) -> None:
        self.locked.append(memory)

    def close(self) -> None:
        for lane in (self._copies, self._ahead, self._compute):
            if lane is not None:
                lane.close()
