"""Which replica serves which token of a batch: local first, then a rank that the token visits anyway, then the idlest.

Deterministic and written without data-dependent loops over tokens, so that it ports to a device: one pass over the
replicated experts balances what is left by filling up the least loaded ranks.
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
    A token goes to a copy on its home rank; else to a rank where another of its experts must be served; the rest of
    each expert's tokens is dealt to its copies so that ranks fill evenly, experts in ascending order. T may be 0.
    """
    ids = np.asarray(topk_ids, np.int64)
    if not len(ids):
        return ids
    home = np.broadcast_to(np.asarray(home, np.int64), ids.shape[:1])
    copies = np.where((ids >= 0)[:, :, None], log2phy[ids], -1)  # [T, K, R]
    ranks = np.where(copies >= 0, copies // physical_per_rank, -1)
    num_copies = (copies >= 0).sum(axis=2)
    num_ranks = int(log2phy.max(initial=0)) // physical_per_rank + 1
    num_ranks = max(num_ranks, int(home.max(initial=0)) + 1)
    local = ranks == home[:, None, None]
    chosen = np.where(num_copies == 1, copies[:, :, 0], -1)
    chosen = np.where(
        local.any(axis=2), np.take_along_axis(copies, local.argmax(axis=2)[:, :, None], 2)[:, :, 0], chosen
    )
    visited = np.zeros((len(ids), num_ranks), bool)
    token, slot = np.nonzero(chosen >= 0)
    visited[token, chosen[token, slot] // physical_per_rank] = True
    token = np.arange(len(ids))[:, None, None]
    passing = (ranks >= 0) & visited[token, np.maximum(ranks, 0)]
    load = np.bincount(chosen[chosen >= 0] // physical_per_rank, minlength=num_ranks)
    open_pair = (chosen < 0) & (num_copies > 0)
    # Copies on ranks that the token visits anyway; where there are several, dealt like the rest.
    free = np.where(passing.any(axis=2, keepdims=True), passing, copies >= 0) & open_pair[:, :, None]
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
