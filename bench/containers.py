"""Memory limits by cgroup (v1 or v2) that count the page cache, for whole processes; needs to be root."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def why_no_limits() -> str | None:
    if os.geteuid() != 0:
        return "memory limits need root"
    if (ROOT / "memory" / "memory.limit_in_bytes").exists():
        return None
    controllers = ROOT / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return None
    return "this machine offers no memory cgroup"


@dataclass(frozen=True, slots=True)
class Container:
    folder: Path
    is_v1: bool

    @property
    def prefix(self) -> list[str]:
        """Put before a command, it runs inside."""
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs; exec "$@"', "sh"]

    def limit(self, num_bytes: int) -> None:
        """Sets the limit anew; what is over it is reclaimed first, which may take some tries."""
        name = "memory.limit_in_bytes" if self.is_v1 else "memory.max"
        for attempt in range(20):
            try:
                (self.folder / name).write_text(str(num_bytes))
                return
            except OSError:
                if attempt == 19:
                    raise
                time.sleep(0.3)


@contextmanager
def container(name: str) -> Iterator[Container]:
    """A cgroup that is gone afterwards. Raises OSError where `why_no_limits` has a reason."""
    is_v1 = (ROOT / "memory").is_dir()
    folder = (ROOT / "memory" if is_v1 else ROOT) / f"moe-bench-{os.getpid()}-{name}"
    if not is_v1:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    folder.mkdir()
    try:
        yield Container(folder, is_v1)
    finally:
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


@contextmanager
def read_ahead(kib: int) -> Iterator[None]:
    """Every disk's read-ahead at `kib` meanwhile: some machines read 8 MiB ahead, which mmap-based engines pay for."""
    files = [f for f in Path("/sys/block").glob("*/queue/read_ahead_kb") if os.access(f, os.W_OK)]
    before = {f: f.read_text() for f in files}
    try:
        for f in files:
            f.write_text(str(kib))
        yield
    finally:
        for f, value in before.items():
            f.write_text(value)


def drop_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


@contextmanager
def busy_processes(num: int) -> Iterator[None]:
    """So many other processes, which compute all the time: what a step takes on a machine that is not ours alone."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
