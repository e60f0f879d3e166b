"""Memory that processes of this machine have promised to their slots and KV and not taken yet: it is not free.

Slots take memory when they are first written, so that the system counts as free what a process beside this one is
going to fill. Each says in a small file how large it may become.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe.offload.files_in_use import SHARED_MEMORY, is_at, is_sole_user, open_in_use, remove_abandoned

log = logging.getLogger(__name__)

_PREFIX = "moe-promised-"


class Owed(NamedTuple):
    """nbytes: that process `pid` may still take."""

    pid: int
    nbytes: int


class Promise:
    """Of this process: what it may take beyond what it has. Ends with `close`, or with the process."""

    def __init__(self, folder: Path = SHARED_MEMORY) -> None:
        self._path = folder / f"{_PREFIX}{os.getpid()}-{id(self):x}"
        self._file: int | None = None
        try:
            remove_abandoned(folder, _PREFIX)
            self._file = open_in_use(self._path, 0o644)
        except OSError as error:
            log.warning("other processes do not know what memory this one will still take: %s", error)

    def renew(self, nbytes: int) -> None:
        """From now on: `nbytes` beyond what it has now."""
        if self._file is not None:
            told = f"{_own_space()} {os.getpid()} {own_memory() + nbytes} {nbytes}\n"
            os.pwrite(self._file, told.ljust(128).encode(), 0)

    def close(self) -> None:
        """No effect the second time."""
        file, self._file = self._file, None
        if file is not None:
            self._path.unlink(missing_ok=True)
            os.close(file)


def owed_by_processes(proc: Path = Path("/proc"), folder: Path = SHARED_MEMORY) -> Iterator[Owed]:
    """Of every process that has made a promise, this one's too. Where it cannot be seen, all that it promised."""
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:  # it was withdrawn just now
            continue
        try:
            told = os.pread(file, 128, 0).split()
            is_promise = len(told) == 4 and all(word.isdigit() for word in told)  # anybody may put a file here
            if is_promise and is_at(file, path) and not is_sole_user(file):
                space, pid, most, nbytes = map(int, told)
                yield Owed(pid, _left(proc / str(pid), most, nbytes) if space == _own_space() else nbytes)
        finally:
            os.close(file)


def own_memory(proc: Path = Path("/proc")) -> int:
    """Bytes of this process alone that are no pages of files and shared with nobody."""
    nbytes = _anonymous(proc / "self")
    if nbytes is None:
        raise OSError(f"{proc / 'self' / 'status'} has no RssAnon line")
    return nbytes


def _left(process: Path, most: int, promised: int) -> int:
    try:
        has = _anonymous(process)
    except (FileNotFoundError, ProcessLookupError):  # hidden from this user; or it ends
        return promised
    return 0 if has is None else max(0, most - has)  # None: it has ended, and nobody has asked how


def _anonymous(process: Path) -> int | None:
    for line in (process / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def own_promised(proc: Path = Path("/proc"), folder: Path = SHARED_MEMORY) -> int:
    """Bytes that this process may still take."""
    return sum(owed.nbytes for owed in owed_by_processes(proc, folder) if owed.pid == os.getpid())


def _own_space() -> int:
    """In which process ids mean the same."""
    return os.stat("/proc/self/ns/pid").st_ino
