"""One MoE layer's experts on a GPU: the single launch and the grouped path against what torch offers.

    python -m bench.bench_kernels            everything, in under ten minutes on an H200
    python -m bench.bench_kernels --check    correctness alone; with --tiny also under compute-sanitizer (racecheck)
    TRITON_INTERPRET=1 python -m bench.bench_kernels --tiny    the same without a GPU; its times mean nothing

Correctness comes first, with poisoned outputs, and a wrong result ends the run. Candidates take turns; each call has
another routing, so that small steps do not find their experts in cache. Limits: weights of the active experts over
4.3 TB/s for few tokens, 790 TFLOP/s bf16 for many (measured rates of an H200); "floor" is the larger of the two.
"fp8" and "int8" are the grouped path on the same experts in 8 bits, compared with the reference on those; their floor
is that of bf16, of which they read half. Baselines: a chain of torch._grouped_mm, a loop over experts, and the
published table of vLLM's kernel on an H200.
The last line is one JSON document.
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from moe.comm.symmetric import VirtualHeap
from moe.kernels.combine import combine
from moe.kernels.fused import FusedExperts
from moe.kernels.grouped_gemm import grouped_experts
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.intrinsics import is_interpreted
from moe.kernels.quantize import quantize_experts
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.tiles import device_capability
from moe.kernels.weights import Activation, ExpertWeights

BANDWIDTH, MATRIX_RATE = 4.3e12, 790e12
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "hardware" / "h200_fused_moe_bf16.csv.gz"
ROUTINGS = 8
TOKENS = (1, 16, 128, 1024, 8192, 16384)
RANK_TOKENS = (1, 16, 128)  # of each virtual rank
ERROR_BOUND = 1e-2  # bf16: h is rounded at other partial sums, results once


@dataclass(frozen=True)
class Layer:
    """experts: resident here. of: experts that tokens choose among; ids of the others are -1 (one rank's share)."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    of: int
    gated: bool = True


LAYERS = (
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, 128),
    Layer("OLMoE", 2048, 1024, 64, 8, 64),
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2, 8),
    Layer("DeepSeek-V3 1/8", 7168, 2048, 32, 8, 256),
)
FLASH = Layer("FlashMoE's shape", 2048, 2048, 32, 2, 32, gated=False)
TINY = (Layer("tiny", 32, 16, 4, 2, 4), Layer("tiny 1/2", 32, 16, 4, 2, 8))


class Case:
    """A layer with weights, and routings of T tokens."""

    def __init__(self, layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
        self.layer, self.device, self.dtype = layer, device, dtype
        rows = layer.inter * (2 if layer.gated else 1)
        gate_up = torch.empty(layer.experts, rows, layer.hidden, dtype=dtype, device=device)
        down = torch.empty(layer.experts, layer.hidden, layer.inter, dtype=dtype, device=device)
        gate_up.normal_(std=layer.hidden**-0.5)
        down.normal_(std=layer.inter**-0.5)
        activation = Activation() if layer.gated else Activation(kind="gelu", gated=False)
        self.weights = ExpertWeights(gate_up, down, None, None, activation)
        self.slots = torch.arange(layer.experts, dtype=torch.int32, device=device)
        chip = device_capability(device)
        kinds: tuple[Literal["fp8", "int8"], ...] = ("fp8", "int8") if chip == 0 or chip >= 89 else ("int8",)
        self.stored = {kind: quantize_experts(self.weights, kind) for kind in kinds}

    def inputs(self, tokens: int, routing: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """x, ids and weights. routing: "balanced" or "power_law" (popularity of expert r is r ** -1.2)."""
        layer, generator = self.layer, torch.Generator(self.device).manual_seed(seed)
        scores = torch.rand(tokens, layer.of, generator=generator, device=self.device)
        if routing == "power_law":  # Gumbel top-k: without replacement, in proportion to the popularity
            rank = torch.arange(1, layer.of + 1, device=self.device)
            scores = -1.2 * rank.log() - (-scores.clamp(1e-9, 1 - 1e-6).log()).log()
        ids = scores.topk(layer.top_k, dim=-1).indices.to(torch.int32)
        ids = torch.where(ids < layer.experts, ids, -1)
        x = torch.randn(tokens, layer.hidden, generator=generator, device=self.device).to(self.dtype)
        topk_weights = torch.softmax(torch.randn(ids.shape, generator=generator, device=self.device), -1)
        return x, ids, topk_weights

    def limits(self, ids: Tensor) -> tuple[float, float, float]:
        """FLOPs, bytes, and the floor in microseconds. Host sync."""
        layer = self.layer
        rows, active = int((ids >= 0).sum()), int(ids[ids >= 0].unique().numel())
        matrices = 3 if layer.gated else 2
        flops = 2.0 * matrices * layer.hidden * layer.inter * rows
        itemsize = self.dtype.itemsize
        nbytes = float(matrices * layer.hidden * layer.inter * itemsize * active + 4 * rows * layer.hidden * itemsize)
        return flops, nbytes, max(flops / MATRIX_RATE, nbytes / BANDWIDTH) * 1e6


def run_grouped(case: Case, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    y = grouped_experts(x, ids, case.weights, num_experts=case.layer.experts, y_dtype=x.dtype)
    return combine(y, w, x.dtype)


def run_stored(case: Case, kind: str, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    y = grouped_experts(x, ids, case.stored[kind], num_experts=case.layer.experts, y_dtype=x.dtype)
    return combine(y, w, x.dtype)


def run_grouped_mm(case: Case, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """What torch offers without a loop: sort, torch._grouped_mm twice, undo the sort, weighted sum."""
    gate_up, down = case.weights.gate_up, case.weights.down
    flat = torch.where(ids >= 0, ids, case.layer.experts).flatten()
    sorted_ids, order = torch.sort(flat, stable=True)
    ends = torch.searchsorted(sorted_ids, case.slots, right=True, out_int32=True)
    h = torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends)
    h = F.silu(h[:, : case.layer.inter]) * h[:, case.layer.inter :] if case.layer.gated else F.gelu(h)
    y = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    y[order] = torch._grouped_mm(h, down.transpose(1, 2), offs=ends)
    y = torch.where((ids >= 0)[..., None], y.view(*ids.shape, -1), 0)
    return (y.float() * w[..., None]).sum(1).to(x.dtype)


def run_loop(case: Case, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """The loop over experts that model code contains; it syncs for every expert."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(case.layer.experts):
        token, k = torch.where(ids == expert)
        if len(token):
            h = F.linear(x[token], case.weights.gate_up[expert])
            h = F.silu(h[:, : case.layer.inter]) * h[:, case.layer.inter :] if case.layer.gated else F.gelu(h)
            y = F.linear(h, case.weights.down[expert])
            out.index_add_(0, token, y.float() * w[token, k, None])
    return out.to(x.dtype)


class Single:
    """The single launch over virtual ranks: rank r plays tokens [r * T, (r + 1) * T)."""

    def __init__(self, case: Case, world_size: int, max_tokens: int) -> None:
        layer = case.layer
        self.case, self.world_size = case, world_size
        shape = FusedShape(
            world_size=world_size,
            num_experts=layer.experts,
            top_k=layer.top_k,
            hidden_size=layer.hidden,
            intermediate_size=layer.inter,
            max_tokens=max_tokens,
            dtype=case.dtype,
            y_dtype=case.dtype,
        )
        self.heap = VirtualHeap(world_size, HeapLayout.of(shape).nbytes, case.device)
        self.fused = FusedExperts(shape, self.heap.bases, num_ranks=world_size)
        self.slots = case.slots.view(world_size, -1)

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        x, ids, w = (t.view(self.world_size, -1, t.shape[-1]) for t in (x, ids, w))
        return self.fused(x, ids, w, self.slots, self.case.weights).flatten(0, 1)


Runner = Callable[[Tensor, Tensor, Tensor], Tensor]


class Replay:
    """A runner with inputs in place, run eagerly or as a CUDA graph."""

    def __init__(self, run: Runner, inputs: tuple[Tensor, ...], *, graph: bool) -> None:
        self.run, self.inputs = run, tuple(t.clone() for t in inputs)
        self.graph: Any = None
        if graph:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = run(*self.inputs)

    def load(self, inputs: tuple[Tensor, ...]) -> None:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)

    def __call__(self) -> Tensor:
        if self.graph is None:
            self.out = self.run(*self.inputs)
        else:
            self.graph.replay()
        return self.out


def error_against_reference(weights: ExpertWeights, out: Tensor, x: Tensor, ids: Tensor, w: Tensor) -> float:
    want = combine_reference(experts_reference(x, ids, weights), w, torch.float32)
    return float((out.float() - want).norm() / want.norm().clamp(min=1e-30))


def check(case: Case, tokens: tuple[int, ...], worlds: tuple[int, ...]) -> None:
    """Every path against the torch reference, outputs poisoned; `SystemExit` on a wrong one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty returns NaN
    for world in worlds:
        for count in tokens:
            single = Single(case, world, count)
            for seed, routing in enumerate(("balanced", "power_law", "balanced")):  # three epochs: both parities twice
                inputs = case.inputs(count * world, routing, seed)
                runs: list[tuple[str, Runner]] = [(f"single launch, {world} ranks", single)]
                if world == 1:
                    runs += [("grouped", bind(run_grouped, case)), ("torch._grouped_mm", bind(run_grouped_mm, case))]
                    runs += [(kind, partial(run_stored, case, kind)) for kind in case.stored]
                for name, run in runs:
                    error = error_against_reference(case.stored.get(name, case.weights), run(*inputs), *inputs)
                    if not error <= ERROR_BOUND:  # also when it is NaN
                        raise SystemExit(f"WRONG: {case.layer.name}, {name}, T={count}, {routing}: error {error:.2e}")
            single.fused.check()
    torch.use_deterministic_algorithms(False)
    print(f"correct: {case.layer.name}, T {tokens}, ranks {worlds}", flush=True)


def bind(run: Callable[..., Tensor], case: Case) -> Runner:
    return lambda x, ids, w: run(case, x, ids, w)


def time_all(
    candidates: dict[str, Replay], sets: list[tuple[Tensor, ...]], repeats: int, on_gpu: bool
) -> dict[str, Any]:
    """Median and spread in microseconds; candidates take turns, every round has another routing."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 2):
        for name, replay in candidates.items():
            replay.load(sets[round_ % len(sets)])
            if on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                replay()
                end.record()
                end.synchronize()
                us = begin.elapsed_time(end) * 1e3
            else:
                start = time.perf_counter()
                replay()
                us = (time.perf_counter() - start) * 1e6
            if round_ >= 2:
                times[name].append(us)
    return {
        name: {"us": statistics.median(found), "low": min(found), "high": max(found)} for name, found in times.items()
    }


def measure(case: Case, tokens: int, routing: str, repeats: int, on_gpu: bool) -> dict[str, Any]:
    """One row of the table."""
    sets = [case.inputs(tokens, routing, seed) for seed in range(ROUTINGS)]
    graph = on_gpu and tokens <= 1024
    candidates = {
        "grouped": Replay(bind(run_grouped, case), sets[0], graph=graph),
        "torch._grouped_mm": Replay(bind(run_grouped_mm, case), sets[0], graph=graph),
    }
    if tokens <= 1024:
        single = Single(case, 1, tokens)
        candidates["single"] = Replay(single, sets[0], graph=graph)
    if graph and tokens <= 128:
        candidates |= {"single, no graph": Replay(single, sets[0], graph=False)}
        candidates |= {"grouped, no graph": Replay(bind(run_grouped, case), sets[0], graph=False)}
    if routing == "balanced" and tokens <= 1024:
        for kind in case.stored:
            candidates[kind] = Replay(partial(run_stored, case, kind), sets[0], graph=graph)
    if routing == "balanced" and tokens in (16, 1024, 8192):
        candidates["loop"] = Replay(bind(run_loop, case), sets[0], graph=False)
    found = time_all(candidates, sets, repeats, on_gpu)
    if tokens <= 1024:
        single.fused.check()
    limits = [case.limits(ids) for _, ids, _ in sets]
    flops, nbytes, floor = (statistics.mean(column) for column in zip(*limits, strict=True))
    torch_us = min(found[name]["us"] for name in ("torch._grouped_mm", "loop") if name in found)
    for name, row in found.items():
        row |= {"tflops": flops / row["us"] / 1e6, "gbs": nbytes / row["us"] / 1e3, "floor": floor / row["us"]}
        row["x_torch"] = torch_us / row["us"]
        print(
            f"{case.layer.name:16s} {tokens:6d} {routing:9s} {name:18s} {row['us']:10.1f} [{row['low']:.1f}, "
            f"{row['high']:.1f}] {row['tflops']:7.1f} {row['gbs']:7.0f} {row['floor']:7.1%} {row['x_torch']:6.2f}",
            flush=True,
        )
    return {"layer": case.layer.name, "tokens": tokens, "routing": routing, "floor_us": floor, "found": found}


def measure_ranks(case: Case, world: int, tokens: int, repeats: int, on_gpu: bool) -> dict[str, Any]:
    """`world` virtual ranks of T tokens in one launch, beside the grouped path with all tokens on one rank."""
    sets = [case.inputs(tokens * world, "balanced", seed) for seed in range(ROUTINGS)]
    graph = on_gpu and tokens * world <= 1024
    ranks = Single(case, world, tokens)
    candidates = {f"{world} ranks": Replay(ranks, sets[0], graph=graph)}
    candidates |= {"grouped": Replay(bind(run_grouped, case), sets[0], graph=graph)}
    found = time_all(candidates, sets, repeats, on_gpu)
    ranks.fused.check()
    many, alone = found[f"{world} ranks"]["us"], found["grouped"]["us"]
    print(
        f"{case.layer.name:16s} {world} virtual ranks x {tokens:5d}: {many:10.1f} us; grouped path {alone:10.1f} us",
        flush=True,
    )
    return {"layer": case.layer.name, "ranks": world, "tokens": tokens, "found": found}


def published(layer: Layer) -> Iterator[tuple[int, str, float]]:
    """(tokens, distribution, microseconds) of vLLM's fused MoE for a layer on one H200, where the table is."""
    if PUBLISHED.is_file():
        want = (str(layer.hidden), str(layer.inter), str(layer.top_k), str(layer.experts), "1", "1")
        names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
        with gzip.open(PUBLISHED, "rt") as file:
            for row in csv.DictReader(file):
                if tuple(row[name] for name in names) == want:
                    yield int(row["num_tokens"]), row["distribution"], float(row["latency"]) * 1e3


def warm(worlds: tuple[int, ...]) -> None:
    """Compile in processes of their own, at once, into Triton's cache, so that the run is short."""
    command = [sys.executable, "-m", "bench.bench_kernels", "--warm"]
    names = [*(layer.name for layer in LAYERS), *(f"ranks {world}" for world in worlds[1:])]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in names]
    if any([process.wait() != 0 for process in processes]):  # noqa: C419  all must be waited for
        raise SystemExit("a warm-up process failed; see above")


def compile_for(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """What `warm` starts: one layer's kernels, or those of the first layer over several ranks."""
    if name.startswith("ranks "):
        case = Case(LAYERS[0], device, dtype)
        for count in RANK_TOKENS:
            measure_ranks(case, int(name.split()[1]), count, 1, True)
        return
    case = Case(next(layer for layer in LAYERS if layer.name == name), device, dtype)
    for count in TOKENS:
        if count <= 1024:
            measure(case, count, "balanced", 1, True)
        else:
            run_grouped(case, *case.inputs(count, "balanced"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for the interpreter")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no new row is begun")
    parser.add_argument("--out", type=Path, help="also write the JSON document there")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or (options.tiny and is_interpreted())):
        print("needs a GPU, or TRITON_INTERPRET=1 with --tiny; nothing was measured")
        return 2
    start, on_gpu = time.perf_counter(), torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers = TINY if options.tiny else LAYERS
    tokens = (1, 3) if options.tiny else TOKENS
    rank_tokens = (3,) if options.tiny else RANK_TOKENS
    worlds = (1, 2) if options.tiny else (1, 2, 4, 8)
    if options.warm:
        compile_for(options.warm, device, dtype)
        return 0
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, interpreter"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    print(f"{name}; {versions}; {' '.join(sys.argv)}")
    if on_gpu and not options.tiny and not options.check:
        warm(worlds)
        print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    check(Case(layers[0], device, dtype), rank_tokens, worlds)
    if options.check:
        return 0
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    print(
        f"{'layer':16s} {'T':>6s} {'routing':9s} {'candidate':18s} {'us':>10s} [low, high] "
        "TFLOP/s GB/s of-floor x-torch"
    )

    def late(what: str) -> bool:
        if time.perf_counter() - start > options.budget:
            skipped.append(what)
            return True
        return False

    repeats = 2 if options.tiny else 30
    for layer in layers:
        case = Case(layer, device, dtype)
        check(case, (tokens[-1] if options.tiny else 128,), (1,))
        for count, routing in itertools.product(tokens, ("balanced", "power_law")):
            if late(f"{layer.name} T={count} {routing}"):
                continue
            rows.append(measure(case, count, routing, min(repeats, max(3, 60000 // count)), on_gpu))
        for world, count in itertools.product(worlds[1:], rank_tokens):
            if layer is not layers[0] or late(f"{layer.name} {world} ranks T={count}"):
                continue
            rows.append(measure_ranks(case, world, count, repeats, on_gpu))
        for count, distribution, us in published(layer):
            if count in tokens:
                rows.append({"layer": layer.name, "tokens": count, "routing": distribution, "published_us": us})
                print(f"{layer.name:16s} {count:6d} {distribution:14s} published, vLLM {us:10.1f}")
        del case
    if not options.tiny and not late(FLASH.name):
        rows.append(measure_ranks(Case(FLASH, device, dtype), 8, 8192, 5, on_gpu))
        print(
            "FlashMoE's paper: 3.7 ms on 8 H100 in fp32 with 8192 tokens per GPU; here one GPU does the work of all 8"
        )
    for what in skipped:
        print(f"not measured, the budget of {options.budget:.0f} s was spent: {what}")
    document = {
        "hardware": name,
        "versions": versions,
        "command": " ".join(sys.argv),
        "cpu": platform.processor() or os.uname().machine,
        "seconds": math.ceil(time.perf_counter() - start),
        "skipped": skipped,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
