"""Some seconds of measuring this machine, for automatic choices.

What is timed are the parts that a run is made of: the compiled kernels by rows and format, attention, random reads of
the sizes that experts have while a thread computes, what is left of a step whose weights weigh nothing
(measure_step.py), and what ranks of this machine tell each other (measure_ranks.py). No model of the user's is run.
One thread's work is timed in CPU seconds, medians, that of several by the clock, the least: other jobs disturb it less.
"""

import datetime
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moe.engine.known import this_machine
from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.cpu_linear import CpuLinear
from moe.kernels.weights import Activation
from moe.launch.console import err
from moe.launch.measure_ranks import measure_exchange
from moe.launch.measure_step import measure_attention, measure_overhead, usual_seconds
from moe.models.dense_cpu import CompiledLinear
from moe.offload.deepnvme import Handle, LockedReads, aio_handles, is_built
from moe.offload.formats.slot import BF12, MatrixFormat
from moe.offload.layout import ALIGNMENT, ExpertLayout, ExpertSite
from moe.offload.requantise import target_format
from moe.offload.stores import aligned_bytes
from moe.placement.machine import Exchange, How, Machine, Rate, Reads, disk_of

HIDDEN, WIDTH = 1024, 768  # of the expert that is timed
SLAB_BYTES = 512 << 20  # more than caches hold
FIRST_SLAB_BYTES = 128 << 20  # of a first run, whose memory is the model's
FILE_BYTES = 256 << 20
RATE_BYTES = 64 << 20  # that one rate of reads is timed over, at most
FIRST_RATE_BYTES = 16 << 20
READ_SIZES = tuple(1 << n for n in (18, 20, 22, 24))
DEPTHS = (1, 2, 4, 8)
EXPERT_ROWS, DENSE_ROWS = (1, 2, 4, 8, 16, 64), (1, 4, 16, 64, 256)
_LAYERS = 4 * 8  # linear ones that are timed
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def probe(folder: Path, known: Machine | None = None) -> Machine:
    """All figures of this machine. known: what was measured before; other disks stay.

    Takes half a GiB of memory, and for the time of reading a quarter of a GiB in `folder`. Raises ValueError without
    the compiled kernels.
    """
    if not instruction_sets():
        raise ValueError("the compiled kernels are not there, nothing else is measured; reinstall with a compiler")
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    slab = aligned_bytes(SLAB_BYTES).fill_(0x3C)  # finite and not small in every format
    try:
        rates: list[Rate] = []
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            _say(f"kernels with {threads} thread(s)")
            rates += [*expert_rates(slab, threads), *dense_rates(slab, threads)]
        torch.set_num_threads(1)
        memory = {threads: memory_bytes_per_s(slab, threads) for threads in sorted({1, min(2, cores), cores})}
        _say("attention")
        attention = measure_attention()
        _say("what a step costs without weights")
        overhead = measure_overhead(slab)
        copy = copy_bytes_per_s(slab)
        _say(f"reads in {folder}")
        with computing(slab):
            disks = {disk_of(folder): tuple(measure_reads(folder))}
    finally:
        torch.set_num_threads(before)
    del slab
    exchange: tuple[Exchange, ...] = ()
    if cores > 1:
        _say("two ranks of this machine")
        exchange = (measure_exchange(2),)
    machine = Machine(
        name=this_machine(),
        when=_now(),
        cores=cores,
        memory=memory,
        rates=tuple(rates),
        attention=attention,
        overhead=overhead,
        copy_bytes_per_s=copy,
        exchange=exchange,
        disks=disks,
    )
    if known is None:
        return machine
    return replace(machine, disks={**known.disks, **disks})


def probe_first(file: Path, nbytes: int, known: Machine | None) -> Machine:
    """What the choices of a run start from and nothing else: kernels of one row, and reads of a model's own file.

    file: of experts, at least as large as `nbytes`, an expert's. known: measured before; its kernels stay, as do other
    disks. Writes nothing, takes 128 MiB and, on a disk of 200 MB/s, five seconds. Raises OSError for a file that cannot
    be read.
    """
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    slab = aligned_bytes(FIRST_SLAB_BYTES).fill_(0x3C)
    rates: list[Rate] = []
    try:
        for threads in sorted({1, cores}) if known is None else ():
            torch.set_num_threads(threads)
            rates += [*expert_rates(slab, threads, rows_of=(1,)), *dense_rates(slab, threads, rows_of=(1,))]
        torch.set_num_threads(1)
        machine = known or Machine(
            name=this_machine(),
            when=_now(),
            cores=cores,
            memory={1: memory_bytes_per_s(slab, 1)},
            rates=tuple(rates),
            copy_bytes_per_s=copy_bytes_per_s(slab),
        )
        sizes = [n for n in READ_SIZES if n // 4 < nbytes < n * 4]
        with computing(slab):
            reads = tuple(rates_of_reads(file, sizes or [READ_SIZES[-1]], DEPTHS, FIRST_RATE_BYTES))
    finally:
        torch.set_num_threads(before)
    return replace(machine, disks={**machine.disks, disk_of(file.parent): reads})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _say(what: str) -> None:
    err.print(f"measuring {what} …", style="dim", markup=False)


def memory_bytes_per_s(slab: Tensor, threads: int) -> float:
    """What so many threads read together, each its own part, in CPU seconds of each."""
    parts = slab.view(torch.float32).view(threads, -1, 8192)
    vector = torch.ones(8192)
    start = threading.Barrier(threads)

    def seconds(part: Tensor) -> float:
        start.wait(60)
        return usual_seconds(lambda _: part @ vector, 1, 5)

    with ThreadPoolExecutor(threads) as pool:
        return sum(slab.nbytes / threads / each for each in pool.map(seconds, parts))


def copy_bytes_per_s(slab: Tensor) -> float:
    """Of one thread, from memory to memory."""
    half = len(slab) // 2
    return half / usual_seconds(lambda _: slab[:half].copy_(slab[half:]), 1, 5)


@contextmanager
def computing(slab: Tensor) -> Iterator[None]:
    """Inside, another thread reads weights as a run does, so that what is timed shares memory and cores with it."""
    stop = threading.Event()
    numbers, vector = slab[: 64 << 20].view(torch.float32).view(-1, 8192), torch.ones(8192)

    def work() -> None:
        while not stop.is_set():
            numbers @ vector

    thread = threading.Thread(target=work, name="probe-compute", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()  # no limit: after one product


def expert_rates(
    slab: Tensor, threads: int, shape: tuple[int, int] = (HIDDEN, WIDTH), rows_of: Sequence[int] = EXPERT_ROWS
) -> Iterator[Rate]:
    """Four experts a call, others each time, so that they come from memory."""
    hidden, width = shape
    site = ExpertSite(module="probe", num_experts=4, hidden_size=hidden, intermediate_size=width)
    formats = {name: MatrixFormat(dtype) for name, dtype in FLOATS.items()}
    formats |= {name: target_format(name, None) for name in ("bf12", "int8", "int4")}
    for name, each in formats.items():
        layout = ExpertLayout.of(site, each)
        count = len(slab) // layout.nbytes
        blobs = slab[: count * layout.nbytes].view(count, layout.nbytes)
        kernel = CpuExperts(layout.weights(layout.views(blobs), Activation()))
        for rows in rows_of:
            x = torch.ones(rows, hidden, dtype=torch.float32 if name == "float32" else torch.bfloat16)
            weights = torch.full((rows, 4), 0.25)

            def call(number: int, rows: int = rows, count: int = count) -> object:
                ids = (torch.arange(4) + 4 * number) % count
                return kernel.combine(x, ids.repeat(rows, 1), weights)  # noqa: B023

            yield Rate("expert", name, threads, rows, usual_seconds(call, threads) / (4 * 3 * hidden * width))


def dense_rates(
    slab: Tensor, threads: int, shape: tuple[int, int] = (HIDDEN, HIDDEN), rows_of: Sequence[int] = DENSE_ROWS
) -> Iterator[Rate]:
    """Layers as the engine has them on a CPU; four a call, others each time."""
    kinds = dict[str, tuple[torch.dtype, Sequence[Callable[[Tensor], Tensor]]]]()
    for name, dtype in FLOATS.items():
        kinds[name] = dtype, [_linear(weight) for weight in slab.view(dtype).view(-1, *shape)[:_LAYERS]]
    kinds["bf12"] = torch.bfloat16, _short_linears(slab, shape)
    for name, (dtype, layers) in kinds.items():
        for rows in rows_of:
            x = torch.ones(rows, shape[1], dtype=dtype)

            def call(number: int) -> None:
                for layer in layers[4 * number : 4 * number + 4]:  # noqa: B023
                    layer(x)  # noqa: B023

            with torch.inference_mode():
                yield Rate("dense", name, threads, rows, usual_seconds(call, threads) / (4 * shape[0] * shape[1]))


def _short_linears(slab: Tensor, shape: tuple[int, int]) -> list[CpuLinear]:
    pieces, made = BF12.pieces(1, *shape), []
    sizes = [piece.nbytes for piece in pieces.values()]
    for one in slab[: len(slab) // sum(sizes) * sum(sizes)].view(-1, sum(sizes))[:_LAYERS]:
        parts = zip(pieces.items(), torch.split(one, sizes))
        views = {name: part.view(piece.dtype).view(1, *piece.shape) for (name, piece), part in parts}
        made.append(CpuLinear(views[""][0], coding=BF12.coding(views, ""), columns=shape[1]))
    return made


def _linear(weight: Tensor) -> CompiledLinear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return CompiledLinear(layer)


def measure_reads(
    folder: Path, nbytes: int = FILE_BYTES, sizes: Sequence[int] = READ_SIZES, depths: Sequence[int] = DEPTHS
) -> Iterator[Reads]:
    """Random reads of a file that is written here and removed; direct ones only where the file system has them."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moe-probe-") as file:
        piece = np.random.default_rng(0).bytes(1 << 22)
        for _ in range(0, nbytes, len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        yield from rates_of_reads(Path(file.name), sizes, depths, RATE_BYTES)


def rates_of_reads(path: Path, sizes: Sequence[int], depths: Sequence[int], most: int) -> Iterator[Reads]:
    """most: bytes that one rate is timed over."""
    total = path.stat().st_size
    for how in ("direct", "buffered", "cached"):
        with suppress(OSError), _opened(path, how) as opened:
            for size in (one for one in sizes if one <= total):
                for depth in depths if how == "direct" else (1, 2):
                    yield Reads(how, size, depth, _read_rate(opened, how, size, depth, total, most))
    if is_built():
        yield from deepnvme_rates(path, aio_handles(), sizes, depths, most)


def deepnvme_rates(
    path: Path, handles: Callable[[], Handle], sizes: Sequence[int], depths: Sequence[int], most: int
) -> Iterator[Reads]:
    """The same reads by DeepSpeed's handles, each thread its own, into memory that they locked and then to a slot."""
    total = path.stat().st_size
    reads = LockedReads(handles)
    try:
        for size in (one for one in sizes if one <= total):
            for depth in depths:
                buffers = [aligned_bytes(size) for _ in range(depth)]

                def read(thread: int, offset: int) -> None:
                    reads.read(path, offset, buffers[thread])  # noqa: B023

                yield Reads("deepnvme", size, depth, _rate_of(read, size, depth, total, most))
    finally:
        reads.close()


@contextmanager
def _opened(path: Path, how: How) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    try:
        yield file
    finally:
        os.close(file)


def _read_rate(file: int, how: How, size: int, depth: int, total: int, most: int) -> float:
    buffers = [aligned_bytes(-(-size // ALIGNMENT) * ALIGNMENT).numpy().data for _ in range(depth)]

    def read(thread: int, offset: int) -> None:
        os.preadv(file, [buffers[thread][:size]], offset)

    def forget() -> None:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    return _rate_of(
        read, size, depth, total, most, forget=forget if how == "buffered" else None, is_warm=how == "cached"
    )


def _rate_of(
    read: Callable[[int, int], None],
    size: int,
    depth: int,
    total: int,
    most: int,
    *,
    forget: Callable[[], None] | None = None,
    is_warm: bool = False,
) -> float:
    """The median of three; each reads at most `most` bytes or once a thread, in random order, no place twice.

    read: (thread, offset).
    """
    order = np.random.default_rng(size + depth)
    rates = []
    for _ in range(3):
        offsets = order.permutation(total // size)[: max(depth, most // size)] * size
        if forget is not None:
            forget()

        def work(thread: int) -> None:
            for offset in offsets[thread::depth].tolist():  # noqa: B023
                read(thread, offset)

        if is_warm:
            with ThreadPoolExecutor(depth) as pool:
                list(pool.map(work, range(depth)))
        start = time.perf_counter()
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(work, range(depth)))
        rates.append(len(offsets) * size / (time.perf_counter() - start))
    return statistics.median(rates)
