"""Generations: who is missing is named, nodes may be uneven, survivors go on, a wait can be ended."""

import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.dispatcher import TokenDispatcher
from moe.comm.errors import LostPeer, MissingPeers
from moe.comm.groups import Groups
from moe.comm.membership import Generation, connect, interrupt, join_groups, leave_groups, start_groups
from tests.distributed import spawn
from tests.patience import NEVER_S, PATIENCE_S


def store() -> dist.TCPStore:
    return connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), PATIENCE_S)


def own_rank() -> int:
    return int(os.environ["RANK"])


def ask_all(groups: Groups, kind: type[AllToAllDispatcher] = AllToAllDispatcher, layer: int = 3) -> list[float]:
    """One token to one expert on each rank, and what comes home: the number of ranks, if nothing was lost."""
    dispatcher: TokenDispatcher = kind(groups, torch.arange(groups.world_size))
    ids = torch.arange(groups.world_size)[None]
    sent = dispatcher.dispatch(torch.ones(1, 2), ids, torch.ones(ids.shape), layer=layer)
    y = (sent.local_ids >= 0)[:, :, None] * sent.rows[:, None]
    return dispatcher.combine(y, sent.handle)[0].tolist()


def uneven() -> tuple:
    groups = join_groups(store(), Generation(0, ("here", "there", "there")), own_rank(), meet_s=PATIENCE_S)
    try:
        with pytest.raises(ValueError, match="unequal numbers of ranks"):
            HierarchicalDispatcher(groups, torch.arange(3))
        assert groups.local is None or tuple(dist.get_process_group_ranks(groups.local)) == groups.local_ranks
        return groups.node, groups.local_rank, groups.local_ranks, groups.cross_ranks, ask_all(groups)
    finally:
        leave_groups(groups)


def test_nodes_may_have_unequal_numbers_of_ranks():
    assert spawn(3, uneven) == [
        (0, 0, (0,), (0,), [3.0, 3.0]),
        (1, 0, (1, 2), (1,), [3.0, 3.0]),
        (1, 1, (1, 2), (2,), [3.0, 3.0]),
    ]


def mixed_nodes() -> tuple:
    """Ranks of two nodes in turns: the mesh is not in the order of the ranks."""
    groups = join_groups(store(), Generation(0, ("a", "b", "a", "b")), own_rank(), meet_s=PATIENCE_S)
    answer = groups.local_ranks, groups.cross_ranks, ask_all(groups, HierarchicalDispatcher)
    leave_groups(groups)
    return answer


def test_ranks_of_a_node_need_not_follow_each_other():
    assert spawn(4, mixed_nodes) == [
        ((0, 2), (0, 1), [4.0] * 2),
        ((1, 3), (0, 1), [4.0] * 2),
        ((0, 2), (2, 3), [4.0] * 2),
        ((1, 3), (2, 3), [4.0] * 2),
    ]


def somebody_is_missing() -> str | None:
    if own_rank() == 1:
        return None
    shared, here = store(), "moe_generation_5/here_{}"
    shared.set(here.format(own_rank()), "")  # before the meeting begins for either
    shared.wait([here.format(0), here.format(2)])
    with pytest.raises(MissingPeers) as caught:
        join_groups(shared, Generation(5, ("a", "a", "a")), own_rank(), meet_s=1, timeout_s=NEVER_S)
    assert (caught.value.generation, caught.value.peers) == (5, (1,))
    assert not dist.is_initialized()
    return str(caught.value)


def test_who_is_missing_is_named_long_before_a_collective_would_time_out():
    first, _, third = spawn(3, somebody_is_missing)
    assert re.fullmatch(r"rank 0 of 3: ranks \[1\] of generation 5 did not come in [\d.]+ s", first), first
    assert third.startswith("rank 2 of 3: ranks [1]")


def test_ranks_that_meet_can_be_called_off():
    """By the end of their store: nobody waits out `meet_s` for a rank that will not come."""
    servers = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    own, observer = (connect("127.0.0.1", servers[0].port, PATIENCE_S) for _ in range(2))

    def call_off() -> None:
        observer.wait(["moe_generation_3/here_0"])
        servers.clear()

    thread = threading.Thread(target=call_off)
    thread.start()
    with pytest.raises(MissingPeers, match="rank 0 of 3: a rank of generation 3 was lost while all met"):
        join_groups(own, Generation(3, ("a",) * 3), 0, meet_s=NEVER_S)
    thread.join()
    assert not dist.is_initialized()


def meets_briefly() -> None:
    groups = join_groups(store(), Generation(0, ("a", "a")), own_rank(), meet_s=PATIENCE_S, connect_s=10)
    ask_all(groups)
    if groups.rank == 1:
        time.sleep(11)
    both = dist.barrier(group=groups.world, async_op=True)
    ask_all(groups)  # two waits longer than the meeting's limit
    both.wait()
    leave_groups(groups)


def test_a_collective_may_wait_longer_than_a_meeting():
    spawn(2, meets_briefly)


def lives_through_three(nodes: str) -> list:
    """Generation 1 of three, of which rank 1 is killed in a layer; generation 2 of the others; 3 after a clean end."""
    groups = join_groups(store(), Generation(1, tuple(nodes)), own_rank(), meet_s=PATIENCE_S, timeout_s=NEVER_S)
    answers = [ask_all(groups)]
    if groups.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LostPeer) as caught:
        ask_all(groups, layer=4)
    assert (caught.value.generation, caught.value.layer) == (1, 4)
    assert caught.value.peers == (1,)
    leave_groups(groups, wait=False)
    for number in (2, 3):
        groups = join_groups(store(), Generation(number, (nodes[0], nodes[2])), own_rank() // 2, meet_s=PATIENCE_S)
        answers.append(ask_all(groups))
        leave_groups(groups)
    return answers


@pytest.mark.parametrize("nodes", ["aaa", "abc", "aab"])
def test_survivors_form_the_next_generation_in_the_same_process(nodes):
    """By lines, by messages of gloo, and by both."""
    first, _, third = spawn(3, lives_through_three, nodes, may_die=[1])
    assert first == third == [[3.0] * 2, [2.0] * 2, [2.0] * 2]


def is_freed(nodes: tuple[str, ...], eager_bytes: int) -> float | None:
    limits = {"meet_s": PATIENCE_S, "timeout_s": NEVER_S}
    groups = join_groups(store(), Generation(0, nodes), own_rank(), **limits, eager_bytes=eager_bytes)
    ask_all(groups)
    if groups.rank == 1:
        store().wait(["freed"])
        leave_groups(groups, wait=False)
        return None
    timer = threading.Timer(0.5, interrupt, [groups])
    timer.start()
    with pytest.raises(LostPeer, match="with ranks"):
        ask_all(groups)
    timer.join()
    leave_groups(groups, wait=False)
    store().set("freed", "1")
    return 1.0


@pytest.mark.parametrize(("nodes", "eager_bytes"), [("aa", 0), ("aa", 1 << 12), ("ab", 1 << 12)])
def test_a_rank_that_waits_for_a_living_peer_can_be_freed(nodes, eager_bytes):
    """Long before its own limit. In a collective, on a line, in a message of gloo."""
    assert spawn(2, is_freed, tuple(nodes), eager_bytes) == [1.0, None]


def is_freed_from_one_while_another_has_left(leaver: int) -> float | None:
    groups = join_groups(store(), Generation(0, ("a",) * 3), own_rank(), meet_s=PATIENCE_S)
    ask_all(groups)
    assert groups.world is not None
    if groups.rank == leaver:
        leave_groups(groups, wait=False)
        store().set("left", "1")
        return None
    store().wait(["left"])
    if groups.rank != 0:
        store().wait(["freed"])
        leave_groups(groups, wait=False)
        return None
    waiting = groups.world.recv([torch.empty(1)], 3 - leaver, 5)
    timer = threading.Timer(0.5, interrupt, [groups])
    timer.start()
    with pytest.raises(RuntimeError, match=r"closed|Application timeout"):
        waiting.wait(timedelta(seconds=NEVER_S))
    timer.join()
    leave_groups(groups, wait=False)
    store().set("freed", "1")
    return 1.0


@pytest.mark.parametrize("leaver", [1, 2])
def test_a_rank_is_freed_from_a_silent_peer_though_another_has_left(leaver):
    """Whichever of the two it is asked to hear from first."""
    assert spawn(3, is_freed_from_one_while_another_has_left, leaver) == [1.0, None, None]


def test_bad_memberships_are_refused():
    with pytest.raises(ValueError, match="generation 3 has no ranks"):
        Generation(3, ())
    with pytest.raises(ValueError, match=r"rank 2 must lie in \[0, 2\)"):
        join_groups(dist.HashStore(), Generation(0, ("a", "a")), 2)
    with pytest.raises(MissingPeers, match=r"the store at 127\.0\.0\.1:1 does not answer"):
        connect("127.0.0.1", 1, 0.5)


def test_deepspeeds_launcher_says_local_size(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with pytest.raises(ValueError, match=r"world size 3 is not a multiple of ranks_per_node \(2\)"):
        start_groups(rank=0, world_size=3)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("text", ["two", "-1", "1.0"])
def test_what_a_job_tells_must_be_numbers(monkeypatch, name, text):
    for other in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"^{name} \('{text}'\) of the environment is no number"):
        start_groups()
