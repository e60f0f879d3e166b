"""Who has which experts: a plan for those who are there, and what became of it while they served.

Each keeps the experts it has, and those without a home go to whoever has fewest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe.cluster.messages import Placed
from moe.placement.loop import PlacementStats
from moe.placement.plan import Plan
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace

_SECONDS, _ROUNDS = 10.0, 100  # what solving may take before the first generation

Hosted = NDArray[np.bool_]  # [L, E]: what one host has


class Placements:
    """Of one generation after another. plan: that is served now; stats: of the loops that moved experts, of all
    generations."""

    def __init__(self, file: str | None, begin: Plan | None = None) -> None:
        """begin: what another controller served last, over `file`; hosts beyond its ranks take from others."""
        self.file, self._begin = file, begin
        self.plan: Plan | None = None
        self.stats = self._before = PlacementStats()
        self._held: dict[int, Hosted] = {}  # by host: what it has
        self._placed: Placed | None = None

    def form(self, hosts: Sequence[int], shape: tuple[int, int], nodes: Sequence[str]) -> Plan:
        """For the next generation: numbers of its hosts and their nodes, by rank. Raises ValueError as `first_plan`."""
        held = [self._held.get(number) for number in hosts]
        if self._held:
            plan = plan_for(held, shape)
        elif self._begin is not None and self._begin.num_ranks == len(hosts):
            plan = self._begin
        elif self._begin is not None:
            parts = [*np.moveaxis(self._begin.hosted, 2, 0)][: len(hosts)]
            plan = plan_for([*parts, *[None] * (len(hosts) - len(parts))], shape)
        else:
            plan = first_plan(self.file, shape, nodes)
        plan.check_ranks()
        self.plan = plan
        self._held = {number: plan.hosted[:, :, rank] for rank, number in enumerate(hosts)}
        self._before, self._placed = self.stats, None
        return plan

    def check(self, num_hosts: int) -> None:
        """Raises ValueError if some of so many hosts would have no expert."""
        if self.plan is not None and num_hosts > self.plan.num_experts:
            raise ValueError(
                f"{num_hosts} hosts would share {self.plan.num_experts} experts of a layer, so that "
                f"{num_hosts - self.plan.num_experts} had none; ask for at most {self.plan.num_experts}"
            )

    def left(self, host: int, rank: int, plan: Plan | None) -> None:
        """A host that was `rank` ended a generation with this plan; None: it never began."""
        if plan is not None:
            self._held[host] = plan.hosted[:, :, rank]

    def moved(self, placed: Placed) -> Sequence[str]:
        """Rank 0 of the generation that serves says this. Returns what had not been said before."""
        known = () if self._placed is None else self._placed.notes
        self._placed, self.plan, self.stats = placed, placed.plan, placed.stats.after(self._before)
        return placed.notes[len(known) :]


def plan_for(held: Sequence[Hosted | None], shape: tuple[int, int]) -> Plan:
    """held: by rank, None = it has just come. Experts that someone has stay there; loads differ by at most one where
    newcomers can take from the fullest, replicas first."""
    num_layers, num_experts = shape
    hosted = np.zeros((num_layers, num_experts, len(held)), np.bool_)
    for rank, own in enumerate(held):
        if own is not None:
            hosted[:, :, rank] = own
    for layer in hosted:
        for expert in np.flatnonzero(~layer.any(axis=1)):
            layer[expert, layer.sum(axis=0).argmin()] = True
        while True:
            load = layer.sum(axis=0)
            full, empty = load.argmax(), load.argmin()
            if load[full] - load[empty] <= 1:
                break
            movable = np.flatnonzero(layer[:, full] & ~layer[:, empty])
            expert = movable[np.argmax(layer[movable].sum(axis=1))]
            layer[expert, full], layer[expert, empty] = False, True
    return Plan.from_hosted(hosted, solver="kept")


def first_plan(file: str | None, shape: tuple[int, int], nodes: Sequence[str]) -> Plan:
    """Solved for the topology that Ray reports. file: a plan, or a routing trace; nodes: of each host, by rank.

    A trace is solved here for these hosts on these nodes, in seconds: few copies of a token, few of them between nodes.
    Without a file, contiguous blocks. Raises ValueError if it is another model's or for another number of hosts.
    """
    if file is None:
        return Plan.contiguous(*shape, len(nodes))
    plan = Plan.load(file) if file.endswith(".json") else solved(RoutingTrace.load(file), nodes)
    if (plan.num_layers, plan.num_experts, plan.num_ranks) != (*shape, len(nodes)):
        raise ValueError(
            f"{file} is of {plan.num_layers} layers of {plan.num_experts} experts on {plan.num_ranks} ranks, this run "
            f"has {shape[0]} of {shape[1]} on {len(nodes)}"
        )
    return plan


def solved(trace: RoutingTrace, nodes: Sequence[str]) -> Plan:
    """As few hosts per token as can be found, on few nodes, evenly loaded."""
    topology = Topology.from_hosts(nodes)
    options = CopyOptions(
        seconds=_SECONDS, rounds=_ROUNDS, nodes=topology.node_of_rank, node_weight=topology.node_weight
    )
    return solve_copies(trace, topology.num_ranks, options=options)
