"""Memory that the ranks of a node map together.

A file in /dev/shm has a name only until all of them have it open. Meanwhile its maker holds a lock on the folder, so
that whoever makes the next one knows whether names that it finds there belong to anybody: those of processes that were
all killed in that moment are removed.
"""

import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.lost import in_collective

log = logging.getLogger(__name__)

Opened = TypeVar("Opened")
_FOLDER = Path("/dev/shm")
_PREFIX = "moe-shared-"


def map_together(groups: Groups, num_bytes: int, open_file: Callable[[Path], Opened]) -> Opened | None:
    """`open_file` of a new file of `num_bytes` zeros in memory, one for all ranks of this node. A collective.

    The name is gone when it returns; the memory goes with the last rank that has it open. None, on all of them, where
    the machine has no such memory or not that much of it left; the reason is logged.
    """
    path, what = "", Task("sharing memory on a node")
    with ExitStack() as until_all_have_it:
        if groups.local_rank == 0:
            try:
                path = str(until_all_have_it.enter_context(_new_file(num_bytes)))
            except OSError as error:
                log.warning("no %d bytes in %s for the ranks of a node: %s", num_bytes, _FOLDER, error)
        shared = torch.frombuffer(bytearray(path.encode().ljust(64, b"\0")), dtype=torch.uint8).to(groups.device)
        with in_collective(groups, what, groups.local_ranks):
            dist.broadcast(shared, groups.local_ranks[0], group=groups.local)
        path = bytes(shared.cpu().numpy()).rstrip(b"\0").decode()
        if not path:
            return None
        opened = open_file(Path(path))
        with in_collective(groups, what, groups.local_ranks):
            dist.barrier(group=groups.local)  # all have it open
    return opened


@contextmanager
def _new_file(num_bytes: int) -> Iterator[Path]:
    """A file of zeros that has its name inside the block.

    Raises OSError where there is no room: a mapped page that does not exist would end the process.
    """
    folder = os.open(_FOLDER, os.O_RDONLY)  # not the file: `line.c` loses its own lock when any descriptor of it closes
    try:
        _remove_left(folder)
        fcntl.flock(folder, fcntl.LOCK_SH)  # no limit: others have it alone just while they remove what was left
        file, name = tempfile.mkstemp(prefix=_PREFIX, dir=_FOLDER)
        try:
            try:
                os.posix_fallocate(file, 0, num_bytes)
            finally:
                os.close(file)
            yield Path(name)
        finally:
            os.unlink(name)
    finally:
        os.close(folder)


def _remove_left(folder: int) -> None:
    """Removes this user's files whose processes were killed, if nobody is just making one."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    for path in _FOLDER.glob(f"{_PREFIX}*"):
        if path.stat().st_uid == os.getuid():
            path.unlink()
