"""Lines through memory: who may use them, messages of every length, who is ahead, and the end of a peer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from moe.comm import together
from moe.comm.errors import LostPeer, Task
from moe.comm.lines import DEPTH, LINE_BYTES, load_helper
from moe.comm.membership import leave_groups, process_groups, start_groups
from moe.comm.wire import Wire, traffic_of
from tests.distributed import spawn
from tests.patience import NEVER_S


def own_wire(groups):
    return Wire(groups, groups.world, groups.world_ranks, traffic_of(groups))


def lines_of(groups):
    """The peers that a rank has a line to, by group."""
    boxes = (groups.mailboxes.get(group) for group in (groups.world, groups.local))
    return [() if box is None or box.lines is None else tuple(sorted(box.lines.peers)) for box in boxes]


def rank_lines():
    with process_groups() as groups:
        return lines_of(groups), sorted(groups.mailboxes[groups.world].on_lines)


def test_ranks_of_a_node_have_lines_and_others_do_not():
    assert load_helper() is not None, "not compiled: everything here would be sockets"
    assert spawn(2, rank_lines) == [([(1,), (1,)], [1]), ([(0,), (0,)], [0])]
    assert spawn(2, rank_lines, ranks_per_node=1) == [([(), ()], [])] * 2
    # Members of the world by rank, of the node by place.
    assert spawn(4, rank_lines, ranks_per_node=2) == [
        ([(1,), (1,)], [1]),
        ([(0,), (0,)], [0]),
        ([(1,), (1,)], [3]),
        ([(0,), (0,)], [2]),
    ]


# 16: its length and one count. Longer ones come in pieces of LINE_BYTES.
SIZES = (0, 1, LINE_BYTES - 16, LINE_BYTES - 15, LINE_BYTES, LINE_BYTES + 1, 3 * LINE_BYTES, 7 * LINE_BYTES - 1)


def rank_sends_every_size():
    with process_groups() as groups:
        wire, peer = own_wire(groups), 1 - groups.rank
        for size in SIZES:
            rows = torch.arange(size).to(torch.uint8) + groups.rank
            counts = torch.tensor([[0], [size]] if groups.rank == 0 else [[size], [0]])
            got = wire.exchange_counted(counts, lambda told, rows=rows: rows, Task("rows"))
            assert torch.equal(got.received, torch.arange(size).to(torch.uint8) + peer)


def test_messages_of_every_length_arrive():
    spawn(2, rank_sends_every_size)


def rank_runs_ahead(messages):
    """Rank 0 sends and hears nothing, until the lines are full; rank 1 begins late."""
    with process_groups() as groups:
        wire, found = own_wire(groups), []
        if groups.rank == 1:
            time.sleep(0.3)
        for number in range(messages):
            rows = torch.full((1 - groups.rank, 2), number)
            got = wire.exchange(rows, [0, 1 - groups.rank], [groups.rank, 0], Task("rows"))
            found.append(got.flatten().tolist())
        return found


def test_a_sender_that_is_ahead_waits_for_room():
    messages = 5 * DEPTH
    assert spawn(2, rank_runs_ahead, messages) == [[[]] * messages, [[n, n] for n in range(messages)]]


def rank_sees_an_end(how):
    groups = start_groups(timeout_s=NEVER_S)
    wire = own_wire(groups)
    if groups.rank == 1:
        wire.exchange(torch.ones(1, 1), [1, 0], [0, 0], Task("its last word"))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        leave_groups(groups, wait=False)
        return None
    assert wire.exchange(torch.ones(0, 1), [0, 0], [0, 1], Task("its last word")).item() == 1.0
    with pytest.raises(LostPeer, match="ended or left") as caught:
        wire.exchange(torch.ones(0, 1), [0, 0], [0, 1], Task("silence"))
    leave_groups(groups, wait=False)
    return caught.value.peers


@pytest.mark.parametrize("how", ["killed", "left"])
def test_the_end_of_a_peer_is_seen_long_before_the_time_out(how):
    assert spawn(2, rank_sees_an_end, how, may_die=[1] if how == "killed" else ()) == [(1,), None]


def rank_ends_between_pieces():
    """Rank 1 dies when it has sent its head and two of its eight pieces."""
    groups = start_groups(timeout_s=NEVER_S)
    wire = own_wire(groups)
    if groups.rank == 1:
        lines, sent = wire.mailbox.lines, []
        send = lines.send

        def send_or_die(peer, head, body):
            if len(sent) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            sent.append(len(body))
            send(peer, head, body)

        lines.send = send_or_die
    rows = torch.zeros(8 * LINE_BYTES, dtype=torch.uint8)
    sizes = [0, len(rows)] if groups.rank == 0 else [len(rows), 0]
    with pytest.raises(LostPeer, match="ended or left") as caught:
        wire.exchange(rows, sizes, sizes, Task("rows"))
    leave_groups(groups, wait=False)
    return caught.value.peers


def test_a_peer_that_ends_between_pieces_is_named():
    assert spawn(2, rank_ends_between_pieces, may_die=[1])[0] == (1,)


def rank_without_memory(folder):
    together._FOLDER = Path(folder)
    with process_groups() as groups:
        assert lines_of(groups) == [(), ()]
        return own_wire(groups).exchange(torch.full((2, 1), groups.rank), [1, 1], [1, 1], Task("rows")).tolist()


def test_without_shared_memory_ranks_of_a_node_use_sockets(tmp_path):
    assert spawn(2, rank_without_memory, str(tmp_path / "none")) == [[[0], [1]]] * 2


def test_no_room_is_told_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "_FOLDER", tmp_path)

    def no_room(file, offset, num_bytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"), together._new_file(1 << 20):
        pass
    assert list(tmp_path.iterdir()) == []


def rank_lines_in(folder):
    together._FOLDER = Path(folder)
    rank_lines()
    return together._FOLDER.stat().st_mtime_ns


def test_no_name_is_left_in_memory():
    with TemporaryDirectory(dir="/dev/shm") as folder:  # of its own: other tests run beside this one
        before = Path(folder).stat().st_mtime_ns
        assert min(spawn(2, rank_lines_in, folder)) > before  # there were names
        assert list(Path(folder).iterdir()) == []


def test_names_that_killed_ranks_leave_are_removed_by_the_next(tmp_path, monkeypatch):
    """Not those of ranks that are just about to open theirs."""
    monkeypatch.setattr(together, "_FOLDER", tmp_path)

    def names():
        return sorted(path.name for path in tmp_path.glob("moe-shared-*"))

    maker = "import sys; import moe.comm.together as t; from pathlib import Path; t._FOLDER = Path(sys.argv[1])\n"
    maker += "with t._new_file(4096): print('made', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", maker, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "made\n"
        (theirs,) = names()
        with together._new_file(1 << 12) as own:
            assert names() == sorted([theirs, own.name])
        assert names() == [theirs]
        other.kill()
        other.wait()
    assert names() == [theirs]
    with together._new_file(1 << 12) as own:
        assert names() == [own.name]
    assert names() == []
