"""From one plan to another: fewest bytes by renaming ranks, then single writes under a byte budget per step.

A step is a set of slot writes that are applied together between two batches. Between steps every expert is on some
rank, so the model can always run; read backwards the same steps undo the migration.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan
from moe.placement.topology import Topology


class Write(NamedTuple):
    """Physical expert `physical` of `layer` changes from logical `old` to `new`; -1 is an empty slot."""

    layer: int
    physical: int
    old: int
    new: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Migration:
    """Steps of writes that turn `start` into `target`; total bytes received from other ranks; pay-back.

    seconds: time to move the bytes over the slowest used rank link; saving: predicted seconds per model step;
    steps_to_pay: model steps until the saving has paid for the move.
    """

    start: Plan
    target: Plan
    steps: tuple[tuple[Write, ...], ...]
    num_bytes: int
    seconds: float
    saving: float
    steps_to_pay: float

    def states(self) -> Iterator[Plan]:
        """As `states_of`."""
        return states_of(self.start, self.steps)


def states_of(start: Plan, steps: Iterable[Iterable[Write]]) -> Iterator[Plan]:
    """The plan after each step; constructing a `Plan` checks that it is valid."""
    table = start.phy2log.copy()
    for step in steps:
        for write in step:
            assert table[write.layer, write.physical] == write.old, (write, table[write.layer, write.physical])
            table[write.layer, write.physical] = write.new
        yield start.with_result(phy2log=table, solver="moved", value=None, bound=None, seconds=None)


def relabel(present: Plan, target: Plan, *, nodes: tuple[int, ...] | None = None, per_layer: bool = False) -> Plan:
    """The target with ranks renamed so that the fewest experts move, kept experts in their present slots.

    One renaming for all layers, which changes no cost that only compares ranks; with `nodes` ranks trade names only
    as whole nodes and inside them. per_layer renames each layer for itself: right only if layers are independent
    (home-bound attention). Assignment problem, O(G^3).
    """
    _comparable(present, target)
    overlap = np.einsum("leg,leh->lgh", present.hosted.astype(np.int64), target.hosted.astype(np.int64))
    groups = overlap if per_layer else np.broadcast_to(overlap.sum(axis=0), overlap.shape)
    hosted = np.empty_like(target.hosted)
    for layer in range(present.num_layers):
        names = _best_names(groups[layer], nodes)
        hosted[layer, :, names] = target.hosted[layer].T
    width = max(present.physical_per_rank, target.physical_per_rank)
    table = np.full((present.num_layers, present.num_ranks, width), -1, np.int32)
    old = widened(present, width).phy2log.reshape(table.shape)
    for layer, rank in np.ndindex(*table.shape[:2]):
        wanted = hosted[layer, :, rank]
        stays = (old[layer, rank] >= 0) & wanted[old[layer, rank]]
        table[layer, rank, stays] = old[layer, rank, stays]
        fresh = np.setdiff1d(np.flatnonzero(wanted), old[layer, rank, stays])
        table[layer, rank, np.flatnonzero(~stays)[: len(fresh)]] = fresh
    return target.with_result(phy2log=table.reshape(present.num_layers, -1))


def plan_migration(
    present: Plan,
    target: Plan,
    topology: Topology,
    *,
    expert_bytes: int,
    bytes_per_step: int,
    seconds_per_step: tuple[float, float],
    horizon_steps: float = np.inf,
) -> Migration:
    """A schedule from `present` to `target` (already relabelled), and whether it pays.

    seconds_per_step: predicted model step time under the present and the target plan (`simulate`). bytes_per_step:
    how much all ranks together may receive between two batches; at least two experts where slots must trade.
    Raises ValueError if the plan saves nothing or pays back only after `horizon_steps`.
    """
    _comparable(present, target)
    if topology.num_ranks != present.num_ranks:
        raise ValueError(f"the topology has {topology.num_ranks} ranks, the plans {present.num_ranks}")
    width = max(present.physical_per_rank, target.physical_per_rank)
    start, goal = widened(present, width), widened(target, width)
    incoming = (goal.hosted & ~start.hosted).sum(axis=(0, 1)) * expert_bytes
    link = topology.inter if topology.num_nodes > 1 else topology.intra
    steps, num_bytes = _schedule(start, goal, expert_bytes, bytes_per_step)
    seconds = sum(link.latency for _ in steps) + float(incoming.max(initial=0)) / link.bandwidth
    saving = seconds_per_step[0] - seconds_per_step[1]
    to_pay = seconds / saving if saving > 0 else np.inf
    if num_bytes and (saving <= 0 or to_pay > horizon_steps):
        raise ValueError(
            f"this migration never pays back: it moves {num_bytes} bytes in {seconds:.3g} s and saves "
            f"{saving:.3g} s per step ({to_pay:.3g} steps to pay, horizon {horizon_steps:.3g}); keep the present plan"
        )
    return Migration(
        start=start, target=goal, steps=steps, num_bytes=num_bytes, seconds=seconds, saving=saving,
        steps_to_pay=to_pay if num_bytes else 0.0,
    )  # fmt: skip


def widened(plan: Plan, width: int) -> Plan:
    """The same plan with `width` slots per rank, the new ones empty."""
    if width < plan.physical_per_rank:
        raise ValueError(f"{width} slots per rank cannot hold the plan's {plan.physical_per_rank}")
    table = plan.phy2log.reshape(plan.num_layers, plan.num_ranks, -1)
    table = np.pad(table, ((0, 0), (0, 0), (0, width - plan.physical_per_rank)), constant_values=-1)
    return plan.with_result(phy2log=table.reshape(plan.num_layers, -1))


def _schedule(start: Plan, goal: Plan, expert_bytes: int, budget: int) -> tuple[tuple[tuple[Write, ...], ...], int]:
    """Pack safe groups of writes into steps, as full as can be; a group is one write, or a cycle of slots that must
    trade together. Groups that wait for others of their layer keep their order, each in the first step with room."""
    most, groups = budget // expert_bytes, list[tuple[int, list[Write], int]]()
    waits = np.zeros(start.num_layers, bool)
    for layer in range(start.num_layers):
        old, new = start.phy2log[layer], goal.phy2log[layer]
        own = list(_groups(layer, old, new, start, most))
        largest = max((size for _, size in own), default=0)
        if largest > most:
            raise ValueError(
                f"bytes_per_step ({budget}) is less than a group of {largest} experts that must move together "
                f"({largest * expert_bytes} bytes); raise it or leave a spare slot per rank"
            )
        written = [write.physical for group, _ in own for write in group]
        waits[layer] = any(len(np.unique(table)) < len(table) for table in (old, new, written)) or (old < 0).any()
        groups += [(layer, group, size) for group, size in own]
    free = sorted((one for one in groups if one[2] and not waits[one[0]]), key=lambda one: -one[2])
    steps, room = list[list[Write]](), list[int]()  # room: experts that each step may still receive
    while free:
        chosen = _fullest([size for _, _, size in free], most)
        steps.append([write for n in chosen for write in free[n][1]])
        room.append(most - sum(free[n][2] for n in chosen))
        free = [one for n, one in enumerate(free) if n not in chosen]
    earliest = np.zeros(start.num_layers, np.int64)
    for layer, group, size in (one for one in groups if not one[2] or waits[one[0]]):
        at = next((step for step in range(earliest[layer], len(steps)) if size <= room[step]), len(steps))
        if at == len(steps):
            steps.append([])
            room.append(most)
        steps[at] += group
        room[at] -= size
        earliest[layer] = at
    return tuple(map(tuple, steps)), sum(size for _, _, size in groups) * expert_bytes


def _fullest(sizes: list[int], room: int) -> tuple[int, ...]:
    """Which of the sizes, all above 0, fill the room best."""
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for n, size in enumerate(sizes):
        for total, chosen in list(reached.items()):
            if total + size <= room:
                reached.setdefault(total + size, (*chosen, n))
        if room in reached:
            break
    return reached[max(reached)]


def _groups(
    layer: int, old: NDArray[np.int32], new: NDArray[np.int32], plan: Plan, largest: int
) -> Iterator[tuple[list[Write], int]]:
    """Groups of writes of one layer, and how many experts cross ranks in each."""
    table, rank = old.copy(), plan.rank_of_physical()

    def crossing(writes: list[Write]) -> int:
        return sum(w.new >= 0 and rank[w.physical] not in rank[before == w.new] for w in writes)

    while (pending := np.flatnonzero(table != new)).size:
        before = table.copy()
        counts = np.bincount(table[table >= 0], minlength=plan.num_experts)
        safe = [
            p for p in pending if (table[p] < 0 or counts[table[p]] > 1) and _free_of(table, rank, int(p), int(new[p]))
        ]
        fills = [p for p in safe if new[p] >= 0]
        if fills or safe:
            p = int((fills or safe)[0])
            writes = [Write(layer, p, int(table[p]), int(new[p]))]
        else:  # only last copies are in the way: trade slots along a cycle, or two by two if that is too many
            cycle = _cycle(table, new, int(pending[0]))
            if len(cycle) <= max(largest, 2):
                writes = [Write(layer, p, int(table[p]), int(new[p])) for p in cycle]
            else:
                p, q = cycle[0], cycle[1]
                writes = [Write(layer, p, int(table[p]), int(table[q])), Write(layer, q, int(table[q]), int(table[p]))]
        for write in writes:
            table[write.physical] = write.new
        yield writes, crossing(writes)


def _free_of(table: NDArray[np.int32], rank: NDArray[np.int64], physical: int, expert: int) -> bool:
    """Whether the rank of a slot does not hold this expert already (it would then hold it twice)."""
    return expert < 0 or not (table[rank == rank[physical]] == expert).any()


def _cycle(table: NDArray[np.int32], new: NDArray[np.int32], first: int) -> list[int]:
    """Slots p0, p1, ...: p0 wants what p1 holds, p1 wants what p2 holds, ..., back to p0."""
    path = [first]
    while True:
        wanted = new[path[-1]]
        holders = np.flatnonzero((table == wanted) & (new != wanted))
        if not holders.size:  # every holder keeps its copy: the chain ends in a plain copy
            return path
        holder = int(holders[0])
        if holder in path:
            return path[path.index(holder) :]
        path.append(holder)


def _best_names(overlap: NDArray[np.int64], nodes: tuple[int, ...] | None) -> NDArray[np.int64]:
    """New name of each target rank, [G], with the greatest total overlap [present, target]."""
    from scipy.optimize import linear_sum_assignment  # a fifth of a second, which runs that move nothing do not take

    if nodes is None:
        return np.asarray(linear_sum_assignment(overlap.T, maximize=True)[1])
    node = np.array(nodes)
    members = [np.flatnonzero(node == n) for n in range(node.max() + 1)]
    if len({len(m) for m in members}) > 1:
        return np.arange(len(node))  # unequal nodes keep their names
    inner = {
        (a, b): linear_sum_assignment(overlap[np.ix_(members[a], members[b])].T, maximize=True)[1]
        for a in range(len(members))
        for b in range(len(members))
    }
    value = np.array(
        [[overlap[members[a][inner[a, b]], members[b]].sum() for b in range(len(members))] for a in range(len(members))]
    )
    names = np.empty(len(node), np.int64)
    for b, a in enumerate(linear_sum_assignment(value.T, maximize=True)[1]):
        names[members[b]] = members[a][inner[a, b]]
    return names


def _comparable(present: Plan, target: Plan) -> None:
    if present.hosted.shape != target.hosted.shape:
        raise ValueError(f"plans of shapes {present.hosted.shape} and {target.hosted.shape} [L, E, G] cannot be joined")
