"""Tokens that stay where their heaviest expert is (ExFlow, arXiv 2401.08383): in decode, nothing travels home.

A token goes once to each rank that holds one of its experts, as always; the rank of the heaviest becomes its new home.
Results computed there stay there, the others are sent there and not to the old home. So a layer needs one round for
tokens, and one for results only if some token has experts on several ranks, which all ranks learn with the counts. It
is exact for any K; for K = 1 the second round never happens. Attention must find the K/V of the token's sequence at
every rank (`gather.BackgroundGather`), so that this is for decode, where 2·d_kv·(G - 1) < d·p or latency dominates.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe.comm.all_to_all import broadcast_plan
from moe.comm.dispatcher import (
    Dispatched,
    ExpertRanks,
    check_tokens,
    pair_values,
    row_sums,
    row_values,
    weighted_sum,
    weighted_sum_of_pairs,
)
from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.hop import exchange_pairs, exchange_sums, hits_of
from moe.comm.wire import Table, Wire, pack_rows, traffic_of, unpack_rows
from moe.placement.wire_format import CombineMode, WireFormat


class Moved(NamedTuple):
    """The tokens that live on this rank now, by former rank, within it in their former order.

    out: [T', H], Σ_k w_k·y_k in x's dtype; x: [T', H], the row that was dispatched; payload: [T', D];
    tokens_per_rank: T' of every rank, which the next dispatch may be given.
    """

    out: Tensor
    x: Tensor
    payload: Tensor
    tokens_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """Received rows: home: rank, int64 [R]; member: [R, K], the rank of each expert, -1 = none."""

    x: Tensor
    member: Tensor
    weights: Tensor
    home: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CoherentHandle:
    """What `combine` needs. payload: [T', D] of the tokens that stay, or [R, D] after a broadcast.

    tokens_per_rank, is_split (some token anywhere has experts on several ranks): None after a broadcast, where they
    follow from the rows.
    """

    arrived: Arrived
    local_ids: Tensor
    payload: Tensor
    tokens_per_rank: tuple[int, ...] | None
    is_split: bool | None
    layer: int


class CoherentDispatcher:
    """Dispatch that moves the home of a token; see the module. The arguments are those of `AllToAllDispatcher`.

    Rounds per layer: counts, tokens, results; no counts when broadcast, no results when no token is split. Host syncs:
    at most 2. Bytes: `WireFormat`; the payload is added only for the new home, but for every rank when
    broadcast, so that a wide payload does not go with it (send the residual stream as x and normalise on arrival).
    """

    def __init__(
        self, groups: Groups, rank_of: Tensor, *, combine: CombineMode = "exact", broadcast_tokens: int = 0
    ) -> None:
        self.format = WireFormat(dispatcher="coherent", combine=combine)
        self.groups = groups
        self.experts = ExpertRanks(rank_of, groups)
        self.traffic = traffic_of(groups)
        self.broadcast_tokens = broadcast_tokens
        self.wire = Wire(groups, groups.world, groups.world_ranks, self.traffic)

    def dispatch(
        self,
        x: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        *,
        payload: Tensor,
        layer: int = 0,
        tokens_per_rank: tuple[int, ...] | None = None,
    ) -> Dispatched:
        """Send tokens to their experts and their payload to their new home. All ranks must call, also with T = 0.

        payload: [T, D] of any dtype, what the new home needs to go on (sequence, position, residual). The new home is
        the rank of the expert with the largest weight, the first of equal ones; a token of no expert stays. Otherwise
        as `TokenDispatcher.dispatch`. Raises CommError when a peer does not answer in time.
        """
        check_tokens(x, physical_ids, topk_weights, self.experts.num_physical)
        if payload.ndim != 2 or len(payload) != len(x):
            raise ValueError(f"payload {tuple(payload.shape)} must be [T, D] with T = {len(x)}")
        self.traffic.calls += 1
        what = Task("coherent dispatch", layer)
        columns = [x, physical_ids.to(torch.int32), topk_weights.float()]
        held = broadcast_plan(tokens_per_rank, self.broadcast_tokens, self.groups, len(x))
        if held is not None:
            columns.append(payload)
            everywhere = pack_rows(columns).repeat(self.wire.size, 1)
            packed = self.wire.exchange(everywhere, [len(x)] * self.wire.size, held, what)
            *rows, payload = unpack_rows(packed, columns)
            arrived, local_ids = self._arrived(rows, held)
            return Dispatched(
                arrived.x,
                local_ids,
                arrived.weights,
                CoherentHandle(arrived, local_ids, payload, None, None, layer),
                len(local_ids),
            )
        rows, payload, held, homes, is_split = self._exchange_moving(columns, payload, what)
        arrived, local_ids = self._arrived(rows, held)
        return Dispatched(
            arrived.x,
            local_ids,
            arrived.weights,
            CoherentHandle(arrived, local_ids, payload, homes, is_split, layer),
            len(local_ids),
        )

    def _exchange_moving(
        self, columns: list[Tensor], payload: Tensor, what: Task
    ) -> tuple[list[Tensor], Tensor, list[int], tuple[int, ...], bool]:
        """Counts, and rows to every rank that they need and payload to the new home alone, in one buffer.

        Returns the columns received, payload received, rows by source, tokens of every rank afterwards, is_split.
        """
        size, me = self.wire.size, self.wire.index
        _, ids, weights = columns
        member = self.experts.rank_of[ids.long()]
        home = home_of(member, weights, torch.full_like(member[:, 0], me))
        moves = hits_of(home, size)  # [T, G]
        needed = hits_of(member, size).any(1) | moves
        is_split = (needed.sum(1) > 1).any().reshape(1)
        packed, packed_payload = pack_rows(columns), pack_rows([payload])
        widths = packed.shape[1], packed_payload.shape[1]
        by_rank, moving_by_rank = needed.t(), moves.t()

        def bytes_of(counts_to: Table) -> Tensor:
            rows_to, moves_to = counts_to[me][1 : size + 1], counts_to[me][size + 1 : -1]
            row = by_rank.nonzero_static(size=sum(rows_to))[:, 1]
            moving = moving_by_rank.nonzero_static(size=sum(moves_to))[:, 1]
            parts = zip(
                torch.split(packed.index_select(0, row), rows_to), torch.split(packed_payload[moving], moves_to)
            )
            return torch.cat([piece.reshape(-1) for pair in parts for piece in pair])

        # Everyone tells everyone everything: 2·G + 1 figures, so that all know where all tokens are afterwards.
        num_rows, num_moves = needed.sum(0), moves.sum(0)
        figures = torch.cat([num_rows, num_moves, is_split.long()]).repeat(size, 1)
        num_bytes = num_rows * widths[0] + num_moves * widths[1]
        received, _, told = self.wire.exchange_counted(torch.cat([num_bytes[:, None], figures], 1), bytes_of, what)
        table = [row[1:] for row in told]
        rows_from, moves_from = [row[me] for row in table], [row[size + me] for row in table]
        pieces = torch.split(
            received, [n for r, m in zip(rows_from, moves_from) for n in (r * widths[0], m * widths[1])]
        )
        rows = unpack_rows(torch.cat(pieces[::2]).view(-1, widths[0]), columns)
        moved = torch.cat(pieces[1::2]).view(sum(moves_from), widths[1])
        homes = tuple(sum(row[size + d] for row in table) for d in range(size))
        return rows, unpack_rows(moved, [payload])[0], rows_from, homes, any(row[-1] for row in table)

    def _arrived(self, columns: list[Tensor], rows_of: list[int]) -> tuple[Arrived, Tensor]:
        x, ids, weights = columns
        ids = ids.long()
        ranks = torch.arange(self.wire.size, device=x.device)
        source = torch.repeat_interleave(ranks, torch.tensor(rows_of, device=x.device), output_size=len(x))
        member = self.experts.rank_of[ids]
        home = home_of(member, weights, source)
        return Arrived(x, member, weights, home), self.experts.local_of[ids]

    def combine(self, y: Tensor, handle: object) -> Moved:
        """Bring results to the new homes. y: [R, K, H], 0 where local_ids is -1, or [M, H] as `local_pairs` lists.

        Raises CommError when a peer does not answer in time.
        """
        if not isinstance(handle, CoherentHandle):
            raise ValueError(f"the handle is a {type(handle).__name__}; pass the one that dispatch returned")
        arrived, me, size = handle.arrived, self.wire.index, self.wire.size
        tokens_per_rank, is_split = handle.tokens_per_rank, handle.is_split
        if tokens_per_rank is None or is_split is None:
            at_home = hits_of(arrived.home, size)
            needed = hits_of(arrived.member, size).any(1) | at_home
            figures = torch.stack([*at_home.sum(0), (needed.sum(1) > 1).sum()])
            *homes, num_split = self.wire.to_host(figures.unsqueeze(0))[0]
            tokens_per_rank, is_split = tuple(homes), num_split > 0
        here = (arrived.home == me).nonzero_static(size=tokens_per_rank[me])[:, 0]
        payload = handle.payload[here] if handle.tokens_per_rank is None else handle.payload
        out = self._results_at(here, y, handle, is_split)
        x = arrived.x.index_select(0, here)
        return Moved(out.to(x.dtype), x, payload, tokens_per_rank)

    def _results_at(self, here: Tensor, y: Tensor, handle: CoherentHandle, is_split: bool) -> Tensor:
        """Σ_k w_k·y_k of the rows `here`, in x's dtype or float32."""
        y = y.to(handle.arrived.x.dtype)
        arrived, me, size = handle.arrived, self.wire.index, self.wire.size
        what = Task("coherent combine", handle.layer)
        member, weights, dtype = arrived.member[here], arrived.weights[here], arrived.x.dtype
        if not is_split:  # by agreement of all ranks: every result is at home already
            return weighted_sum(row_values(y, handle.local_ids).index_select(0, here), weights, dtype)
        is_exact = self.format.is_exact
        hits = hits_of(member, size)
        mine = arrived.member == me
        leaving = (mine if is_exact else mine.any(1, keepdim=True)).sum(1)  # [R], results per row
        to = (hits_of(arrived.home, size) * leaving.unsqueeze(1)).sum(0)
        coming = hits.sum((0, 1)) if is_exact else hits.any(1).sum(0)
        send, recv = self.wire.to_host(torch.stack([to, coming]))
        if is_exact:
            values = pair_values(y, handle.local_ids, sum(send))
        else:
            sums = row_sums(y, handle.local_ids, arrived.weights)
            values = sums.index_select(0, leaving.nonzero_static(size=sum(send))[:, 0])
        home = torch.repeat_interleave(arrived.home, leaving, output_size=sum(send))
        values = values.index_select(0, torch.argsort(home, stable=True))
        if not is_exact:
            return exchange_sums(self.wire, values.to(dtype), send, recv, member, what)
        got, positions = exchange_pairs(self.wire, values, send, recv, member, what)
        return weighted_sum_of_pairs(got, positions, weights, dtype)


def home_of(member: Tensor, weights: Tensor, otherwise: Tensor) -> Tensor:
    """The rank of each token's heaviest expert, int64 [T]. member, weights: [T, K]; otherwise: [T], if it has none."""
    heaviest = torch.where(member >= 0, weights, -torch.inf).argmax(1, keepdim=True)
    home = member.gather(1, heaviest)[:, 0]
    return torch.where(home >= 0, home, otherwise)
