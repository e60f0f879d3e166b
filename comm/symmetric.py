"""Symmetric heaps, and the fused path over them: dispatch, experts and combine as one call.

A symmetric heap is memory of one layout on all ranks that every rank can write. Here: virtual ranks on one device, and
processes on one machine over a mapped file; `symmetric_torch.py` has the one between GPUs. Across nodes the same
kernel needs NVSHMEM (`kernels.intrinsics.peer_pointer`, `release_*` and `wait_*` become its put, signal and wait).
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe.kernels.fused import FusedExperts, polls_within
from moe.kernels.heap_layout import FusedShape
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import ExpertWeights

PAGE = 4096


def padded(nbytes: int) -> int:
    """Whole pages."""
    return -(-nbytes // PAGE) * PAGE


class SymmetricHeap(Protocol):
    """Zeroed bytes on every rank, each at the same offset.

    bases: int64 [G] on the device, the address of every rank's part as this process maps it, while the heap lives.
    first_rank, num_ranks: the ranks that this process plays.
    """

    bases: Tensor
    first_rank: int
    num_ranks: int


class VirtualHeap:
    """All ranks on one device, in one process: for tests, and for timing the single launch on one GPU."""

    def __init__(self, world_size: int, nbytes: int, device: torch.device | str = "cpu") -> None:
        self.parts = torch.zeros(world_size, padded(nbytes), dtype=torch.uint8, device=device)
        self.bases = torch.tensor([part.data_ptr() for part in self.parts], device=device)
        self.first_rank, self.num_ranks = 0, world_size


class MappedHeap:
    """Processes on one machine, over one mapped file: no fork, no common parent, every rank maps it where it likes.

    path: a file that is new for this run, best in memory (/dev/shm); whoever made the folder removes it. Ranks may
    start in any order: waiting for a late one is waiting for its tokens.
    """

    def __init__(self, path: Path, rank: int, world_size: int, nbytes: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank ({rank}) must lie in [0, {world_size})")
        stride = padded(nbytes)
        memory = torch.from_file(str(path), shared=True, size=world_size * stride, dtype=torch.uint8)
        self.parts = memory.view(world_size, stride)
        self.bases = torch.tensor([part.data_ptr() for part in self.parts])
        self.first_rank, self.num_ranks = rank, 1


class SymmetricDispatcher:
    """The fused path of one rank: what a `TokenDispatcher` and an experts function do, in one launch.

    Wins for few tokens (`kernels.crossover` measures where). Every rank must call `run` for every layer in the same
    order, also with no tokens. Physical expert p lives on rank p // experts_per_rank. timeout_s: about how long one
    waits for a peer that is lost (`polls_within`).
    """

    def __init__(
        self, shape: FusedShape, heap: SymmetricHeap, *, config: TileConfig | None = None, timeout_s: float = 30
    ) -> None:
        self.heap = heap  # keeps the memory alive
        self.fused = FusedExperts(
            shape,
            heap.bases,
            first_rank=heap.first_rank,
            num_ranks=heap.num_ranks,
            config=config,
            poll_limit=polls_within(timeout_s),
        )

    def run(
        self, x: Tensor, physical_ids: Tensor, topk_weights: Tensor, local_slots: Tensor, weights: ExpertWeights
    ) -> Tensor:
        """out[t] = Σ_k topk_weights[t, k] · expert(physical_ids[t, k])(x[t]). All ranks must call, also with T = 0.

        x: [T, H]; physical_ids: int [T, K], -1 = none; topk_weights: [T, K]; local_slots: int [E_local], the slot of
        each of this rank's experts, all that may have rows resident. Returns [T, H]. No host sync.
        """
        return self.fused(x, physical_ids, topk_weights, local_slots, weights)

    def check(self) -> None:
        """`RuntimeError` when a peer was lost or an expert was not resident; a host sync, so once per step."""
        self.fused.check()
