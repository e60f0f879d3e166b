"""Phases of the GPU session about what is around the kernels: the host's cost, copies, and the engine whole."""

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import walk_model
from bench.gpu_layers import (
    QWEN,
    TINY,
    Case,
    Single,
    distance,
    grouped,
)
from bench.gpu_run import Session
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.params import SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "examples" / "tinymoe"


def host(s: Session) -> None:
    """What Python costs: a layer's call, a TMA descriptor, waits of the host in a step, stalls on a compiler."""
    case = Case(TINY[0] if s.tiny else QWEN, s.device, s.dtype)
    inputs, calls = case.inputs(1, "balanced"), 2 if s.tiny else 200
    for name, run in (("grouped", grouped(case)), ("single", Single(case, 1, 16))):
        with s.rows.attempt(what="call", path=name):
            run(*inputs)
            _wait(s)
            start = time.perf_counter()
            for _ in range(calls):
                run(*inputs)
            us = (time.perf_counter() - start) / calls * 1e6
            _wait(s)
            s.rows.add(what="call", path=name, host_us=us)
    with s.rows.attempt(what="descriptor"):
        from triton.tools.tensor_descriptor import TensorDescriptor

        start = time.perf_counter()
        for _ in range(calls):
            TensorDescriptor.from_tensor(case.weights.down, [1, 16, 16])
        s.rows.add(what="descriptor", host_us=(time.perf_counter() - start) / calls * 1e6)
    with s.rows.attempt(what="stalls"):
        run, slow = grouped(case), {}
        for tokens in (1,) if s.tiny else range(1, 65):
            one = case.inputs(tokens, "balanced")
            _wait(s)
            start = time.perf_counter()
            run(*one)
            _wait(s)
            if time.perf_counter() - start > 0.05:
                slow[tokens] = round(time.perf_counter() - start, 2)
        s.rows.add(what="stalls", seconds_by_tokens=slow)
    with s.rows.attempt(what="step"):
        _profiled_step(s)


def _wait(s: Session) -> None:
    if s.on_gpu:
        torch.cuda.synchronize()


def _profiled_step(s: Session) -> None:
    """Operators, launches, copies and waits of one decoding step of the demo model."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if s.on_gpu else []
    with LLM(DEMO, experts_in_memory=1.0) as llm:
        llm.add(llm.encode("Once upon a time"), SamplingParams(max_tokens=16, ignore_eos=True))
        for _ in range(6):
            llm.step()
        with torch.profiler.profile(activities=activities) as profile:
            llm.step()
        counts: dict[str, int] = {}
        for event in profile.events():
            kind = "operators" if event.name.startswith("aten::") else event.name
            if kind == "operators" or kind.startswith(
                ("cudaStreamSync", "cudaMemcpy", "cudaLaunch", "cudaGraphLaunch")
            ):
                counts[kind] = counts.get(kind, 0) + 1
        s.rows.add(what="step", layers=llm.engine.blueprint.config.num_hidden_layers, counts=counts)


def copies(s: Session) -> None:
    """Experts from pinned host memory: by the copy engine, by several streams, by a kernel, and read where they lie."""
    nbytes = 1 << 12 if s.tiny else 3 * QWEN.hidden * QWEN.inter * 2
    most = 2 if s.tiny else 64
    source = torch.zeros(most, nbytes, dtype=torch.uint8, pin_memory=s.on_gpu)
    target = torch.zeros(most, nbytes, dtype=torch.uint8, device=s.device)
    for number in (1, 2) if s.tiny else (1, 4, 16, 64):
        for streams in (1, 2) if s.tiny else (1, 2, 4):
            with s.rows.attempt(how="copies", experts=number, streams=streams):
                us = s.clock.median_us(lambda: _copied(s, source, target, number, streams), s.repeats)  # noqa: B023
                s.rows.add(how="copies", experts=number, streams=streams, gb_per_s=number * nbytes / us / 1e3)
        with s.rows.attempt(how="one copy", experts=number):
            whole = lambda: target[:number].copy_(source[:number], non_blocking=True)  # noqa: B023, E731
            s.rows.add(
                how="one copy", experts=number, gb_per_s=number * nbytes / s.clock.median_us(whole, s.repeats) / 1e3
            )
        with s.rows.attempt(how="by a kernel", experts=number):
            from bench.host_gather import gather

            which = torch.arange(number, dtype=torch.int32, device=s.device)
            call = lambda: gather(source, target, which)  # noqa: B023, E731
            s.rows.add(
                how="by a kernel", experts=number, gb_per_s=number * nbytes / s.clock.median_us(call, s.repeats) / 1e3
            )
    if s.on_gpu:
        with s.rows.attempt(how="experts read in host memory"):
            _read_in_place(s)


def _copied(s: Session, source: Tensor, target: Tensor, number: int, streams: int) -> None:
    if not s.on_gpu:
        target[:number].copy_(source[:number])
        return
    here = torch.cuda.current_stream()
    sides = [torch.cuda.Stream() for _ in range(streams)]
    for n, side in enumerate(sides):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for expert in range(n, number, streams):
                target[expert].copy_(source[expert], non_blocking=True)
        here.wait_stream(side)


def _read_in_place(s: Session) -> None:
    """The grouped path over weights that lie in pinned host memory."""
    case = Case(replace(QWEN, experts=8, of=8, name="8 experts"), s.device, s.dtype)
    pinned = case.weights._replace(
        gate_up=case.weights.gate_up.cpu().pin_memory(), down=case.weights.down.cpu().pin_memory()
    )
    inputs = case.inputs(1, "balanced")
    run = grouped(case, pinned)
    error = distance(run(*inputs), grouped(case)(*inputs))
    us = s.clock.median_us(lambda: run(*inputs), s.repeats)
    nbytes = pinned.gate_up.nbytes + pinned.down.nbytes
    s.rows.add(how="experts read in host memory", gb_per_s=nbytes / us / 1e3, error=error)


def engine(s: Session) -> None:
    """Tokens per second of a Qwen3-30B-A3B-shaped model of 12 layers (heads of 64, of which there are 32 and 8).

    Its greedy tokens are known (bench/walk_model.py), so that every row is checked. Of 48 layers: four times the step,
    which counts the head four times, so the real figure is higher.
    """
    model = walk_model.WalkModel(layers=12, experts=128, top_k=8, hidden=2048, width=768, vocab=151936)
    folder = Path(tempfile.mkdtemp(prefix="gpu-session-"))
    try:
        with s.rows.attempt(what="model"):
            start = time.perf_counter()
            walk_model.write(folder / "model", walk_model.TINY if s.tiny else model)
            s.rows.add(what="model", seconds=time.perf_counter() - start)
        batches = (1, 2) if s.tiny else (1, 16, 64)
        runs = [Run("auto", budget, store, "auto", batches) for budget, store in BUDGETS]
        if s.tiny:  # the device's own path, interpreted: seconds a step
            runs[1:3] = [Run("grouped", "0.5", "ram", "auto", (1,))]
        runs[1:1] = [Run("auto", "1.0", "file", "off", batches)]
        for run in (*runs, Run("reference", "1.0", "file", "off", (1,))):
            with s.rows.attempt(**run.told):
                _engine_rows(s, folder / "model", run)
    finally:
        shutil.rmtree(folder)


BUDGETS = (("1.0", "file"), ("0.5", "ram"), ("0.25", "ram"), ("0.5", "file"), ("0.25", "file"))


class Run(NamedTuple):
    """Settings of an engine, and the batches that it serves."""

    kernel: Any
    budget: str
    store: Any
    graphs: Any
    sizes: tuple[int, ...]

    @property
    def told(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "budget": self.budget, "store": self.store, "graphs": self.graphs}


def _engine_rows(s: Session, folder: Path, run: Run) -> None:
    kernel, sizes = run.kernel, run.sizes
    new, prompt = (4 if kernel == "auto" else 2, 8) if s.tiny else (64 if kernel == "auto" else 8, 64)
    config = EngineConfig(
        kernel=kernel,
        graphs=run.graphs,
        dtype="bfloat16" if s.on_gpu else "float32",
        crossover_table=str(folder / "crossover.json"),
        offload=OffloadConfig(budget=run.budget, store=run.store, prefetch="off"),
        batch=BatchConfig(max_sequences=max(sizes), kv_tokens=max(sizes) * 256, prefix_sharing=False),
    )
    start = time.perf_counter()
    with LLM(folder, config) as llm:
        loaded, first = time.perf_counter() - start, llm.engine
        for size in (sizes[0], *sizes):  # the first only warms up
            prompts = walk_model.prompts_of(folder, size, prompt, seed=size)
            before = replace(first.stats)
            cache = first.experts.cache if first.experts is not None else None
            if cache is not None:
                cache.reset_stats()
            said = llm.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True), use_tqdm=False)
            right = [o.outputs[0].token_ids for o in said] == walk_model.answers_to(folder, prompts, new)
            steps = new - 1
            seconds = (first.stats.decode_seconds - before.decode_seconds) / steps
            totals = [] if cache is None else first.layer_stats()
            s.rows.add(
                **run.told,
                replays=getattr(getattr(first.loaded.memory.runner, "replays", None), "num_replays", 0),
                by_blocks=getattr(first.loaded.memory.runner, "decoding", None) is not None,
                batch=size,
                right=right,
                loaded_s=round(loaded, 1),
                step_ms=seconds * 1e3,
                tokens_per_s=size / seconds,
                of_48_layers=size / seconds / 4,
                prefill_tokens_per_s=(first.stats.prefill_tokens - before.prefill_tokens)
                / max(first.stats.prefill_seconds - before.prefill_seconds, 1e-9),
                hits=sum(t.hits for t in totals),
                misses=sum(t.misses for t in totals),
                bytes_read=sum(t.bytes_read for t in totals),
                stall_s=sum(t.stall_seconds for t in totals),
            )
            if not right:
                raise ValueError(f"WRONG: tokens of batch {size} are not the model's")
