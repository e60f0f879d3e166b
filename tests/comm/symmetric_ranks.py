"""What the processes of the symmetric-heap tests do; every one can compute the whole answer from the seed."""

import random
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from moe.comm.symmetric import MappedHeap, SymmetricDispatcher
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.reference import combine_reference, experts_reference
from moe.kernels.tiles import TileConfig
from moe.kernels.weights import Activation, ExpertWeights
from tests.kernels.kernels_experts import relative_error
from tests.patience import PATIENCE_S

BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
TILES = TileConfig(16, 32, 32, 32, 4, 1)


def run_processes(target, count: int, arguments: tuple, timeout: float = 240) -> list[int | None]:
    """Exit codes of `count` processes running target(index, *arguments); None: it had to be ended."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=target, args=(i, *arguments)) for i in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def all_weights(shape: FusedShape) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    inter, hidden = shape.intermediate_size, shape.hidden_size
    gate_up = torch.randn(shape.num_experts, 2 * inter, hidden, generator=generator) / hidden**0.5
    down = torch.randn(shape.num_experts, hidden, inter, generator=generator) / inter**0.5
    return ExpertWeights(gate_up.to(shape.dtype), down.to(shape.dtype), None, None, Activation())


def inputs(shape: FusedShape, rank: int, epoch: int, skew: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens: another number of them on every rank and epoch, sometimes none."""
    generator = torch.Generator().manual_seed(1000 * epoch + rank)
    tokens = (rank + epoch) % (shape.max_tokens + 1)
    scores = torch.rand(tokens, shape.num_experts, generator=generator)
    first = {"one": 0, "own": rank, "next": (rank + 1) % shape.world_size}.get(skew)
    if skew == "one":
        scores[:, 0] += 1
    elif first is not None:
        scores[:, first * shape.experts_per_rank : (first + 1) * shape.experts_per_rank] += 1
    ids = scores.topk(shape.top_k, dim=-1).indices.to(torch.int32)
    if skew == "holes":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
    x = torch.randn(tokens, shape.hidden_size, generator=generator).to(shape.dtype)
    return x, ids, torch.rand(ids.shape, generator=generator)


def own_share(shape: FusedShape, rank: int, weights: ExpertWeights) -> tuple[torch.Tensor, ExpertWeights]:
    """Slots of the rank's experts, in a slab of its own with one slot to spare, in another order on every rank."""
    mine = slice(rank * shape.experts_per_rank, (rank + 1) * shape.experts_per_rank)
    order = torch.randperm(shape.experts_per_rank + 1, generator=torch.Generator().manual_seed(rank))
    slots = order[: shape.experts_per_rank]
    gate_up = torch.full((len(order), *weights.gate_up.shape[1:]), torch.nan, dtype=shape.dtype)
    down = torch.full((len(order), *weights.down.shape[1:]), torch.nan, dtype=shape.dtype)
    gate_up[slots], down[slots] = weights.gate_up[mine], weights.down[mine]
    return slots, weights._replace(gate_up=gate_up, down=down)


def one_rank(rank: int, folder: str, shape: FusedShape, epochs: int, skews: tuple[str, ...], delay: float) -> None:
    """Epochs with no barrier between them and a random delay before each; an AssertionError ends the process with 1."""
    torch.set_num_threads(1)
    random.seed(rank)
    heap = MappedHeap(Path(folder) / "heap", rank, shape.world_size, HeapLayout.of(shape).nbytes)
    dispatcher = SymmetricDispatcher(shape, heap, config=TILES)
    weights = all_weights(shape)
    slots, share = own_share(shape, rank, weights)
    for epoch in range(1, epochs + 1):
        x, ids, topk_weights = inputs(shape, rank, epoch, skews[epoch % len(skews)])
        time.sleep(random.random() * delay)
        out = dispatcher.run(x, ids, topk_weights, slots, share)
        dispatcher.check()
        want = combine_reference(experts_reference(x, ids, weights), topk_weights, shape.dtype)
        error = relative_error(out, want)
        assert error <= BOUND[shape.dtype], (rank, epoch, error)


def one_program(index: int, folder: str, shape: FusedShape, players: int, epochs: int, skews, barriers) -> None:
    """One of `players` processes that play the programs of one rank's launch at the same time."""
    torch.set_num_threads(1)
    rank, player = divmod(index, players)
    heap = MappedHeap(Path(folder) / "heap", rank, shape.world_size, HeapLayout.of(shape).nbytes)
    dispatcher = SymmetricDispatcher(shape, heap, config=TILES)
    fused = dispatcher.fused
    fused.players = players
    for name in ("inter", "tile_flag", "tickets", "state"):
        private = getattr(fused, name)
        common = shared_like(Path(folder) / f"{name}{rank}", private)
        if player == 0:
            common.copy_(private)
        setattr(fused, name, common)
    weights = all_weights(shape)
    slots, share = own_share(shape, rank, weights)
    for epoch in range(1, epochs + 1):
        x, ids, topk_weights = inputs(shape, rank, epoch, skews[epoch % len(skews)])
        out = shared_like(Path(folder) / f"out{rank}.{epoch}", torch.full_like(x, torch.nan))
        barriers[rank].wait(PATIENCE_S)  # a launch begins
        fused(x, ids, topk_weights, slots, share, out)
        barriers[rank].wait(PATIENCE_S)  # and ends
        fused.check()
        want = combine_reference(experts_reference(x, ids, weights), topk_weights, shape.dtype)
        error = relative_error(out, want)
        assert error <= BOUND[shape.dtype], (rank, player, epoch, error)


def shared_like(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    size = max(1, tensor.numel())
    return torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)[: tensor.numel()].view(tensor.shape)
