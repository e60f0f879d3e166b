"""Files in memory that are there as long as a process uses them, whatever ends it: each has a lock on the file."""

import fcntl
import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def open_in_use(path: Path, mode: int = 0o600) -> int:
    """The file, made if it is missing, with a mark that a process uses it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, mode)
        fcntl.flock(file, fcntl.LOCK_SH)  # no limit: another has it alone just while it removes the file
        if is_at(file, path):
            return file
        os.close(file)  # another process removed it in between, as its last user


def is_at(file: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def is_sole_user(file: int) -> bool:
    """Of the processes that use it; then nobody else begins to before the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_abandoned(folder: Path, prefix: str, keep: Path | None = None) -> None:
    """Removes this user's files of processes that were all killed."""
    for path in folder.glob(f"{prefix}*"):
        if path == keep:
            continue
        try:
            if path.stat().st_uid != os.getuid():
                continue
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # its last user removed it just now
            continue
        if is_sole_user(file) and is_at(file, path):
            path.unlink()
        os.close(file)
