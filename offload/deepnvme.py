"""Packed experts read by DeepNVMe, DeepSpeed's asynchronous I/O handle: an extra, `pip install 'moeflow[deepspeed]'`.

It reads rightly only where offset and length are whole sectors: others come back as success with wrong bytes. It reads
fast only into memory that it locked, or torch pinned. So only packed folders are read, and what is not pinned is copied
from a locked buffer. Beside preadv: docs/offload.md.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.offload.integrity import CheckReads, ReadCheck
from moe.offload.layout import ALIGNMENT
from moe.offload.segments import ExpertIndex
from moe.offload.stores import ExpertStore, FileStore, convert

log = logging.getLogger(__name__)

BLOCK_BYTES, QUEUE_DEPTH = 1 << 20, 8  # of a read, in the kernel's queue


class Handle(Protocol):
    """What is used of DeepSpeed's `aio_handle`."""

    def new_cpu_locked_tensor(self, num_elem: int, example: Tensor) -> Tensor: ...
    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool: ...
    def is_pinned(self, buffer: Tensor) -> bool: ...
    def sync_pread(self, buffer: Tensor, filename: str, file_offset: int) -> int:
        """1 when the whole buffer is filled; lets other threads run."""


def is_built() -> bool:
    """Whether DeepSpeed is there and its operator was compiled before: loading it then takes seconds."""
    if find_spec("deepspeed") is None:
        return False
    from torch.utils.cpp_extension import get_default_build_root  # warns where there is nvcc and no GPU

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return any(Path(root).rglob("async_io.so"))


def aio_handles() -> Callable[[], Handle]:
    """What makes a handle. The first call on a machine compiles for some ten minutes, later ones take seconds.

    Raises ValueError where DeepSpeed or libaio's headers are missing, or the compiler fails.
    """
    remedy = "or leave out offload.io=deepnvme"
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder
    except ImportError as error:
        raise ValueError(
            f"offload.io=deepnvme needs DeepSpeed ({error}); pip install 'moeflow[deepspeed]', {remedy}"
        ) from None
    builder: Any = AsyncIOBuilder()
    if not is_built():
        if not builder.is_compatible(verbose=False):
            raise ValueError(f"offload.io=deepnvme needs libaio's headers (Debian: libaio-dev); install them, {remedy}")
        log.warning("DeepSpeed compiles its reader once, which takes some ten minutes")
    try:
        module = builder.load(verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"DeepSpeed's reader could not be compiled ({error}); {remedy}") from None

    def make() -> Handle:
        handle: Handle = module.aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, 1)
        return handle

    return make


class LockedReads:
    """Reads of whole pages, by a handle and a locked buffer for each thread that calls. make: a handle."""

    def __init__(self, make: Callable[[], Handle]) -> None:
        self._make = make
        self._own = threading.local()
        self._buffers: list[tuple[Handle, Tensor]] = []
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, out: Tensor) -> None:
        """Fills `out` (uint8, host memory) from `offset` on, both whole pages. Raises OSError, naming the file."""
        nbytes = out.nbytes
        assert not (offset | nbytes) % ALIGNMENT, (offset, nbytes)
        size = path.stat().st_size  # the handle itself would end the process
        if offset + nbytes > size:
            raise OSError(errno.EIO, f"the file ends after {size} bytes, {offset + nbytes} are needed", str(path))
        handle = self._handle()
        straight = out.data_ptr() % ALIGNMENT == 0 and handle.is_pinned(out)
        target = out if straight else self._buffer(handle, nbytes)
        if (done := handle.sync_pread(target, str(path), offset)) != 1:
            raise OSError(errno.EIO, f"reading {nbytes} bytes at {offset}: DeepNVMe says {done}", str(path))
        if not straight:
            out.copy_(target)

    def close(self) -> None:
        for handle, buffer in self._buffers:
            handle.free_cpu_locked_tensor(buffer)
        self._buffers.clear()
        self._own = threading.local()

    def _handle(self) -> Handle:
        handle: Handle | None = getattr(self._own, "handle", None)
        if handle is None:
            handle = self._own.handle = self._make()
        return handle

    def _buffer(self, handle: Handle, nbytes: int) -> Tensor:
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._own.buffer = handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8))
            with self._lock:
                self._buffers.append((handle, buffer))
        return buffer[:nbytes]


class DeepNvmeStore:
    """A packed folder's experts by DeepNVMe, past the page cache.

    Raises ValueError for a folder that is not packed. handles: what makes a handle; None: DeepSpeed's own.
    """

    def __init__(
        self, index: ExpertIndex, *, check: CheckReads = "first", handles: Callable[[], Handle] | None = None
    ) -> None:
        if not index.is_packed:
            raise ValueError(
                "offload.io=deepnvme reads whole pages, which only packed experts have; `moe pack` the model first"
            )
        self.index = index
        self.layouts = index.layouts
        self.num_experts = [site.num_experts for site in index.sites]
        self.direct = True
        self._check = ReadCheck(index, check)
        self._reads = LockedReads(aio_handles() if handles is None else handles)

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        """As `ExpertStore` says."""
        (segment,) = self.index.segments(layer, expert)
        self._reads.read(segment.path, segment.offset, out[: segment.nbytes])
        convert(self.index, layer, expert, out)
        self._check.check(layer, expert, out)
        return segment.nbytes

    def close(self) -> None:
        """No read may be under way."""
        self._reads.close()


def file_store(index: ExpertIndex, io: str | None, *, direct: bool | None, check: CheckReads) -> ExpertStore:
    """The store of files that reads by `io`: "deepnvme", else preadv. Raises what the two raise."""
    return DeepNvmeStore(index, check=check) if io == "deepnvme" else FileStore(index, direct=direct, check=check)
