"""What a step costs beside its weights: attention, the engine's own work, and handing over what is read.

In a run weights pass between two pieces of such work and take the nearest caches with them; `evict` does so here, and
its time is not counted.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe.comm.groups import Groups
from moe.config import BatchConfig, EngineConfig
from moe.kernels.cpu import CpuExperts
from moe.kernels.cpu_block import Block, CpuBlock, Linear, Step
from moe.kernels.weights import Activation
from moe.layer.runners import Resident, Waves
from moe.llm import LLM
from moe.models.load import quiet
from moe.offload.cache import ExpertCache
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.params import SamplingParams
from moe.placement.machine import Attention, Overhead

EVICTED_BYTES = 8 << 20  # read between two pieces of work: what a layer's experts take, more than the nearest caches
TOY_TOP_K = 2
_APART_S = 0.003  # between two arrivals: longer than one takes to compute


def usual_seconds(work: Callable[[int], object], threads: int, repeats: int = 7) -> float:
    """Of `work(0)`, `work(1)`, … after one call that warms up.

    The median of this thread's CPU seconds where it is the only one; else the least by the clock, for other jobs that
    stop one of several threads only add to it.
    """
    times = _times(work, threads, repeats)
    return statistics.median(times) if threads == 1 else min(times)


def _times(work: Callable[[int], object], threads: int, repeats: int) -> list[float]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    work(repeats)
    times = []
    for number in range(repeats):
        start = clock()
        work(number)
        times.append(clock() - start)
    return times


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


class Evict:
    """Reads other memory each time, as weights do; `seconds` by the given clock are to be taken off what is timed."""

    def __init__(self, slab: Tensor, clock: Callable[[], float]) -> None:
        self._pieces = slab[: len(slab) // EVICTED_BYTES * EVICTED_BYTES].view(torch.int32).view(-1, EVICTED_BYTES // 4)
        self._clock, self._next, self.seconds = clock, 0, 0.0

    def __call__(self) -> None:
        start = self._clock()
        self._pieces[self._next].max()
        self._next = (self._next + 1) % len(self._pieces)
        self.seconds += self._clock() - start


def measure_overhead(slab: Tensor) -> Overhead:
    """From steps of toy models of 2 and 10 layers, at 1 and 8 sequences, and from misses that read nothing."""
    steps: dict[tuple[int, int, bool], float] = {}
    for layers in (2, 10):
        with tempfile.TemporaryDirectory() as folder:
            write_toy(folder, layers)
            for batch, apart in product((1, 8), (False, True)):
                steps[layers, batch, apart] = toy_step(folder, slab, batch, apart=apart)
    layer, alone = ({n: (steps[10, n, apart] - steps[2, n, apart]) / 8 for n in (1, 8)} for apart in (False, True))
    rest = {n: steps[2, n, False] - 2 * layer[n] for n in (1, 8)}
    more = {n: max(0.0, alone[n] - layer[n]) for n in (1, 8)}
    per_layer, per_step, per_apart = (max(0.0, (each[8] - each[1]) / 7) for each in (layer, rest, more))
    waits = miss_seconds(slab)
    wave = {rows: max(0.0, (waits[rows, 3] - waits[rows, 1]) / 2) for rows in (1, 8)}
    miss = {rows: max(0.0, waits[rows, 1] - waits[rows, 0] - wave[rows]) for rows in (1, 8)}
    wave_row, miss_row = (max(0.0, (each[8] - each[1]) / 7) for each in (wave, miss))
    return Overhead(
        step=max(0.0, rest[1] - per_step),
        step_sequence=per_step,
        layer=max(0.0, layer[1] - per_layer),
        layer_sequence=per_layer,
        waves=max(0.0, waits[1, 0] - waits[1, None]),
        miss=max(0.0, miss[1] - miss_row),
        miss_row=miss_row,
        wave=max(0.0, wave[1] - wave_row),
        wave_row=wave_row,
        apart=max(0.0, more[1] - per_apart),
        apart_sequence=per_apart,
    )


def write_toy(folder: str | Path, layers: int, hidden: int = 64) -> None:
    """A model with next to no weights."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=TOY_TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def toy_step(
    folder: str | Path,
    slab: Tensor,
    batch: int,
    groups: Groups | None = None,
    *,
    by_clock: bool = False,
    apart: bool = True,
) -> float:
    """Seconds of a decoding step of what `write_toy` wrote, caches emptied before it.

    apart: and between its layers, which are then not computed by one call. batch: of this process. CPU seconds, or by
    the clock; with groups always by the clock, and a collective.
    """
    clock = time.perf_counter if by_clock or groups is not None else time.thread_time
    evict = Evict(slab, clock)
    settings = EngineConfig(threads=1, batch=BatchConfig(prefix_sharing=False))
    with LLM(folder, settings, experts_in_memory=1.0, groups=groups) as llm:
        for site in llm.engine.blueprint.index.sites if apart else ():
            _evict_after(llm.engine.model.get_submodule(site.module), evict)
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
        for number in range(batch):
            llm.add([number + 1, 7], params)
        llm.engine.start()
        times = []
        while llm.engine.has_work:
            evict()
            start, evict.seconds = clock(), 0.0
            llm.step()
            times.append(clock() - start - evict.seconds)
    return statistics.median(times[4:-2])


def _evict_after(experts: Any, evict: Evict) -> None:
    compute = experts.compute

    def cold(*args: Any) -> Tensor:
        result: Tensor = compute(*args)
        evict()
        return result

    experts.compute = cold


class NullStore:
    """Experts that come one by one, slowly, and cost nothing to read once `is_filling` is off: what is timed is handing
    reads over and back."""

    def __init__(self, layout: ExpertLayout, num_experts: int) -> None:
        self.layouts, self.num_experts = [layout], [num_experts]
        self.is_filling = True  # memory that nobody wrote to is one page of zeros, which no cache loses

    def read_into(self, layer: int, expert: int, out: Tensor) -> int:
        if self.is_filling:
            out.fill_(0x3C)
        else:
            time.sleep(_APART_S)
        return len(out)

    def close(self) -> None:
        """There is nothing."""


def miss_seconds(slab: Tensor) -> dict[tuple[int, int | None], float]:
    """CPU seconds of a layer of four experts by (rows, how many of them have to be read, each arriving alone).

    None: by the runner that knows that all are there.
    """
    # As large as real ones: rows are moved between waves, and weights push the engine's own data out of caches.
    site = ExpertSite(module="probe", num_experts=16, hidden_size=1024, intermediate_size=768)
    layout = ExpertLayout.of(site, MatrixFormat(torch.bfloat16))
    store = NullStore(layout, 16)
    cache, whole = (ExpertCache(store, slots, num_readers=1) for slots in (8, 16))
    evict = Evict(slab, time.thread_time)
    try:
        cache.preload()
        whole.preload()
        store.is_filling = False
        pinned = whole.pin()
        assert pinned is not None, "all experts were preloaded"
        kernels = [CpuExperts(layout.weights(one.views(0), Activation())) for one in (cache, whole)]
        waves, resident = Waves(cache, kernels[:1], lambda: None), Resident(pinned, kernels[1:])
        found: dict[tuple[int, int | None], float] = {}
        for rows in (1, 8):
            x, weights = torch.zeros(rows, 1024, dtype=torch.bfloat16), torch.full((rows, 4), 0.25)
            for misses in (None, 0, 1, 3):
                times = []
                for _ in range(40):
                    there = np.flatnonzero(cache.map.of_layer[0] >= 0).tolist()
                    absent = [e for e in range(16) if e not in there]
                    chosen = [*there[: 4 - (misses or 0)], *absent[: misses or 0 if there else 4]][:4]
                    ids = torch.tensor([chosen]).expand(rows, 4)
                    evict()
                    start = time.thread_time()
                    (resident if misses is None else waves).run(0, x, ids, weights)
                    times.append(time.thread_time() - start)
                found[rows, misses] = statistics.median(times[4:])
        return found
    finally:
        cache.close()
        whole.close()
