"""The serving rule of replicas (placement/replicas.py) on a device: fixed rounds, no host sync.

One layer costs about 8 · K / 2 + 12 · 2 · (G - 1) small launches; the tests compare it with the rule exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe.placement.replicas import SWEEPS, ServingTable, meetings


class DeviceTable(NamedTuple):
    """physical: int64 [E + 1, G], -1 = none, the last row for id -1; meetings: int64 [rounds, G + 1], G = no one."""

    physical: Tensor
    meetings: Tensor

    @staticmethod
    def of(table: ServingTable, device: torch.device) -> "DeviceTable":
        physical = torch.from_numpy(table.physical).long()
        ranks = physical.shape[1]
        met = torch.from_numpy(meetings(ranks)).repeat(SWEEPS, 1)
        none = met.new_full((len(met), 1), ranks)
        return DeviceTable(
            torch.cat([physical, physical.new_full((1, ranks), -1)]).to(device), torch.cat([met, none], 1).to(device)
        )


def choose_on_device(topk_ids: Tensor, home: int, table: DeviceTable, *, home_first: bool = False) -> Tensor:
    """`choose_replicas` of one rank's tokens. topk_ids: int64 [T, K], -1 = none. Returns int64 [T, K]; T may be 0."""
    (tokens, top_k), ranks = topk_ids.shape, table.physical.shape[1]
    if not tokens:
        return topk_ids
    physical = table.physical[topk_ids]  # [T, K, G]
    hosts = physical >= 0
    known = topk_ids.clamp(min=0)
    first = home + known.sum(1) + 1
    every = torch.arange(ranks, device=topk_ids.device)
    turn = (first[:, None] + every) % ranks
    visited = (hosts & (hosts.sum(2, keepdim=True) == 1)).any(1)
    visited[:, home] = True
    for _ in range(top_k // 2):
        left = hosts & ~(hosts & visited[:, None]).any(2, keepdim=True)
        gain = left.sum(1).gather(1, turn)
        # argmax of the first of equal ones, on every device: the gain before the order of turns
        best = (gain * ranks + (ranks - 1 - every)).argmax(1, keepdim=True)
        take = gain.gather(1, best) > 1
        visited.scatter_(1, turn.gather(1, best), take | visited.gather(1, turn.gather(1, best)))
    near = hosts & visited[:, None]
    options = torch.where(near.any(2, keepdim=True), near, hosts)
    if home_first:
        at_home = hosts & (every == home)
        options = torch.where(at_home.any(2, keepdim=True), at_home, options)
    order = ((first[:, None] + known)[:, :, None] + every) % ranks
    begin = (options.gather(2, order).long() * ranks + (ranks - 1 - every)).argmax(2, keepdim=True)
    rank = torch.where(topk_ids >= 0, order.gather(2, begin)[:, :, 0], ranks).flatten()
    rank = _dealt(options.flatten(0, 1), rank, table.meetings)
    served = physical.flatten(0, 1).gather(1, rank.clamp(max=ranks - 1)[:, None])[:, 0].view(tokens, top_k)
    return torch.where(topk_ids >= 0, served, -1)


def _dealt(options: Tensor, rank: Tensor, meetings: Tensor) -> Tensor:
    ranks = options.shape[1]
    every = torch.arange(ranks + 1, device=rank.device)
    allowed = torch.cat([options, options.new_zeros(len(options), 1)], 1)
    load = torch.zeros(ranks + 1, dtype=torch.int64, device=rank.device)
    load.index_add_(0, rank, torch.ones_like(rank))
    load[ranks] = torch.iinfo(torch.int64).max // 2
    for other in meetings:
        quota = (load - load[other]).clamp(min=0) // 2
        quota = torch.where(every == ranks, 0, quota)
        to = other[rank]
        able = allowed.gather(1, to[:, None])[:, 0]
        mine = (rank[:, None] == every) & able[:, None]
        place = mine.long().cumsum(0).gather(1, rank[:, None])[:, 0]
        moves = able & (place <= quota[rank])
        load = load.index_add(0, rank, -moves.long()).index_add(0, to, moves.long())
        rank = torch.where(moves, to, rank)
    return rank
