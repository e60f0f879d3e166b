"""Messages without a handshake bring what collectives bring, whoever is ahead, long or short."""

import time

import torch

from moe.comm import lines, mailbox
from moe.comm.errors import Task
from moe.comm.membership import process_groups
from moe.comm.wire import Wire, traffic_of
from tests.distributed import spawn

WORLD, STEPS, COUNTS = 3, 40, 3


def rank_exchanges(eager_bytes, line_bytes=lines.LINE_BYTES):
    """Known and unknown sizes in turn, many of them 0, so that a rank that waits for no one runs ahead."""
    lines.LINE_BYTES = mailbox.LINE_BYTES = line_bytes
    with process_groups(eager_bytes=eager_bytes) as groups:
        wire = Wire(groups, groups.world, groups.world_ranks, traffic_of(groups))
        assert (wire.mailbox is None) == (eager_bytes == 0)
        generator = torch.Generator().manual_seed(7)
        found = []
        for step in range(STEPS):
            rows = torch.randint(0, 30, (WORLD, WORLD), generator=generator)
            rows *= torch.rand(WORLD, WORLD, generator=generator) < 0.5
            buffers = [torch.randn(int(n.sum()), 5, generator=generator).to(torch.bfloat16) for n in rows]
            own, to, come = buffers[groups.rank], rows[groups.rank].tolist(), rows[:, groups.rank].tolist()
            if step % 3 == groups.rank:
                time.sleep(0.002)
            if step % 2:
                found.append(wire.exchange(own, to, come, Task("rows")).tolist())
                continue
            counts = torch.cat([rows[groups.rank][:, None], torch.full((WORLD, COUNTS - 1), groups.rank + step)], 1)
            got = wire.exchange_counted(counts, lambda told, own=own: own, Task("rows"))
            assert got.counts_to == counts.tolist()
            assert got.counts_from == [[n] + [r + step] * (COUNTS - 1) for r, n in enumerate(come)]
            found.append(got.received.tolist())
            expected = [b.split(n.tolist())[groups.rank] for b, n in zip(buffers, rows)]
            assert torch.equal(got.received, torch.cat(expected))
        return found, wire.traffic.bytes_to, wire.traffic.control_bytes_to, wire.traffic.messages


def test_messages_bring_what_collectives_bring():
    """Through sockets, as between nodes, and through memory, on one."""
    # 72 bytes hold the length, the counts and four rows of ten bytes.
    collectives = spawn(WORLD, rank_exchanges, 0)
    assert [spawn(WORLD, rank_exchanges, size, ranks_per_node=1) for size in (72, 4096)] == [collectives] * 2
    assert spawn(WORLD, rank_exchanges, 4096) == collectives
    assert spawn(WORLD, rank_exchanges, 4096, 64) == collectives  # most bodies in pieces
