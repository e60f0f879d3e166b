"""Experts on the CPU, all resident: the compiled helper against the experts of transformers on the same weights.

    python bench/bench_experts_cpu.py [--threads 1] [--seconds 3] [--out bench/results/experts_cpu]

Baseline is a real MixtralExperts module with its `eager`, `batched_mm` and `grouped_mm` implementations. Candidates
take turns, each turn with another routing (uniform, K distinct experts), so that none finds its weights in cache.
At T = 1 and 8 the limit is memory bandwidth, at T = 256 the fp32 multiply-add rate; both are measured in the same run
(largest rate of torch's own sum, matrix-vector and matrix product). Shapes whose experts fit into a cache exceed the
memory's rate. With one thread the clock is the thread's CPU time, which other jobs on the machine disturb less; with
more it is wall time. Outputs are compared before anything is timed. The last line is one JSON document.
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
from moe.kernels.weights import Activation, ExpertWeights

SHAPES = {"a": (192, 128, 16, 2), "b": (1024, 512, 32, 4), "c": (2048, 1024, 16, 8)}  # H, I, E, K
TOKENS = (1, 8, 64, 256)
BATCHED_LIMIT = 2 << 30  # bytes of gathered weights; batched_mm copies the weights of every (token, k)
ROUTINGS = 8
OURS = "compiled"


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


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape, dtype and T")
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if not instruction_sets():
        sys.exit("the compiled helper is missing: python setup.py build_ext --inplace")
    clock = time.thread_time if options.threads == 1 else time.perf_counter

    limits = measure_limits(clock)
    results = []
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS:
                results.append({"shape": name, **case(shape, dtype, tokens, options.seconds, clock)})
                print("measured", name, dtype, tokens, flush=True)
    limits = {n: max(v, limits[n]) for n, v in measure_limits(clock).items()}  # before and after; the better one

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    document = {
        "bench": "experts_cpu",
        "command": "python bench/bench_experts_cpu.py " + " ".join(sys.argv[1:]),
        "processor": processor(),
        "instruction_set": instruction_sets()[0],
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall time",
        "versions": versions,
        "limits": limits,
        "shapes": SHAPES,
        "results": results,
    }
    lines = [
        "# Experts on the CPU, all resident",
        f"\n`{document['command']}`: {document['processor']}, {document['instruction_set']}, "
        f"{options.threads} thread(s), {document['clock']}; "
        f"{', '.join(f'{n} {v}' for n, v in versions.items())}. "
        f"Limits measured in the run: {limits['memory_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{limits['fp32_flop_per_s'] / 1e9:.0f} GFLOP/s. × = how many times faster ours is.",
        *table(results, limits),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
