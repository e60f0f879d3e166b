"""One phase of the GPU session; `bench/gpu_session.sh` runs them all, each in a process and a time-out of its own.

    OUT=folder bash bench/gpu_session.sh                      ten minutes on one GPU, from a plain checkout
    python -m bench.gpu_session --out rows.jsonl kernels      one phase
    TINY=1 TRITON_INTERPRET=1 bash bench/gpu_session.sh       everything without a GPU; its times mean nothing

A measurement is a row (bench/gpu_measure.py), and so is a failure; nothing ends a phase but its time. Which limit
binds: for few tokens the weights of the active experts over the memory's rate, for many the matrix rate; the phase
`machine` measures both. Baselines beside the grouped path and the single launch: torch's grouped_mm, the usual tile of
two launches (bench/two_launch.py), and the published times of vLLM's kernel on an H200 (bench/data).
"""

import argparse
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor

from bench import walk_model
from bench.gpu_layers import (
    FLASH,
    GPT,
    LAYERS,
    MIXTRAL,
    ODD,
    QWEN,
    TINY,
    TINY_GPT,
    TINY_SLAB,
    Case,
    Layer,
    Single,
    candidates,
    error_of,
    grouped,
    loop,
    published,
)
from bench.gpu_measure import Clock, Rotation, Rows
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.kernels.gate import GateConfig, gate, gate_reference
from moe.kernels.intrinsics import is_interpreted
from moe.kernels.tiles import TileConfig, device_capability, pick_tiles
from moe.kernels.triton_experts import FusedLayerExperts, GroupedExperts, SingleLaunch, compile_at_start
from moe.llm import LLM
from moe.params import SamplingParams

DEMO = Path(__file__).resolve().parents[1] / "examples" / "tinymoe"
# bf16: h is rounded at other partial sums, results once; 8 bits are compared with what they decode to.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Session:
    """Where a phase runs, and how much it does."""

    rows: Rows
    device: torch.device
    clock: Clock
    tiny: bool
    jobs: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def layers(self) -> tuple[Layer, ...]:
        return TINY if self.tiny else LAYERS

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 12

    @property
    def routings(self) -> tuple[str, ...]:
        return ("power_law",) if self.tiny else ("balanced", "power_law", "one")

    def bytes_free(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.on_gpu else 1 << 30


def machine(s: Session) -> None:
    """What it is, and its ceilings in this run: memory, matrices, the host's link."""
    about: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    about |= {"cpu": platform.processor(), "cores": os.cpu_count(), "interpreted": is_interpreted()}
    if s.on_gpu:
        found = torch.cuda.get_device_properties(s.device)
        about |= {"gpu": found.name, "cuda": torch.version.cuda, "sms": found.multi_processor_count}
        about |= {"l2_bytes": found.L2_cache_size, "gpu_bytes": found.total_memory}
        with s.rows.attempt(what="clocks"):
            query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            about["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    s.rows.add(**about)
    nbytes, size = (1 << 16, 64) if s.tiny else (2 << 30, 8192)
    with s.rows.attempt(what="device copy"):
        source = torch.zeros(nbytes, dtype=torch.uint8, device=s.device)
        target = torch.empty_like(source)
        us = s.clock.median_us(lambda: target.copy_(source), s.repeats)
        s.rows.add(what="device copy", gb_per_s=2 * nbytes / us / 1e3)
    with s.rows.attempt(what="matrix product"):
        a = torch.randn(size, size, device=s.device).to(s.dtype)
        us = s.clock.median_us(lambda: a @ a, s.repeats)
        s.rows.add(what="matrix product", dtype=str(s.dtype), size=size, tflops=2 * size**3 / us / 1e6)
    for pinned in (True, False):
        with s.rows.attempt(what="host link", pinned=pinned):
            host = torch.zeros(nbytes // 4, dtype=torch.uint8, pin_memory=pinned and s.on_gpu)
            part = source[: len(host)]
            us = s.clock.median_us(lambda: part.copy_(host, non_blocking=True), s.repeats)  # noqa: B023
            back = s.clock.median_us(lambda: host.copy_(part, non_blocking=True), s.repeats)  # noqa: B023
            rates = {"to_device_gb_per_s": len(host) / us / 1e3, "to_host_gb_per_s": len(host) / back / 1e3}
            s.rows.add(what="host link", pinned=pinned, bytes=len(host), **rates)


def compile_all(s: Session) -> None:
    """Every layer's kernels, as the engine compiles them at its start, in processes of their own."""
    names = [layer.name for layer in s.layers]
    command = [sys.executable, "-m", "bench.gpu_session", *(["--tiny"] if s.tiny else [])]
    command += [] if s.rows.path is None else ["--out", str(s.rows.path)]
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < s.jobs:
            running.append(subprocess.Popen([*command, "--layer", waiting.pop(0), "compile"]))
        running = [one for one in running if one.poll() is None]
        time.sleep(0.05)


def compile_layer(s: Session, name: str) -> None:
    layer = next(one for one in s.layers if one.name == name)
    with s.rows.attempt(layer=name):
        start = time.perf_counter()
        case, launch = Case(layer, s.device, s.dtype), SingleLaunch(256)
        compile_at_start([FusedLayerExperts(case.weights, launch, layer.experts)], layer.top_k, s.dtype)
        for tokens in (3,) if s.tiny else (1, 16, 128, 1024, 8192):
            for make in candidates(case, tokens).values():
                make()(*case.inputs(tokens, "balanced"))
        launch.check()
        s.rows.add(layer=name, seconds=time.perf_counter() - start)


def correct(s: Session) -> None:
    """Every path against fp64, with poisoned memory; then many launches one after another, and from graphs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty returns NaN
    slab = replace(QWEN, name="slab of 6144 slots", slots=_most_slots(s, QWEN, 6144))
    layers = (TINY[1], TINY_GPT, TINY_SLAB, ODD) if s.tiny else (QWEN, replace(MIXTRAL, inter=1792), GPT, ODD, slab)
    dtypes = (s.dtype,) if s.tiny else (torch.bfloat16, torch.float16, torch.float32)
    tokens = (0, 5) if s.tiny else (0, 1, 17, 130, 1024)
    for layer, dtype in product(layers, dtypes):
        if dtype != torch.bfloat16 and layer.slots is not None and s.on_gpu:
            continue  # one slab is what fits
        with s.rows.attempt(layer=layer.name, dtype=str(dtype)):
            _correct_layer(s, Case(layer, s.device, dtype), tokens)
    with s.rows.attempt(path="gate"):
        _correct_gate(s)
    first = TINY[0] if s.tiny else QWEN
    with s.rows.attempt(layer=first.name, path="single, epochs"):
        _epochs(s, Case(first, s.device, s.dtype), 3 if s.tiny else 200)
    if s.on_gpu:
        with s.rows.attempt(layer=first.name, path="graph"):
            _graphs(s, Case(first, s.device, s.dtype), 200)
    torch.use_deterministic_algorithms(False)


def _most_slots(s: Session, layer: Layer, wanted: int) -> int:
    room = s.bytes_free() * 6 // 10 // (3 * layer.hidden * layer.inter * s.dtype.itemsize)
    return max(layer.experts, min(wanted, room))


def _correct_layer(s: Session, case: Case, tokens: tuple[int, ...]) -> None:
    layer = case.layer
    launch = SingleLaunch(1024)
    fused = FusedLayerExperts(case.weights, launch, layer.experts)
    paths: dict[str, Any] = {"grouped": GroupedExperts(case.weights, layer.experts).combine, "single": fused.combine}
    weights = dict.fromkeys(paths, case.weights)
    if not layer.biased and layer.slots is None:
        for kind, stored in case.stored().items():
            paths[kind], weights[kind] = grouped(case, stored), stored
    for (name, run), routing in product(paths.items(), s.routings):
        with s.rows.attempt(layer=layer.name, dtype=str(case.dtype), path=name, routing=routing):
            errors = {}
            for count in tokens:
                inputs = case.inputs(count, routing)
                errors[count] = error_of(weights[name], run(*inputs), *inputs)
            launch.check()
            _judge(s, errors, BOUNDS[case.dtype], layer=layer.name, path=name, routing=routing, dtype=str(case.dtype))
    worlds = [w for w in (2, 4, 8) if layer.experts % w == 0 and layer.slots is None and case.dtype == s.dtype]
    for world in worlds[:1] if s.tiny else worlds:
        with s.rows.attempt(layer=layer.name, path=f"{world} virtual ranks"):
            single, errors = Single(case, world, max(tokens[:3])), {}
            for count in tokens[:3]:
                inputs = case.inputs(count * world, "balanced")
                errors[count] = error_of(case.weights, single(*inputs), *inputs)
            single.fused.check()
            _judge(s, errors, BOUNDS[case.dtype], layer=layer.name, path=f"{world} virtual ranks")


def _judge(s: Session, errors: dict[int, float], bound: float, **what: Any) -> None:
    wrong = [count for count, error in errors.items() if not error <= bound]  # also when it is NaN
    worst = max(errors.values(), key=lambda e: math.inf if math.isnan(e) else e)
    if wrong:
        raise ValueError(f"WRONG for T in {wrong}: error {worst:.2e}, bound {bound:.0e}")
    s.rows.add(**what, tokens=list(errors), worst=worst)


def _correct_gate(s: Session) -> None:
    for score, groups in (("softmax", 1), ("sigmoid", 4), ("softmax_topk", 1)):
        config = GateConfig(top_k=4, score=score, num_groups=groups, topk_groups=min(groups, 2))  # type: ignore[arg-type]
        for count in (0, 1, 33):
            logits = torch.randn(count, 64, device=s.device)
            found, wanted = gate(logits, config), gate_reference(logits, config)
            if not torch.equal(found.topk_ids, wanted.topk_ids):
                raise ValueError(f"WRONG: the gate chooses others for {score}, T={count}")
    s.rows.add(path="gate", ok=True)


def _epochs(s: Session, case: Case, number: int) -> None:
    """Launches back to back with changing T, looked at only in the end."""
    single, reference = Single(case, 1, 64), grouped(case)
    sets = [case.inputs(n % 64 + 1 if s.on_gpu else n + 1, "power_law", n) for n in range(min(number, 16))]
    outs = [single(*sets[n % len(sets)]) for n in range(number)]
    single.fused.check()
    worst = max(_distance(out, reference(*sets[n % len(sets)])) for n, out in enumerate(outs))
    if not worst <= BOUNDS[case.dtype]:
        raise ValueError(f"WRONG after {number} launches: {worst:.2e} from the grouped path")
    s.rows.add(layer=case.layer.name, path="single, epochs", launches=number, worst=worst)


def _graphs(s: Session, case: Case, number: int) -> None:
    for name, run in (("grouped", grouped(case)), ("single", Single(case, 1, 16))):
        with s.rows.attempt(path=f"{name}, graph"):
            rotation = Rotation(run, [case.inputs(16, "power_law", n) for n in range(4)], 0, graph=True)
            wanted = [run(*one).clone() for one in rotation.sets]
            different = 0
            for _ in range(number):
                for out in rotation.outs:
                    out.fill_(torch.nan)
                rotation()
                different += sum(not torch.equal(a, b) for a, b in zip(rotation.outs, wanted))
            if different:
                raise ValueError(f"WRONG: {different} of {number * 4} replayed results differ from the eager ones")
            s.rows.add(path=f"{name}, graph", replays=number)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def stress(s: Session) -> None:
    """The single launch's protocol beside a kernel that takes the memory, with few and with many programs."""
    case = Case(TINY[0] if s.tiny else QWEN, s.device, s.dtype)
    number = 2 if s.tiny else 400
    big = torch.zeros(16 if s.tiny else 1 << 28, device=s.device)
    side = torch.cuda.Stream() if s.on_gpu else None
    for programs in (1, 3) if s.tiny else (1, 7, 132, 264, 1000):
        with s.rows.attempt(programs=programs):
            single, reference = Single(case, 1, 32, programs=programs, poll_limit=None), grouped(case)
            inputs = case.inputs(2 if s.tiny else 32, "power_law")
            wanted = reference(*inputs)
            start, worst = time.perf_counter(), 0.0
            for n in range(number if programs > 1 else number // 2):
                with torch.cuda.stream(side) if side is not None and n % 8 == 0 else nullcontext():
                    if n % 8 == 0:
                        big.add_(1)
                out = single(*inputs)
                if n % 50 == 0:
                    worst = max(worst, _distance(out, wanted))
            single.fused.check()
            worst = max(worst, _distance(out, wanted))
            if not worst <= BOUNDS[s.dtype]:
                raise ValueError(f"WRONG: {worst:.2e} from the grouped path")
            s.rows.add(programs=programs, launches=number, worst=worst, seconds=time.perf_counter() - start)


def kernels(s: Session) -> None:
    """Microseconds of one layer by every path, every call another routing, several of them between two events."""
    for layer in s.layers:
        with s.rows.attempt(layer=layer.name):
            case = Case(layer, s.device, s.dtype)
            for tokens in (3,) if s.tiny else (1, 4, 16, 128, 1024, 8192, 16384):
                for routing in s.routings[:2]:
                    _kernel_row(s, case, tokens, routing)
            for tokens, distribution, us in published(layer):
                if tokens in (1, 4, 16, 128, 1024, 8192, 16384):
                    s.rows.add(layer=layer.name, tokens=tokens, routing=distribution, published_us=us)
            for world in (2,) if s.tiny else (2, 8):
                if layer is s.layers[0]:
                    _ranks_row(s, case, world, 2 if s.tiny else 16)
            del case
    if not s.tiny:
        with s.rows.attempt(layer=FLASH.name):  # FlashMoE's paper: 3.7 ms on 8 H100 in fp32; here one GPU does all
            _ranks_row(s, Case(FLASH, s.device, s.dtype), 8, 8192)


def _kernel_row(s: Session, case: Case, tokens: int, routing: str) -> None:
    what: dict[str, Any] = {"layer": case.layer.name, "tokens": tokens, "routing": routing}
    graph = s.on_gpu and tokens <= 1024
    sets = [case.inputs(tokens, routing, seed) for seed in range(8 if tokens <= 1024 and s.on_gpu else 2)]
    ready: dict[str, Rotation] = {}
    made = candidates(case, tokens)
    if tokens in (16, 1024) and routing == "balanced":
        made["loop"] = lambda: loop(case)
    for number, (name, make) in enumerate(made.items()):
        with s.rows.attempt(**what, candidate=name):
            ready[name] = Rotation(make(), sets, 2 * number, graph=graph and name != "loop")
    limits = [case.limits(ids) for _, ids, _ in sets]
    flops, nbytes, floor = (statistics.mean(column) for column in zip(*limits, strict=True))
    with s.rows.attempt(**what):
        found = s.clock.turns(ready, s.repeats)
        for row in found.values():
            row |= {
                "tflops": flops / row["us"] / 1e6,
                "gb_per_s": nbytes / row["us"] / 1e3,
                "of_floor": floor / row["us"],
            }
        rounded = {n: {k: float(f"{v:.4g}") for k, v in row.items()} for n, row in found.items()}
        s.rows.add(**what, graph=graph, floor_us=round(floor, 1), found=rounded)


def _ranks_row(s: Session, case: Case, world: int, tokens: int) -> None:
    with s.rows.attempt(layer=case.layer.name, ranks=world):
        sets = [case.inputs(tokens * world, "balanced", seed) for seed in range(2)]
        both = {"single": Single(case, world, tokens), "grouped": grouped(case)}
        ready = {name: Rotation(run, sets, n, graph=False) for n, (name, run) in enumerate(both.items())}
        found = s.clock.turns(ready, s.repeats)
        s.rows.add(layer=case.layer.name, ranks=world, tokens=tokens, found=found)


def tune(s: Session) -> None:
    """Tile sizes around the ones in use; the best of each path and T is a row, and so is what is in use."""
    case = Case(TINY[0] if s.tiny else QWEN, s.device, s.dtype)
    for tokens in (3,) if s.tiny else (1, 16, 128, 1024, 8192):
        sets = [case.inputs(tokens, "balanced", seed) for seed in range(4 if s.on_gpu else 1)]
        used = pick_tiles(tokens * case.layer.top_k / case.layer.experts, s.dtype, device_capability(s.device))
        found: dict[str, dict[TileConfig, float]] = {"grouped": {}, "single": {}}
        for config in dict.fromkeys((used, *_around(used, s.tiny))):
            paths: dict[str, Callable[[], Any]] = {"grouped": lambda c=config: grouped(case, config=c)}  # type: ignore[misc]
            if tokens <= 256:
                paths["single"] = lambda c=config, t=tokens: Single(case, 1, t, config=c)  # type: ignore[misc]
            for name, make in paths.items():
                with s.rows.attempt(tokens=tokens, path=name, config=tuple(config)):
                    rotation = Rotation(make(), sets, 0, graph=s.on_gpu and tokens <= 1024)
                    found[name][config] = s.clock.median_us(rotation, max(1, s.repeats // 3)) / len(rotation)
        for name, times in found.items():
            if times:
                best = sorted(times.items(), key=lambda pair: pair[1])[:3]
                in_use = times.get(used)
                s.rows.add(
                    tokens=tokens, path=name, used=tuple(used), used_us=in_use, best=[(*c, us) for c, us in best]
                )


def _around(used: TileConfig, tiny: bool) -> list[TileConfig]:
    if tiny:
        return [used._replace(block_k=64)]
    sizes = [used._replace(block_n1=n, block_n2=2 * n, block_k=k) for n, k in product((32, 64, 128), (64, 128, 256))]
    return sizes + [used._replace(num_stages=n) for n in (2, 4, 5)] + [used._replace(num_warps=n) for n in (4, 8)]


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
    error = _distance(run(*inputs), grouped(case)(*inputs))
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
        runs = [("auto", budget, batches) for budget in ("1.0", "0.5", "0.25")]
        for kernel, budget, sizes in (*runs, ("reference", "1.0", (1,))):
            with s.rows.attempt(kernel=kernel, budget=budget):
                _engine_rows(s, folder / "model", kernel, budget, sizes)
    finally:
        shutil.rmtree(folder)


def _engine_rows(s: Session, folder: Path, kernel: Any, budget: str, sizes: tuple[int, ...]) -> None:
    new, prompt = (4, 8) if s.tiny else (64 if kernel == "auto" else 8, 64)
    config = EngineConfig(
        kernel=kernel,
        dtype="bfloat16" if s.on_gpu else "float32",
        crossover_table=str(folder / "crossover.json"),
        offload=OffloadConfig(budget=budget),
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
                kernel=kernel,
                budget=budget,
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


PHASES: dict[str, Callable[[Session], None]] = {
    "machine": machine,
    "compile": compile_all,
    "correct": correct,
    "stress": stress,
    "kernels": kernels,
    "tune": tune,
    "host": host,
    "copies": copies,
    "engine": engine,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, help="rows are appended to this file as they come")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for the interpreter and for memcheck")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--layer", help="compile this layer alone, in this process")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not (options.tiny and is_interpreted()):
        print("needs a GPU, or TRITON_INTERPRET=1 with --tiny; nothing was measured")
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    rows = Rows(options.out, options.phase)
    session = Session(rows, device, Clock(device), options.tiny, options.jobs)
    if options.layer is not None:
        compile_layer(session, options.layer)
    else:
        PHASES[options.phase](session)
    return 1 if rows.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
