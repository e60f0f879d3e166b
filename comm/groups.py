"""The process groups of a run, as a mesh of nodes × local ranks, started and ended in one place.

Rank r is local rank `r % ranks_per_node` of node `r // ranks_per_node`. A group of one member is None, so that a run of
one process needs no torch.distributed at all. `ranks_per_node` may be given, so that one machine can stand for several.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe.comm.mailbox import Mailbox

EAGER_BYTES = 1 << 16


class CommError(RuntimeError):
    """A collective did not complete; the message names this rank, the operation and the layer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """Who this process is among its peers. `world`, `local` (same node), `cross` (same local rank): None if alone.

    side: a second world group for traffic in the background (K/V, counts), so that it never queues ahead of tokens.
    mailboxes: of the groups whose messages need no collective, on the CPU.
    timeout_s: seconds after which a collective that a peer does not join raises.
    """

    rank: int = 0
    world_size: int = 1
    ranks_per_node: int = 1
    device: torch.device
    timeout_s: float = 0.0
    world: ProcessGroup | None = None
    local: ProcessGroup | None = None
    cross: ProcessGroup | None = None
    side: ProcessGroup | None = None
    mailboxes: Mapping[ProcessGroup, Mailbox] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    @property
    def world_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.world_size))

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Global ranks of this node, in the order of the group `local`."""
        return tuple(range(self.node * self.ranks_per_node, (self.node + 1) * self.ranks_per_node))

    @property
    def cross_ranks(self) -> tuple[int, ...]:
        """Global ranks with this local rank, by node, in the order of the group `cross`."""
        return tuple(range(self.local_rank, self.world_size, self.ranks_per_node))


def start_groups(
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = 300.0,
    device: str | torch.device = "cpu",
    eager_bytes: int = EAGER_BYTES,
    rank: int | None = None,
    world_size: int | None = None,
) -> Groups:
    """Join all ranks of the run: gloo on the CPU, NCCL on a GPU. Every rank must call; end with `stop_groups`.

    ranks_per_node: None = LOCAL_WORLD_SIZE, or all ranks on one node. eager_bytes: on the CPU, the size of the buffers
    that each rank keeps posted for every peer (`Mailbox`), 0 = collectives only. rank, world_size: None = RANK and
    WORLD_SIZE as torchrun sets them, or a run of one. MASTER_ADDR and MASTER_PORT say where to meet.
    Raises ValueError for a mesh that does not fit, CommError when the ranks do not meet within `timeout_s`.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if ranks_per_node is None:
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must lie in [0, {world_size}), the world size; check RANK and WORLD_SIZE")
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise ValueError(
            f"world size {world_size} is not a multiple of ranks_per_node ({ranks_per_node}); "
            "give every node the same number of ranks"
        )
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be positive")
    least = 8 * (2 * world_size + 3)  # the longest counts: those of coherent dispatch
    if eager_bytes and eager_bytes < least:
        raise ValueError(f"eager_bytes ({eager_bytes}) must be 0 or >= {least}, the counts of {world_size} ranks")
    device = _own_device(torch.device(device), rank % ranks_per_node)
    if world_size == 1:
        return Groups(device=device, timeout_s=timeout_s)

    started = time.monotonic()
    limit = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = next(iter(rendezvous("env://", rank, world_size, timeout=limit)))[0]
        # torchrun's store outlives a group: a second start must not read the addresses that the first one left.
        start = store.add(f"moe_starts_of_{rank}", 1)
        dist.init_process_group(
            backend,
            store=PrefixStore(f"moe_start_{start}", store),
            rank=rank,
            world_size=world_size,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        everyone = list(range(world_size))
        nodes = [everyone[i : i + ranks_per_node] for i in range(0, world_size, ranks_per_node)]
        columns = [everyone[i::ranks_per_node] for i in range(ranks_per_node)]
        local, cross = _subgroup(nodes, limit), _subgroup(columns, limit)
        mailboxes: dict[ProcessGroup, Mailbox] = {}
        if eager_bytes and device.type == "cpu":
            mailboxes = {g: Mailbox(g, eager_bytes) for g in {dist.group.WORLD, local, cross} if g is not None}
        return Groups(
            rank=rank,
            world_size=world_size,
            ranks_per_node=ranks_per_node,
            device=device,
            timeout_s=timeout_s,
            world=dist.group.WORLD,
            local=local,
            cross=cross,
            side=dist.new_group(everyone, timeout=limit),
            mailboxes=mailboxes,
        )
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise CommError(
            f"rank {rank} of {world_size}: the ranks did not meet at {where} ({time.monotonic() - started:.1f} s of "
            f"{timeout_s:g} s); start all {world_size} and see which one ended ({first_line(error)})"
        ) from error


def stop_groups(groups: Groups, *, wait: bool = True) -> None:
    """End the groups. wait: first meet the peers, so that none ends while another reads; False after an error."""
    if groups.world is None:
        return
    try:
        if wait:
            dist.barrier(group=groups.world)
    except RuntimeError as error:
        raise CommError(
            f"rank {groups.rank} of {groups.world_size}: a peer was gone at the end of the run ({first_line(error)})"
        ) from error
    finally:
        dist.destroy_process_group()


@contextmanager
def process_groups(
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = 300.0,
    device: str | torch.device = "cpu",
    eager_bytes: int = EAGER_BYTES,
) -> Iterator[Groups]:
    """`start_groups`, and `stop_groups` however the block ends; an error ends them without waiting for the peers."""
    groups = start_groups(ranks_per_node=ranks_per_node, timeout_s=timeout_s, device=device, eager_bytes=eager_bytes)
    try:
        yield groups
    except BaseException:
        stop_groups(groups, wait=False)
        raise
    stop_groups(groups)


def first_line(error: BaseException) -> str:
    """The first sentence of a backend's error, without its source position."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if line.startswith("[") and "] " in line:
        line = line.split("] ", 1)[1]
    return line.split(". ", 1)[0]


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    index = local_rank if str(device) == "cuda" else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"local rank {local_rank} wants GPU {index}, this machine has {count}; start fewer ranks")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _subgroup(rows: list[list[int]], limit: timedelta) -> ProcessGroup | None:
    """The group of this rank among `rows`, which partition the world; None for one member."""
    if len(rows[0]) == 1:
        return None
    if len(rows) == 1:
        return dist.group.WORLD
    # Every rank makes all of them, in one order.
    groups: list[ProcessGroup] = [dist.new_group(row, timeout=limit) for row in rows]
    return next(group for group, row in zip(groups, rows) if dist.get_rank() in row)


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
