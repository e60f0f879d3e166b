"""Tokens over all-to-all: in one step over all ranks, or in two, across nodes and then inside the node.

The flat dispatcher has the fewest rounds. The two-step one wins where links between nodes are the limit: a token
crosses once per destination node instead of once per destination rank, and each rank talks to one peer per node.

`combine="exact"` (the default) returns one row per (token, k) pair and adds them at home in the order of k: bit for bit
what one process computes, for any world size, placement and dispatcher, as long as the experts themselves do not depend
on the batch. Results travel in the dtype of the tokens, which loses nothing: a result is rounded to it before it is
weighted, on one rank as on many (kernels/reference.py). `combine="partial"` returns one weighted sum per (token, rank),
in two steps per (token, node), in the same dtype. It saves the bytes of a token's experts that share a destination, but
adds the K terms in another order and rounds each sum that travels: an element may differ by up to
(2·(K + 1)·2⁻²⁴ + steps·u) · Σ_k |w_k·y_k| before the last rounding, where u is 2⁻⁸ for bfloat16, 2⁻¹¹ for float16
and 0 for float32. That is enough to flip a near-tied token, and "same tokens for any world size" is what this system
promises, so that the saving has to be asked for. What each mode sends is `placement/wire_format.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.comm.dispatcher import (
    Dispatched,
    ExpertRanks,
    check_results,
    check_tokens,
    local_pairs,
    pair_values,
    row_sums,
    table_with_none,
    weighted_sum_of_pairs,
)
from moe.comm.errors import Task
from moe.comm.groups import Groups, ranks_by_node
from moe.comm.hop import Hop, HopHandle
from moe.comm.wire import Meanwhile, Wire, nothing, pack_rows, traffic_of, unpack_rows
from moe.placement.wire_format import CombineMode, DispatcherName, WireFormat


@dataclass(frozen=True, slots=True, eq=False)
class RoutedHandle:
    """What `combine` needs. steps: of each hop, and the pairs bool [N, K] of its received rows that return by it."""

    steps: tuple[tuple[HopHandle, Tensor], ...]
    topk_weights: Tensor  # [T, K], at home
    local_ids: Tensor  # [R, K], here
    local_weights: Tensor | None  # [R, K], here
    num_first: int  # rows that have travelled; after them come the T own ones, where they stayed
    dtype: torch.dtype
    layer: int


class AllToAllDispatcher:
    """One all-to-all over all ranks each way; a token travels once per destination rank, with its ids.

    rank_of: int [P], the rank of each physical expert. combine: see the module. broadcast_tokens: with the T of all
    ranks known and none above this, every token goes to every rank in one round without the exchange of counts: less
    latency for more bytes, right for a few tokens per rank.
    Rounds per layer: 3, or 2 when broadcast. Host syncs: 1 each. Bytes: `WireFormat`.
    """

    name: DispatcherName = "all_to_all"

    def __init__(
        self, groups: Groups, rank_of: Tensor, *, combine: CombineMode = "exact", broadcast_tokens: int = 0
    ) -> None:
        self.format = WireFormat(dispatcher=self.name, combine=combine)
        self.groups = groups
        self.experts = ExpertRanks(rank_of, groups)
        self.traffic = traffic_of(groups)
        self.broadcast_tokens = broadcast_tokens
        steps = self._steps()
        self.hops = [Hop(wire) for wire, _ in steps]
        self.tables = [table for _, table in steps] + [self.experts.local_of]

    def _steps(self) -> list[tuple[Wire, Tensor]]:
        """Each step's wire and the member that a physical expert is reached through, int64 [P + 1], -1 = not."""
        return [(Wire(self.groups, self.groups.world, self.groups.world_ranks, self.traffic), self.experts.rank_of)]

    def dispatch(
        self,
        x: Tensor,
        physical_ids: Tensor,
        topk_weights: Tensor,
        *,
        layer: int = 0,
        tokens_per_rank: tuple[int, ...] | None = None,
    ) -> Dispatched:
        """See `TokenDispatcher`. Raises CommError when a peer does not answer in time."""
        check_tokens(x, physical_ids, topk_weights, self.experts.num_physical)
        self.traffic.calls += 1
        held = broadcast_plan(tokens_per_rank, self.broadcast_tokens, self.groups, len(x))
        ids, own_ids = physical_ids.to(torch.int32), None
        if self.format.is_exact and held is None and x.is_cpu:  # elsewhere their number would be a host sync
            own_ids = self.experts.local_of[ids.long()]
            ids = ids.masked_fill(own_ids >= 0, -1)
        columns = [x, ids]
        if self.format.sends_weights:
            columns.append(topk_weights.float())
        packed = pack_rows(columns)
        assert packed.shape[1] == self.format.row_bytes(x.shape[1], x.element_size(), ids.shape[1]), packed.shape
        member, received, steps = self.tables[0][ids.long()], columns, []
        for hop, table in zip(self.hops, self.tables[1:]):
            rows_of = None if held is None else [held[rank] for rank in hop.wire.ranks]
            packed, handle = hop.forward(packed, member, Task("dispatch", layer), rows_of)
            received = unpack_rows(packed, columns)
            member = table[received[1].long()]
            steps.append((handle, member >= 0))
            held = None if held is None else self._held_after(held)
        rows, local_ids, num_first = received[0], member, len(member)
        weights = received[2] if self.format.sends_weights else None
        if own_ids is not None:
            rows, local_ids = torch.cat([rows, x]), torch.cat([local_ids, own_ids])
        kept = RoutedHandle(tuple(steps), topk_weights, local_ids, weights, num_first, x.dtype, layer)
        return Dispatched(rows, local_ids, weights, kept, num_first)

    def _held_after(self, held: list[int]) -> list[int]:
        return held

    def combine(self, y: Tensor, handle: object, meanwhile: Meanwhile = nothing) -> Tensor:
        """See `TokenDispatcher`. Raises CommError when a peer does not answer in time."""
        if not isinstance(handle, RoutedHandle):
            raise ValueError(f"the handle is a {type(handle).__name__}; pass the one that dispatch returned")
        what, ids, num_first = Task("combine", handle.layer), handle.local_ids, handle.num_first
        check_results(y, ids)
        steps = [(hop, step, mine, hop.counts(step, mine)) for hop, (step, mine) in zip(self.hops, handle.steps)]
        if handle.local_weights is not None:
            sums = row_sums(y.to(handle.dtype), ids, handle.local_weights)
            for hop, step, mine, counts in reversed(steps):
                sums = hop.return_sums(sums.to(handle.dtype), mine, step, counts, what)
            return sums.to(handle.dtype)
        num_pairs = sum(steps[-1][3].pairs_from)
        border = num_first if y.ndim == 3 else num_pairs
        values = pair_values(y[:border], ids[:num_first], num_pairs).to(handle.dtype)
        for hop, step, _, counts in reversed(steps[1:]):
            values, positions = hop.return_pairs(values, step, counts, what)
            values = values.index_select(0, torch.argsort(positions))
        hop, step, _, counts = steps[0]
        values, positions = hop.return_pairs(values, step, counts, what, meanwhile)
        if num_first < len(ids):
            own = local_pairs(ids[num_first:])
            values = torch.cat([values, pair_values(y[border:], ids[num_first:], len(own)).to(handle.dtype)])
            positions = torch.cat([positions, own])
        return weighted_sum_of_pairs(values, positions, handle.topk_weights, handle.dtype)


class HierarchicalDispatcher(AllToAllDispatcher):
    """Two steps: across nodes to the same local rank, then inside the node; back the same way.

    A token crosses once per destination node. With combine="partial" the relay adds its node's sums before they cross.
    Rounds per layer: 6, or 4 when broadcast, half of them inside a node; host syncs: 2.
    """

    name: DispatcherName = "hierarchical"

    def _steps(self) -> list[tuple[Wire, Tensor]]:
        groups = self.groups
        rank_of = self.experts.rank_of[:-1]
        if not groups.is_even:
            raise ValueError(f"nodes {groups.nodes} have unequal numbers of ranks: there is no group across them")
        node_of = torch.tensor(groups.nodes)[rank_of]
        local_ranks = torch.full((groups.world_size,), -1)
        local_ranks[list(groups.local_ranks)] = torch.arange(len(groups.local_ranks))
        local_of = local_ranks[rank_of]
        across = Wire(groups, groups.cross, groups.cross_ranks, self.traffic)
        inside = Wire(groups, groups.local, groups.local_ranks, self.traffic)
        return [
            (across, table_with_none(node_of, groups.device)),
            (inside, table_with_none(local_of, groups.device)),
        ]

    def _held_after(self, held: list[int]) -> list[int]:
        """Rows on every rank after the step across, when all rows go everywhere."""
        by_node = ranks_by_node(self.groups.nodes)
        columns = {rank: column for column in zip(*by_node) for rank in column}
        return [sum(held[r] for r in columns[rank]) for rank in range(len(held))]


def broadcast_plan(
    tokens_per_rank: tuple[int, ...] | None, broadcast_tokens: int, groups: Groups, num_tokens: int
) -> list[int] | None:
    """T of every rank if this layer is broadcast, None if it is not: every rank decides the same from the same T's."""
    if tokens_per_rank is None:
        return None
    if len(tokens_per_rank) != groups.world_size or tokens_per_rank[groups.rank] != num_tokens:
        raise ValueError(
            f"tokens_per_rank {tokens_per_rank} must give {groups.world_size} ranks, with {num_tokens} at {groups.rank}"
        )
    return list(tokens_per_rank) if max(tokens_per_rank) <= broadcast_tokens else None
