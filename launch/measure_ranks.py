"""What ranks of this machine cost beside their experts: packing rows, waking each other, the lock step.

A toy model is decoded by every rank alone, all at the same time, and then by all together, by the clock: the difference
is the exchange, with threads that wait for each other on these cores as they are.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from moe.comm.groups import Groups
from moe.comm.membership import process_groups
from moe.launch.measure_step import TOY_TOP_K, toy_step, write_toy
from moe.offload.stores import aligned_bytes
from moe.placement.machine import Exchange

NARROW, WIDE = 64, 2048  # elements of a row: what a byte costs is seen between them
_SLAB_BYTES = 128 << 20
RESULT = "exchange.json"


def measure_exchange(ranks: int) -> Exchange:
    """In processes of their own. Raises RuntimeError with the end of what they said if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        for layers, hidden in product((2, 10), (NARROW, WIDE)):
            write_toy(_toy(folder, layers, hidden), layers, hidden)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(  # no limit: its ranks have one for each other
            [*command, "-m", "moe.launch.measure_ranks", folder],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks could not be measured: {done.stderr[-500:]}")
        return Exchange(*json.loads((Path(folder) / RESULT).read_text()))


def exchange_of(extra: dict[tuple[int, int, int], float], ranks: int) -> Exchange:
    """extra: seconds of a step beyond those of one process, by (layers, sequences of a rank, elements of a row)."""
    layer = {batch: (extra[10, batch, NARROW] - extra[2, batch, NARROW]) / 8 for batch in (1, 8)}
    wide = (extra[10, 8, WIDE] - extra[2, 8, WIDE]) / 8
    row = max(0.0, (layer[8] - layer[1]) / 7)
    away = 2 * 8 * TOY_TOP_K * (ranks - 1) / ranks * 2 * (WIDE - NARROW)  # bytes out and back, bfloat16
    return Exchange(
        ranks=ranks,
        step=max(0.0, extra[2, 1, NARROW] - 2 * layer[1]),
        layer=max(0.0, layer[1] - row),
        layer_sequence=row,
        byte=max(0.0, wide - layer[8]) / away,
    )


def measured(folder: str, groups: Groups) -> dict[tuple[int, int, int], float]:
    """Of the slowest rank. A collective."""
    slab = aligned_bytes(_SLAB_BYTES).fill_(1)
    found = {}
    for layers, batch, hidden in [(n, b, NARROW) for n in (2, 10) for b in (1, 8)] + [(n, 8, WIDE) for n in (2, 10)]:
        dist.barrier(group=groups.world)
        toy = _toy(folder, layers, hidden)
        alone = toy_step(toy, slab, batch, by_clock=True)
        dist.barrier(group=groups.world)
        extra = torch.tensor(toy_step(toy, slab, batch, groups) - alone, dtype=torch.float64)
        dist.all_reduce(extra, op=dist.ReduceOp.MAX, group=groups.world)
        found[layers, batch, hidden] = float(extra)
    return found


def _toy(folder: str, layers: int, hidden: int) -> Path:
    return Path(folder) / f"{layers}-{hidden}"


def main() -> None:
    """One rank; rank 0 writes. Started by `measure_exchange` with the folder of the toys."""
    (folder,) = sys.argv[1:]
    with process_groups(timeout_s=120) as groups:
        exchange = exchange_of(measured(folder, groups), groups.world_size)
        if groups.rank == 0:
            (Path(folder) / RESULT).write_text(json.dumps(exchange))


if __name__ == "__main__":
    main()
