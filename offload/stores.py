"""Tiers that an expert's blob can be read from.

`FileStore` is the default: one read per run of adjacent bytes, straight into the slot where the file's alignment
allows it. `MmapStore` is its plain twin. `RamStore` keeps every blob in host memory; it is also the store for tests.
"""

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.offload.budget import format_bytes
from moe.offload.integrity import CheckReads, ReadCheck
from moe.offload.layout import ALIGNMENT, ExpertLayout
from moe.offload.memory import available_memory
from moe.offload.segments import ExpertIndex, Segment
from moe.offload.stretches import Run, in_parts, runs_of, stretches_of

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)

# Bytes are copied as arrays: torch's copy would call up its threads, within a reader too, beside those that compute.
Bytes = npt.NDArray[np.uint8]

PART_BYTES = 1 << 20  # 0.7 ms of this project's disk: what a miss waits for a reader at most


class ExpertStore(Protocol):
    """Reads one expert's blob from a tier; safe to call from several threads."""

    @property
    def layouts(self) -> Sequence[ExpertLayout]: ...
    @property
    def num_experts(self) -> Sequence[int]: ...
    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        """Fills `out` (uint8 [nbytes], host memory) with the blob; padding between pieces is left as it was.

        Returns the bytes moved. Raises OSError, naming the file, if they cannot be read.
        """

    def close(self) -> None: ...


@runtime_checkable
class PartedStore(Protocol):
    """A store that can stop in the middle of an expert."""

    def read_parts(self, layer: int, expert: int, out: Tensor) -> Generator[int, None, int]:
        """`read_into` in parts of `PART_BYTES` at most. Yields between two of them: the bytes moved so far."""


def bytes_moved(read: Generator[int, None, int], goes_on: Callable[[int], object] = lambda nbytes: None) -> int:
    """Runs what reads in parts to its end. goes_on: called between two of them, with the bytes moved so far."""
    while True:
        try:
            nbytes = next(read)
        except StopIteration as end:
            return int(end.value)
        goes_on(nbytes)


LARGE_PAGE = 2 << 20  # bytes, where the system has them
_MAP_NORESERVE = 0x4000  # Linux; Python 3.11's mmap has no name for it


def aligned_bytes(nbytes: int, huge: bool = True) -> Tensor:
    """Zeroed uint8 [nbytes] that starts on a page and takes memory only where it is written.

    More than the machine has may be asked for: without MAP_NORESERVE Linux refuses addresses beyond memory and swap.
    huge: in large pages where the system has them, so that a byte may take the memory of many. Raises OSError where a
    limit on addresses (`ulimit -v`, vm.overcommit_memory=2) is below it.
    """
    if nbytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        asked = f"{error.strerror}: addresses for {format_bytes(nbytes)}"
        message = f"{asked}; raise `ulimit -v`, or set vm.overcommit_memory to 0 or 1"
        raise OSError(error.errno, message) from None
    if not huge:
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    elif nbytes >= 2 * LARGE_PAGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def give_back(memory: Tensor) -> None:
    """The whole pages in this part of `aligned_bytes` are the system's again: zeros that take memory when written."""
    begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    nbytes = (memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if nbytes > 0 and _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), f"madvise of {nbytes} bytes")


class Buffers(threading.local):
    """Of every thread its own, to read into; one more where a read is within another, between its parts."""

    def __init__(self) -> None:
        self.free = list[Tensor]()

    @contextmanager
    def spare(self, nbytes: int) -> Iterator[Tensor]:
        """uint8 [nbytes], from a page on."""
        spare = self.free.pop() if self.free else aligned_bytes(0)
        if len(spare) < nbytes:
            spare = aligned_bytes(-(-nbytes // ALIGNMENT) * ALIGNMENT)
        try:
            yield spare[:nbytes]
        finally:
            self.free.append(spare)


def _place_kept(segment: Segment, kept: Sequence[tuple[int, Bytes]], out: Bytes) -> None:
    """Copies what of the segment was read to buffers. kept: them, by where they begin in the file."""
    for begin, source in kept:
        first, end = max(begin, segment.offset), min(begin + len(source), segment.offset + segment.nbytes)
        if first < end:
            part, target = source[first - begin : end - begin], segment.blob_offset + first - segment.offset
            if segment.size is None:
                np.copyto(out[target : target + len(part)], part)
            else:
                assert len(part) == segment.nbytes, (segment, begin, len(source))
                _place(segment, part, out)


def _place(segment: Segment, source: Bytes, out: Bytes) -> None:
    """Copies one segment's bytes to its place in the blob. source: [segment.nbytes]."""
    target = out[segment.blob_offset : segment.blob_offset + segment.nbytes]
    if segment.size is None or segment.stride is None or segment.dtype is None:
        np.copyto(target, source)
    else:
        stored = torch.from_numpy(source)
        if stored.data_ptr() % segment.dtype.itemsize:
            stored = stored.clone()  # a view of another dtype needs an aligned start
        typed = stored.view(segment.dtype).as_strided(segment.size, segment.stride)
        torch.from_numpy(target).view(segment.dtype).view(segment.size).copy_(typed)


def convert(index: ExpertIndex, layer: int, expert: int, out: Tensor) -> int:
    """Makes what the blob holds in another arrangement than the file, and checks what decodes it. Returns bytes read.

    Costs a read per tensor and the rearrangement: a packed folder has done both. Raises OSError, naming the file,
    where it cannot be read or where a scale is no finite number.
    """
    conversions = index.conversions(layer, expert)
    for source, offset, shape, dtype in conversions:
        try:
            made = source.read(shape, dtype)
        except ValueError as error:
            raise OSError(errno.EIO, str(error), str(source.tensors[0].path)) from None
        out[offset : offset + made.nbytes] = made.view(-1).view(torch.uint8)
    bad = None if index.is_packed else index.layouts[layer].not_finite(out)
    if bad is not None:
        raise OSError(errno.EIO, f"{bad} of this expert has a scale that is no finite number", str(index.files()[0]))
    return sum(info.nbytes for conversion in conversions for info in conversion.tensors)


class MmapStore:
    """Every file mapped, every segment copied; the operating system decides what is cached."""

    def __init__(self, index: ExpertIndex, *, check: CheckReads = "first") -> None:
        self.index = index
        self.layouts = index.layouts
        self.num_experts = [site.num_experts for site in index.sites]
        self._check = ReadCheck(index, check)
        self._maps = {path: np.memmap(path, dtype=np.uint8, mode="r") for path in index.files()}

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        segments = self.index.segments(layer, expert)
        for segment in segments:
            stored = self._maps[segment.path][segment.offset : segment.offset + segment.nbytes]
            _place(segment, np.array(stored), out.numpy())
        nbytes = sum(segment.nbytes for segment in segments) + convert(self.index, layer, expert, out)
        self._check.check(layer, expert, out)
        return nbytes

    def close(self) -> None:
        self._maps.clear()


class RamStore:
    """Every blob in host memory. blobs: per layer uint8 [E, nbytes]."""

    def __init__(self, layouts: Sequence[ExpertLayout], blobs: Sequence[Tensor]) -> None:
        self.layouts = layouts
        self.num_experts = [len(layer) for layer in blobs]
        self.blobs = list(blobs)

    @staticmethod
    def read_from(source: ExpertStore) -> "RamStore":
        """Reads every blob of `source` once. Raises ValueError where they are more than the memory."""
        nbytes = sum(count * layout.nbytes for count, layout in zip(source.num_experts, source.layouts))
        if nbytes > (free := available_memory()):
            raise ValueError(
                f"offload.store=ram keeps all experts in host memory: {format_bytes(nbytes)}, of which "
                f"{format_bytes(free)} are free; leave it out, then they are read from their files"
            )
        blobs = [aligned_bytes(n * layout.nbytes).view(n, -1) for n, layout in zip(source.num_experts, source.layouts)]
        for layer, experts in enumerate(blobs):
            for expert, blob in enumerate(experts):
                source.read_into(layer, expert, blob)
        return RamStore(source.layouts, blobs)

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        np.copyto(out.numpy(), self.blobs[layer][expert].numpy())
        return len(out)

    def close(self) -> None:
        self.blobs.clear()


def page_cache_holds(index: ExpertIndex) -> bool:
    """Whether all files of the experts fit half of the memory that is available now."""
    return sum(path.stat().st_size for path in index.files()) <= available_memory() // 2


class FileStore:
    """Positioned reads of the checkpoint's own files, buffered or past the page cache (O_DIRECT).

    direct: None takes O_DIRECT only if the experts' files together are larger than half of the memory that is
    available now: below that the page cache holds them after the first pass, and reading from it is faster than the
    disk; above it, buffered reads cost 7 times the CPU time of direct ones (bench/bench_stores.py) and push out the
    pages of others. A file system that refuses O_DIRECT is read buffered, which is logged once.
    Pages of the file that are whole pages of `out` too go straight there: all of a packed file's, all but those at the
    ends of tensors where slots are made for it (offload/in_place.py). The rest goes through a buffer.
    """

    def __init__(self, index: ExpertIndex, *, direct: bool | None = None, check: CheckReads = "first") -> None:
        self.index = index
        self.layouts = index.layouts
        self.num_experts = [site.num_experts for site in index.sites]
        self._check = ReadCheck(index, check)
        files = index.files()
        self.direct = not page_cache_holds(index) if direct is None else direct
        self._files: dict[Path, tuple[int, bool]] = {}  # descriptor, opened with O_DIRECT
        self._buffers = Buffers()
        try:
            for path in files:
                self._files[path] = self._open(path)
        except OSError:
            self.close()
            raise

    def _open(self, path: Path) -> tuple[int, bool]:
        if self.direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                log.warning("%s: the file system refuses O_DIRECT; expert reads go through the page cache", path.parent)
                self.direct = False
        return os.open(path, os.O_RDONLY), False

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        return bytes_moved(self._read_parts(layer, expert, out, sys.maxsize))

    def read_parts(self, layer: int, expert: int, out: Tensor) -> Generator[int, None, int]:
        """As `PartedStore` says."""
        return self._read_parts(layer, expert, out, PART_BYTES)

    def _read_parts(self, layer: int, expert: int, out: Tensor, most: int) -> Generator[int, None, int]:
        """most: bytes of a part, of whole pages."""
        total = 0
        for number, run in enumerate(runs_of(self.index.segments(layer, expert))):
            if number:
                yield total
            for done in self._read_run(run, out, most):
                yield total + done
            total += run.nbytes
        total += convert(self.index, layer, expert, out)
        self._check.check(layer, expert, out)
        return total

    def _read_run(self, run: Run, out: Tensor, most: int) -> Iterator[int]:
        """Yields between its parts: the bytes of the run that have come, of which some may not be in place yet."""
        file, direct = self._files[run.path]
        stretches = stretches_of(run, out.data_ptr(), ALIGNMENT if direct else 1)
        with self._buffers.spare(sum(each.nbytes for each in stretches if each.target is None)) as spare:
            blob, buffer, at = out.numpy(), spare.numpy(), 0
            kept, targets = list[tuple[int, Bytes]](), list[memoryview]()  # kept: by where it begins in the file
            for begin, nbytes, target in stretches:
                if target is None:
                    kept.append((begin, buffer[at : at + nbytes]))
                    targets.append(buffer.data[at : at + nbytes])
                    at += nbytes
                else:
                    targets.append(blob.data[target : target + nbytes])
            begin, end = stretches[0].begin, run.offset + run.nbytes
            for part in in_parts(targets, most):
                self._read(run, file, part, begin, min(sum(map(len, part)), end - begin))
                begin += sum(map(len, part))
                if begin < end:
                    yield begin - run.offset
            for segment in run.segments:
                _place_kept(segment, kept, blob)

    def _read(self, run: Run, file: int, parts: list[memoryview], offset: int, needed: int) -> None:
        """preadv until `needed` bytes arrived; the file may end inside the last page that was asked for."""
        try:
            done = os.preadv(file, parts, offset)
            while done < needed:
                rest, skip = [], done
                for part in parts:
                    rest.append(part[skip:])
                    skip = max(0, skip - len(part))
                more = os.preadv(file, rest, offset + done)
                if more == 0:
                    raise OSError(errno.EIO, f"the file ends after {offset + done} bytes, {offset + needed} are needed")
                done += more
        except OSError as error:
            raise OSError(error.errno, f"reading {needed} bytes at {offset}: {error.strerror}", str(run.path)) from None

    def close(self) -> None:
        for file, _ in self._files.values():
            os.close(file)
        self._files.clear()
