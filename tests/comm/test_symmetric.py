"""The single launch between processes over a mapped heap, and what stands around it."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from symmetric_ranks import BOUND, all_weights, inputs, one_program, one_rank, own_share, run_processes

from moe.comm.symmetric import MappedHeap, SymmetricDispatcher, VirtualHeap
from moe.comm.symmetric_torch import TorchSymmetricHeap
from moe.kernels.heap_layout import FusedShape, HeapLayout
from moe.kernels.reference import combine_reference, experts_reference
from tests.kernels.kernels_experts import relative_error

SKEWS = ("none", "one", "own", "next", "holes")


def make_shape(world_size: int, dtype: torch.dtype = torch.float32, max_tokens: int = 4) -> FusedShape:
    return FusedShape(
        world_size=world_size,
        num_experts=2 * world_size,
        top_k=2,
        hidden_size=32,
        intermediate_size=32,
        max_tokens=max_tokens,
        dtype=dtype,
    )


def test_two_processes(tmp_path):
    assert run_processes(one_rank, 2, (str(tmp_path), make_shape(2), 3, SKEWS, 0.1)) == [0, 0]


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_processes_ten_epochs_with_delays(tmp_path, dtype):
    assert run_processes(one_rank, 4, (str(tmp_path), make_shape(4, dtype), 10, SKEWS, 0.5), 500) == [0] * 4


@pytest.mark.heavy
def test_three_processes_play_each_of_two_ranks(tmp_path):
    """Real concurrency inside a rank, which the interpreter's own loop over programs cannot show."""
    barriers = [multiprocessing.get_context("spawn").Barrier(3) for _ in range(2)]
    shape = make_shape(2, max_tokens=9)
    assert run_processes(one_program, 6, (str(tmp_path), shape, 3, 5, SKEWS, barriers), 500) == [0] * 6


@pytest.mark.heavy
def test_a_process_that_never_comes(tmp_path):
    """The rank that did come ends with an error instead of hanging."""
    assert run_processes(lonely_rank, 1, (str(tmp_path),), 120) == [0]


def lonely_rank(rank: int, folder: str) -> None:
    shape = make_shape(2)
    heap = MappedHeap(Path(folder) / "heap", rank, 2, HeapLayout.of(shape).nbytes)
    dispatcher = SymmetricDispatcher(shape, heap)
    dispatcher.fused.poll_limit = 100
    slots, share = own_share(shape, rank, all_weights(shape))
    dispatcher.run(*inputs(shape, rank, 3, "none"), slots, share)
    with pytest.raises(RuntimeError, match="row counts of a peer did not arrive"):
        dispatcher.check()


def test_one_rank_without_peers():
    shape = make_shape(1)
    dispatcher = SymmetricDispatcher(shape, VirtualHeap(1, HeapLayout.of(shape).nbytes))
    weights = all_weights(shape)
    for epoch in (3, 4):
        x, ids, topk_weights = inputs(shape, 0, epoch, "none")
        out = dispatcher.run(x, ids, topk_weights, torch.arange(2), weights)
        want = combine_reference(experts_reference(x, ids, weights), topk_weights)
        assert relative_error(out, want) <= BOUND[torch.float32]
    dispatcher.check()


def test_mapped_heaps_are_one_memory(tmp_path):
    one, other = (MappedHeap(tmp_path / "heap", rank, 2, 5000) for rank in range(2))
    assert one.parts.shape == (2, 8192)
    assert not one.parts.any()
    one.parts[1, 4999] = 7
    assert other.parts[1, 4999] == 7
    assert int(other.bases[1] - other.bases[0]) == 8192
    assert (other.first_rank, other.num_ranks) == (1, 1)


def test_layout_has_no_overlap():
    shape = make_shape(4, max_tokens=200)
    layout = HeapLayout.of(shape)
    starts = [layout.count_flag, layout.data_flag, layout.ret_flag, layout.offsets, layout.rows]
    starts += [layout.recv_x, layout.ret_y, layout.nbytes]
    assert starts == sorted(starts)
    assert all(start % 128 == 0 for start in starts)
    assert layout.ret_y - layout.recv_x >= 4 * 200 * 32 * 4  # [G, T_max, H] float32
    assert layout.nbytes - layout.ret_y >= 200 * 2 * 32 * 4  # [R_max, H] float32


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"rank \(2\) must lie in \[0, 2\)"):
        MappedHeap(tmp_path / "heap", 2, 2, 100)
    with pytest.raises(ValueError, match="needs a GPU, not cpu"):
        TorchSymmetricHeap(100, None, torch.device("cpu"))
    assert VirtualHeap(3, 100).num_ranks == 3
