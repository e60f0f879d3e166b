"""What computing an expert's gate and up, while its down projection is still being read, could win: a bound.

Two thirds of an expert's bytes and of its work come first. Recorded routing is replayed in virtual time, one sequence
or eight, with an expert's time on one thread (weights from memory, one row) and its read's as measured here, both ways:
an expert begins when all of it has come, or when two thirds have. Two calls in place of one, and two hand-overs between
threads, cost nothing here. What binds is the disk; what can be won is at most the first two thirds of the last expert
of a layer that misses one.

    python bench/bench_projections.py ESFT.npz … --hidden 2048 --inner 1408 [--formats bfloat16 int4] [--disk FOLDER]
"""

import argparse
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe.kernels.cpu import CpuExperts
from moe.kernels.weights import Activation
from moe.launch.gain import SHARES
from moe.offload.formats.slot import MatrixFormat
from moe.offload.layout import ExpertLayout, ExpertSite
from moe.offload.policy import Access, Lfu
from moe.offload.requantise import target_format
from moe.offload.virtual_time import Costs, Guess, replay
from moe.placement.importers import from_deepseek_esft_npz
from moe.placement.trace import RoutingTrace

FIRST = 2 / 3
STEPS = 320  # of decoding; the first half warms the slots
MEMORY = 1 << 29  # weights that are computed with in turn: more than any cache


def compute_seconds(layout: ExpertLayout, hidden: int) -> float:
    """Of this thread, for one row by one expert: the median over experts that no cache holds."""
    count = max(2, MEMORY // layout.nbytes)
    views = layout.views(torch.randint(0, 256, (count, layout.nbytes), dtype=torch.uint8))
    for view in views.values():
        if view.dtype.is_floating_point:
            view.fill_(0.01)
    kernel = CpuExperts(layout.weights(views, Activation()))
    x, times = torch.randn(1, hidden, dtype=torch.bfloat16), []
    for n in range(2 * count):
        slot = torch.tensor([[n % count]])
        began = time.thread_time()
        kernel.experts(x, slot)
        times.append(time.thread_time() - began)
    return statistics.median(times[count:])


def read_seconds(nbytes: int, folder: Path) -> float:
    """Of one expert past the page cache, median."""
    count = max(2, MEMORY // nbytes)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(count):
            file.write(os.urandom(nbytes))
        file.flush()
        os.fsync(file.fileno())
        buffer, times = mmap.mmap(-1, nbytes), []
        source = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        for n in np.random.default_rng(0).permutation(count).tolist():
            began = time.perf_counter()
            assert os.preadv(source, [buffer], n * nbytes) == nbytes
            times.append(time.perf_counter() - began)
        os.close(source)
    return statistics.median(times)


def visits(trace: RoutingTrace, batch: int) -> list[Access]:
    """Steps of `batch` places of the trace that decode side by side."""
    ids = trace.expert_ids.astype(np.int64)
    steps = min(STEPS, len(ids) // batch)
    first = np.arange(trace.num_layers) * trace.num_experts
    at = np.arange(batch) * (len(ids) // batch)
    return [
        Access(layer, np.unique(ids[at + step, layer]) + first[layer])
        for step in range(steps)
        for layer in range(trace.num_layers)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--inner", type=int, required=True)
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--disk", type=Path, default=Path())
    parser.add_argument("--mib-per-s", type=float, help="of the disk, in place of measuring it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, load {os.getloadavg()[0]:.1f}\n")
    heads = (
        "experts | MiB | read ms | compute ms | batch | trace | slots | nothing ahead: stall, won | next layer known"
    )
    print(f"| {heads} |\n" + "|---" * 9 + "|")
    rows = []
    for name in args.formats:
        site = ExpertSite(
            module="", num_experts=2, hidden_size=args.hidden, intermediate_size=args.inner, has_bias=False
        )
        stored = MatrixFormat(torch.bfloat16) if name == "bfloat16" else target_format(name, None)
        layout = ExpertLayout.of(site, stored)
        expert = compute_seconds(layout, args.hidden)
        read = layout.nbytes / 2**20 / args.mib_per_s if args.mib_per_s else read_seconds(layout.nbytes, args.disk)
        dense = 4 * args.hidden**2 * expert / (3 * args.hidden * args.inner)  # as many weights as attention has
        for batch in args.batches:
            for path in args.traces:
                trace = from_deepseek_esft_npz(path)
                accesses, nothing = visits(trace, batch), Guess.joined([])
                known = [Guess.sure(a.keys) if a.layer else nothing for a in accesses[1:]] + [nothing]
                num_experts = [trace.num_experts] * trace.num_layers
                warm = len(accesses) // 2 // trace.num_layers * trace.num_layers
                for share in SHARES:
                    slots, cells, won = int(share * sum(num_experts)), [], []
                    if slots < max(len(a.keys) for a in accesses):
                        continue
                    for guesses in (None, known):
                        whole, parts = (
                            replay(
                                accesses,
                                guesses,
                                Lfu(num_experts),
                                slots,
                                Costs(read, dense, expert, first=first),
                                warm=warm,
                            )
                            for first in (0.0, FIRST)
                        )
                        won.append(whole.seconds / parts.seconds - 1)
                        cells.append(f"{whole.stall / whole.seconds:.0%}, {won[-1]:.1%}")
                    rows.append({"format": name, "batch": batch, "trace": path.stem, "share": share, "won": won})
                    said = f"{layout.nbytes / 2**20:.1f} | {1e3 * read:.2f} | {1e3 * expert:.3f}"
                    print(
                        f"| {name} | {said} | {batch} | {path.stem} | {share:.1%} | {' | '.join(cells)} |", flush=True
                    )
    print("\n" + json.dumps(rows))


if __name__ == "__main__":
    main()
