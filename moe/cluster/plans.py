"""A plan for those who are there: each keeps the experts it has, and those without a home go to whoever has fewest."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan

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


def first_plan(file: str | None, shape: tuple[int, int], num_hosts: int) -> Plan:
    """The one in `file`, else contiguous blocks. Raises ValueError if it is another model's or for another number."""
    if file is None:
        return Plan.contiguous(*shape, num_hosts)
    plan = Plan.load(file)
    if (plan.num_layers, plan.num_experts, plan.num_ranks) != (*shape, num_hosts):
        raise ValueError(
            f"{file} is a plan of {plan.num_layers} layers of {plan.num_experts} experts on {plan.num_ranks} ranks, "
            f"this run has {shape[0]} of {shape[1]} on {num_hosts}"
        )
    return plan
