"""One step of tokens over one process group and the way back: what every dispatcher is made of.

Forward, a row travels once to every member that it has an expert on. Backward, results return either per (row, k) pair,
in an order that both sides derive from the ids, or as one sum per (row, member).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe.comm.errors import Task
from moe.comm.wire import Meanwhile, Table, Wire, nothing


class Counts(NamedTuple):
    """By member: rows and (row, k) pairs sent there in the forward, and received from there."""

    rows_to: list[int]
    pairs_to: list[int]
    rows_from: list[int]
    pairs_from: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class HopHandle:
    """member: [N, K], who computes pair (row, k), -1 = no one; counts: None after a broadcast, which exchanges none."""

    member: Tensor
    received_from: tuple[int, ...]
    counts: Counts | None


class Hop:
    """Rows out over `wire` and results back. Every member must call, also with no rows."""

    def __init__(self, wire: Wire):
        self.wire = wire

    def forward(
        self, packed: Tensor, member: Tensor, what: Task, rows_of: Sequence[int] | None = None
    ) -> tuple[Tensor, HopHandle]:
        """Send rows to the members of their experts. packed: uint8 [N, B]; member: int64 [N, K], -1 = none.

        Returns the received rows uint8 [R, B], by member, then in its order. rows_of: None = counts go with
        or before the rows (one host sync); otherwise N of every member, and every row goes everywhere without counts.
        """
        wire = self.wire
        if rows_of is not None:
            assert rows_of[wire.index] == len(packed), (rows_of, wire.index, len(packed))
            everywhere = packed.repeat(wire.size, 1)
            received = wire.exchange(everywhere, [len(packed)] * wire.size, rows_of, what)
            return received, HopHandle(member, tuple(rows_of), None)
        hits = hits_of(member, wire.size)
        needed = hits.any(1)  # [N, members]
        by_member = needed.t()  # by member, then by row

        def rows(counts_to: Table) -> Tensor:
            size = sum(rows for rows, _ in counts_to)
            return packed.index_select(0, by_member.nonzero_static(size=size)[:, 1])

        outgoing = torch.stack([needed.sum(0), hits.sum((0, 1))], 1)
        received, told, heard = wire.exchange_counted(outgoing, rows, what)
        counts = Counts(*([row[i] for row in table] for table in (told, heard) for i in (0, 1)))
        return received, HopHandle(member, tuple(counts.rows_from), counts)

    def counts(self, handle: HopHandle, mine: Tensor) -> Counts:
        """The counts of the forward. mine: bool [R, K], the pairs of received rows that this side returns.

        Costs a host sync after a broadcast, nothing otherwise.
        """
        if handle.counts is not None:
            return handle.counts
        hits = hits_of(handle.member, self.wire.size)
        parts = torch.split(mine, list(handle.received_from))
        figures = [
            hits.any(1).sum(0),
            hits.sum((0, 1)),
            torch.stack([part.any(1).sum() for part in parts]),
            torch.stack([part.sum() for part in parts]),
        ]
        return Counts(*self.wire.to_host(torch.stack(figures)))

    def return_pairs(
        self, values: Tensor, handle: HopHandle, counts: Counts, what: Task, meanwhile: Meanwhile = nothing
    ) -> tuple[Tensor, Tensor]:
        """values: [M, H], one per pair of the received rows in the order (row, k). See `exchange_pairs`."""
        return exchange_pairs(self.wire, values, counts.pairs_from, counts.pairs_to, handle.member, what, meanwhile)

    def return_sums(self, sums: Tensor, mine: Tensor, handle: HopHandle, counts: Counts, what: Task) -> Tensor:
        """sums: [R, H] in the dtype that travels; rows without a pair in `mine` [R, K] stay. See `exchange_sums`."""
        if handle.counts is None:
            sums = sums.index_select(0, mine.any(1).nonzero_static(size=sum(counts.rows_from))[:, 0])
        return exchange_sums(self.wire, sums, counts.rows_from, counts.rows_to, handle.member, what)


def hits_of(member: Tensor, size: int) -> Tensor:
    """bool [N, K, members]: pair (row, k) is on that member. member: [N, K], -1 = none."""
    return member.unsqueeze(-1) == torch.arange(size, device=member.device)


def exchange_pairs(
    wire: Wire,
    values: Tensor,
    send: Sequence[int],
    recv: Sequence[int],
    member: Tensor,
    what: Task,
    meanwhile: Meanwhile = nothing,
) -> tuple[Tensor, Tensor]:
    """Receive one result per pair of the own rows. values: [M, H] by member, within it by (row, k) as the owner orders.

    member: [N, K], who computes a pair of the own rows. Returns got [M', H], one per pair with a member, and the flat
    position row * K + k of each, int64 [M'].
    """
    got = wire.exchange(values, send, recv, what, meanwhile=meanwhile)
    by_member = torch.argsort(member.reshape(-1), stable=True)  # those of no member (-1) come first
    return got, by_member[by_member.numel() - len(got) :]


def exchange_sums(wire: Wire, sums: Tensor, send: list[int], recv: list[int], member: Tensor, what: Task) -> Tensor:
    """Add what the members of each own row return, in ascending order of member. sums: [M, H] by member.

    member: [N, K]. Returns float32 [N, H], 0 for a row of no member.
    """
    got = wire.exchange(sums, send, recv, what)
    needed = hits_of(member, wire.size).any(1)
    rows = needed.t().nonzero_static(size=sum(recv))[:, 1]
    out = torch.zeros(len(member), sums.shape[1], device=sums.device)
    for part, row in zip(torch.split(got, recv), torch.split(rows, recv)):
        out.index_add_(0, row, part.float())  # no row twice in a part: the order of the sum is that of members
    return out
