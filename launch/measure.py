"""Some seconds of measuring this machine, for automatic choices.

What is timed are the parts that a run is made of: the compiled kernels by rows and format, attention, random reads of
the sizes that experts have, and what is left of a step whose weights weigh nothing. No model of the user's is run.
One thread's work is timed in CPU seconds and all else by the clock, medians, so that other jobs disturb it less.
"""

import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe.config import BatchConfig, EngineConfig
from moe.engine.choices import this_machine
from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.cpu_block import Block, CpuBlock, Linear, Step
from moe.kernels.weights import Activation
from moe.launch.console import err
from moe.layer.runners import Waves
from moe.llm import LLM
from moe.models.dense_cpu import CompiledLinear
from moe.offload.cache import ExpertCache
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ALIGNMENT, ExpertLayout, ExpertSite
from moe.offload.requantise import target_format
from moe.offload.stores import aligned_bytes
from moe.params import SamplingParams
from moe.placement.machine import (
    Attention,
    How,
    Machine,
    Overhead,
    Rate,
    Reads,
    disk_of,
)

HIDDEN, WIDTH = 1024, 768  # of the expert that is timed
SLAB_BYTES = 512 << 20  # more than caches hold
FILE_BYTES = 256 << 20
READ_SIZES = tuple(1 << n for n in (18, 20, 22, 24))
DEPTHS = (1, 2, 4, 8)
EXPERT_ROWS, DENSE_ROWS = (1, 2, 4, 8, 16, 64), (1, 4, 16, 64, 256)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def probe(folder: Path, known: Machine | None = None) -> Machine:
    """All figures of one process. known: what was measured before; other disks and the links of ranks stay.

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
        memory = {threads: memory_bytes_per_s(slab, threads) for threads in sorted({1, min(2, cores), cores})}
        torch.set_num_threads(1)
        _say("attention")
        attention = measure_attention()
        _say("what a step costs without weights")
        overhead = measure_overhead()
    finally:
        torch.set_num_threads(before)
    _say(f"reads in {folder}")
    disks = {disk_of(folder): tuple(measure_reads(folder))}
    machine = Machine(
        name=this_machine(),
        when=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cores=cores,
        memory=memory,
        rates=tuple(rates),
        attention=attention,
        overhead=overhead,
        disks=disks,
    )
    if known is None:
        return machine
    return replace(machine, disks={**known.disks, **disks})


def _say(what: str) -> None:
    err.print(f"measuring {what} …", style="dim", markup=False)


def median_seconds(work: Callable[[int], object], threads: int, repeats: int = 7) -> float:
    """Of `work(0)`, `work(1)`, … after one call that warms up; CPU seconds of this thread where it is the only one."""
    return statistics.median(_times(work, threads, repeats))


def _times(work: Callable[[int], object], threads: int, repeats: int) -> list[float]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    work(repeats)
    times = []
    for number in range(repeats):
        start = clock()
        work(number)
        times.append(clock() - start)
    return times


def memory_bytes_per_s(slab: Tensor, threads: int) -> float:
    torch.set_num_threads(threads)
    numbers = slab.view(torch.float32).view(-1, 8192)
    vector = torch.ones(8192)
    return slab.nbytes / median_seconds(lambda _: numbers @ vector, threads, 5)


def expert_rates(slab: Tensor, threads: int, shape: tuple[int, int] = (HIDDEN, WIDTH)) -> Iterator[Rate]:
    """Four experts a call, others each time, so that they come from memory."""
    hidden, width = shape
    site = ExpertSite(module="probe", num_experts=4, hidden_size=hidden, intermediate_size=width)
    formats = {name: MatrixFormat(dtype) for name, dtype in FLOATS.items()}
    formats |= {name: target_format(name, None) for name in ("int8", "int4")}
    for name, each in formats.items():
        layout = ExpertLayout.of(site, each)
        count = len(slab) // layout.nbytes
        blobs = slab[: count * layout.nbytes].view(count, layout.nbytes)
        kernel = CpuExperts(layout.weights(layout.views(blobs), Activation()))
        for rows in EXPERT_ROWS:
            x = torch.ones(rows, hidden, dtype=torch.float32 if name == "float32" else torch.bfloat16)
            weights = torch.full((rows, 4), 0.25)

            def call(number: int, rows: int = rows, count: int = count) -> object:
                ids = (torch.arange(4) + 4 * number) % count
                return kernel.combine(x, ids.repeat(rows, 1), weights)  # noqa: B023

            yield Rate("expert", name, threads, rows, median_seconds(call, threads) / (4 * 3 * hidden * width))


def dense_rates(slab: Tensor, threads: int, shape: tuple[int, int] = (HIDDEN, HIDDEN)) -> Iterator[Rate]:
    """Layers as the engine has them on a CPU; four a call, others each time."""
    for name, dtype in FLOATS.items():
        weights = slab.view(dtype).view(-1, *shape)
        layers = [_linear(weight) for weight in weights[: 4 * 8]]
        for rows in DENSE_ROWS:
            x = torch.ones(rows, shape[1], dtype=dtype)

            def call(number: int) -> None:
                for layer in layers[4 * number : 4 * number + 4]:  # noqa: B023
                    layer(x)  # noqa: B023

            with torch.inference_mode():
                yield Rate("dense", name, threads, rows, median_seconds(call, threads) / (4 * shape[0] * shape[1]))


def _linear(weight: Tensor) -> CompiledLinear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return CompiledLinear(layer)


def measure_attention() -> Attention:
    """Of the compiled block in bfloat16, 16 heads of 64 over 4: what is left when the same rows see fewer keys."""
    heads, kv_heads, dim, long, prompt, size = 16, 4, 64, 2048, 256, 16
    block = _block(heads, kv_heads, dim)
    pool = [torch.zeros(long, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2)]
    compiled = CpuBlock(block, *pool)

    def seconds(begin: int, end: int) -> float:
        """Of the tokens [begin, end) of one sequence."""
        tokens, most = end - begin, -(-end // size)
        step = Step(
            torch.ones(tokens, dim, dtype=torch.bfloat16),
            torch.zeros(tokens, dim, dtype=torch.bfloat16),
            torch.tensor([0, tokens]),
            torch.tensor([end]),
            torch.arange(most, dtype=torch.int32)[None],
            size,
        )
        h = torch.ones(tokens, heads * dim, dtype=torch.bfloat16)
        work = torch.empty(compiled.work_bytes(tokens), dtype=torch.uint8)
        return min(_times(lambda _: compiled(h, None, step, work), 1, 15))  # other work only adds

    far = seconds(long - 1, long) - seconds(size - 1, size)
    whole = seconds(0, 2 * prompt) - 2 * seconds(0, prompt)  # rows cancel, pairs do not
    if min(far, whole) <= 0:
        raise ValueError("attention takes no longer with more keys, this machine is too busy to tell; try again later")
    return Attention((long - size) * 2 * kv_heads * dim * 2 / far, 2 * prompt**2 * heads * dim / whole)


def _block(heads: int, kv_heads: int, dim: int) -> Block:
    hidden = heads * dim

    def linear(rows: int, columns: int) -> Linear:
        return Linear(torch.full((rows, columns), 0.01, dtype=torch.bfloat16), None)

    return Block(
        q=linear(heads * dim, hidden),
        k=linear(kv_heads * dim, hidden),
        v=linear(kv_heads * dim, hidden),
        o=linear(hidden, heads * dim),
        norm=torch.ones(hidden, dtype=torch.bfloat16),
        next_norm=torch.ones(hidden, dtype=torch.bfloat16),
        q_norm=None,
        k_norm=None,
        sinks=None,
        router=None,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        rotary=dim,
        window=0,
        top_k=0,
        normalize=False,
        round_weights=False,
        eps=1e-6,
        head_eps=0.0,
        scale=dim**-0.5,
    )


def measure_overhead() -> Overhead:
    """From steps of toy models of 2 and 10 layers, at 1 and 8 sequences, and from misses that read nothing."""
    steps = {(layers, batch): _toy_step(layers, batch) for layers in (2, 10) for batch in (1, 8)}
    layer = {batch: (steps[10, batch] - steps[2, batch]) / 8 for batch in (1, 8)}
    rest = {batch: steps[2, batch] - 2 * layer[batch] for batch in (1, 8)}
    per_layer, per_step = max(0.0, (layer[8] - layer[1]) / 7), max(0.0, (rest[8] - rest[1]) / 7)
    waits = _miss_seconds()
    wave = max(0.0, (waits[3] - waits[1]) / 2)
    return Overhead(
        step=max(0.0, rest[1] - per_step),
        step_sequence=per_step,
        layer=max(0.0, layer[1] - per_layer),
        layer_sequence=per_layer,
        miss=max(0.0, waits[1] - waits[0] - wave),
        wave=wave,
    )


def _toy_step(layers: int, batch: int) -> float:
    """CPU seconds of a decoding step of a model whose weights fit the processor's nearest cache."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
        settings = EngineConfig(threads=1, batch=BatchConfig(prefix_sharing=False))
        with LLM(folder, settings, experts_in_memory=1.0) as llm:
            params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
            for number in range(batch):
                llm.add([number + 1, 7], params)
            times = []
            while llm.engine.has_work:
                start = time.thread_time()
                llm.step()
                times.append(time.thread_time() - start)
    return statistics.median(times[4:-1])


class NullStore:
    """Experts that cost nothing to read: what is timed over it is handing reads over and back."""

    def __init__(self, layout: ExpertLayout, num_experts: int) -> None:
        self.layouts, self.num_experts = [layout], [num_experts]

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        return len(out)

    def close(self) -> None:
        """There is nothing."""


def _miss_seconds() -> dict[int, float]:
    """Seconds of a layer of four experts by how many of them have to be read; the least of many, by the clock."""
    site = ExpertSite(module="probe", num_experts=16, hidden_size=64, intermediate_size=704)  # above the inline limit
    layout = ExpertLayout.of(site, MatrixFormat(torch.float32))
    cache = ExpertCache(NullStore(layout, 16), 8, num_readers=2)
    try:
        kernel = CpuExperts(layout.weights(cache.views(0), Activation()))
        waves = Waves(cache, [kernel], lambda: None)
        x, weights = torch.zeros(1, 64), torch.full((1, 4), 0.25)
        found = {}
        for misses in (0, 1, 3):
            times = []
            for _ in range(60):
                there = np.flatnonzero(cache.map.of_layer[0] >= 0).tolist()
                absent = [e for e in range(16) if e not in there]
                ids = torch.tensor([[*there[: 4 - misses], *absent[: misses if there else 4]][:4]])
                start = time.perf_counter()
                waves.run(0, x, ids, weights)
                times.append(time.perf_counter() - start)
            found[misses] = min(times[4:])
        return found
    finally:
        cache.close()


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
        path = Path(file.name)
        total = path.stat().st_size
        for how in ("direct", "buffered", "cached"):
            with suppress(OSError), _opened(path, how) as opened:
                for size in (one for one in sizes if one <= total):
                    for depth in depths if how == "direct" else (1, 2):
                        yield Reads(how, size, depth, _read_rate(opened, how, size, depth, total))


@contextmanager
def _opened(path: Path, how: How) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    try:
        yield file
    finally:
        os.close(file)


def _read_rate(file: int, how: How, size: int, depth: int, total: int) -> float:
    """The median of three; each reads at most 64 MiB in random order, no place twice."""
    order = np.random.default_rng(size + depth)
    rates = []
    for _ in range(3):
        offsets = order.permutation(total // size)[: max(depth, (64 << 20) // size)] * size
        buffers = [aligned_bytes(-(-size // ALIGNMENT) * ALIGNMENT).numpy().data for _ in range(depth)]
        if how == "buffered":
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

        def work(thread: int) -> None:
            for offset in offsets[thread::depth].tolist():  # noqa: B023
                os.preadv(file, [buffers[thread][:size]], offset)  # noqa: B023

        if how == "cached":
            with ThreadPoolExecutor(depth) as pool:
                list(pool.map(work, range(depth)))
        start = time.perf_counter()
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(work, range(depth)))
        rates.append(len(offsets) * size / (time.perf_counter() - start))
    return statistics.median(rates)
