"""How much memory this process may still take: of the machine, of its container, of its `ulimit`; the least counts."""

import resource
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 says no limit by a number near 2^63


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new allocations and the page cache can take without swapping, and without being killed.

    The least of MemAvailable, of the room left in every control group around the process (v1 and v2), and of what
    `ulimit -v` and `ulimit -d` leave. Pages of files count as free: they are given up first. proc, cgroups: where
    these file systems are mounted.
    """
    return max(0, min(_of_machine(proc), *_of_control_groups(proc, cgroups), *_of_limits(proc), _UNLIMITED))


def own_memory(proc: Path = Path("/proc")) -> int:
    """Bytes of this process alone that are no pages of files and shared with nobody."""
    for line in (proc / "self" / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc / 'self' / 'status'} has no RssAnon line")


def _of_machine(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc / 'meminfo'} has no MemAvailable line")


def _of_control_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    groups = proc / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            for root in (cgroups, cgroups / "unified"):
                for folder in _upward(root, path):
                    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
                    yield from _left(limits, folder / "memory.current", folder, ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            for folder in _upward(cgroups / "memory", path):
                limits = [_number(folder / "memory.limit_in_bytes")]
                counted = ("total_inactive_file", "total_active_file")
                yield from _left(limits, folder / "memory.usage_in_bytes", folder, counted)


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
