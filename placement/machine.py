"""What `moe probe` found of a machine: figures that automatic choices start from. Plain data.

Kept in one JSON file for any number of machines, by name; reads from disks by the file system that a folder lies on.
"""

import fcntl
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe.placement.schema import Kinds, checked
from moe.placement.written import written_whole

Work = Literal["expert", "dense"]
# Past the page cache by preadv; through it when it holds nothing of the file; when it holds all; past it by DeepSpeed.
How = Literal["direct", "buffered", "cached", "deepnvme"]


class Rate(NamedTuple):
    """Seconds for each weight of an expert (or of a dense layer), read and multiplied with `rows` rows."""

    work: Work
    format: str
    threads: int
    rows: int
    seconds: float


class Reads(NamedTuple):
    """Bytes a second of random reads of `nbytes`, `depth` of them at a time."""

    how: How
    nbytes: int
    depth: int
    bytes_per_s: float


class Attention(NamedTuple):
    """kv_bytes_per_s: of keys and values that a decoding token reads. prompt_macs_per_s: q·k and p·v of a prompt."""

    kv_bytes_per_s: float
    prompt_macs_per_s: float


class Overhead(NamedTuple):
    """Seconds beyond weights and rows: of a step, and more for each sequence; of a layer, and more for each sequence.

    apart: more of a layer that is not computed in one call with all others (its experts come and go, or ranks share
    them), and more for each sequence. waves: of a layer whose experts come and go, though all it asks for are there.
    miss: of a layer that has misses, and more for each of its rows; wave: for each further expert that arrives alone,
    and more for each of its rows. A figure of `apart` that is missing was measured as part of `layer`.
    """

    step: float
    step_sequence: float
    layer: float
    layer_sequence: float
    waves: float
    miss: float
    miss_row: float
    wave: float
    wave_row: float
    apart: float = 0.0
    apart_sequence: float = 0.0


class Exchange(NamedTuple):
    """Seconds beyond one process, on ranks of this machine: of a step; of a layer, for each sequence of a rank, and for
    each byte that a rank sends away or gets back."""

    ranks: int
    step: float
    layer: float
    layer_sequence: float
    byte: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """name: what the figures are valid for. memory: bytes a second that so many threads read together.

    attention, overhead: None where only what choices need was measured, as a first run does; no step can be planned.
    """

    name: str
    when: str
    cores: int
    memory: Mapping[int, float]
    rates: tuple[Rate, ...]
    copy_bytes_per_s: float  # of one thread
    attention: Attention | None = None
    overhead: Overhead | None = None
    exchange: tuple[Exchange, ...] = ()
    disks: Mapping[str, tuple[Reads, ...]] = field(default_factory=dict)

    def seconds_per_weight(self, work: Work, kind: str, rows: float, threads: int) -> float:
        """Between measured rows: on a straight line in both logarithms; beyond them: in proportion to the rows.

        Raises ValueError for a format that was not measured.
        """
        found = [r for r in self.rates if (r.work, r.format) == (work, kind)]
        if not found:
            known = sorted({r.format for r in self.rates if r.work == work})
            raise ValueError(f"no {work} in {kind} was measured on this machine; known: {', '.join(known)}")
        measured = min({r.threads for r in found}, key=lambda n: (abs(n - threads), n))
        points = sorted((r.rows, r.seconds) for r in found if r.threads == measured)
        return _between(points, rows)

    def step_costs(self) -> tuple[Attention, Overhead]:
        """Raises ValueError where they were not measured."""
        if self.attention is None or self.overhead is None:
            raise ValueError("only what a first run needs was measured of this machine; `moe probe` measures the rest")
        return self.attention, self.overhead

    def memory_bytes_per_s(self, threads: int) -> float:
        """Of so many threads together: no more than those that were measured get."""
        return self.memory[min(self.memory, key=lambda n: (abs(n - threads), n))]

    def read_bytes_per_s(self, disk: str, how: How, nbytes: int, depth: int) -> float | None:
        """At the measured depth that is nearest, between the measured sizes; None if this was not measured."""
        rows = [r for r in self.disks.get(disk, ()) if r.how == how]
        if not rows:
            return None
        nearest = min({r.depth for r in rows}, key=lambda n: (abs(math.log(n / depth)), n))
        points = sorted((r.nbytes, r.nbytes / r.bytes_per_s) for r in rows if r.depth == nearest)
        return nbytes / (_between(points, nbytes) if nbytes > points[0][0] else points[0][1] * nbytes / points[0][0])

    def stored(self) -> dict[str, Any]:
        """As JSON has it; `of` reads it."""
        return asdict(self)

    @staticmethod
    def of(where: str, fields: Any) -> "Machine":
        """Raises ValueError, naming the file and the field, for what `stored` did not write."""
        known = checked(where, fields, _FIELDS)
        try:
            return Machine(
                **{name: known[name] for name in ("name", "when", "cores", "copy_bytes_per_s")},
                memory={int(threads): float(rate) for threads, rate in known["memory"].items()},
                rates=tuple(Rate(*row) for row in known["rates"]),
                attention=None if known["attention"] is None else Attention(*known["attention"]),
                overhead=None if known["overhead"] is None else Overhead(*known["overhead"]),
                exchange=tuple(Exchange(*row) for row in known["exchange"]),
                disks={disk: tuple(Reads(*row) for row in rows) for disk, rows in known["disks"].items()},
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: {error}; delete it and run `moe probe` again") from None


_FIELDS: Mapping[str, Kinds] = {
    **dict.fromkeys(("name", "when"), (str,)),
    "cores": (int,),
    "copy_bytes_per_s": (float, int),
    **dict.fromkeys(("memory", "disks"), (dict,)),
    **dict.fromkeys(("rates", "exchange"), (list, tuple)),
    **dict.fromkeys(("attention", "overhead"), (list, tuple, type(None))),
}


def load_machine(path: Path, name: str) -> Machine | None:
    """What the file says of this machine; None if it says nothing. Raises ValueError for a damaged file."""
    stored = _read(path)
    return Machine.of(str(path), stored[name]) if name in stored else None


def lacks(machine: Machine | None, disk: str, *, whole: bool = False) -> bool:
    """Whether nothing is known of this machine, or of this disk of it; whole: or not all that `moe probe` measures."""
    return machine is None or disk not in machine.disks or (whole and machine.overhead is None)


@contextmanager
def measures_alone(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """One process at a time measures for the file `path`, from what it holds to what is saved there: two would slow
    each other, and the second forget what the first found. waits: called where another does, until which has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)  # no limit: it is let go of when that process saves, or ends in any way
        yield


def save_machine(path: Path, machine: Machine) -> None:
    """In place of what was known of it; other machines stay. Whoever reads meanwhile sees the old file or the new; who
    writes has it to himself by `measures_alone`."""
    stored = {**_read(path), machine.name: machine.stored()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(stored, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; delete it and run `moe probe` again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no machines; delete it and run `moe probe` again")
    return stored


def machine_name(cores: int, instructions: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What figures of the processor are valid for: its model, the cores that this process may use, the kernels' set."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'unknown processor'}, {cores} cores, {instructions}"


def disk_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The file system that holds a folder, by source and type, such as "/dev/nvme0n1p2 ext4"."""
    real, best = folder.resolve(), ("", "unknown")
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        before, _, after = line.partition(" - ")
        point, (kind, source) = before.split()[4], after.split()[:2]
        if real.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, f"{source} {kind}"
    return best[1]


def _between(points: Iterable[tuple[float, float]], at: float) -> float:
    known = list(points)
    if at <= known[0][0]:
        return known[0][1]
    for (a, low), (b, high) in pairwise(known):
        if at <= b:
            part = math.log(at / a) / math.log(b / a)
            return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    return known[-1][1] * at / known[-1][0]
