"""A plan for those who are there: each keeps the experts it has, and those without a home go to whoever has fewest."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan
from moe.placement.solve.copies import solve_copies
from moe.placement.solve.swaps import CopyOptions
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace

_SECONDS, _ROUNDS = 10.0, 100  # what solving may take before the first generation

Hosted = NDArray[np.bool_]  # [L, E]: what one host has


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
