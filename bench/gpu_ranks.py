"""Phase `ranks` of the GPU session: the single launch between real processes, and what becomes of NCCL's groups.

With one GPU two and four processes share it, which torch's switch for overlapping devices allows: right or wrong,
never timed, since contexts take turns. With `--gpus N` each of N processes has its own. Without a GPU they share a
file. Polls are bounded, and so is the time of the processes: a wait that never ends is a row.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_layers import QWEN, TINY, Case, error_of
from bench.gpu_measure import Clock, Rows
from bench.gpu_run import Session
from moe.comm.groups import Groups
from moe.comm.membership import interrupt
from moe.comm.symmetric import MappedHeap, SymmetricDispatcher
from moe.kernels.fused import FusedShape
from moe.kernels.heap_layout import HeapLayout

SECONDS = 60  # of all processes of one world
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def ranks(s: Session) -> None:
    for world in (2,) if s.tiny else (s.gpus,) if s.gpus > 1 else (2, 4):
        with s.rows.attempt(world=world, path="single launch"):
            _run_world(s, world)
    if s.on_gpu:
        with s.rows.attempt(what="NCCL, a world of one"):
            _nccl_alone(s)


def _run_world(s: Session, world: int) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-ranks-") as folder:
        command = [sys.executable, "-m", "bench.gpu_ranks", "--folder", folder, "--world", str(world)]
        command += ["--gpus", str(s.gpus), *(["--tiny"] if s.tiny else [])]
        command += [] if s.rows.path is None else ["--out", str(s.rows.path)]
        own = os.environ | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
        running = [subprocess.Popen([*command, "--rank", str(rank)], env=own) for rank in range(world)]
        end = time.monotonic() + (600 if s.tiny else SECONDS)
        try:
            codes = [one.wait(max(1.0, end - time.monotonic())) for one in running]
        finally:
            for one in running:
                one.kill()
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}")


def _nccl_alone(s: Session) -> None:
    """Joins, reduces, is interrupted: what recovery needs of NCCL, as far as one process shows it."""
    store = dist.HashStore()
    started = time.perf_counter()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=s.device)
    joined, x = time.perf_counter() - started, torch.ones(8, device=s.device)
    dist.all_reduce(x)
    groups = Groups(device=s.device, timeout_s=30, world=dist.group.WORLD)
    started = time.perf_counter()
    interrupt(groups)  # aborts
    aborted = time.perf_counter() - started
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=s.device)
    dist.all_reduce(x)
    ok = bool((x == 1).all())
    dist.destroy_process_group()
    s.rows.add(what="NCCL, a world of one", joined_s=joined, aborted_s=aborted, right=ok)


def _heap(folder: Path, rank: int, world: int, nbytes: int, device: torch.device) -> Any:
    meet: dict[str, Any] = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    meet["timeout"] = timedelta(seconds=SECONDS)
    if device.type == "cpu":
        dist.init_process_group("gloo", **meet)
        heap = MappedHeap(folder / "heap", rank, world, nbytes)
        dist.barrier()
        return heap
    from moe.comm.symmetric_torch import TorchSymmetricHeap

    kind = "nccl" if torch.cuda.device_count() >= world else "gloo"  # NCCL refuses two ranks on one card
    dist.init_process_group(kind, **meet)
    assert dist.group.WORLD is not None
    return TorchSymmetricHeap(nbytes, dist.group.WORLD, device)


def one_rank(s: Session, folder: Path, rank: int, world: int) -> None:
    """Some epochs of its tokens, of which one has none; compared with fp64."""
    torch.manual_seed(0)  # all have the same experts, and use their part
    case, most, epochs = Case(TINY[0] if s.tiny else QWEN, s.device, s.dtype), 4 if s.tiny else 32, 3 if s.tiny else 50
    layer = case.layer
    shape = FusedShape(
        world_size=world,
        num_experts=layer.experts,
        top_k=layer.top_k,
        hidden_size=layer.hidden,
        intermediate_size=layer.inter,
        max_tokens=most,
        dtype=case.dtype,
    )
    launch = SymmetricDispatcher(shape, _heap(folder, rank, world, HeapLayout.of(shape).nbytes, s.device), timeout_s=20)
    own, worst = case.slots.view(world, -1)[rank], 0.0
    for epoch in range(epochs):
        count = 0 if epoch % world == rank else 1 + (epoch + rank) % most
        inputs = case.inputs(count, "power_law", 100 * epoch + rank)
        out = launch.run(*inputs, own, case.weights)
        if epoch < 4 and count:
            worst = max(worst, error_of(case.weights, out, *inputs))
    launch.check()
    dist.barrier()
    right = worst <= BOUNDS[case.dtype]
    s.rows.add(path="single launch", world=world, rank=rank, epochs=epochs, worst=worst, right=right)
    if not right:
        raise ValueError(f"WRONG: {worst:.2e} from fp64 on rank {rank}")


def main() -> int:
    parser = argparse.ArgumentParser(description="one rank of the phase `ranks`")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", options.rank % options.gpus) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rows = Rows(options.out, "ranks")
    session = Session(rows, device, Clock(device), options.tiny, 1, options.gpus)
    with rows.attempt(path="single launch", world=options.world, rank=options.rank):
        one_rank(session, options.folder, options.rank, options.world)
    return 1 if rows.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
