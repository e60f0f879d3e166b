"""Phases of the GPU session that judge: every path against the reference, poisoned, in graphs, and under stress."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.gpu_layers import (
    GPT,
    MIXTRAL,
    ODD,
    QWEN,
    TINY,
    TINY_GPT,
    TINY_SLAB,
    Case,
    Layer,
    Single,
    distance,
    error_of,
    grouped,
)
from bench.gpu_measure import Rotation
from bench.gpu_run import Session
from moe.kernels.gate import GateConfig, gate, gate_reference
from moe.kernels.triton_experts import FusedLayerExperts, GroupedExperts, SingleLaunch

# bf16: h is rounded at other partial sums, results once; 8 bits are compared with what they decode to.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


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
    worst = max(distance(out, reference(*sets[n % len(sets)])) for n, out in enumerate(outs))
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
                    worst = max(worst, distance(out, wanted))
            single.fused.check()
            worst = max(worst, distance(out, wanted))
            if not worst <= BOUNDS[s.dtype]:
                raise ValueError(f"WRONG: {worst:.2e} from the grouped path")
            s.rows.add(programs=programs, launches=number, worst=worst, seconds=time.perf_counter() - start)
