"""Machines: ranks on nodes, the links between them, and how much memory each tier has.

Made from a file (`load`), from the host names of a running cluster (`from_hosts`), or measured (`fit_link` turns
timed all-to-alls into latency and bandwidth). Presets are calibrated on recorded H200 tables.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.placement.schema import Kinds, checked, integers, numbers
from moe.placement.written import written_whole

MOST_RANKS = 4096  # tables of every pair of them are made: 128 MiB each

Numbers = float | NDArray[np.integer[Any]] | NDArray[np.float64]


def _check_number(num_ranks: int) -> None:
    if num_ranks > MOST_RANKS:
        raise ValueError(f"{num_ranks} ranks are more than a topology may have, {MOST_RANKS}; name fewer")


class Link(NamedTuple):
    """One way between two memories: bandwidth in bytes/s, latency in s."""

    bandwidth: float
    latency: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.bandwidth


class ExpertCost(NamedTuple):
    """What a rank's experts take in one layer: launch in s; bytes/s of weights; operations/s; bytes/s of rows."""

    launch: float
    weight_bandwidth: float
    flops: float
    row_bandwidth: float

    def seconds(
        self, used: Numbers, pairs: Numbers, hidden_size: Numbers, expert_bytes: Numbers, element_bytes: int
    ) -> NDArray[np.float64]:
        """launch + the longer of reading the experts that are used and computing the pairs + moving the pairs' rows.

        used, pairs: of each rank. Rows are read and written at the hidden and three times at the expert's own size. A
        rank without a pair launches nothing.
        """
        weights = expert_bytes / element_bytes  # as if experts were kept in the dtype of activations
        row = element_bytes * 2 * hidden_size + expert_bytes / hidden_size
        work = np.maximum(used * expert_bytes / self.weight_bandwidth, 2 * pairs * weights / self.flops)
        return np.where(pairs > 0, self.launch + work + pairs * row / self.row_bandwidth, 0.0)


# bench/fit_h200.py on published times of vLLM's kernel, bf16, 13 shapes; tests/placement/test_gpus.py checks the fit
H200_EXPERTS = ExpertCost(2.48e-5, 4.34e12, 7.19e14, 1.38e12)
# all_to_all of 2 to 8 GPUs in one NVLink node; tests/placement/test_plan.py checks the fit on the recorded table
H200_NVLINK = Link(270e9, 9e-6)
INFINIBAND_NDR = Link(45e9, 35e-6)  # one 400 Gb/s port per rank at about 90 %; nominal, not measured here
PCIE5_HOST = Link(50e9, 10e-6)
NVME = Link(6e9, 100e-6)
LAPTOP_LINK = Link(4e9, 100e-6)  # gloo over shared memory between processes
LAPTOP_DISK = Link(1.1e9, 100e-6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """G ranks, the node of each, link classes, and bytes of expert memory per tier.

    node_of_rank: [G] node numbers 0..nodes-1. intra/inter: links between ranks of one node / of two nodes.
    experts: what they take on a rank; None = not known.
    fast_bytes: per rank, for experts; None = unlimited. host_bytes: per node, None = unlimited.
    reachable: False for a rank that no link reaches; such a topology is refused.
    """

    node_of_rank: tuple[int, ...]
    intra: Link = H200_NVLINK
    inter: Link = INFINIBAND_NDR
    host: Link = PCIE5_HOST
    disk: Link = NVME
    experts: ExpertCost | None = None
    fast_bytes: tuple[int, ...] | None = None
    host_bytes: tuple[int, ...] | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if not self.node_of_rank:
            raise ValueError("a topology needs at least one rank")
        _check_number(self.num_ranks)
        nodes = sorted(set(self.node_of_rank))
        if nodes != list(range(len(nodes))):
            raise ValueError(f"node_of_rank uses nodes {nodes}; number them 0..{len(nodes) - 1} without holes")
        for kind in ("intra", "inter", "host", "disk"):
            link = getattr(self, kind)
            used = {"intra": self.num_ranks > self.num_nodes, "inter": self.num_nodes > 1}.get(kind, True)
            if used and not (np.isfinite(link.bandwidth) and link.bandwidth > 0):
                stranded = [r for r in range(self.num_ranks) if kind == "inter" or self._has_peer(r)]
                raise ValueError(
                    f"ranks {stranded} are unreachable: the {kind} link has bandwidth {link.bandwidth}; "
                    "give it a positive one or leave these ranks out"
                )
            if used and not (np.isfinite(link.latency) and link.latency >= 0):
                raise ValueError(f"the {kind} link has latency {link.latency}; it must be a finite number >= 0")
        if self.experts is not None and (min(self.experts[1:]) <= 0 or self.experts.launch < 0):
            raise ValueError(f"experts ({tuple(self.experts)}) must be a launch >= 0 and three rates > 0")
        for kind, count in (("fast_bytes", self.num_ranks), ("host_bytes", self.num_nodes)):
            budget = getattr(self, kind)
            if budget is not None and (len(budget) != count or min(budget) < 0):
                raise ValueError(f"{kind} must hold {count} numbers >= 0, it is {budget}")

    def _has_peer(self, rank: int) -> bool:
        return self.node_of_rank.count(self.node_of_rank[rank]) > 1

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1

    @property
    def nodes(self) -> NDArray[np.int64]:
        return np.array(self.node_of_rank, np.int64)

    def same_node(self) -> NDArray[np.bool_]:
        """Whether two ranks share a node: [G, G]."""
        return np.asarray(self.nodes[:, None] == self.nodes[None, :])

    def link_cost(self) -> NDArray[np.float64]:
        """Relative cost of a byte between ranks: [G, G]; 0 on the diagonal, 1 inside a node, intra / inter outside.

        With one rank per node the cheapest used link is the unit.
        """
        unit = self.intra if self.num_ranks > self.num_nodes else self.inter
        cost = np.where(self.same_node(), 1.0, unit.bandwidth / self.inter.bandwidth if self.num_nodes > 1 else 1.0)
        np.fill_diagonal(cost, 0.0)
        return cost

    @property
    def node_weight(self) -> float:
        """What a copy on a further node costs beyond one on the same; 0 for one node, or one rank on each."""
        cost = self.link_cost()
        return float(cost.max() - 1) if self.num_nodes > 1 and self.num_ranks > self.num_nodes else 0.0

    @staticmethod
    def uniform(num_nodes: int, ranks_per_node: int, **fields: Any) -> "Topology":
        """`num_nodes` equal nodes, ranks numbered node by node."""
        if num_nodes < 1 or ranks_per_node < 1:
            raise ValueError(f"{num_nodes} node(s) of {ranks_per_node} rank(s): both must be at least 1")
        _check_number(num_nodes * ranks_per_node)
        return Topology(node_of_rank=tuple(n for n in range(num_nodes) for _ in range(ranks_per_node)), **fields)

    @staticmethod
    def preset(name: str) -> "Topology":
        """`h200x8` one node of 8, `2xh200x8` two nodes over InfiniBand, `laptopx4` 4 processes, any counts."""
        parts = name.split("x")
        kinds: dict[str, dict[str, Any]] = {
            "h200": {
                "intra": H200_NVLINK,
                "inter": INFINIBAND_NDR,
                "host": PCIE5_HOST,
                "disk": NVME,
                "experts": H200_EXPERTS,
            },
            "laptop": {"intra": LAPTOP_LINK, "inter": Link(1e9, 1e-4), "host": Link(8e9, 1e-6), "disk": LAPTOP_DISK},
        }
        if len(parts) == 2:
            parts = ["1", *parts]
        if len(parts) != 3 or parts[1] not in kinds or not (parts[0].isdigit() and parts[2].isdigit()):
            raise ValueError(
                f"unknown topology {name!r}; use [NODESx]h200xRANKS or [NODESx]laptopxRANKS, or a JSON file"
            )
        return Topology.uniform(int(parts[0]), int(parts[2]), name=name, **kinds[parts[1]])

    @staticmethod
    def from_hosts(hosts: Sequence[str], **fields: Any) -> "Topology":
        """One rank per entry; equal host names are one node, numbered by first appearance."""
        number: dict[str, int] = {}
        nodes = tuple(number.setdefault(host, len(number)) for host in hosts)
        return Topology(node_of_rank=nodes, **fields)

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON: node_of_rank, one [bandwidth, latency] pair per link class, memory in bytes."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        with written_whole(path) as part:
            part.write_text(json.dumps(fields, indent=1) + "\n")

    @staticmethod
    def load(path: str | PathLike[str]) -> "Topology":
        """Read what `save` wrote; unknown keys are errors."""
        try:
            given = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(given, dict) or "node_of_rank" not in given:
            raise ValueError(f"{path} is no topology: it has no node_of_rank")
        told = {name: value for name, value in given.items() if value is not None}
        fields = checked(str(path), told, {name: kinds for name, kinds in _STORED.items() if name in told})
        for name in ("intra", "inter", "host", "disk"):
            if name in fields:
                fields[name] = Link(*numbers(str(path), name, fields[name], 2))
        if "experts" in fields:
            fields["experts"] = ExpertCost(*numbers(str(path), "experts", fields["experts"], 4))
        for name in ("node_of_rank", "fast_bytes", "host_bytes"):
            if name in fields:
                fields[name] = tuple(integers(str(path), name, fields[name]))
        try:
            return Topology(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


_STORED: Mapping[str, Kinds] = {
    **dict.fromkeys(("node_of_rank", "fast_bytes", "host_bytes", "intra", "inter", "host", "disk", "experts"), (list,)),
    "name": (str,),
}


def fit_link(num_bytes: Sequence[float], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth that best explain timed transfers, by least squares on relative errors.

    Needs at least two different sizes; ValueError if the times do not grow with the bytes.
    """
    x, y = np.asarray(num_bytes, float), np.asarray(seconds, float)
    if x.shape != y.shape or len(set(x.tolist())) < 2 or not (y > 0).all():
        raise ValueError(f"{x.size} sizes and {y.size} times: give two or more different sizes, each with a time > 0")
    rows = np.stack([1 / y, x / y], axis=1)
    (latency, slope), *_ = np.linalg.lstsq(rows, np.ones(len(x)), rcond=None)
    if latency < 0:
        latency, slope = 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    if slope <= 0:
        raise ValueError("the times do not grow with the bytes; probe larger messages")
    return Link(1 / float(slope), float(latency))


def probe_link(all_to_all: Callable[[int], float], sizes: Sequence[int], repeats: int = 5) -> Link:
    """Time `all_to_all(bytes sent per rank) -> seconds` at several sizes, smallest first, and fit a link.

    The shortest of `repeats` counts, since other work only adds; where even that does not grow with the bytes, up to
    three times as many. Ranks that are to agree must give `all_to_all` the same times. ValueError as of `fit_link`.
    """
    times = [float("inf")] * len(sizes)
    for _ in range(3):
        times = [min([least, *(all_to_all(size) for _ in range(repeats))]) for least, size in zip(times, sizes)]
        if times[0] < times[-1]:
            break
    return fit_link(sizes, times)
