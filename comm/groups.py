"""The process groups of one generation of ranks, as a mesh of nodes × local ranks.

A group of one member is None, so that a run of one process needs no torch.distributed at all. Nodes may have unequal
numbers of ranks; then there is no group across them. `membership.py` makes groups and ends them.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from moe.comm.cores import Cores
from moe.comm.mailbox import Mailbox


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """Who this process is among its peers. `world`, `local` (same node), `cross` (same local rank): None if alone.

    nodes: the node of every rank, numbered from 0. generation: of the ranks, see `membership.py`. name: what all of
    this start have, and no other start.
    store: of the generation alone, for words between ranks when a group no longer works.
    side: a second world group for traffic in the background (K/V, counts), so that it never queues ahead of tokens.
    mailboxes: of the groups whose messages need no collective, on the CPU.
    cores: of each of `local_ranks`, the processor cores that it runs on; none where the system's choice stands.
    timeout_s: seconds after which a collective that a peer does not join raises.
    freed: set when somebody who knows that the generation ends took this rank out of a wait (`membership.interrupt`).
    """

    rank: int = 0
    nodes: tuple[int, ...] = (0,)
    generation: int = 0
    name: str = ""
    device: torch.device
    timeout_s: float = 0.0
    world: ProcessGroup | None = None
    local: ProcessGroup | None = None
    cross: ProcessGroup | None = None
    side: ProcessGroup | None = None
    store: Store | None = None
    mailboxes: Mapping[ProcessGroup, Mailbox] = field(default_factory=dict)
    cores: tuple[Cores, ...] = ()
    freed: threading.Event = field(default_factory=threading.Event)

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    @property
    def num_nodes(self) -> int:
        return max(self.nodes) + 1

    @property
    def node(self) -> int:
        return self.nodes[self.rank]

    @property
    def local_rank(self) -> int:
        return self.local_ranks.index(self.rank)

    @property
    def world_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.world_size))

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Global ranks of this node, in the order of the group `local`."""
        return ranks_by_node(self.nodes)[self.node]

    @property
    def cross_ranks(self) -> tuple[int, ...]:
        """Global ranks with this local rank, by node, in the order of the group `cross`; alone if nodes are uneven."""
        if not self.is_even:
            return (self.rank,)
        return tuple(ranks[self.local_rank] for ranks in ranks_by_node(self.nodes))

    @property
    def is_even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return len({len(ranks) for ranks in ranks_by_node(self.nodes)}) == 1


def ranks_by_node(nodes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The ranks of every node, ascending."""
    return [tuple(r for r, own in enumerate(nodes) if own == node) for node in range(max(nodes) + 1)]


def timed_all_to_all(groups: Groups, group: dist.ProcessGroup, size: int) -> Callable[[int], float]:
    """all_to_all(bytes sent per rank) -> seconds of the slowest rank of all, so that every rank fits the same link."""

    def all_to_all(num_bytes: int) -> float:
        part = max(1, num_bytes // size)
        sent = torch.zeros(part * size, dtype=torch.uint8, device=groups.device)
        received = torch.empty_like(sent)
        dist.barrier(group=groups.world)
        start = time.perf_counter()
        dist.all_to_all_single(received, sent, group=group)
        if groups.device.type == "cuda":
            torch.cuda.synchronize(groups.device)
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=groups.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.world)
        return float(seconds)

    return all_to_all
