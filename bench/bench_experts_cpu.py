"""Experts on the CPU, all resident: the compiled helper against the experts of transformers on the same weights.

    python bench/bench_experts_cpu.py [--threads 1] [--seconds 3] [--out bench/results/experts_cpu]
    python bench/bench_experts_cpu.py --codes [--threads 1] [--seconds 6] [--out bench/results/codes_cpu]

Baseline is a real MixtralExperts module with its `eager`, `batched_mm` and `grouped_mm` implementations. Candidates
take turns, each turn with another routing (uniform, K distinct experts), so that none finds its weights in cache.
At T = 1 and 8 the limit is memory bandwidth, at T = 256 the fp32 multiply-add rate; both are measured in the same run
(largest rate of torch's own sum, matrix-vector and matrix product). Shapes whose experts fit into a cache exceed the
memory's rate. With one thread the clock is the thread's CPU time, which other jobs on the machine disturb less; with
more it is wall time. Outputs are compared before anything is timed. The last line is one JSON document.

--codes: the same kernel on experts stored as low-bit codes (random ones: values do not matter to time) against itself
on bf16, one layer of Qwen3-30B-A3B's sizes at T = 1, 2 and 8. All read the same routing, each in the next of several
sets of experts, which together exceed the caches, in large pages as slots are. The limit is memory bandwidth: bytes of
codes and scales.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.formats import CODE_DTYPES, NIBBLE_CODES, CodeName, Coding, Residual, bytes_per_row
from moe.kernels.nested import LEVELS, PLANES, plane_bytes
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.weights import Activation, ExpertWeights
from moe.offload.short_floats import short
from moe.offload.stores import aligned_bytes

SHAPES = {"a": (192, 128, 16, 2), "b": (1024, 512, 32, 4), "c": (2048, 1024, 16, 8)}  # H, I, E, K
TOKENS = (1, 8, 64, 256)
BATCHED_LIMIT = 2 << 30  # bytes of gathered weights; batched_mm copies the weights of every (token, k)
ROUTINGS = 8
OURS = "compiled"
CODES_SHAPE = (2048, 768, 64, 8)  # H, I, E, K
CODES_BYTES = 600 << 20  # of each format, in sets of E experts: as many bytes as bf16 takes
ROW = 1 << 20  # columns that share a scale: all of a row
CODES: dict[str, tuple[CodeName, tuple[int, int], torch.dtype, bool]] = {  # code, block, scales, with zeros
    "bf12": ("bf12", (1, 1 << 30), torch.int32, False),
    "fp8, blocks of 128 x 128": ("e4m3", (128, 128), torch.float32, False),
    "fp8, per channel": ("e4m3", (1, ROW), torch.bfloat16, False),
    "int8, per channel": ("int8", (1, ROW), torch.bfloat16, False),
    "int4, groups of 32": ("int4", (1, 32), torch.bfloat16, False),
    "int4, groups of 128": ("int4", (1, 128), torch.float16, False),
    "int4, 128, zero points": ("int4", (1, 128), torch.float16, True),
    "mxfp4": ("e2m1", (1, 32), torch.float8_e8m0fnu, False),
    "nvfp4": ("e2m1", (1, 16), torch.float8_e4m3fn, False),
    "nf4": ("lut4", (1, 64), torch.float32, False),
    **{f"nested, {level} bits": ("nested", (1, 64), torch.float16, False) for level in LEVELS},
}


def best_rate(work: float, run: Callable[[], Any], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(15):
        start = clock()
        run()
        times.append(clock() - start)
    return work / min(times)


def measure_limits(clock: Callable[[], float]) -> dict[str, float]:
    big, vector = torch.ones(16384, 8192), torch.ones(8192)  # 512 MiB
    square = torch.randn(1536, 1536)
    read = max(best_rate(big.nbytes, lambda: big.sum(), clock), best_rate(big.nbytes, lambda: big @ vector, clock))
    return {"memory_bytes_per_s": read, "fp32_flop_per_s": best_rate(2 * 1536**3, lambda: square @ square, clock)}


def modules(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, MixtralExperts]:
    """One module per implementation, all with the same tensors."""
    hidden, intermediate, experts, _ = shape
    out: dict[str, MixtralExperts] = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        config = MixtralConfig(num_local_experts=experts, hidden_size=hidden, intermediate_size=intermediate)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        if out:
            module.gate_up_proj, module.down_proj = out["eager"].gate_up_proj, out["eager"].down_proj
        else:
            module = module.to_empty(device="cpu").to(dtype).requires_grad_(False)
            torch.nn.init.normal_(module.gate_up_proj, std=hidden**-0.5)
            torch.nn.init.normal_(module.down_proj, std=intermediate**-0.5)
        out[implementation] = module
    return out


def case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tokens: int, seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    hidden, intermediate, experts, top_k = shape
    theirs = modules(shape, dtype)
    parameters = (theirs["eager"].gate_up_proj, theirs["eager"].down_proj)
    ours = CpuExperts(ExpertWeights(*parameters, None, None, Activation()))
    inputs = []
    for _ in range(ROUTINGS):
        ids = torch.rand(tokens, experts).topk(top_k).indices
        weights = torch.rand(tokens, top_k)
        inputs.append((torch.randn(tokens, hidden).to(dtype), ids, weights / weights.sum(-1, keepdim=True)))
    candidates: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {OURS: ours.combine, **theirs}
    if tokens * top_k * 3 * hidden * intermediate * dtype.itemsize > BATCHED_LIMIT:
        del candidates["batched_mm"]

    reference = theirs["eager"](*inputs[0]).double()
    for name, candidate in candidates.items():
        error = float((candidate(*inputs[0]).double() - reference).norm() / reference.norm())
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), (name, error)  # bf16: eager's own roundings

    times: dict[str, list[float]] = {name: [] for name in candidates}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 5 or time.perf_counter() < end:
        for offset, (name, candidate) in enumerate(candidates.items()):
            arguments = inputs[(turn + offset) % ROUTINGS]
            start = clock()
            candidate(*arguments)
            times[name].append(clock() - start)
        turn += 1
    used = statistics.mean(len(set(ids.flatten().tolist())) for _, ids, _ in inputs)
    per_expert = 3 * hidden * intermediate
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "turns": len(times[OURS]),
        "weight_bytes": used * per_expert * dtype.itemsize,
        "flop": tokens * top_k * 2 * per_expert,
        "median_s": {name: statistics.median(t) for name, t in times.items()},
        "quartiles_s": {name: statistics.quantiles(t, n=4)[::2] for name, t in times.items()},
    }


def table(results: list[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    lines = []
    for name, (h, i, e, k) in SHAPES.items():
        lines += [f"\n**({name}) H={h}, I={i}, E={e}, K={k}**; ms, median (quartiles of ours)\n"]
        lines += [
            "| dtype | T | ours | eager | batched_mm | grouped_mm | × eager | × grouped | % memory | % fp32 peak |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for r in (r for r in results if r["shape"] == name):
            t, (low, high) = r["median_s"], r["quartiles_s"][OURS]
            ms = {n: f"{v * 1e3:.3g}" for n, v in t.items()}
            lines += [
                f"| {r['dtype']} | {r['tokens']} | {ms[OURS]} ({low * 1e3:.3g} to {high * 1e3:.3g}) | {ms['eager']} "
                f"| {ms.get('batched_mm', '> 2 GiB')} | {ms['grouped_mm']} | {t['eager'] / t[OURS]:.2f} "
                f"| {t['grouped_mm'] / t[OURS]:.2f} "
                f"| {100 * r['weight_bytes'] / t[OURS] / limits['memory_bytes_per_s']:.0f} "
                f"| {100 * r['flop'] / t[OURS] / limits['fp32_flop_per_s']:.0f} |"
            ]
    return lines


def in_large_pages(t: Tensor) -> Tensor:
    """The same, in memory as slots have an expert: with small pages few bits wait for addresses, not for memory."""
    return aligned_bytes(t.nbytes).view(t.dtype).view(t.shape).copy_(t)


def random_coded(name: str) -> tuple[ExpertWeights, int]:
    """Experts of random codes, and the bytes of one."""
    code, block, scale_dtype, with_zeros = CODES[name]
    hidden, inter, experts, _ = CODES_SHAPE
    level = int(name.split()[1]) if code == "nested" else 0
    bits = level or (4 if code in NIBBLE_CODES else 12 if code == "bf12" else 8)
    slots = experts * round(CODES_BYTES * 8 / (experts * 3 * hidden * inter * bits))
    tensors, codings, nbytes = [], [], 0
    for parts, rows, columns in ((2, inter, hidden), (1, hidden, inter)):
        if code == "bf12":
            made = [
                short(torch.randn(parts * rows, columns).mul_(columns**-0.5).bfloat16(), 7, parts) for _ in range(8)
            ]
            raw, words = (
                in_large_pages(torch.stack(each).repeat(slots // 8, 1, *[1] * (each[0].dim() - 1)))
                for each in zip(*made)
            )
            tensors.append(raw)
            codings.append(Coding(code, block, words))
            nbytes += raw[0].nbytes + words[0].nbytes
            continue
        raw = torch.randint(0, 127, (slots, parts * rows, bytes_per_row(code, columns)), dtype=torch.uint8)
        grid = (slots, parts, -(-rows // block[0]), -(-columns // block[1]))
        scale = in_large_pages(torch.full(grid, 2.0**-8).to(scale_dtype))
        zero = in_large_pages(torch.randint(-8, 8, grid, dtype=torch.int8)) if with_zeros else None
        table = torch.randn(slots, parts, 16) if code == "lut4" else None
        raw = in_large_pages(raw)
        tensors.append(raw.view(CODE_DTYPES[code]))
        residual = random_planes(level, (slots, parts, rows, columns), grid) if level else None
        codings.append(Coding(code, block, scale, zero, table=table, residual=residual))
        nbytes += sum(t[0].nbytes for t in (raw, scale, zero, *(residual or ())) if t is not None)
    return ExpertWeights(tensors[0], tensors[1], None, None, Activation(), *codings), nbytes


def random_planes(level: int, shape: tuple[int, int, int, int], grid: tuple[int, ...]) -> Residual:
    """What slots of `level` bits hold beyond the base."""
    slots, parts, rows, columns = shape
    made: dict[str, Tensor] = {"bits": torch.full((slots, 1), level, dtype=torch.int32)}
    for bits in LEVELS[1 : LEVELS.index(level) + 1]:
        plane = (slots, parts * rows, plane_bytes(PLANES[bits], columns))
        made[f"codes{bits}"] = in_large_pages(torch.randint(0, 256, plane, dtype=torch.uint8))
        scale = torch.full(grid, 2.0**-12).half() if bits == 8 else torch.full(grid, 60).to(torch.uint8)
        made[f"scale{bits}"] = in_large_pages(scale)
    return Residual(**made)


def measure_codes(seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    hidden, inter, experts, top_k = CODES_SHAPE
    shapes = (experts, 2 * inter, hidden), (experts, hidden, inter)
    plain = [in_large_pages(torch.empty(s, dtype=torch.bfloat16).normal_(std=s[2] ** -0.5)) for s in shapes]
    stored = {"bf16": (ExpertWeights(plain[0], plain[1], None, None, Activation()), 2 * 3 * hidden * inter)}
    stored |= {name: random_coded(name) for name in CODES}
    kernels = {name: CpuExperts(weights) for name, (weights, _) in stored.items()}
    results = []
    for tokens in (1, 2, 8):
        inputs = []
        for _ in range(ROUTINGS):
            ids = torch.rand(tokens, experts).topk(top_k).indices
            inputs.append((torch.randn(tokens, hidden).bfloat16(), ids, torch.rand(tokens, top_k)))
        for name, kernel in kernels.items():
            x, ids, weights = inputs[0][0][:1], inputs[0][1][:1, :2], inputs[0][2][:1, :2]
            right = combine_reference(experts_reference(x, ids, stored[name][0]), weights, x.dtype).double()
            error = float((kernel.combine(x, ids, weights).double() - right).norm() / right.norm())
            assert error < 1e-2, (name, error)  # bf16 roundings of h and of the result, moved by another order of a sum
        times: dict[str, list[float]] = {name: [] for name in kernels}
        end, turn = time.perf_counter() + seconds * len(kernels), 0
        while turn < 5 or time.perf_counter() < end:
            for name, kernel in kernels.items():
                x, ids, weights = inputs[turn % ROUTINGS]
                sets = len(stored[name][0].gate_up) // experts
                start = clock()
                kernel.combine(x, ids + turn % sets * experts, weights)
                times[name].append(clock() - start)
            turn += 1
        used = statistics.mean(len(set(ids.flatten().tolist())) for _, ids, _ in inputs)
        for name, taken in times.items():
            row: dict[str, Any] = {
                "format": name,
                "tokens": tokens,
                "turns": turn,
                "median_s": statistics.median(taken),
            }
            row["quartiles_s"] = statistics.quantiles(taken, n=4)[::2]
            results.append(row | {"bytes": used * stored[name][1]})
    return results


def codes_table(results: list[dict[str, Any]], limits: dict[str, float]) -> list[str]:
    lines = [
        "\n| format | T | ms (quartiles) | × bf16 | bytes of bf16 | GB/s | % memory |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = {r["tokens"]: r for r in results if r["format"] == "bf16"}
    for r in results:
        base, (low, high) = plain[r["tokens"]], r["quartiles_s"]
        lines += [
            f"| {r['format']} | {r['tokens']} | {r['median_s'] * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f}) "
            f"| {base['median_s'] / r['median_s']:.2f} | {r['bytes'] / base['bytes']:.2f} "
            f"| {r['bytes'] / r['median_s'] / 1e9:.1f} "
            f"| {100 * r['bytes'] / r['median_s'] / limits['memory_bytes_per_s']:.0f} |"
        ]
    return lines


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def measure_shapes(seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    results = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS:
                results.append({"shape": name, **case(shape, dtype, tokens, seconds, clock)})
                print("measured", name, dtype, tokens, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape, dtype and T")
    parser.add_argument("--codes", action="store_true", help="low-bit codes against bf16, both by the compiled helper")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if not instruction_sets():
        sys.exit("the compiled helper is missing: python setup.py build_ext --inplace")
    clock = time.thread_time if options.threads == 1 else time.perf_counter

    limits = measure_limits(clock)
    results = measure_codes(options.seconds, clock) if options.codes else measure_shapes(options.seconds, clock)
    limits = {n: max(v, limits[n]) for n, v in measure_limits(clock).items()}  # before and after; the better one

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    document = {
        "bench": "codes_cpu" if options.codes else "experts_cpu",
        "command": "python bench/bench_experts_cpu.py " + " ".join(sys.argv[1:]),
        "processor": processor(),
        "instruction_set": instruction_sets()[0],
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall time",
        "versions": versions,
        "limits": limits,
        "shapes": {"codes": CODES_SHAPE} if options.codes else SHAPES,
        "results": results,
    }
    lines = [
        f"# Experts on the CPU, {'stored as codes' if options.codes else 'all resident'}",
        f"\n`{document['command']}`: {document['processor']}, {document['instruction_set']}, "
        f"{options.threads} thread(s), {document['clock']}; "
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}. "
        f"Limits measured in the run: {limits['memory_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{limits['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s. × = how many times faster ours is.",
        *(codes_table(results, limits) if options.codes else table(results, limits)),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
