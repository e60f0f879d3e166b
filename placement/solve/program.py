"""The one objective that every solver minimises and every bound is a bound of.

cost = cross * (mass of consecutive-layer transitions, each times the link cost between the two ranks)
     + load * (mean over layers of the busiest rank's token load / the mean load, minus 1)
     + migration * (copies that the present plan lacks / all experts)
     + miss * (expert uses that find the expert outside their rank's fast memory / all uses)

Each term is a fraction, so weights compare: with the default weights and link cost 0/1 the value is the crossing
fraction.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.plan import Plan, even_capacities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What one unit of each fraction costs. All >= 0."""

    cross: float = 1.0
    load: float = 0.0
    migration: float = 0.0
    miss: float = 0.0

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.__slots__}
        if min(values.values()) < 0 or not np.isfinite(list(values.values())).all():
            raise ValueError(f"weights must be finite and >= 0, they are {values}")


class Terms(NamedTuple):
    """The four fractions of a plan and their weighted sum."""

    cross: float
    load: float
    migration: float
    miss: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """One placement problem: L layers of E experts on G ranks.

    transitions: [L - 1, E, E] >= 0. load: [L, E] tokens per expert; None = derived from the transitions.
    capacities: [G] experts of one layer on each rank, sum E. link_cost: [G, G] symmetric, zero diagonal; None = 0/1.
    present: hosted [L, E, G] of the running plan, for migration. fast_slots: [G] experts of all layers in fast memory.
    Transitions are normalised to total 1 and load to total 1 per layer. Raises ValueError for wrong shapes.
    """

    transitions: Floats
    capacities: Ints
    load: Floats | None = None
    link_cost: Floats | None = None
    weights: Weights = Weights()
    present: NDArray[np.bool_] | None = None
    fast_slots: Ints | None = None

    def __post_init__(self) -> None:
        mass = np.asarray(self.transitions, float)
        if mass.ndim != 3 or mass.shape[1] != mass.shape[2] or (mass.size == 0 and self.load is None):
            raise ValueError(f"transitions must be [L - 1, E, E], they are {mass.shape}")
        if mass.size and (mass.min() < 0 or not np.isfinite(mass).all()):
            raise ValueError("transitions must be finite and >= 0")
        experts = mass.shape[1]
        capacities = np.asarray(self.capacities, np.int64)
        if capacities.ndim != 1 or capacities.size < 1 or capacities.min() < 0 or capacities.sum() != experts:
            raise ValueError(f"capacities {capacities.tolist()} must be >= 0 and sum to {experts} experts")
        ranks = capacities.size
        load = (
            np.concatenate([mass.sum(axis=2), mass[-1:].sum(axis=1)])
            if self.load is None
            else np.asarray(self.load, float)
        )
        if load.shape != (mass.shape[0] + 1, experts) or load.min() < 0:
            raise ValueError(f"load must be [{mass.shape[0] + 1}, {experts}] and >= 0, it is {load.shape}")
        cost = 1.0 - np.eye(ranks) if self.link_cost is None else np.asarray(self.link_cost, float)
        if cost.shape != (ranks, ranks) or (cost != cost.T).any() or cost.diagonal().any() or cost.min() < 0:
            raise ValueError(f"link_cost must be a symmetric [{ranks}, {ranks}] matrix >= 0 with a zero diagonal")
        if self.present is not None and self.present.shape != (mass.shape[0] + 1, experts, ranks):
            raise ValueError(
                f"present is {self.present.shape}, the program {(mass.shape[0] + 1, experts, ranks)}; use one model"
            )
        if self.weights.migration and self.present is None:
            raise ValueError("a migration weight needs the present plan")
        if self.weights.miss and self.fast_slots is None:
            raise ValueError("a miss weight needs fast_slots, the experts that each rank's fast memory holds")
        object.__setattr__(self, "transitions", mass / max(float(mass.sum()), 1e-300))
        object.__setattr__(self, "load", load / np.maximum(load.sum(axis=1, keepdims=True), 1e-300))
        object.__setattr__(self, "capacities", capacities)
        object.__setattr__(self, "link_cost", cost)

    @staticmethod
    def even(transitions: Floats, num_ranks: int, **fields: object) -> "Program":
        """Equal capacities, or differing by one where the experts do not divide."""
        return Program(
            transitions=transitions,
            capacities=even_capacities(transitions.shape[1], num_ranks),
            **fields,  # type: ignore[arg-type]
        )

    def with_empty_places(self) -> "Program":
        """The same with silent experts where ranks have room, ceil(E / G) places each, last: [L, G * ceil(E / G)].

        Solvers that only trade places then move an expert into an empty one; costs stay. Itself if E divides.
        """
        experts, ranks = self.num_experts, self.num_ranks
        missing = -experts % ranks
        if not missing:
            return self
        present, weights = self.present, self.weights
        if present is not None:  # whoever is silent is at home everywhere
            present = np.pad(present, ((0, 0), (0, missing), (0, 0)), constant_values=True)
            weights = replace(weights, migration=weights.migration * (experts + missing) / experts)
        return replace(
            self,
            transitions=np.pad(self.transitions, ((0, 0), (0, missing), (0, missing))),
            load=np.pad(self.shares, ((0, 0), (0, missing))),
            capacities=np.full(ranks, (experts + missing) // ranks),
            present=present,
            weights=weights,
        )

    @property
    def num_layers(self) -> int:
        return int(self.transitions.shape[0]) + 1

    @property
    def num_experts(self) -> int:
        return int(self.transitions.shape[1])

    @property
    def num_ranks(self) -> int:
        return int(self.capacities.size)

    @property
    def links(self) -> Floats:
        assert self.link_cost is not None
        return self.link_cost

    @property
    def shares(self) -> Floats:
        """Load normalised per layer: [L, E]."""
        assert self.load is not None
        return self.load

    @property
    def labels_free(self) -> bool:
        """Whether ranks of equal capacity may trade names without changing the cost."""
        off = self.links[~np.eye(self.num_ranks, dtype=bool)]
        return self.weights.migration == 0 and self.weights.miss == 0 and (off.size == 0 or float(np.ptp(off)) == 0.0)

    def unary(self) -> Floats:
        """Linear cost of putting an expert on a rank, [L, E, G]: the migration term."""
        cost = np.zeros((self.num_layers, self.num_experts, self.num_ranks))
        if self.present is not None and self.weights.migration:
            cost += self.weights.migration / (self.num_layers * self.num_experts) * ~self.present
        return cost

    def terms(self, plan: Plan) -> Terms:
        """The cost of a plan, term by term; replicas serve a transition from the cheapest pair of copies.

        A replicated expert's load is shared equally by its copies.
        """
        if plan.hosted.shape != (self.num_layers, self.num_experts, self.num_ranks):
            raise ValueError(
                f"the plan is {plan.hosted.shape} [L, E, G], the program "
                f"{(self.num_layers, self.num_experts, self.num_ranks)}; use a plan for this model and topology"
            )
        hosted = plan.hosted
        cross = 0.0
        for layer in range(self.num_layers - 1):
            cross += float(
                (self.transitions[layer] * cheapest_link(hosted[layer], hosted[layer + 1], self.links)).sum()
            )
        split = hosted * (self.shares / hosted.sum(axis=2))[:, :, None]
        busiest = split.sum(axis=1).max(axis=1) * self.num_ranks
        migration = 0.0
        if self.present is not None:
            migration = float((hosted & ~self.present).sum()) / (self.num_layers * self.num_experts)
        miss = 0.0
        if self.fast_slots is not None:
            for rank in range(self.num_ranks):
                uses = np.sort(split[:, :, rank][hosted[:, :, rank]])[::-1]
                miss += float(uses[int(self.fast_slots[rank]) :].sum()) / self.num_layers
        w = self.weights
        load = float(busiest.mean()) - 1.0
        return Terms(
            cross, load, migration, miss, w.cross * cross + w.load * load + w.migration * migration + w.miss * miss
        )

    def cost(self, plan: Plan) -> float:
        return self.terms(plan).total


def cheapest_link(left: NDArray[np.bool_], right: NDArray[np.bool_], links: Floats) -> Floats:
    """Least link cost between a copy of i (left [E, G]) and a copy of j (right [E, G]): [E, E]."""
    if (left.sum(axis=1) == 1).all() and (right.sum(axis=1) == 1).all():
        return np.asarray(links[left.argmax(axis=1)][:, right.argmax(axis=1)])
    reach = np.where(left[:, :, None], links[None], np.inf).min(axis=1)  # [E, G]: from any copy of i to rank g
    return np.asarray(np.where(right[None], reach[:, None, :], np.inf).min(axis=2))
