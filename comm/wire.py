"""Bytes between ranks: rows packed into one buffer, one all-to-all per call, every byte that leaves counted.

On the CPU an all-to-all is a message to every peer (`Mailbox`), elsewhere, or if told so, a collective.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.comm.errors import LostPeer, Task
from moe.comm.groups import Groups
from moe.comm.lost import lost_peer
from moe.comm.mailbox import Moving

Table = list[list[int]]
Meanwhile = Callable[[], object]


@dataclass(slots=True)
class Traffic:
    """What one rank has sent since `reset`: all figures exclude what it kept for itself.

    bytes_to: payload bytes by global destination rank. control_bytes_to: the same for the counts that precede payload.
    messages: non-empty payload parts. collectives: rounds, each an all-to-all. calls: dispatches. host_syncs: times
    that a figure had to be known on the CPU (free on a CPU device). carries: tokens and results ("rows"), which
    `placement/wire_format.py` describes, or what else ranks tell each other ("beside").
    """

    rank: int
    world_size: int
    nodes: tuple[int, ...]
    carries: str = "rows"
    bytes_to: list[int] = field(
        default_factory=list, metadata={"help": "Payload sent to other ranks", "unit": "bytes", "index": "to_rank"}
    )
    control_bytes_to: list[int] = field(
        default_factory=list, metadata={"help": "Counts sent ahead of payload", "unit": "bytes", "index": "to_rank"}
    )
    messages: int = field(default=0, metadata={"help": "Parts of payload that were not empty"})
    collectives: int = field(default=0, metadata={"help": "Rounds, each an all-to-all"})
    calls: int = field(default=0, metadata={"help": "Dispatches of a layer's tokens"})
    host_syncs: int = field(default=0, metadata={"help": "Times that a figure had to be known on the CPU"})

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.bytes_to = [0] * self.world_size
        self.control_bytes_to = [0] * self.world_size
        self.messages = self.collectives = self.calls = self.host_syncs = 0

    @property
    def cross_node_bytes(self) -> int:
        """Payload bytes that left this node."""
        return sum(n for n, node in zip(self.bytes_to, self.nodes) if node != self.nodes[self.rank])


def nothing() -> None:
    """What there is to do meanwhile, where nobody said."""


def traffic_of(groups: Groups, carries: str = "rows") -> Traffic:
    return Traffic(groups.rank, groups.world_size, groups.nodes, carries)


class Counted(NamedTuple):
    """received: rows by member; counts_to, counts_from: what members were told, and told this one, [members][C]."""

    received: Tensor
    counts_to: Table
    counts_from: Table


class Wire:
    """All-to-all over one process group, with its traffic and with errors that say who and what.

    group None: one member, nothing moves. ranks: the members' global ranks in the order of the group.
    """

    def __init__(self, groups: Groups, group: ProcessGroup | None, ranks: Sequence[int], traffic: Traffic):
        if group is None and len(ranks) != 1:
            raise ValueError(f"ranks {tuple(ranks)} need a process group; only one rank goes without")
        self.groups, self.group, self.ranks, self.traffic = groups, group, tuple(ranks), traffic
        self.size = len(self.ranks)
        self.index = self.ranks.index(groups.rank)
        self.mailbox = None if group is None else groups.mailboxes.get(group)

    def exchange(
        self,
        buffer: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        what: Task,
        *,
        is_control: bool = False,
        meanwhile: Meanwhile = nothing,
    ) -> Tensor:
        """Send the first `send[0]` rows to member 0, and so on. buffer: [sum(send), ...]. Returns [sum(recv), ...].

        meanwhile: called once the rows are on their way.
        """
        if self.mailbox is None:
            under_way = self.start_exchange(buffer, send, recv, what, is_control=is_control)
            meanwhile()
            return under_way.wait()
        self._count(send, buffer.shape[1:].numel() * buffer.element_size(), is_control)
        received, _ = self._post(buffer, send, torch.zeros(self.size, 0, dtype=torch.int64), recv, what, meanwhile)
        return received

    def start_exchange(
        self, buffer: Tensor, send: Sequence[int], recv: Sequence[int], what: Task, *, is_control: bool = False
    ) -> "Exchange":
        """`exchange` that goes on in the background until `wait`; all ranks must start in the same order."""
        assert len(buffer) == sum(send), (tuple(buffer.shape), send)
        assert len(send) == len(recv) == self.size, (send, recv, self.size)
        if self.group is None:
            return Exchange(self, what, buffer, buffer, None)
        self._count(send, buffer.shape[1:].numel() * buffer.element_size(), is_control)
        received = torch.empty(sum(recv), *buffer.shape[1:], dtype=buffer.dtype, device=buffer.device)
        exchange = Exchange(self, what, buffer.contiguous(), received, None)
        try:
            exchange.work = dist.all_to_all_single(
                received, exchange.sent, list(recv), list(send), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise self.failed(what, exchange.started, error) from error
        return exchange

    def exchange_counted(self, counts: Tensor, rows: Callable[[Table], Tensor], what: Task) -> Counted:
        """`exchange` where members do not know yet how much comes: one round by mailbox, else two. One host sync.

        counts: int64 [members, C], one row for each member, the rows of buffer that it gets first. rows: makes the
        buffer when the counts are known on the CPU.
        """
        if self.mailbox is None:
            ones = [1] * self.size
            incoming = self.exchange(counts, ones, ones, Task(f"counts for {what.what}", what.layer), is_control=True)
            both = self.to_host(torch.cat([counts, incoming]))
            to, come = both[: self.size], both[self.size :]
            received = self.exchange(rows(to), [row[0] for row in to], [row[0] for row in come], what)
            return Counted(received, to, come)
        to = self.to_host(counts)
        buffer, send = rows(to), [row[0] for row in to]
        self._count(send, buffer.shape[1:].numel() * buffer.element_size(), is_control=False)
        for rank in set(self.ranks) - {self.groups.rank}:
            self.traffic.control_bytes_to[rank] += 8 * counts.shape[1]
        received, come = self._post(buffer, send, counts, None, what, nothing)
        return Counted(received, to, come)

    def _post(
        self,
        buffer: Tensor,
        send: Sequence[int],
        counts: Tensor,
        recv: Sequence[int] | None,
        what: Task,
        meanwhile: Meanwhile,
    ) -> tuple[Tensor, Table]:
        """Rows and counts [members, C] to every member, and theirs. recv: known rows; none: no message."""
        assert self.mailbox is not None
        assert len(buffer) == sum(send), (tuple(buffer.shape), send)
        started, size = time.monotonic(), buffer.shape[1:].numel() * buffer.element_size()
        parts = torch.split(buffer.reshape(-1).view(torch.uint8), [n * size for n in send])
        heads = torch.cat([torch.tensor([n * size for n in send])[:, None], counts], 1)
        bodies, come = list(parts), counts.tolist()
        waiting: list[tuple[int, Moving]] = []
        peers = [(self.index + i) % self.size for i in range(1, self.size)]
        waits_for: list[int] = list(self.ranks)
        is_long = partial(self.mailbox.is_in_pieces, num_counts=counts.shape[1])
        try:
            for peer in peers:
                waits_for = [self.ranks[peer]]
                if recv is None or send[peer]:
                    waiting += [(peer, one) for one in self.mailbox.send(peer, heads[peer], parts[peer])]
        except RuntimeError as error:
            raise self.failed(what, started, error, waits_for) from error
        in_pieces = any(is_long(peer, num_bytes=len(parts[peer])) for peer in peers)
        if not in_pieces:
            meanwhile()
        try:
            for peer in peers:
                bodies[peer] = parts[peer][:0]
                if recv is None or recv[peer]:
                    waits_for = [self.ranks[peer]]
                    come[peer], bodies[peer], following = self.mailbox.receive(peer, counts.shape[1])
                    waiting += [(peer, one) for one in following]
            out, into = ([(p, of[p]) for p in peers if is_long(p, num_bytes=len(of[p]))] for of in (parts, bodies))
            for peer in self.mailbox.pass_pieces(out, into):
                waits_for = [self.ranks[peer]]
            for peer, one in waiting:
                waits_for = [self.ranks[peer]]
                one.work.wait(self.mailbox.timeout)
        except RuntimeError as error:
            raise self.failed(what, started, error, waits_for) from error
        if in_pieces:  # which only move while both members see to them
            meanwhile()
        rows = [row[0] for row in come] if recv is None else list(recv)
        assert [len(body) for body in bodies] == [n * size for n in rows], (what, rows)
        return torch.cat(bodies).view(buffer.dtype).view(sum(rows), *buffer.shape[1:]), come

    def to_host(self, figures: Tensor) -> list[list[int]]:
        """Figures as Python integers: the one place where the CPU waits for the device."""
        self.traffic.host_syncs += 1  # host sync
        values: list[list[int]] = figures.tolist()
        return values

    def failed(self, what: Task, started: float, error: RuntimeError, peers: Sequence[int] = ()) -> LostPeer:
        return lost_peer(self.groups, what, started, error, self.ranks, peers)

    def _count(self, send: Sequence[int], row_bytes: int, is_control: bool) -> None:
        traffic = self.traffic
        traffic.collectives += 1
        bytes_to = traffic.control_bytes_to if is_control else traffic.bytes_to
        for rank, rows in zip(self.ranks, send):
            if rank != self.groups.rank and rows * row_bytes:
                bytes_to[rank] += rows * row_bytes
                traffic.messages += not is_control


@dataclass(slots=True, eq=False)
class Exchange:
    """An all-to-all under way; it keeps the buffers alive until `wait`."""

    wire: Wire
    what: Task
    sent: Tensor
    received: Tensor
    work: dist.Work | None
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> Tensor:
        if self.work is not None:
            try:
                self.work.wait()  # no limit: the group has one
            except RuntimeError as error:
                raise self.wire.failed(self.what, self.started, error) from error
            self.work = None
        return self.received


def pack_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [N, ...] of any dtypes as the bytes uint8 [N, B], row by row."""
    flat = [part.reshape(len(part), part.shape[1:].numel()).contiguous() for part in parts]
    # A last dimension of size 1 may have any stride and still count as contiguous; bytes need a stride of 1.
    flat = [f if f.stride(1) == 1 else f.clone(memory_format=torch.contiguous_format) for f in flat]
    return torch.cat([f.view(torch.uint8) for f in flat], dim=1)


def unpack_rows(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `pack_rows`. packed: uint8 [N, B]; `like` gives the trailing shapes and dtypes. Returns tensors [N, ...]."""
    parts, at = [], 0
    for part in like:
        shape = part.shape[1:]
        width = shape.numel() * part.element_size()
        # A clone begins at an aligned address; a one-row slice would count as contiguous and keep its odd offset.
        piece = packed[:, at : at + width].clone(memory_format=torch.contiguous_format)
        parts.append(piece.view(-1).view(part.dtype).view(len(packed), *shape))
        at += width
    assert at == packed.shape[1], (at, tuple(packed.shape))
    return parts
