"""Generations of ranks: who belongs together, how they meet, and how groups end before the process does.

A generation is a number and the node of every rank. Its groups are made from a store that outlives all ranks (in a
controller, or torchrun's); whatever holds a group is made from one generation and thrown away with it. In one process:

    groups = join_groups(store, Generation(1, ("a", "a", "b")), rank=0)   # rank 1 dies: LostPeer
    leave_groups(groups, wait=False)
    groups = join_groups(store, Generation(2, ("a", "b")), rank=0)        # model, slots, KV and requests are as before

On the CPU the ranks of a node run on cores of their own from `join_groups` to `leave_groups` (moe/comm/cores.py).
Ranks that meet can be called off by ending the server of their store: all raise MissingPeers at once.

`start_groups` is the one generation of a torchrun job. A process belongs to one generation at a time (torch's default
group is the generation's world).
"""

import atexit
import gc
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe.comm import cores
from moe.comm.defaults import EAGER_BYTES
from moe.comm.errors import CommError, MissingPeers, Task, first_line
from moe.comm.groups import Groups, ranks_by_node
from moe.comm.interface import choose_interface
from moe.comm.lines import Lines, file_bytes, load_helper
from moe.comm.lost import in_collective
from moe.comm.mailbox import Mailbox
from moe.comm.together import map_together

# Public from torch 2.14 on, where the private name warns.
_set_timeout = getattr(dist, "set_timeout", distributed_c10d._set_pg_timeout)
_NEVER_SENT = 7  # a tag: what `interrupt` waits for

# gloo's threads let go of a collective's tensors after whoever waited for it went on, and need Python for that. Once it
# ends, they abort the process: groups that nobody holds any more, and with them their threads, end before.
atexit.register(gc.collect)


@dataclass(frozen=True, slots=True)
class Generation:
    """A number that no other generation of the store has, and the name of the node of each rank."""

    number: int
    nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError(f"generation {self.number} has no ranks; give the node of each")

    @property
    def node_numbers(self) -> tuple[int, ...]:
        """The node of each rank, numbered in the order in which they come."""
        names = list(dict.fromkeys(self.nodes))
        return tuple(names.index(node) for node in self.nodes)


def connect(host: str, port: int, timeout_s: float = 30.0) -> TCPStore:
    """The store of a controller that listens at `host`. Raises MissingPeers if it does not answer: at once where
    nobody listens any more."""
    try:
        socket.create_connection((host, port), timeout_s).close()  # TCPStore itself asks a closed port again and again
        limit = timedelta(seconds=timeout_s)
        return TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise MissingPeers(f"the store at {host}:{port} does not answer ({first_line(error)})") from error


def join_groups(
    store: Store,
    generation: Generation,
    rank: int,
    *,
    device: str | torch.device = "cpu",
    meet_s: float = 30.0,
    connect_s: float | None = None,
    timeout_s: float = 300.0,
    eager_bytes: int = EAGER_BYTES,
) -> Groups:
    """Meet the other ranks of a generation: gloo on the CPU, NCCL on a GPU. Every rank must call.

    meet_s: until the ranks that are missing are given up; connect_s: of gloo, for each connection to one that has come
    (nothing frees a rank that waits for a peer which has died since), None = meet_s, as for NCCL;
    timeout_s: of every collective afterwards. eager_bytes: on the CPU, the size of the buffers that each rank keeps
    posted for every peer of another node (`Mailbox`), 0 = collectives only, also between those of one.
    Raises ValueError for what does not fit, MissingPeers, which names them, when ranks do not come.
    """
    world_size, number = len(generation.nodes), generation.number
    if connect_s is None or torch.device(device).type == "cuda":
        connect_s = meet_s
    _check(rank, world_size, min(timeout_s, meet_s, connect_s), eager_bytes)
    nodes = generation.node_numbers
    device = _own_device(torch.device(device), ranks_by_node(nodes)[nodes[rank]].index(rank))
    if world_size == 1:
        return Groups(generation=number, device=device, timeout_s=timeout_s)
    if dist.is_initialized():
        raise ValueError(f"this process is in other groups already; leave them before it joins generation {number}")
    own = PrefixStore(f"moe_generation_{number}", store)
    started = time.monotonic()
    try:
        allowed = _meet(own, number, rank, world_size, meet_s)
        if len(set(nodes)) > 1:
            choose_interface(store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=own,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=connect_s),
            device_id=device if device.type == "cuda" else None,
        )
        name = own.compare_set("name", "", secrets.token_hex(8)).decode()  # the first rank's
        groups = _groups_of(nodes, rank, Start(number, name, connect_s, timeout_s, own), device, eager_bytes)
    except MissingPeers:
        raise
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise MissingPeers(
            f"rank {rank} of {world_size}: a rank of generation {number} was lost while all met "
            f"({time.monotonic() - started:.1f} s; {first_line(error)})",
            generation=number,
        ) from error
    if device.type == "cpu":
        of_node = [allowed[r] for r in groups.local_ranks]
        groups = replace(groups, cores=tuple(cores.share_of(of_node, i) for i in range(len(of_node))))
        cores.run_on(groups.cores[groups.local_rank])
    return groups


def leave_groups(groups: Groups, *, wait: bool = True) -> None:
    """End the groups, if that was not done. wait: meet the peers first, so that none ends while another reads; False
    after an error."""
    if groups.world is None or not dist.is_initialized():
        return
    cores.run_on(cores.allowed_cores())
    try:
        if wait:
            with in_collective(groups, Task("the end of the run")):
                dist.barrier(group=groups.world)
    finally:
        for mailbox in groups.mailboxes.values():
            if mailbox.lines is not None:
                mailbox.lines.close()
        dist.destroy_process_group()


def interrupt(groups: Groups) -> None:
    """Free this process's thread that waits in a collective: it raises LostPeer. To be called from another thread.

    It frees this process alone; the others may wait for a peer that lives: call it on each. The groups are of no use
    afterwards. Whoever calls knows who is lost, so that the freed rank does not wait for the word of others.
    """
    groups.freed.set()
    for mailbox in groups.mailboxes.values():
        if mailbox.lines is not None:
            mailbox.lines.rouse()
    for group in {groups.world, groups.side, groups.local, groups.cross} - {None}:
        assert group is not None
        if groups.device.type == "cuda":
            group.abort()
            continue
        # gloo's abort() does nothing, but a receive that times out closes every connection of its group. One from a
        # peer that has left fails at once and closes nothing: each peer is asked.
        for peer in set(range(group.size())) - {group.rank()}:
            try:
                group.recv([torch.empty(1, dtype=torch.uint8)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue  # as it should
            raise AssertionError(f"rank {groups.rank}: rank {peer} sent what nobody sends")


def _told_number(name: str, otherwise: int) -> int:
    """Of the environment of a job."""
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise ValueError(f"{name} ({text[:40]!r}) of the environment is no number: torchrun sets it; leave it unset")
    return int(text)


def start_groups(
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = 300.0,
    device: str | torch.device = "cpu",
    eager_bytes: int = EAGER_BYTES,
    rank: int | None = None,
    world_size: int | None = None,
) -> Groups:
    """`join_groups` for a job of torchrun, or of DeepSpeed's launcher: all ranks in one generation.

    ranks_per_node: None = LOCAL_WORLD_SIZE (or LOCAL_SIZE), or all ranks on one node; a number lets one machine stand
    for several. rank, world_size: None = RANK and WORLD_SIZE, or a run of one. MASTER_ADDR and MASTER_PORT say where to
    meet. Raises ValueError for a mesh that does not fit, MissingPeers when the ranks do not meet within `timeout_s`.
    """
    rank = _told_number("RANK", 0) if rank is None else rank
    world_size = _told_number("WORLD_SIZE", 1) if world_size is None else world_size
    if ranks_per_node is None:
        ranks_per_node = _told_number("LOCAL_WORLD_SIZE", 0) or _told_number("LOCAL_SIZE", 0) or world_size
    if ranks_per_node < 1 or world_size % ranks_per_node:
        raise ValueError(
            f"world size {world_size} is not a multiple of ranks_per_node ({ranks_per_node}); "
            "give every node the same number of ranks"
        )
    _check(rank, world_size, timeout_s, eager_bytes)
    if world_size == 1:
        return Groups(device=_own_device(torch.device(device), 0), timeout_s=timeout_s)
    nodes = tuple(str(r // ranks_per_node) for r in range(world_size))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    started = time.monotonic()
    try:
        store = next(iter(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout_s))))[0]
        # torchrun's store outlives a group: a second start must not read the addresses that the first one left.
        generation = Generation(store.add(f"moe_starts_of_{rank}", 1), nodes)
        return join_groups(
            store,
            generation,
            rank,
            device=device,
            meet_s=timeout_s,
            timeout_s=timeout_s,
            eager_bytes=eager_bytes,
        )
    except RuntimeError as error:
        raise MissingPeers(
            f"rank {rank} of {world_size}: the ranks did not meet at {where}, given up after "
            f"{time.monotonic() - started:.1f} s of {timeout_s:g}; start all {world_size} and see which one ended "
            f"({first_line(error)})",
            peers=error.peers if isinstance(error, CommError) else (),
        ) from error


@contextmanager
def process_groups(
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = 300.0,
    device: str | torch.device = "cpu",
    eager_bytes: int = EAGER_BYTES,
) -> Iterator[Groups]:
    """`start_groups`, and `leave_groups` however the block ends; an error ends them without waiting for the peers."""
    groups = start_groups(ranks_per_node=ranks_per_node, timeout_s=timeout_s, device=device, eager_bytes=eager_bytes)
    try:
        yield groups
    except BaseException:
        leave_groups(groups, wait=False)
        raise
    leave_groups(groups)


def _check(rank: int, world_size: int, timeout_s: float, eager_bytes: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} must lie in [0, {world_size}), the world size; check RANK and WORLD_SIZE")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be positive")
    least = 8 * (2 * world_size + 3)  # the longest counts: those of coherent dispatch
    if eager_bytes and eager_bytes < least:
        raise ValueError(f"eager_bytes ({eager_bytes}) must be 0 or >= {least}, the counts of {world_size} ranks")


def _meet(store: Store, number: int, rank: int, world_size: int, meet_s: float) -> list[cores.Cores]:
    """Each rank says that it is here, before anything that only torch's own time-out could end. Returns the cores that
    each may run on."""
    started = time.monotonic()
    store.set(f"here_{rank}", cores.to_text(cores.allowed_cores()))
    keys = [f"here_{r}" for r in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=meet_s))
    except RuntimeError as error:
        missing = tuple(r for r, key in enumerate(keys) if not store.check([key]))
        raise MissingPeers(
            f"rank {rank} of {world_size}: ranks {list(missing)} of generation {number} did not come in "
            f"{time.monotonic() - started:.1f} s",
            generation=number,
            peers=missing,
        ) from error
    return [cores.from_text(store.get(key).decode()) for key in keys]


class Start(NamedTuple):
    """One generation's start, as all its ranks see it."""

    generation: int
    name: str
    connect_s: float
    timeout_s: float
    store: Store


def _groups_of(nodes: tuple[int, ...], rank: int, start: Start, device: torch.device, eager_bytes: int) -> Groups:
    world = dist.group.WORLD
    assert world is not None
    by_node = ranks_by_node(nodes)
    everyone = tuple(range(len(nodes)))
    sizes = {len(ranks) for ranks in by_node}
    columns = list(zip(*by_node)) if len(sizes) == 1 else [(r,) for r in everyone]
    local, cross = _subgroup(by_node, start.connect_s), _subgroup(columns, start.connect_s)
    side = dist.new_group(list(everyone), timeout=timedelta(seconds=start.connect_s))
    assert isinstance(side, ProcessGroup)  # every rank is a member
    distinct = {id(group): group for group in (world, local, cross, side) if group is not None}.values()
    for group in distinct:
        _set_timeout(timedelta(seconds=start.timeout_s), group)
    groups = Groups(
        rank=rank,
        nodes=nodes,
        generation=start.generation,
        name=start.name,
        device=device,
        timeout_s=start.timeout_s,
        world=world,
        local=local,
        cross=cross,
        side=side,
        store=start.store,
    )
    if not eager_bytes or device.type != "cpu":
        return groups
    lines = _lines_of(groups)
    members = ((world, groups.world_ranks), (local, groups.local_ranks), (cross, groups.cross_ranks))
    of_group = {group: ranks for group, ranks in members if group is not None}
    return replace(
        groups,
        mailboxes={
            group: Mailbox(
                group, eager_bytes, start.timeout_s, lines.get(group), _on_lines(ranks, groups.local_ranks, rank)
            )
            for group, ranks in of_group.items()
        },
    )


def _lines_of(groups: Groups) -> dict[ProcessGroup, Lines]:
    """The lines of this rank to those of its node, of each group that may need them. A collective of the node."""
    local = groups.local
    if local is None:
        return {}
    with in_collective(groups, Task("agreeing on lines"), groups.local_ranks):
        can = torch.tensor([load_helper() is not None])
        dist.all_reduce(can, dist.ReduceOp.MIN, group=local)
    if not can.item():
        return {}
    lines: dict[ProcessGroup, Lines] = {}
    size = len(groups.local_ranks)
    for group in dict.fromkeys((groups.world, local)):
        assert group is not None
        one = map_together(
            groups,
            file_bytes(size),
            lambda path: Lines(path, groups.local_rank, size, groups.timeout_s, groups.freed),
        )
        if one is not None:
            lines[group] = one
    return lines


def _on_lines(members: Sequence[int], local_ranks: Sequence[int], rank: int) -> dict[int, int]:
    """Where members of a group are among the ranks of this node; not `rank` itself."""
    return {i: local_ranks.index(one) for i, one in enumerate(members) if one in local_ranks and one != rank}


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    index = local_rank if str(device) == "cuda" else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"local rank {local_rank} wants GPU {index}, this machine has {count}; start fewer ranks")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _subgroup(rows: Sequence[Sequence[int]], limit_s: float) -> ProcessGroup | None:
    """The group of this rank among `rows`, which partition the world; None for one member."""
    if len(rows) == 1:
        return dist.group.WORLD
    own = None
    for row in rows:  # every rank makes all of them, in one order
        if len(row) > 1:
            group = dist.new_group(list(row), timeout=timedelta(seconds=limit_s))
            own = group if isinstance(group, ProcessGroup) else own  # a number where this rank is no member
    return own
