"""Which replica serves which token of a batch: cover and deal.

A copy on a rank that is visited anyway is as free as one at home, if results travel as sums. So

1. *Visits.* The home rank and the ranks of experts with a single copy count as visited. While some rank has two or more
   of the experts that no visited rank has, the one with the most is visited too; ties go to the first rank from
   home + sum of ids + 1 on, so that tokens spread. An expert that then still is on no visited rank costs a visit of its
   own wherever it goes.
2. *Options.* An expert may be served by the visited ranks that have it, or by all that have it if none is visited.
   Where every result travels by itself (combine=exact) a copy at home saves one: `home_first` makes it the only option.
3. *Dealing.* Each pair begins at its first option from home + sum of ids + id + 1 on. Then every two ranks meet twice
   (a round-robin tournament, all meetings of a round at once): the fuller gives pairs that the other may serve, in
   their order, half of the difference at most.

Integers only, at most K / 2 rounds of visits and 2 (G - 1) of dealing: a pure function of ids, homes and tables, the
same in C (`serve.c`, used where it can be), here, and in torch on a device (moe/layer/replica_choice.py). The tests
compare all three.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.helper import MOST_RANKS, MOST_TOP, SERVE, load_helper
from moe.placement.plan import Plan

Ints = NDArray[np.int64]
SWEEPS = 2


class ServingTable(NamedTuple):
    """One layer's copies: physical int32 [E, G], the physical expert on each rank, -1 = none; masks uint64 [E].

    addresses: of masks and physical, for compiled code.
    """

    physical: NDArray[np.int32]
    masks: NDArray[np.uint64] | None  # None beyond 64 ranks
    addresses: tuple[int, int]

    @staticmethod
    def of(plan: Plan, layer: int) -> "ServingTable":
        """From a plan; made once per plan and layer."""
        ranks = plan.num_ranks
        physical = np.full((plan.num_experts, ranks), -1, np.int32)
        held = np.flatnonzero(plan.phy2log[layer] >= 0)
        physical[plan.phy2log[layer][held], held // plan.physical_per_rank] = held
        bits = np.uint64(1) << np.arange(ranks, dtype=np.uint64) if ranks <= MOST_RANKS else None
        masks = None if bits is None else np.where(physical >= 0, bits, np.uint64(0)).sum(axis=1, dtype=np.uint64)
        return ServingTable.made(physical, masks)

    @staticmethod
    def made(physical: NDArray[np.int32], masks: NDArray[np.uint64] | None) -> "ServingTable":
        physical = np.ascontiguousarray(physical)
        return ServingTable(physical, masks, (0 if masks is None else masks.ctypes.data, physical.ctypes.data))


def choose_replicas(
    topk_ids: NDArray[np.integer[Any]],
    home: int | NDArray[np.integer[Any]],
    table: ServingTable,
    *,
    home_first: bool = False,
) -> Ints:
    """Physical experts for one layer of a batch: topk_ids [T, K], -1 = none -> int64 [T, K], -1 kept.

    home: the rank where each token is, one number or [T]. home_first: see the module. T may be 0. Compiled where the
    helper is there, else `choose_in_numpy`, which says the same.
    """
    helper = load_helper()
    if helper is None or table.masks is None or topk_ids.shape[1] > MOST_TOP:
        return choose_in_numpy(topk_ids, home, table, home_first=home_first)
    ids = np.ascontiguousarray(topk_ids, np.int64)
    chosen = np.empty_like(ids)
    at, homes = -1, 0
    if isinstance(home, np.ndarray):
        home = np.ascontiguousarray(home, np.int64)  # kept until the call is over
        assert home.shape == ids.shape[:1], (home.shape, ids.shape)
        homes = home.ctypes.data
    else:
        at = int(home)
    call = SERVE.pack(
        *ids.shape, *table.physical.shape, home_first, at, ids.ctypes.data, homes, *table.addresses, chosen.ctypes.data
    )
    failed = helper.moe_serve(call)
    if failed:
        assert failed == -1, (ids.max(), table.physical.shape)
        raise MemoryError(f"no memory to serve {ids.size} pairs; use smaller steps")
    return chosen


def choose_in_numpy(
    topk_ids: NDArray[np.integer[Any]],
    home: int | NDArray[np.integer[Any]],
    table: ServingTable,
    *,
    home_first: bool = False,
) -> Ints:
    """The slow twin of `choose_replicas`."""
    ids = np.asarray(topk_ids, np.int64)
    if not ids.size:
        return ids
    ranks = table.physical.shape[1]
    at: Ints = np.broadcast_to(np.asarray(home, np.int64), ids.shape[:1])
    hosts = (table.physical[ids] >= 0) & (ids >= 0)[:, :, None]  # [T, K, G]
    first = at + np.maximum(ids, 0).sum(axis=1) + 1
    visited = _visited(hosts, at, first)
    near = hosts & visited[:, None, :]
    options = np.where(near.any(axis=2, keepdims=True), near, hosts)
    if home_first:
        at_home = (np.arange(ranks) == at[:, None])[:, None, :] & hosts
        options = np.where(at_home.any(axis=2, keepdims=True), at_home, options)
    turn = (first[:, None] + np.maximum(ids, 0))[:, :, None] + np.arange(ranks)
    begin = np.take_along_axis(options, turn % ranks, axis=2).argmax(axis=2)
    rank = np.where(ids >= 0, (turn[:, :, 0] + begin) % ranks, ranks)
    rank = _dealt(options.reshape(-1, ranks), rank.reshape(-1), ranks).reshape(ids.shape)
    served = np.take_along_axis(table.physical[ids], np.minimum(rank, ranks - 1)[:, :, None], axis=2)[:, :, 0]
    return np.where(ids >= 0, served, -1).astype(np.int64)


def _visited(hosts: NDArray[np.bool_], home: Ints, first: Ints) -> NDArray[np.bool_]:
    """Ranks that each token visits: hosts [T, K, G] -> [T, G]. first: [T], where ties begin."""
    tokens, _, ranks = hosts.shape
    row = np.arange(tokens)
    visited: NDArray[np.bool_] = (hosts & (hosts.sum(axis=2, keepdims=True) == 1)).any(axis=1)
    visited[row, home] = True
    turn = (first[:, None] + np.arange(ranks)) % ranks
    while True:
        left = hosts & ~(hosts & visited[:, None, :]).any(axis=2, keepdims=True)
        gain = left.sum(axis=1)
        need = np.flatnonzero(gain.max(axis=1) > 1)
        if not len(need):
            return visited
        best = np.take_along_axis(gain[need], turn[need], axis=1).argmax(axis=1)
        visited[need, turn[need, best]] = True


def meetings(ranks: int) -> Ints:
    """Whom each rank meets in each round of a tournament, [rounds, G]; G = no one. Every two meet once."""
    even = ranks + ranks % 2
    rounds = np.arange(even - 1)[:, None]
    other = (rounds - np.arange(even)) % (even - 1)
    other[:, -1] = 0
    alone = other[:, :-1] == np.arange(even - 1)
    other[:, :-1][alone] = even - 1
    other[:, -1] = alone.argmax(axis=1)
    return np.asarray(np.minimum(other[:, :ranks], ranks), np.int64)


def _dealt(options: NDArray[np.bool_], rank: Ints, ranks: int) -> Ints:
    """Ranks [N] after the meetings. options: [N, G]; rank: [N], G = no expert."""
    load = np.bincount(rank, minlength=ranks + 1)
    load[ranks] = np.iinfo(np.int64).max // 2  # whoever meets no one gives nothing
    allowed = np.pad(options, ((0, 1), (0, 1)))
    number = np.arange(len(rank))
    for other in np.tile(meetings(ranks), (SWEEPS, 1)):
        to = np.append(other, ranks)
        quota = np.maximum(load[:ranks] - load[other], 0) // 2
        able = allowed[number, to[rank]]
        for g in np.flatnonzero(quota):
            moving = np.flatnonzero(able & (rank == g))[: quota[g]]
            rank[moving] = other[g]
            able[moving] = False
            load[g] -= len(moving)
            load[other[g]] += len(moving)
    return rank
