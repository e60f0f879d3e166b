"""Memory that the ranks of a node map together."""

import logging
import os
import tempfile
from collections.abc import Callable
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


def map_together(groups: Groups, num_bytes: int, open_file: Callable[[Path], Opened]) -> Opened | None:
    """`open_file` of a new file of `num_bytes` zeros in memory, one for all ranks of this node. A collective.

    The name is gone when it returns; the memory goes with the last rank that has it open. None, on all of them, where
    the machine has no such memory or not that much of it left; the reason is logged.
    """
    name = bytes(64)
    if groups.local_rank == 0:
        try:
            name = str(_new_file(num_bytes)).encode().ljust(64, b"\0")
        except OSError as error:
            log.warning("no %d bytes in %s for the ranks of a node: %s", num_bytes, _FOLDER, error)
    shared = torch.frombuffer(bytearray(name), dtype=torch.uint8).to(groups.device)
    what = Task("sharing memory on a node")
    with in_collective(groups, what, groups.local_ranks):
        dist.broadcast(shared, groups.local_ranks[0], group=groups.local)
    path = bytes(shared.cpu().numpy()).rstrip(b"\0").decode()
    if not path:
        return None
    try:
        opened = open_file(Path(path))
        with in_collective(groups, what, groups.local_ranks):
            dist.barrier(group=groups.local)  # all have it open
    finally:
        if groups.local_rank == 0:
            os.unlink(path)
    return opened


def _new_file(num_bytes: int) -> Path:
    """Raises OSError where there is no room: a mapped page that does not exist would end the process."""
    file, path = tempfile.mkstemp(prefix="moe-shared-", dir=_FOLDER)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)
    return Path(path)
