"""What is read ahead of being asked for: which reads are under way, what came of them, and what it was worth.

A miss that finds its expert's read under way adopts it (late); one that finds it there was served (useful); what is
evicted before anyone asked was wasted. Misses take slots back from reads that have not begun. When a layer's routing is
known and it misses, what is being read for it and not wanted is cancelled between two parts of the read; where nothing
misses it arrives, and is the first to go.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from moe.offload.readers import Arrival, Batch, Job, Readers
from moe.offload.slot_map import Ids, Keys, SlotMap, State


class Speculation:
    """The speculative reads of one cache. `enter` takes what arrived into the map."""

    def __init__(self, slots: SlotMap, readers: Readers, enter: Callable[[Arrival], None]) -> None:
        self._map, self._readers, self._enter = slots, readers, enter
        self.batch = Batch()
        self.coming: dict[int, Job] = {}  # by key, until they are in the map
        self.cancelled: set[Job] = set()  # until their readers notice
        self.unused: dict[int, int] = {}  # key -> bytes: read ahead, resident, not asked for yet
        self.expected: dict[int, Keys] = {}  # by layer: what stays until it is acquired, if others can go

    @property
    def is_active(self) -> bool:
        return bool(self.coming or self.cancelled or self.expected)

    @property
    def is_reading(self) -> bool:
        """Whether a slot waits for a read to end."""
        return bool(self.coming or self.cancelled)

    def expect(self, layer: int, experts: Ids) -> list[int]:
        """`layer` will probably want these. Returns those that are neither there nor under way.

        What was expected of it before, has not begun and is not among them is dropped.
        """
        if layer in self.expected and self.coming:
            self._give_up(self._readers.take_back(layer, experts.tolist()))
        self.expected[layer] = self._map.first_key[layer] + experts
        slots = self._map.of_layer[layer].take(experts).tolist()
        absent = [expert for expert, slot in zip(experts.tolist(), slots) if slot < 0]
        return [e for e in absent if self._map.key(layer, e) not in self.coming] if self.coming else absent

    def start(self, layer: int, experts: list[int], due: int) -> None:
        """Reads them when no miss waits for a reader. There must be a free slot for each. due: as `Job` has it."""
        jobs = [Job(layer, expert, self._map.take(layer), self.batch, due) for expert in experts]
        self.coming.update((self._map.key(layer, job.expert), job) for job in jobs)
        self._readers.put_ahead(jobs)

    def collect(self) -> None:
        """Takes finished reads into the map."""
        while self.is_reading and not self.batch.done.empty():
            self.collect_one()

    def finish(self) -> None:
        """Waits for all reads."""
        while self.is_reading:
            self.collect_one()

    def end(self) -> None:
        """Waits for the reads that have begun; the others are not done."""
        self._give_up(self._readers.take_back())
        self.finish()

    def collect_one(self) -> Job:
        """Waits for a read and takes it into the map."""
        arrival = self.batch.next_arrival()
        if arrival.job in self.cancelled:
            self.cancelled.remove(arrival.job)
        else:
            del self.coming[self._map.key(arrival.job.layer, arrival.job.expert)]
        self._enter(arrival)
        return arrival.job

    def settle(self, layer: int, wanted: list[int]) -> None:
        """The routing of `layer` is known: what was expected of it and has not begun is dropped unless wanted.

        What has begun is cancelled if a wanted expert is neither there nor under way: it needs the reader.
        """
        self.expected.pop(layer, None)
        self.collect()
        if not self.coming:
            return
        self._give_up(self._readers.take_back(layer, wanted))
        keys = {self._map.key(layer, expert) for expert in wanted}
        wrong = [key for key, job in self.coming.items() if job.layer == layer and key not in keys]
        if wrong and any(key not in self.coming and self._map.slot_of[key] < 0 for key in keys):
            for key in wrong:
                job = self.coming.pop(key)
                job.is_cancelled = True
                self.cancelled.add(job)

    def adopt(self, layer: int, missing: list[int], batch: Batch) -> list[int]:
        """Makes reads of `missing` that batch's own; returns which. Those that are done go into the map."""
        adopted = []
        for expert in missing:
            job = self.coming.get(self._map.key(layer, expert))
            if job is not None and self._readers.adopt(job, batch):
                del self.coming[self._map.key(layer, expert)]
                batch.num_reading += 1
                adopted.append(expert)
        self.collect()
        return adopted

    def make_room(self, layer: int, is_urgent: bool) -> None:
        """Takes slots back for misses of `layer`; waits for a read into one of them if there is no other way."""
        self._give_up(self._readers.take_back())
        if is_urgent and not self._map.num_free(layer):
            while any(self._map.in_one_run(job.layer, layer) for job in (*self.coming.values(), *self.cancelled)):
                if self._map.in_one_run(self.collect_one().layer, layer):
                    return

    def arrived(self, job: Job, nbytes: int) -> None:
        """Its expert is resident, and nobody has asked for it yet."""
        self.unused[self._map.key(job.layer, job.expert)] = nbytes

    def used(self, layer: int, wanted: list[int]) -> int:
        """These are asked for: the bytes of them that were read ahead and are there."""
        if not self.unused:
            return 0
        return sum(self.unused.pop(self._map.key(layer, expert), 0) for expert in wanted)

    def evicted(self, keys: Keys) -> Iterator[tuple[int, int]]:
        """(layer, bytes) of those that were read ahead for nothing."""
        for key in keys.tolist() if self.unused else ():
            if nbytes := self.unused.pop(key, 0):
                yield self._map.layer_of(key), nbytes

    def but_expected(self, keys: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Of all keys those that are True, without what coming layers expect."""
        if not self.expected:
            return keys
        others = keys.copy()
        for expected in self.expected.values():
            others[expected] = False
        return others

    def check(self) -> None:
        slots = [job.slot for job in (*self.coming.values(), *self.cancelled)]
        assert (self._map.state[slots] == State.LOADING).all(), "a slot that is read into was given away"
        assert len(slots) == len(set(slots)), "two speculative reads into one slot"
        assert all(self._map.slot_of[key] < 0 for key in self.coming), "an expert is resident and being read"
        assert all(self._map.slot_of[key] >= 0 for key in self.unused), "an unused expert was evicted and not counted"

    def _give_up(self, jobs: list[Job]) -> None:
        """Frees the slots of reads that were taken back."""
        for job in jobs:
            del self.coming[self._map.key(job.layer, job.expert)]
            self._map.drop(job.slot)
