"""Rows that every rank needs, gathered behind the layer: new K/V in coherent decode, and counts that feed predictors.

An all-gather of uneven parts, made of one all-to-all: its parts go out at once, where gloo's all-gather is a ring of
G - 1 steps. It has its own process group, so that tokens never wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.wire import Exchange, Wire, pack_rows, traffic_of, unpack_rows


@dataclass(frozen=True, slots=True, eq=False)
class Gathering:
    """A gather under way. `wait` may be called at any later time, also more than once."""

    exchange: Exchange
    like: tuple[Tensor, ...]

    def wait(self) -> list[Tensor]:
        """The tensors of all ranks, [sum of rows, ...] each, rank after rank. Raises CommError if a peer is lost."""
        return unpack_rows(self.exchange.wait(), self.like)


class BackgroundGather:
    """All-gathers that return at once. All ranks must start the same ones in the same order; rows may be 0."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self.traffic = traffic_of(groups, "beside")
        self.wire = Wire(groups, groups.side, groups.world_ranks, self.traffic)

    def rows(self, tensors: Sequence[Tensor], rows_of: Sequence[int], what: Task) -> Gathering:
        """Gather tensors [n, ...] of any dtypes in one message, as K, V, sequence ids and positions of new tokens.

        rows_of: n of every rank, as `tokens_per_rank`. what: for errors. Sends n · (G - 1) rows.
        """
        packed = pack_rows(tensors)
        if len(rows_of) != self.groups.world_size or rows_of[self.groups.rank] != len(packed):
            raise ValueError(
                f"rows_of {tuple(rows_of)} must give {self.groups.world_size} ranks, "
                f"with {len(packed)} at {self.groups.rank}"
            )
        everywhere = packed.repeat(self.wire.size, 1)
        send = [len(packed)] * self.wire.size
        like = tuple(tensor[:0] for tensor in tensors)
        return Gathering(self.wire.start_exchange(everywhere, send, rows_of, what), like)

    def counts(self, counts: Tensor, what: Task) -> Gathering:
        """Gather one row per rank, as predicted counts [E] of a layer; `wait()[0]` is [G, E]."""
        return self.rows([counts.unsqueeze(0)], [1] * self.groups.world_size, what)
