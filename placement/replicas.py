"""Which replica serves which token of a batch: cover and deal.

A copy on a rank that is visited anyway is as free as one at home. So the home rank and the ranks of experts with a
single copy count as visited; a greedy set cover adds ranks that serve two or more of the other experts; then each
replicated expert is dealt over the visited ranks that have it, or all that have it if none is visited, so that ranks
fill evenly. At most one round per rank and fixed ties: a pure function of ids, homes and table, whoever asks (engine,
simulator, solver).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan

Ints = NDArray[np.int64]


def choose_replicas(
    topk_ids: NDArray[np.integer[Any]],
    home: int | NDArray[np.integer[Any]],
    log2phy: NDArray[np.integer[Any]],
    physical_per_rank: int,
) -> Ints:
    """Physical experts for one layer of a batch: topk_ids [T, K], -1 = none -> [T, K], -1 kept.

    home: the rank where each token is, one number or [T]. log2phy: [E, R] of this layer, -1 padded.
    Pairs of one expert that may go to the same ranks are dealt together so that ranks fill evenly, experts in
    ascending order. T may be 0.
    """
    ids = np.asarray(topk_ids, np.int64)
    if not len(ids):
        return ids
    at: Ints = np.broadcast_to(np.asarray(home, np.int64), ids.shape[:1])
    copies = np.where((ids >= 0)[:, :, None], log2phy[ids], -1)  # [T, K, R]
    ranks = np.where(copies >= 0, copies // physical_per_rank, -1)
    num_copies = (copies >= 0).sum(axis=2)
    num_ranks = int(log2phy.max(initial=0)) // physical_per_rank + 1
    num_ranks = max(num_ranks, int(at.max(initial=0)) + 1)
    chosen = np.where(num_copies == 1, copies[:, :, 0], -1)
    token = np.arange(len(ids))[:, None, None]
    visited = _cover(ranks, at, num_ranks)
    load = np.bincount(chosen[chosen >= 0] // physical_per_rank, minlength=num_ranks)
    open_pair = num_copies > 1
    passing = (ranks >= 0) & visited[token, np.maximum(ranks, 0)]
    free = np.where(passing.any(axis=2, keepdims=True), passing, ranks >= 0) & open_pair[:, :, None]
    for expert in np.unique(ids[open_pair]):
        token, slot = np.nonzero(open_pair & (ids == expert))
        hosts = log2phy[expert][log2phy[expert] >= 0]
        options = free[token, slot][:, : len(hosts)]
        kind = options @ (1 << np.arange(len(hosts)))  # tokens with the same options are dealt together
        for mask in np.unique(kind):
            group = np.flatnonzero(kind == mask)
            allowed = hosts[(int(mask) >> np.arange(len(hosts))) & 1 == 1]
            share = fill_up(load[allowed // physical_per_rank], len(group))
            chosen[token[group], slot[group]] = np.repeat(allowed, share)
            load[allowed // physical_per_rank] += share
    return chosen


def _cover(ranks: Ints, home: Ints, num_ranks: int) -> NDArray[np.bool_]:
    """Ranks that each token visits: ranks [T, K, R] of its experts' copies, -1 padded -> [T, G].

    Each round takes the rank that serves most of what is not reached, while that is two experts or more: an expert
    that costs a visit of its own wherever it goes is left to the dealing. Ties go to the first rank after the token's
    own, counted from its row, so that tokens that are alike spread.
    """
    tokens = len(ranks)
    row = np.arange(tokens)
    visited = np.zeros((tokens, num_ranks + 1), bool)  # the last column takes the padding
    visited[row, home] = True
    hosts = np.zeros((*ranks.shape[:2], num_ranks + 1), bool)
    np.put_along_axis(hosts, np.where(ranks >= 0, ranks, num_ranks), True, axis=2)
    hosts[:, :, num_ranks] = False
    visited |= (hosts & (hosts.sum(axis=2, keepdims=True) == 1)).any(axis=1)
    turn = (np.arange(num_ranks) + (home + row)[:, None] + 1) % num_ranks  # [T, G], ranks in the order of ties
    while True:
        reached = np.asarray((hosts & visited[:, None, :]).any(axis=2))
        gain = (hosts & ~reached[:, :, None]).sum(axis=1)
        need = np.flatnonzero(gain.max(axis=1) > 1)
        if not len(need):
            return visited[:, :num_ranks]
        first = np.take_along_axis(gain[need], turn[need], axis=1).argmax(axis=1)
        visited[need, turn[need, first]] = True


def fill_up(load: Ints, count: int) -> Ints:
    """How many of `count` items each bin gets so that the fullest bin is as empty as possible: [n], ties in order."""
    order = np.argsort(load, kind="stable")
    level = load[order]
    capacity = np.arange(1, len(level) + 1) * np.append(
        level[1:], np.iinfo(np.int64).max // (2 * len(level))
    ) - np.cumsum(level)
    used = int((capacity < count).sum()) + 1  # bins that receive something
    total = int(level[:used].sum()) + count
    target = np.full(used, total // used) + (np.arange(used) < total % used)
    share = np.zeros(len(load), np.int64)
    share[order[:used]] = target - level[:used]
    return share


def choose_for_plan(
    topk_ids: NDArray[np.integer[Any]], home: int | NDArray[np.integer[Any]], plan: Plan, layer: int
) -> Ints:
    """`choose_replicas` with a plan's tables; [T, K] physical ids."""
    return choose_replicas(topk_ids, home, plan.log2phy[layer], plan.physical_per_rank)
