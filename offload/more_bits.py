"""Planes that experts in nested precision get while a model runs: offload.bits=upgrade.

    start(bits)   a thread reads the new planes behind those that are in the slots, while the model goes on
    finish()      waits for it; then all of them count, at once

Kernels read as many planes of a slot as it says it has, so that what lies behind them may be written meanwhile. When
planes count is the caller's alone to say: what is computed does not depend on how long a read takes, nor on the store.
Slots stand as far apart as all planes need; a page that nothing was read into takes no memory, so that a budget bounds
what is read. Bits never become fewer.
"""

import errno
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from moe.kernels.nested import LEVELS
from moe.offload.cache import ExpertCache
from moe.offload.checkpoint import Checkpoint
from moe.offload.nested import Held, at_level, checksum_at, first_bits, set_bits, written_checksum
from moe.offload.segments import ExpertIndex, Parts, Segment
from moe.offload.stores import ExpertStore

Bits = Sequence[Sequence[int]]  # by layer and expert


@dataclass(slots=True)
class UpgradeStats:
    """What was added to experts while the model ran."""

    upgrades: int = field(default=0, metadata={"help": "Experts that got more bits, each time counted"})
    upgrade_bytes: int = field(default=0, metadata={"help": "Read for it", "unit": "bytes"})
    upgrade_wait_seconds: float = field(default=0.0, metadata={"help": "A step waited for it", "unit": "seconds"})


@dataclass(frozen=True, slots=True)
class Served:
    """How many experts a width has."""

    experts_served: int = field(metadata={"help": "Experts that are served in so many bits", "kind": "gauge"})


class _Wider(NamedTuple):
    """An expert that is being read, and its slot's memory up to the last of `bits` bits; there is `begin` of it."""

    layer: int
    expert: int
    bits: int
    begin: int
    blob: Tensor


class MoreBits:
    """index: as it is served, of a packed folder, with places for all planes; all experts of this rank stay in `cache`.

    open_store: a store of another index of the same files. is_checked: against the checksums of `moe pack`. held: by
    ranks, None = one has all. bits: of all ranks' experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        index: ExpertIndex,
        cache: ExpertCache,
        open_store: Callable[[ExpertIndex], ExpertStore],
        *,
        is_checked: bool,
        held: Held | None = None,
    ) -> None:
        self.checkpoint, self.index, self.cache = checkpoint, index, cache
        self._open_store, self._is_checked = open_store, is_checked
        self.held = held
        self._own = [range(site.num_experts) for site in index.sites] if held is None else held.own
        self.bits: Bits = first_bits(index)
        self.stats = UpgradeStats()
        self._thread = ThreadPoolExecutor(1, "more_bits")
        self._next: Bits = self.bits
        self._wider: list[_Wider] = []  # what is under way
        self._reads: Future[list[int]] | None = None  # bytes of each; None once it was waited for

    def start(self, bits: Bits) -> None:
        """Begins to read what takes experts to so many bits each, no fewer than they have. Nothing may be under way."""
        assert not self._wider, "finish first"
        self._next, self._wider = bits, []
        for layer, (own, now, then) in enumerate(zip(self._own, self.bits, bits)):
            for expert in own:
                before, after = now[expert], then[expert]
                assert before <= after, (layer, expert, before, after)
                if before < after:
                    slot = self.cache.map.of_layer[layer][expert]
                    blob = self.cache.slab.of_layer(layer)[slot, : self._nbytes(layer, after)]
                    self._wider.append(_Wider(layer, expert, after, self._nbytes(layer, before), blob))
        if self._wider:
            self._reads = self._thread.submit(self._read)

    def finish(self) -> None:
        """What was started counts from now on. Raises OSError if it could not be read; the next call reads it again."""
        if not self._wider:
            self.bits = self._next
            return
        start = time.perf_counter()
        reads, self._reads = self._reads or self._thread.submit(self._read), None
        read = reads.result()  # no limit: reads from a disk, as a miss waits for
        self.stats.upgrade_wait_seconds += time.perf_counter() - start
        for (layer, _, bits, _, blob), nbytes in zip(self._wider, read, strict=True):
            set_bits(self.index.layouts[layer], blob, bits)
            self.cache.grew(layer, nbytes)
        self.stats.upgrades += len(read)
        self.stats.upgrade_bytes += sum(read)
        self.bits, self._wider = self._next, []

    @property
    def served(self) -> list[tuple[Served, dict[str, str]]]:
        """Of each width, for the metrics: of this rank."""
        every = [bits[expert] for own, bits in zip(self._own, self.bits) for expert in own]
        return [(Served(every.count(bits)), {"bits": str(bits)}) for bits in LEVELS]

    def close(self) -> None:
        """Waits for what is being read. The slots stay."""
        self._thread.shutdown(cancel_futures=True)

    def _nbytes(self, layer: int, bits: int) -> int:
        return at_level(self.index.sites[layer], self.index.layouts[layer], bits).nbytes

    def _read(self) -> list[int]:
        store = self._open_store(self._behind())
        try:
            read = []
            for layer, expert, bits, begin, blob in self._wider:
                read.append(store.read_into(layer, expert, blob) if begin < len(blob) else 0)
                if self._is_checked:
                    self._check(layer, expert, bits, blob)
            return read
        finally:
            store.close()

    def _behind(self) -> ExpertIndex:
        """Of each expert that gets more, the bytes behind those that its slot has; of others nothing."""
        parts = [[Parts(())] * site.num_experts for site in self.index.sites]
        for layer, expert, _, begin, blob in self._wider:
            (first,) = self.index.segments(layer, expert)
            if begin < len(blob):
                segment = Segment(first.path, first.offset + begin, len(blob) - begin, begin)
                parts[layer][expert] = Parts((segment,))
        return replace(self.index, parts=tuple(map(tuple, parts)), checksums=())

    def _check(self, layer: int, expert: int, bits: int, blob: Tensor) -> None:
        found = checksum_at(self.index.layouts[layer], blob, bits)
        written = written_checksum(self.checkpoint, layer, expert, bits)
        if found != written:
            raise OSError(
                errno.EIO,
                f"layer {layer}, expert {expert}: its first {bits} bits have checksum {found:08x}, {written:08x} were "
                "packed; the file was damaged or belongs to another model: pack the original checkpoint again",
                str(self.index.segments(layer, expert)[0].path),
            )
