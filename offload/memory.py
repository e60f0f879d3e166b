"""How much memory this process may still take: of the machine, of its container, of its `ulimit`; the least counts."""

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe.offload.files_in_use import SHARED_MEMORY
from moe.offload.promised import Owed, owed_by_processes

_UNLIMITED = 1 << 60  # cgroup v1 says no limit by a number near 2^63


def available_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), shared: Path = SHARED_MEMORY
) -> int:
    """Bytes that new allocations and the page cache can take without swapping, and without being killed.

    The least of MemAvailable, of the room left in every control group around the process (v1 and v2), and of what
    `ulimit -v` and `ulimit -d` leave. Pages of files count as free: they are given up first. What processes have
    promised to slots and KV and not taken yet (`offload/promised.py`, this one's too) does not. proc, cgroups, shared:
    where these file systems are mounted.
    """
    owed = list(owed_by_processes(proc, shared))
    of_machine = _of_machine(proc) - sum(one.nbytes for one in owed)
    return max(0, min(of_machine, *_of_control_groups(proc, cgroups, owed), *_of_limits(proc), _UNLIMITED))


def _of_machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc / 'meminfo'} has no MemAvailable line")


def _of_control_groups(proc: Path, cgroups: Path, owed: Sequence[Owed]) -> Iterator[int]:
    around = {one: set(_groups_around(str(one.pid), proc, cgroups)) for one in owed}
    for folder, is_unified in _groups_around("self", proc, cgroups):
        if is_unified:
            limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
            usage, counted = folder / "memory.current", ("inactive_file", "active_file")
        else:
            limits = [_number(folder / "memory.limit_in_bytes")]
            usage, counted = folder / "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
        promised = sum(one.nbytes for one, theirs in around.items() if (folder, is_unified) in theirs)
        yield from (left - promised for left in _left(limits, usage, folder, counted))


def _groups_around(process: str, proc: Path, cgroups: Path) -> list[tuple[Path, bool]]:
    """The folders of all control groups that a process is in, and whether they are of version 2."""
    groups, found = proc / process / "cgroup", list[tuple[Path, bool]]()
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            found += [(folder, True) for root in (cgroups, cgroups / "unified") for folder in _upward(root, path)]
        elif "memory" in controllers.split(","):
            found += [(folder, False) for folder in _upward(cgroups / "memory", path)]
    return found


def _upward(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those around it. In a container the path may be the host's: then only the root is here."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


def _left(limits: list[int | None], usage: Path, folder: Path, reclaimable: tuple[str, ...]) -> Iterator[int]:
    limit = min((each for each in limits if each is not None and each < _UNLIMITED), default=None)
    used = _number(usage)
    if limit is not None and used is not None:
        yield limit - max(0, used - _counted(folder / "memory.stat", reclaimable))


def _of_limits(proc: Path) -> Iterator[int]:
    taken = {}
    status = proc / "self" / "status"
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith(("VmSize:", "VmData:")):
            taken[line[:6]] = int(line.split()[1]) * 1024
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft - taken.get(name, 0)


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:  # the root group of version 2 has no limits; others may be hidden from a container
        return None
    return int(text) if text.isdecimal() else None


def _counted(path: Path, names: tuple[str, ...]) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split(maxsplit=1)[0] in names)


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far (ru_maxrss would begin with that of the process before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
