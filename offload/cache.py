"""The expert slots: one slab of memory, a map from expert to slot, and waves when a layer needs more than fits.

    compute thread      acquire(layer, experts) ─ hits ─▶ Wave ─▶ (GEMM) ─▶ next wave ─▶ …
    reader threads                        └ misses ─▶ read_into(slot) ─▶ arrived ─┘
                        prefetch(layer + 1, experts) ─▶ the same, when no miss waits
                        pin(experts) ─▶ all of them are there and stay: looked up on the device, nothing is acquired

One thread acquires and prefetches; readers touch only the bytes of the slot that they were given, never the maps.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.offload.copies import filling_of
from moe.offload.device_cache import DeviceCache, lend
from moe.offload.device_slots import DeviceSlots
from moe.offload.host_copies import host_copies
from moe.offload.layer_stats import LayerStats
from moe.offload.policy import Policy, named_policy
from moe.offload.readers import Arrival, Batch, Job, Readers
from moe.offload.slab import Slab
from moe.offload.slot_limit import SlotLimit
from moe.offload.slot_map import Ids, Keys, SlotMap, Wave
from moe.offload.slot_reads import SlotReads
from moe.offload.speculation import Speculation
from moe.offload.stores import ExpertStore

# Below this a read from the page cache costs less than handing it to another thread and back (bench/bench_stores.py).
INLINE_READ_BYTES = 1 << 18


class ExpertCache:
    """S slots for the experts of all layers, filled from a store on demand.

    num_slots: 1 .. all experts of the store, shared out among sizes of experts (slot_runs.py). own: experts by layer
    that will ask for slots, None: all of them. policy: "lfu" (frequency with ageing), "lru", or a `Policy` of the
    caller's over keys 0 .. sum(store.num_experts) - 1, layer after layer. num_readers: threads that read misses while
    the hits are computed; 0 reads in the calling thread, as misses up to `INLINE_READ_BYTES` always are.
    Raises ValueError for a bad number of slots. Takes the memory of all slots, on the host committed as they fill.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_slots: int,
        *,
        own: Sequence[int] | None = None,
        policy: Literal["lru", "lfu"] | Policy = "lfu",
        num_readers: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store = store
        self.num_experts = list(store.num_experts)
        counts = self.num_experts if own is None else list(own)
        total = sum(counts)
        if not 1 <= num_slots <= total:
            raise ValueError(f"num_slots ({num_slots}) must be between 1 and the number of experts ({total})")
        self.device = torch.device(device)
        self.blob_bytes = max(layout.nbytes for layout in store.layouts)
        self.spared = sum(layout.spared for layout in store.layouts)  # bytes of slots that are never touched
        assert not self.spared or num_slots == total, "experts that differ in size must all have slots"
        sizes, huge = [layout.nbytes for layout in store.layouts], not self.spared
        self.slab = Slab.made(sizes, counts, self.num_experts, num_slots, self.device, huge=huge)
        self._blobs = [self.slab.of_layer(layer) for layer in range(len(self.num_experts))]
        self.policy = named_policy(policy, self.num_experts) if isinstance(policy, str) else policy
        self.map = SlotMap(self.num_experts, self.slab.slots_of_run, self.slab.rooms, self.slab.run_of_layer)
        self._acquiring: int | None = None  # the layer of the open acquire with misses
        self._views = [layout.views(blobs) for layout, blobs in zip(store.layouts, self._blobs)]
        self._stats = [LayerStats() for _ in self.num_experts]
        self.pinned: DeviceSlots | DeviceCache | None = None
        self._give_back: Callable[[], object] = lambda: None
        self._filling = filling_of(self.device, self.map.room, self.blob_bytes)
        self.from_host = host_copies(self._filling, store, self._blobs)
        self.num_readers = num_readers
        self.reads_inline = num_readers == 0 or self.blob_bytes <= INLINE_READ_BYTES
        self._reads = SlotReads(store, self._blobs, self._filling, self.from_host)
        self._readers = Readers(num_readers, self._reads.read)
        self._reads.goes_on = self._readers.goes_on
        self.ahead = Speculation(self.map, self._readers, self._enter)
        self.limit = SlotLimit(self.map, self.slab, self._blobs, self._make_room)
        self._num_waiting = 0  # misses of the open acquire that no slot could be had for yet
        self._num_visits = self._last_layer = 0

    def acquire(self, layer: int, experts: Sequence[int] | npt.NDArray[np.integer]) -> Generator[Wave, None, None]:
        """Brings `experts` (distinct) of `layer` into slots, as waves that together hold each of them exactly once.

        A wave's slots stay as they are until the next wave is asked for or the iterator is closed. The first wave is
        what is resident already, while the misses are read; then what has arrived, as far as slots allow. If all are
        resident it costs a few microseconds. Only one acquire with misses may be open at a time, by one thread. Raises
        OSError naming layer, expert and file if a read fails, IndexError for an unknown expert, ValueError for
        repeated ones. The cache stays whole after any of them.
        """
        ids = experts.tolist() if isinstance(experts, np.ndarray) else list(experts)
        self._num_visits, self._last_layer = self._num_visits + 1, layer
        if self.ahead.is_active:
            self.ahead.settle(layer, ids)
        if not ids:
            return
        assert not isinstance(self.pinned, DeviceCache), "the device keeps the slots"
        if min(ids) < 0:
            raise IndexError(f"expert {min(ids)} of layer {layer} does not exist")
        if len(set(ids)) != len(ids):
            raise ValueError(f"layer {layer}: experts {ids} must be distinct")
        wanted = np.array(ids, dtype=np.int32)
        slots = self.map.of_layer[layer].take(wanted)
        stats = self._stats[layer]
        stats.useful_bytes += self.ahead.used(layer, ids)
        if self.can_evict:
            self.policy.used(layer, self.map.first_key[layer] + wanted)
        if min(slots.tolist()) >= 0:
            stats.hits += len(ids)
            stats.waves += 1
            self._hold(slots)
            try:
                yield Wave(wanted, slots)
            finally:
                self._release(slots)
            return
        if self._acquiring is not None:
            raise ValueError(f"layer {layer}: another acquire is still open; exhaust or close it first")
        self._acquiring = layer
        try:
            yield from self._acquire_missing(layer, ids, slots.tolist())
        finally:
            self._acquiring = None

    def prefetch(self, layer: int, experts: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Reads distinct experts that `layer` will probably want, best first, when no miss waits for a reader.

        Returns at once. They take slots that are free or that the policy gives up, never one that is held, nor one of
        `experts`; where there are none, nothing is read. The next layer's go first. What was asked of `layer` before
        and has not begun is dropped, as when `layer` is acquired without it. None for a layer that is being acquired. A
        failed read is forgotten: the miss that follows reports it. Raises ValueError without readers.
        """
        if not self.num_readers:
            raise ValueError("prefetch needs num_readers (0) >= 1: someone must read while the caller computes")
        self.ahead.collect()
        if self._num_waiting or layer == self._acquiring:
            return
        missing = self.ahead.expect(layer, np.asarray(experts, np.int32))
        if not missing:
            return
        self._evict(layer, len(missing) - self.map.num_free(layer), ahead=True)
        due = self._num_visits + (layer - self._last_layer) % len(self.num_experts)
        self.ahead.start(layer, missing[: self.map.num_free(layer)], due)

    def views(self, layer: int) -> dict[str, Tensor]:
        """The layer's pieces as views of all slots, by name (`ExpertLayout`): [S, …]. No copy.

        Only the slots that hold experts of this layer mean anything.
        """
        return self._views[layer]

    def resident_slots(self, layer: int) -> Tensor:
        """int32 [E]: the slot of each expert of `layer`, -1 where it is not resident. A live view: do not write."""
        if isinstance(self.pinned, DeviceCache):
            return self.pinned.slots_of(layer)
        return torch.from_numpy(self.map.of_layer[layer])

    def grew(self, layer: int, nbytes: int) -> None:
        """So many bytes were read into what its experts had spared of their slots."""
        self.spared -= nbytes
        self._stats[layer].bytes_read += nbytes

    def pin(self, experts: Sequence[Sequence[int]] | None = None) -> DeviceSlots | None:
        """Keeps these experts where they are until `unpin`, looked up on the device; None if one is not there.

        experts: which, by layer; None: all of them. What is returned counts their uses, which are part of `stats`.
        Nothing may be pinned already.
        """
        assert self.pinned is None, "experts are pinned already"
        if (found := self.map.tables(experts)) is None:
            return None
        tables, slots = found
        self.ahead.unused.clear()  # nobody sees which of them are asked for from here on
        self._hold(slots)
        self.pinned, self._give_back = DeviceSlots(tables, self.device), partial(self._release, slots)
        return self.pinned

    def lend(self) -> DeviceCache | None:
        """Leaves slots, policy and misses to the device until `unpin`: nothing can be acquired meanwhile.

        None where it cannot keep them, as `device_cache.lend` says. Nothing may be pinned. Counts as `pin` does.
        """
        assert self.pinned is None, "experts are pinned already"
        self.ahead.finish()
        if (lent := lend(self.map, self.policy, self.store, self._blobs, self._filling)) is not None:
            self.pinned, self._give_back = lent, lent.give_back
        return lent

    def unpin(self) -> None:
        """What was pinned or lent, if anything, is the cache's again. A host sync for the counts."""
        if self.pinned is not None:
            self._stats, self.pinned = self.stats, None
            self._give_back()

    @property
    def num_slots(self) -> int:
        return self.map.num_slots

    @property
    def can_evict(self) -> bool:
        """Whether there are fewer slots than experts."""
        return self.map.num_slots < len(self.map.slot_of)

    @property
    def slot_sizes(self) -> list[int]:
        """Bytes of a slot by layer: where sizes of experts share slots, those of the larger."""
        return [self.slab.runs[run].nbytes for run in self.slab.run_of_layer]

    @property
    def slot_bytes(self) -> int:
        """Of all slots, full or not."""
        return Slab.nbytes(self.slab.runs, self.map.slots_of_run) - self.spared

    @property
    def empty_bytes(self) -> int:
        """Of the slots that are free."""
        return Slab.nbytes(self.slab.runs, self.map.free_of_run)

    @property
    def stats(self) -> list[LayerStats]:
        """By layer, as of now: read again for later figures. While experts are pinned a host sync."""
        return self._stats if self.pinned is None else self.pinned.added_to(self._stats)

    def preload(self, experts: Sequence[Sequence[int]] | None = None) -> None:
        """Reads experts into slots, layer by layer, until none is free; counts no hits and no misses.

        experts: which, by layer; where slots are short those that are not among them make room. None: all of them.
        """
        each = None if experts is None else zip(self.map.first_key, experts)
        keys = None if each is None else np.concatenate([a + np.asarray(e, np.int64) for a, e in each])
        kept, self._stats = self._stats, [LayerStats() for _ in self._stats]
        try:
            for layer, slot_of in enumerate(self.map.of_layer):
                wanted = np.arange(len(slot_of)) if experts is None else np.asarray(experts[layer], np.int64)
                missing = wanted[slot_of[wanted] < 0].astype(np.int32)
                if keys is not None:
                    self._evict(layer, len(missing) - self.map.num_free(layer), keep=keys)
                missing = missing[: self.map.num_free(layer)]
                if len(missing):
                    for _ in self._acquire_missing(layer, missing.tolist(), [-1] * len(missing)):
                        pass
        finally:
            self._stats = kept

    def reset_stats(self) -> None:
        self._stats = [LayerStats() for _ in self.num_experts]
        if self.pinned is not None:
            self.pinned.reset()

    def close(self) -> None:
        """Stops the readers. The slab and its views stay valid; the store is not closed."""
        self._readers.close()
        self._filling.close()

    def check(self) -> None:
        """Asserts the law of the map, and that what is read ahead has a slot that is being read into."""
        self.map.check()
        self.ahead.check()

    def _acquire_missing(self, layer: int, wanted: list[int], slots: list[int]) -> Iterator[Wave]:
        stats = self._stats[layer]
        batch = Batch()
        ready = Wave.of((), ())
        self._hold(ready.slots)
        try:
            missing = [expert for expert, slot in zip(wanted, slots) if slot < 0]
            if self.ahead.coming:
                adopted = self.ahead.adopt(layer, missing, batch)
                slots = self.map.of_layer[layer].take(wanted).tolist()  # some may have arrived meanwhile
                stats.useful_bytes += self.ahead.used(layer, wanted)
                missing = [expert for expert, slot in zip(wanted, slots) if slot < 0 and expert not in adopted]
            missing.reverse()  # taken from the end
            there = [pair for pair in zip(wanted, slots) if pair[1] >= 0]
            ready = self._next_wave(ready, Wave.of(*zip(*there)) if there else ready)
            stats.hits += len(there)
            stats.misses += len(wanted) - len(there)
            while True:
                self._start_reads(layer, missing, batch, is_waiting=not len(ready.slots))
                has_read = self.reads_inline and self.from_host is None and not batch.done.empty()
                if has_read or not len(ready.slots):  # what was read in this thread joins the wave
                    arrived = self._arrivals(layer, batch)
                    joined = Wave(*map(np.concatenate, zip(ready, arrived))) if len(ready.slots) else arrived
                    ready = self._next_wave(ready, joined)
                assert len(ready.slots), "no slot can be had: all are held by other acquires"
                stats.waves += 1
                yield ready
                ready = self._next_wave(ready, Wave.of((), ()))
                if not missing and not batch.num_reading:
                    return
        finally:
            self._release(ready.slots)
            self._num_waiting = 0
            batch.is_cancelled = True
            while batch.num_reading:  # the consumer stopped early: wait for what is being read right now
                batch.num_reading -= 1
                self._enter(batch.next_arrival())

    def _next_wave(self, before: Wave, wave: Wave) -> Wave:
        """Holds this one in place of the one before."""
        if wave is not before:
            self._hold(wave.slots)
            self._release(before.slots)
        return wave

    def _hold(self, slots: Ids) -> None:
        self.map.hold(slots)
        self._filling.before_use(slots)

    def _release(self, slots: Ids) -> None:
        self._filling.after_use(slots)
        self.map.release(slots)

    def _start_reads(self, layer: int, missing: list[int], batch: Batch, is_waiting: bool) -> None:
        """Starts as many reads as slots can be had for, and takes them off `missing`.

        is_waiting: the caller has nothing to compute meanwhile.
        """
        self._evict(layer, len(missing) - self.map.num_free(layer))
        if self.ahead.coming and len(missing) > self.map.num_free(layer):
            self.ahead.make_room(layer, is_urgent=is_waiting and not batch.num_reading)
            self._evict(layer, len(missing) - self.map.num_free(layer))
        num = min(len(missing), self.map.num_free(layer))
        jobs = [Job(layer, missing.pop(), self.map.take(layer), batch) for _ in range(num)]
        batch.num_reading += num
        if self.from_host is None and not self.reads_inline:
            self._readers.put(jobs)
        else:
            start = time.perf_counter()
            for arrival in map(self._reads.read, jobs) if self.from_host is None else self.from_host.fill(jobs):
                batch.done.put(arrival)
            self._stats[layer].stall_seconds += time.perf_counter() - start
        self._num_waiting = len(missing)

    def _make_room(self, layer: int, count: int) -> None:
        """So many slots are free for experts of `layer`, if no more are held; nothing is being read."""
        self.ahead.end()
        self._evict(layer, count - self.map.num_free(layer))

    def _evict(self, layer: int, count: int, ahead: bool = False, keep: Keys | None = None) -> None:
        """Frees up to `count` slots for experts of `layer`: the policy's choice of those no wave holds, not of `keep`.

        What is expected of a coming layer goes last, and not at all for speculation (`ahead`).
        """
        if count <= 0:
            return
        can_go = self.map.evictable(layer)
        if keep is not None:
            can_go[keep] = False
        keys = np.flatnonzero(self.ahead.but_expected(can_go))
        if len(keys) < count and not ahead and self.ahead.expected:
            keys = np.flatnonzero(can_go)
        count = min(count, len(keys))
        if count:
            evicted = keys[self.policy.victims(keys, count)]
            self.map.evict(evicted)
            for of, nbytes in self.ahead.evicted(evicted):
                self._stats[of].wasted_bytes += nbytes

    def _arrivals(self, layer: int, batch: Batch) -> Wave:
        """Takes all finished reads into the map, waits for one at least. Raises the first error."""
        entered: list[Job] = []
        start = time.perf_counter()
        while batch.num_reading and (not entered or not batch.done.empty()):
            arrival = batch.next_arrival()
            job = arrival.job
            batch.num_reading -= 1
            self._enter(arrival)
            if arrival.error is not None:
                raise OSError(f"expert {job.expert} of layer {layer}: {arrival.error}") from arrival.error
            entered.append(job)
        self._stats[layer].stall_seconds += time.perf_counter() - start
        return Wave.of([job.expert for job in entered], [job.slot for job in entered])

    def _enter(self, arrival: Arrival) -> None:
        """Makes an arrived expert resident, or frees its slot if it was not read."""
        job, nbytes = arrival.job, arrival.nbytes
        stats = self._stats[job.layer]
        if arrival.error is not None or nbytes < 0 or job.is_cancelled:
            lost = max(nbytes, arrival.lost_bytes)
            for name in ("bytes_read", "prefetch_bytes", "wasted_bytes"):
                setattr(stats, name, getattr(stats, name) + lost)
            self.map.drop(job.slot)
            return
        self.map.fill(job.slot, self.map.key(job.layer, job.expert))
        stats.bytes_read += nbytes
        if job.is_late:
            stats.prefetch_bytes += nbytes
            stats.late_bytes += nbytes
        elif job.batch is self.ahead.batch:
            stats.prefetch_bytes += nbytes
            self.ahead.arrived(job, nbytes)
