"""A placement: which logical expert every physical expert of every rank holds, and how good it is known to be.

Physical experts are numbered rank by rank: rank = p // P_local. A slot of a rank may be empty (-1), so that ranks
may hold unequal numbers of experts. Plans are frozen, checked when made, and stored as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.placement.schema import NUMBER, Kinds, checked, integers
from moe.placement.wire_format import ModelSizes
from moe.placement.written import written_whole

FORMAT = "moe-plan-2"
FORMATS = {"moe-plan-1", FORMAT}  # the first does not say the sizes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """Where the E logical experts of L layers live on G ranks.

    phy2log: int32 [L, P], P = G * P_local, -1 = empty. Every expert is somewhere; no rank holds one twice in a layer.
    objective/value/bound/seconds/solver: what was minimised, the plan's cost, the proven lower bound, the time it took
    and by which method; None = not known.
    sizes: of the model it was solved for; None = not known.
    """

    num_experts: int
    num_ranks: int
    phy2log: NDArray[np.int32]
    model: str = ""
    solver: str = ""
    objective: str = ""
    value: float | None = None
    bound: float | None = None
    seconds: float | None = None
    sizes: ModelSizes | None = None
    hosted: NDArray[np.bool_] = field(init=False, repr=False)
    log2phy: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = np.asarray(self.phy2log)
        if self.num_ranks < 1 or self.num_experts < 1:
            raise ValueError(f"{self.num_experts} experts on {self.num_ranks} ranks: both must be at least 1")
        if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[0] < 1:
            raise ValueError(f"phy2log must be integers [L, P] with L >= 1, it is {table.dtype} {table.shape}")
        if table.shape[1] % self.num_ranks or table.shape[1] == 0:
            raise ValueError(f"phy2log has {table.shape[1]} physical experts, not a multiple of {self.num_ranks} ranks")
        if table.min() < -1 or table.max() >= self.num_experts:
            raise ValueError(f"phy2log names experts {table.min()}..{table.max()}; allowed -1..{self.num_experts - 1}")
        if self.num_experts > table.shape[1]:
            raise ValueError(f"{self.num_experts} experts do not fit {table.shape[1]} places; each must be somewhere")
        table = table.astype(np.int32)
        num_layers = table.shape[0]
        per_rank = table.reshape(num_layers, self.num_ranks, -1)
        copies = np.zeros((num_layers, self.num_ranks, self.num_experts + 1), np.int32)
        layer, rank, _ = np.indices(per_rank.shape)
        np.add.at(copies, (layer, rank, per_rank), 1)  # column -1 collects the empty slots
        copies = copies[:, :, :-1]
        if copies.max() > 1:
            where = [int(i[0]) for i in np.nonzero(copies > 1)]
            raise ValueError(
                f"layer {where[0]}: rank {where[1]} holds expert {where[2]} twice; replicas need distinct ranks"
            )
        homeless = np.argwhere(copies.sum(axis=1) == 0)
        if homeless.size:
            raise ValueError(f"layer {homeless[0][0]}: expert {homeless[0][1]} is on no rank ({len(homeless)} in all)")
        if self.bound is not None and self.value is not None and self.bound > self.value + 1e-6 * (1 + abs(self.value)):
            raise ValueError(f"the bound ({self.bound}) exceeds the plan's value ({self.value}); one of them is wrong")
        for name, value in (
            ("phy2log", table),
            ("hosted", copies.transpose(0, 2, 1) > 0),
            ("log2phy", _invert(table, self.num_experts)),
        ):
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    @property
    def num_layers(self) -> int:
        return int(self.phy2log.shape[0])

    @property
    def num_physical(self) -> int:
        return int(self.phy2log.shape[1])

    @property
    def physical_per_rank(self) -> int:
        return self.num_physical // self.num_ranks

    @property
    def replicas(self) -> NDArray[np.int64]:
        """How many copies each expert has: [L, E]."""
        return np.asarray(self.hosted.sum(axis=2))

    def check_ranks(self) -> None:
        """Raises ValueError where a rank holds no expert of any layer: it would have no slot."""
        if idle := np.flatnonzero(~self.hosted.any(axis=(0, 1))).tolist():
            raise ValueError(
                f"rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of {self.num_ranks} would have none of the "
                f"{self.num_experts} experts of a layer; start fewer, or give a plan with replicas"
            )

    @property
    def gap(self) -> float | None:
        """(value - bound) / value, the share by which the plan might still be improved; None without a bound."""
        if self.value is None or self.bound is None:
            return None
        return (self.value - self.bound) / self.value if self.value else 0.0

    @property
    def assignment(self) -> NDArray[np.int64]:
        """The rank of every expert, [L, E]. Raises ValueError if an expert has replicas."""
        if (self.replicas > 1).any():
            raise ValueError(
                f"{int((self.replicas > 1).sum())} experts have replicas; a plain assignment does not exist"
            )
        return np.asarray(self.hosted.argmax(axis=2))

    def rank_of_physical(self) -> NDArray[np.int64]:
        """The rank that owns each physical id: [P]."""
        return np.arange(self.num_physical) // self.physical_per_rank

    def with_result(self, **fields: Any) -> "Plan":
        """The same placement with other notes (solver, objective, value, bound, seconds)."""
        return replace(self, **fields)

    @staticmethod
    def from_assignment(assignment: NDArray[np.integer[Any]], num_ranks: int, **fields: Any) -> "Plan":
        """Every expert on one rank: assignment [L, E] of ranks."""
        ranks = np.asarray(assignment)
        if ranks.ndim != 2 or ranks.size == 0 or ranks.min() < 0 or ranks.max() >= num_ranks:
            raise ValueError(f"assignment {ranks.shape} must hold ranks 0..{num_ranks - 1} as [L, E]")
        return Plan.from_hosted(ranks[:, :, None] == np.arange(num_ranks), **fields)

    @staticmethod
    def from_hosted(hosted: NDArray[np.bool_], **fields: Any) -> "Plan":
        """From hosted [L, E, G]: True where a rank holds a copy. Ids are laid out in ascending order on each rank."""
        num_layers, num_experts, num_ranks = hosted.shape
        width = max(int(hosted.sum(axis=1).max()), 1)
        table = np.full((num_layers, num_ranks, width), -1, np.int32)
        layer, rank, expert = np.nonzero(hosted.transpose(0, 2, 1))
        position = np.cumsum(hosted.transpose(0, 2, 1), axis=2)[layer, rank, expert] - 1
        table[layer, rank, position] = expert
        return Plan(num_experts=num_experts, num_ranks=num_ranks, phy2log=table.reshape(num_layers, -1), **fields)

    @staticmethod
    def contiguous(num_layers: int, num_experts: int, num_ranks: int) -> "Plan":
        """Experts 0, 1, ... in blocks, what expert parallelism does without a plan."""
        ranks = np.repeat(np.arange(num_ranks), even_capacities(num_experts, num_ranks))
        return Plan.from_assignment(np.tile(ranks, (num_layers, 1)), num_ranks, solver="contiguous")

    @staticmethod
    def round_robin(num_layers: int, num_experts: int, num_ranks: int) -> "Plan":
        """Expert e on rank e mod G."""
        return Plan.from_assignment(
            np.tile(np.arange(num_experts) % num_ranks, (num_layers, 1)), num_ranks, solver="round-robin"
        )

    @staticmethod
    def random(num_layers: int, num_experts: int, num_ranks: int, seed: int = 0) -> "Plan":
        """Equal counts, otherwise by chance."""
        rng = np.random.default_rng(seed)
        ranks = np.repeat(np.arange(num_ranks), even_capacities(num_experts, num_ranks))
        rows = np.stack([rng.permutation(ranks) for _ in range(num_layers)])
        return Plan.from_assignment(rows, num_ranks, solver="random")

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON."""
        fields: dict[str, Any] = {"format": FORMAT}
        for name in _STORED:
            value = getattr(self, name)
            fields[name] = value.tolist() if isinstance(value, np.ndarray) else value
        fields["sizes"] = None if self.sizes is None else self.sizes.stored()
        with written_whole(path) as part:
            part.write_text(json.dumps(fields) + "\n")

    @staticmethod
    def load(path: str | PathLike[str]) -> "Plan":
        """Read what `save` wrote, with every check of a new plan. Raises ValueError for anything else."""
        try:
            fields = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        found = fields.pop("format", None) if isinstance(fields, dict) else None
        if not isinstance(found, str) or found not in FORMATS:
            raise ValueError(f"{path} is not a plan of format {FORMAT!r}")
        sizes = ModelSizes.of(str(path), fields.pop("sizes", None) if found == FORMAT else None)
        for name in _FORMER & fields.keys():
            del fields[name]
        fields = checked(str(path), fields, _STORED)
        table = np.array(integers(str(path), "phy2log", fields.pop("phy2log"), axes=2))
        try:
            return Plan(phy2log=table, sizes=sizes, **fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


_FORMER = {"fast_slots", "host_slots"}  # of plans that were written when these were stored
_NONE = type(None)
_STORED: Mapping[str, Kinds] = {
    **dict.fromkeys(("num_experts", "num_ranks"), (int,)),
    **dict.fromkeys(("model", "solver", "objective"), (str,)),
    **dict.fromkeys(("value", "bound", "seconds"), (*NUMBER, _NONE)),
    "phy2log": (list,),
}


def even_capacities(num_experts: int, num_ranks: int) -> NDArray[np.int64]:
    """Experts per rank and layer when counts differ by at most one: [G], the first ranks take the remainder."""
    return np.full(num_ranks, num_experts // num_ranks) + (np.arange(num_ranks) < num_experts % num_ranks)


def check_capacity(num_experts: int, num_ranks: int, slots_per_rank: int, expert_bytes: int = 0) -> None:
    """Raise ValueError if a layer's experts do not fit the ranks' slots, with the missing slots and bytes."""
    missing = num_experts - num_ranks * slots_per_rank
    if missing > 0:
        size = f", {missing * expert_bytes} bytes per layer" if expert_bytes else ""
        raise ValueError(
            f"{num_experts} experts do not fit {num_ranks} ranks x {slots_per_rank} slots: {missing} slots are missing"
            f"{size}; raise the slots or add ranks"
        )


def _invert(phy2log: NDArray[np.int32], num_experts: int) -> NDArray[np.int32]:
    """[L, P] to log2phy [L, E, R]: the physical ids of each expert in ascending order, padded with -1."""
    num_layers = phy2log.shape[0]
    layer, physical = np.nonzero(phy2log >= 0)
    expert = phy2log[layer, physical]
    order = np.lexsort((physical, expert, layer))
    layer, physical, expert = layer[order], physical[order], expert[order]
    key = layer * num_experts + expert
    first = np.r_[0, np.flatnonzero(np.diff(key)) + 1] if key.size else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[first, key.size])
    copy = np.arange(key.size) - np.repeat(first, sizes)
    table = np.full((num_layers, num_experts, int(sizes.max(initial=1))), -1, np.int32)
    table[layer, expert, copy] = physical
    return table


def merge_models(names: Sequence[str]) -> str:
    """The one model that a trace and a plan are both about. Raises ValueError if they name different ones."""
    known = sorted({name for name in names if name})
    if len(known) > 1:
        raise ValueError(
            f"these are of different models: {', '.join(known)}; record a trace of the model that is placed"
        )
    return known[0] if known else ""
