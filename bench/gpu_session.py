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
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

from bench.gpu_correct import correct, stress
from bench.gpu_decode import decode
from bench.gpu_engine import copies, engine, host
from bench.gpu_layers import (
    FLASH,
    QWEN,
    TINY,
    Case,
    Single,
    candidates,
    grouped,
    loop,
    published,
)
from bench.gpu_measure import Clock, Rotation, Rows
from bench.gpu_ranks import ranks
from bench.gpu_run import Session
from moe.kernels.intrinsics import is_interpreted
from moe.kernels.tiles import TileConfig, device_capability, pick_tiles
from moe.kernels.triton_experts import FusedLayerExperts, SingleLaunch, compile_at_start


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
    "decode": decode,
    "ranks": ranks,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--out", type=Path, help="rows are appended to this file as they come")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for the interpreter and for memcheck")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--gpus", type=int, default=1, help="cards that the phase `ranks` uses, a process on each")
    parser.add_argument("--layer", help="compile this layer alone, in this process")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not (options.tiny and is_interpreted()):
        print("needs a GPU, or TRITON_INTERPRET=1 with --tiny; nothing was measured")
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    rows = Rows(options.out, options.phase)
    session = Session(rows, device, Clock(device), options.tiny, options.jobs, options.gpus)
    if options.layer is not None:
        compile_layer(session, options.layer)
    else:
        PHASES[options.phase](session)
    return 1 if rows.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
