"""Expert parallelism of one rank: who serves each token, and the lock step of all ranks.

Attention is data-parallel: every rank has requests of its own. In each layer tokens go to the ranks that hold their
experts, there to slots (which may be fewer than the rank's experts), and back. Every rank must take part in every
layer of every forward: a rank with less work joins with T = 0.

    logical ──choose_replicas──▶ physical ──dispatcher──▶ rank, local ──phy2log──▶ logical ──cache──▶ slot
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.dispatcher import LocalDispatcher, TokenDispatcher
from moe.comm.errors import Task
from moe.comm.groups import Groups
from moe.comm.wire import Wire, traffic_of
from moe.offload.stores import ExpertStore, RamStore, SharedStore
from moe.placement.plan import Plan
from moe.placement.replicas import choose_replicas

DispatcherName = Literal["all_to_all", "hierarchical"]
Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks said at the start of a step. forwards, tokens: per rank."""

    forwards: tuple[int, ...]
    tokens: tuple[int, ...]
    letters: tuple[int, ...]  # bytes of finished results that each rank has for rank 0
    notices: tuple[int, ...]  # bytes that each rank has for all

    @property
    def is_over(self) -> bool:
        """No rank has anything to compute or to hand over."""
        return not any(self.forwards) and not any(self.letters) and not any(self.notices)


class LayerLaunch(Protocol):
    """All ranks' experts of a layer in one launch; every rank calls it, or none (moe/layer/single_launch.py)."""

    def takes(self, layer: int, rows: int) -> bool:
        """Whether it serves a step in which no rank has more than `rows` rows; the same on all ranks."""

    def run(self, layer: int, x: Tensor, physical_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype; T may be 0."""


class ExpertParallel:
    """This rank's part of a plan. Raises ValueError for a plan of another model or number of ranks."""

    def __init__(
        self, groups: Groups, plan: Plan, dispatcher: DispatcherName = "all_to_all", broadcast_tokens: int = 0
    ) -> None:
        if plan.num_ranks != groups.world_size:
            raise ValueError(
                f"the plan is for {plan.num_ranks} ranks, this run has {groups.world_size}; solve it again for them"
            )
        self.groups = groups
        # Counts that travel with the rows cost no round that sending every row to every rank could save.
        self.broadcast_tokens = broadcast_tokens = 0 if groups.mailboxes else broadcast_tokens
        rank_of = torch.from_numpy(plan.rank_of_physical())
        self.dispatcher: TokenDispatcher
        if groups.world_size == 1:
            self.dispatcher = LocalDispatcher(groups, rank_of)
        elif dispatcher == "hierarchical":
            self.dispatcher = HierarchicalDispatcher(groups, rank_of, broadcast_tokens=broadcast_tokens)
        else:
            self.dispatcher = AllToAllDispatcher(groups, rank_of, broadcast_tokens=broadcast_tokens)
        self._wire = Wire(groups, groups.world, groups.world_ranks, traffic_of(groups))
        self.plan = plan
        self.launch: LayerLaunch | None = None
        self.use(plan)
        self.agreement = Agreement((1,), (0,), (0,), (0,))
        self._coming: deque[Plan] = deque()
        self.outbox: list[bytes] = []  # results for rank 0, handed over with the next step
        self.inbox: list[bytes] = []  # on rank 0: what came
        self.notices: list[bytes] = []  # lines for all ranks, this one included, handed over with the next step
        self.heard: list[list[bytes]] = [[] for _ in range(groups.world_size)]  # lines that came, by rank

    def use(self, plan: Plan) -> None:
        """From the next step on, experts are where `plan` says. All ranks must change in the same step.

        Same model, same number of ranks, same number of physical experts per rank. Nothing is moved here: an expert
        that is new on a rank is read from its store when a token first needs it. Costs a table per layer.
        """
        if (plan.num_ranks, plan.num_physical, plan.num_layers, plan.num_experts) != (
            self.plan.num_ranks,
            self.plan.num_physical,
            self.plan.num_layers,
            self.plan.num_experts,
        ):
            raise ValueError(
                f"the new plan has {plan.num_layers} layers, {plan.num_experts} experts and {plan.num_physical} "
                f"physical experts on {plan.num_ranks} ranks, the run has {self.plan.num_layers}, "
                f"{self.plan.num_experts}, {self.plan.num_physical} and {self.plan.num_ranks}"
            )
        self.plan, self.launch = plan, None  # a launch needs all experts resident: true of the plan of the start alone
        mine = slice(self.groups.rank * plan.physical_per_rank, (self.groups.rank + 1) * plan.physical_per_rank)
        none = np.full((plan.num_layers, 1), -1, np.int64)
        self._logical_of = np.concatenate([plan.phy2log[:, mine], none], axis=1).astype(np.int64)  # id -1 reads -1
        self._has_replicas = bool((plan.replicas > 1).any())

    def migrate(self, states: Iterable[Plan]) -> None:
        """Takes on one plan after another, one a step (`Migration.states`). All ranks must call it between the same
        steps with the same plans; requests go on running."""
        self._coming.extend(states)

    def hosted(self) -> list[list[int]]:
        """The logical experts of this rank, by layer."""
        return [[int(e) for e in row[:-1] if e >= 0] for row in self._logical_of]

    def share_elsewhere(self) -> float:
        """The share of experts that a rank does not hold, over all ranks and layers."""
        return 1.0 - float(self.plan.hosted.mean()) if self.plan.num_ranks > 1 else 0.0

    def share_here(self, layer: int) -> npt.NDArray[np.float64]:
        """Of each rank's tokens for each expert, the share that comes to this rank: [G, E].

        All of its own, if it holds the expert; of ranks that do not, one part of as many as there are copies.
        """
        hosted = self.plan.hosted[layer].T  # [G, E]
        here = hosted[self.groups.rank]
        share = np.where(hosted, 0.0, here / np.maximum(1, hosted.sum(axis=0)))
        share[self.groups.rank] = here
        return share

    def physical(self, layer: int, topk_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The physical expert that serves each pair: [T, K], -1 kept. Local copies first, then the least loaded."""
        plan = self.plan
        if self._has_replicas:
            chosen = choose_replicas(topk_ids, self.groups.rank, plan.log2phy[layer], plan.physical_per_rank)
            return np.asarray(chosen, np.int64)
        return np.where(topk_ids >= 0, plan.log2phy[layer][topk_ids, 0], -1).astype(np.int64)

    def compute(
        self,
        layer: int,
        x: Tensor,
        topk_ids: npt.NDArray[np.int64],
        topk_weights: Tensor,
        run: Callable[[Tensor, npt.NDArray[np.int64]], Tensor],
        rows_per_token: int = 1,
    ) -> Tensor:
        """One layer's experts for this rank's rows. run(rows [R, H], logical ids [R, K]) -> y [R, K, H].

        rows_per_token: rows that a token of the step has here, 1 unless each of its pairs is a row of its own.
        """
        physical = torch.from_numpy(self.physical(layer, topk_ids)).to(x.device)
        told = self.agreement
        known = tuple(t * rows_per_token for t in told.tokens) if max(told.forwards) <= 1 else None
        if self.launch is not None and known is not None and self.launch.takes(layer, max(known)):
            return self.launch.run(layer, x, physical, topk_weights)
        sent = self.dispatcher.dispatch(
            x.contiguous(), physical, topk_weights.float(), layer=layer, tokens_per_rank=known
        )
        return self.dispatcher.combine(run(sent.rows, self.logical_here(layer, sent.local_ids)), sent.handle)

    def logical_here(self, layer: int, local_ids: Tensor) -> npt.NDArray[np.int64]:
        """Logical ids of this rank's local expert ids, -1 kept."""
        here: npt.NDArray[np.int64] = self._logical_of[layer][local_ids.numpy(force=True)]  # host sync
        return here

    def smallest(self, value: int) -> int:
        """The least of all ranks' values. A collective."""
        return min(int(v) for v in self._gather(torch.tensor([value]), "agreeing on a number"))

    def agree(self, forwards: int, tokens: int) -> Agreement:
        """Tells all ranks what this one will do in this step, and hands finished results to rank 0. A collective."""
        letter, notice = b"".join(self.outbox), b"".join(self.notices)
        own = torch.tensor([forwards, tokens, len(letter), len(notice)], dtype=torch.int64)
        gathered = self._gather(own, "the agreement on a step")
        if self._coming:
            self.use(self._coming.popleft())
        columns = list(zip(*(row.tolist() for row in gathered)))
        self.agreement = Agreement(*columns)
        for lines in self._exchange_lines(letter, self.agreement.letters):
            self.inbox += lines if self.groups.rank == 0 else []
        for heard, lines in zip(self.heard, self._exchange_lines(notice, self.agreement.notices)):
            heard += lines
        self.outbox.clear()
        self.notices.clear()
        return self.agreement

    def share_host_copy(self, source: ExpertStore) -> ExpertStore:
        """All experts of `source` in host memory once for this node; each rank reads its part. A collective."""
        groups = self.groups
        if groups.local is None:
            return RamStore.read_from(source)
        store = self.open_shared(lambda path: SharedStore(source, path))
        store.fill(source, groups.local_rank, len(groups.local_ranks))
        dist.barrier(group=groups.local)  # all parts are there
        return store

    def open_shared(self, open_file: Callable[[str], Opened]) -> Opened:
        """`open_file` of the name of a new file in memory, one for all ranks of this node. A collective.

        The name is gone when it returns; the memory goes with the last rank that has it open.
        """
        groups = self.groups
        name = bytes(64)
        if groups.local_rank == 0:
            file, path = tempfile.mkstemp(prefix="moe-experts-", dir="/dev/shm")
            os.close(file)
            name = path.encode().ljust(64, b"\0")
        shared = torch.frombuffer(bytearray(name), dtype=torch.uint8).to(groups.device)
        dist.broadcast(shared, groups.local_ranks[0], group=groups.local)
        path = bytes(shared.cpu().numpy()).rstrip(b"\0").decode()
        try:
            opened = open_file(path)
            dist.barrier(group=groups.local)  # all have it open
        finally:
            if groups.local_rank == 0:
                os.unlink(path)
        return opened

    def _exchange_lines(self, own: bytes, sizes: Sequence[int]) -> list[list[bytes]]:
        """The lines of every rank; nothing is sent if there are none."""
        if not any(sizes):
            return []
        padded = torch.frombuffer(bytearray(own.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        gathered = self._gather(padded, "handing over results and requests")
        return [bytes(data[:size].numpy()).splitlines(keepends=True) for data, size in zip(gathered, sizes)]

    def _gather(self, own: Tensor, what: str) -> list[Tensor]:
        if self.groups.world is None:
            return [own]
        ones = [1] * self._wire.size  # as an all-to-all: gloo's all-gather is a ring of G - 1 steps
        everywhere = own.to(self.groups.device).repeat(self._wire.size, 1)
        return list(self._wire.exchange(everywhere, ones, ones, Task(what)).cpu())


def broadcast_lines(groups: Groups, lines: Sequence[int]) -> set[int]:
    """Rank 0's numbers on every rank. A collective."""
    if groups.world is None:
        return set(lines)
    count = torch.tensor([len(lines)], device=groups.device)
    dist.broadcast(count, 0, group=groups.world)
    numbers = torch.zeros(int(count), dtype=torch.int64, device=groups.device)
    if groups.rank == 0:
        numbers.copy_(torch.tensor(list(lines), dtype=torch.int64))
    dist.broadcast(numbers, 0, group=groups.world)
    return set(numbers.tolist())
