"""Process groups: the mesh, clean ends, and errors that say which rank lost whom, within the time-out."""

import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.coherent import CoherentDispatcher
from moe.comm.dispatcher import ExpertRanks, LocalDispatcher, contiguous_ranks, weighted_sum_of_pairs
from moe.comm.errors import CommError, MissingPeers
from moe.comm.groups import Groups
from moe.comm.lost import speaks_for_job
from moe.comm.membership import Generation, connect, join_groups, leave_groups, process_groups, start_groups
from moe.comm.wire import pack_rows, unpack_rows
from moe.kernels.reference import combine_reference
from tests.distributed import RankFailed, spawn
from tests.patience import NEVER_S, PATIENCE_S

ALONE = Groups(device=torch.device("cpu"))


def rank_mesh():
    with process_groups() as groups:
        found = []
        for group, ranks in ((groups.local, groups.local_ranks), (groups.cross, groups.cross_ranks)):
            assert (group is None) == (len(ranks) == 1)
            if group is not None:
                assert tuple(dist.get_process_group_ranks(group)) == ranks
            found.append(ranks)
        return groups.num_nodes, groups.node, groups.local_rank, *found


def test_mesh_of_two_nodes():
    assert spawn(4, rank_mesh, ranks_per_node=2) == [
        (2, 0, 0, (0, 1), (0, 2)),
        (2, 0, 1, (0, 1), (1, 3)),
        (2, 1, 0, (2, 3), (0, 2)),
        (2, 1, 1, (2, 3), (1, 3)),
    ]


def test_mesh_of_one_node_and_of_one_rank_per_node():
    assert spawn(2, rank_mesh)[1] == (1, 0, 1, (0, 1), (1,))
    assert spawn(2, rank_mesh, ranks_per_node=1)[1] == (2, 1, 0, (1,), (0, 1))


def test_one_rank_needs_no_torch_distributed():
    groups = start_groups(rank=0, world_size=1)
    assert (groups.num_nodes, groups.node, groups.local_ranks, groups.world) == (1, 0, (0,), None)
    assert not dist.is_initialized()
    leave_groups(groups)


def rank_restart():
    for _ in range(4):
        with process_groups() as groups:
            total = torch.ones(1)
            dist.all_reduce(total, group=groups.world)
            assert total.item() == 2
    assert not dist.is_initialized()


def test_groups_can_start_again_after_a_clean_end():
    spawn(2, rank_restart)


KINDS = {"all_to_all": AllToAllDispatcher, "hierarchical": HierarchicalDispatcher, "coherent": CoherentDispatcher}


def lost_peer(name, how):
    """Rank 1 leaves before its third layer, or hangs until the others have ended; they say what they saw."""
    seen, rank, store = None, int(os.environ["RANK"]), connect("127.0.0.1", int(os.environ["MASTER_PORT"]), PATIENCE_S)
    groups = join_groups(
        store,
        Generation(1, ("a", "a", "b", "b")),
        rank,
        meet_s=PATIENCE_S,
        timeout_s=20 if how == "hangs" else NEVER_S,  # what ends is seen at once
        eager_bytes=0 if how == "in a collective" else 1 << 12,
    )
    try:
        dispatcher = KINDS[name](groups, contiguous_ranks(8, groups.world_size))
        moves = {"payload": torch.zeros(3, 1)} if name == "coherent" else {}
        for layer in range(4):
            if layer == 2 and rank == 1:
                if how in ("killed", "in a collective"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "raises":
                    raise KeyError("a rank's own error")
                store.wait([f"ended_{other}" for other in (0, 2, 3)], timedelta(seconds=PATIENCE_S))
            x, ids = torch.ones(3, 4), torch.tensor([[0, 5], [2, 7], [3, 4]])
            sent = dispatcher.dispatch(x, ids, torch.ones(3, 2), layer=layer, **moves)
            dispatcher.combine(torch.ones(len(sent.rows), 2, 4), sent.handle)
    except KeyError as error:
        seen = str(error), False
    except CommError as error:
        seen = str(error), speaks_for_job(groups)
    leave_groups(groups, wait=False)
    store.set(f"ended_{rank}", "")
    return seen


@pytest.mark.parametrize("how", ["killed", "hangs", "raises", "in a collective"])
@pytest.mark.parametrize("name", KINDS)
def test_a_lost_peer_is_an_error_that_names_it_and_the_layer(name, how):
    may_die = [1] if how in ("killed", "in a collective") else []
    results = spawn(4, lost_peer, name, how, may_die=may_die)
    # Who needed several waits a second for their words, and names those whose have not come: on a slow machine, more.
    lost = r"(rank 1|one of ranks \[[\d, ]*\b1\b[\d, ]*\])" if how in ("hangs", "in a collective") else "rank 1"
    spoken = 0
    for rank in (0, 2, 3):
        message, speaks = results[rank]
        assert re.match(rf"rank {rank} of 4: lost {lost} in .* of layer 2 with ranks", message), message
        spoken += speaks
    assert spoken == 1
    if how == "raises":
        assert "own error" in results[1][0]


def late():
    with process_groups(timeout_s=2):
        pass


def never_comes():
    if os.environ["RANK"] == "0":
        late()


def test_a_rank_that_never_comes_is_named_as_a_meeting_that_failed():
    with pytest.raises(RankFailed, match=r"rank 0 of 2: the ranks did not meet at 127\.0\.0\.1:\d+"):
        spawn(2, never_comes)


def test_a_meeting_that_is_called_off_says_when_and_not_only_its_limit(monkeypatch):
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": stores[0].port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    observer = connect("127.0.0.1", stores[0].port, PATIENCE_S)

    def call_off() -> None:
        observer.wait(["moe_generation_1/here_0"])
        stores.clear()  # its end is seen by all who meet there

    thread = threading.Thread(target=call_off)
    thread.start()
    with pytest.raises(MissingPeers) as caught:
        start_groups(rank=0, world_size=2, timeout_s=NEVER_S)
    thread.join()
    assert re.search(rf"given up after [\d.]+ s of {NEVER_S:g};", str(caught.value))


def fails_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("seen by the test")


def stays():
    time.sleep(NEVER_S)


def test_spawn_raises_a_ranks_error_and_ends_a_rank_that_stays():
    with pytest.raises(RankFailed, match=r"(?s)rank 1: Traceback.*seen by the test"):
        spawn(2, fails_on_rank_1)
    with pytest.raises(RankFailed, match="no result within 1 s"):
        spawn(1, stays, time_limit_s=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank 2 must lie in \[0, 2\)"),
        ({"rank": 0, "world_size": 3, "ranks_per_node": 2}, "world size 3 is not a multiple of ranks_per_node"),
        ({"rank": 0, "world_size": 2, "timeout_s": 0.0}, "must be positive"),
        ({"rank": 0, "world_size": 2, "eager_bytes": 55}, r"eager_bytes \(55\) must be 0 or >= 56"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        start_groups(**options)


def test_bad_input_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="holds ranks 0 to 1; the run has ranks 0 to 0"):
        ExpertRanks(torch.tensor([0, 1]), ALONE)
    with pytest.raises(ValueError, match="10 physical experts do not divide over 4"):
        contiguous_ranks(10, 4)
    with pytest.raises(ValueError, match="'sum'"):
        AllToAllDispatcher(ALONE, torch.zeros(2), combine="sum")
    x, ids, weights = torch.ones(2, 4), torch.tensor([[0], [1]]), torch.ones(2, 1)
    for dispatcher in (LocalDispatcher(ALONE, torch.zeros(2)), AllToAllDispatcher(ALONE, torch.zeros(2))):
        with pytest.raises(ValueError, match="of one T"):
            dispatcher.dispatch(x, ids[:1], weights)
        with pytest.raises(ValueError, match="integer"):
            dispatcher.dispatch(x, ids.float(), weights)
        with pytest.raises(ValueError, match=r"physical ids 0 to 2 must be -1 or lie in \[0, 2\)"):
            dispatcher.dispatch(x, ids * 2, weights)
        sent = dispatcher.dispatch(x, ids, weights)
        with pytest.raises(ValueError, match=r"must be \[R, K, H\]"):
            dispatcher.combine(torch.ones(2, 2, 4), sent.handle)
        with pytest.raises(ValueError, match="the handle is a tuple"):
            dispatcher.combine(torch.ones(2, 1, 4), ())
    with pytest.raises(ValueError, match="with 2 at 0"):
        AllToAllDispatcher(ALONE, torch.zeros(2)).dispatch(x, ids, weights, tokens_per_rank=(3,))


@pytest.mark.parametrize("holes", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (63, 5)])
def test_the_sum_over_pairs_is_the_reference_bit_for_bit(num_tokens, top_k, holes):
    generator = torch.Generator().manual_seed(0)
    positions = (torch.rand(num_tokens * top_k, generator=generator) >= holes).nonzero()[:, 0]
    positions = positions[torch.randperm(len(positions), generator=generator)]
    values = torch.randn(len(positions), 33, generator=generator)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    y = torch.zeros(num_tokens * top_k, 33)
    y[positions] = values
    for dtype in (torch.float32, torch.bfloat16):
        expected = combine_reference(y.view(num_tokens, top_k, 33), weights, dtype)
        assert torch.equal(weighted_sum_of_pairs(values, positions, weights, dtype), expected)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_packed_rows_come_back(num_rows):
    parts = [
        torch.randn(num_rows, 3).to(torch.bfloat16),  # 6 bytes: what follows is not aligned
        torch.arange(num_rows * 2, dtype=torch.int32).view(num_rows, 2),
        torch.randn(num_rows, 0),
        torch.randn(num_rows, 2, 3, dtype=torch.float64),
        torch.arange(num_rows),
    ]
    packed = pack_rows(parts)
    assert packed.shape == (num_rows, 6 + 8 + 48 + 8)
    for back, part in zip(unpack_rows(packed, parts), parts):
        assert back.dtype == part.dtype
        assert torch.equal(back, part)
