"""One host copy of all experts for the processes of a node, made without any of them waiting for a peer.

A file in memory: a page of marks, then every layer's blobs. The experts are read in parts; whoever comes to a part that
is not marked locks it, reads it and marks it, so that processes which start together share the work, one that starts
alone does all of it, one that dies in the middle leaves an unlocked part for the next, and a later one (a replacement)
finds everything read.
"""

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from moe.offload.files_in_use import SHARED_MEMORY, is_at, is_sole_user, open_in_use, remove_abandoned
from moe.offload.stores import ExpertStore, RamStore

_PREFIX = "moe-experts-"
_NUM_PARTS = 64
_PART_S = 1800.0  # for another process to read one of them


class SharedStore(RamStore):
    """A `RamStore` whose blobs all processes that give the same `name` map once per node.

    The name stays until the last of them closes, or until `forget_name`. Files whose processes have all been killed
    are removed by whoever makes the next one. part_s: for another process to read a part that it has begun. Raises
    OSError, naming the file, if memory does not suffice, or that process does not go on.
    """

    def __init__(
        self, source: ExpertStore, name: str, folder: Path = SHARED_MEMORY, *, part_s: float = _PART_S
    ) -> None:
        self.path, self._part_s = folder / f"{_PREFIX}{name}", part_s
        sizes = [count * layout.nbytes for count, layout in zip(source.num_experts, source.layouts)]
        remove_abandoned(folder, _PREFIX, keep=self.path)
        self._file: int | None = open_in_use(self.path)
        self.blobs: list[Tensor] = []
        try:
            pages = _map(self._file, mmap.PAGESIZE + sum(sizes), self.path)
            self._marks, *parts = torch.split(torch.frombuffer(pages, dtype=torch.uint8), [mmap.PAGESIZE, *sizes])
            super().__init__(source.layouts, [part.view(n, -1) for part, n in zip(parts, source.num_experts)])
            self._read_all(source, first=os.getpid())
        except BaseException:
            self.close()
            raise

    def forget_name(self) -> None:
        """The file goes with the last process that has it mapped, killed or not; nobody can come to it any more."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        if is_sole_user(file) and is_at(file, self.path):
            self.path.unlink()
        os.close(file)
        super().close()

    def _read_all(self, source: ExpertStore, first: int) -> None:
        places = [(layer, expert, blob) for layer, blobs in enumerate(self.blobs) for expert, blob in enumerate(blobs)]
        for part in ((first + i) % _NUM_PARTS for i in range(_NUM_PARTS)):
            if not self._marks[part]:
                self._read_part(source, part, places[part::_NUM_PARTS])

    def _read_part(self, source: ExpertStore, part: int, places: Iterable[tuple[int, int, Tensor]]) -> None:
        assert self._file is not None
        self._lock(self._file, part)
        try:
            if not self._marks[part]:  # nobody read it while this process waited
                for layer, expert, blob in places:
                    source.read_into(layer, expert, blob)
                self._marks[part] = 1
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, part)

    def _lock(self, file: int, part: int) -> None:
        deadline = time.monotonic() + self._part_s
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, part)  # ends with the process, however that ends
                return
            except (BlockingIOError, PermissionError):  # another has it
                if time.monotonic() > deadline:
                    message = (
                        f"another process has not read its part of the host copy of all experts in {self._part_s:g} s: "
                        "it may be stopped; end it, or leave offload.store=ram out"
                    )
                    raise OSError(errno.ETIMEDOUT, message, str(self.path)) from None
            time.sleep(0.01)


def _map(file: int, nbytes: int, path: Path) -> mmap.mmap:
    try:
        os.posix_fallocate(file, 0, nbytes)  # fails here, not by a signal in the middle of a copy
        return mmap.mmap(file, nbytes, flags=mmap.MAP_SHARED)
    except OSError as error:
        message = f"{error.strerror}: the host copy of all experts takes {nbytes} bytes"
        raise OSError(error.errno, message, str(path)) from None
