"""Expert parallelism of one rank: who serves each token, by a plan.

Attention is data-parallel: every rank has requests of its own. In each layer tokens go to the ranks that hold their
experts, there to slots (which may be fewer than the rank's experts), and back. Every rank must take part in every
layer of every forward: a rank with less work joins with T = 0.

    logical ──log2phy──▶ physical ──dispatcher──▶ rank, local ──phy2log──▶ logical ──cache──▶ slot

The plan's tables are tensors on the device, each read by one index; which copy of an expert serves is chosen there too.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe.comm.all_to_all import AllToAllDispatcher, HierarchicalDispatcher
from moe.comm.dispatcher import LocalDispatcher, TokenDispatcher
from moe.comm.groups import Groups
from moe.layer.home_first import LATER_BYTES
from moe.layer.replica_choice import DeviceTable, choose_on_device
from moe.placement.plan import Plan
from moe.placement.replicas import ServingTable, choose_replicas
from moe.placement.wire_format import WireFormat


class LayerLaunch(Protocol):
    """All ranks' experts of a layer in one launch; every rank calls it, or none (moe/layer/single_launch.py)."""

    def takes(self, layer: int, rows: int) -> bool:
        """Whether it serves a step in which no rank has more than `rows` rows; the same on all ranks."""

    def run(self, layer: int, x: Tensor, physical_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Σ_k w·y [T, H] in x's dtype; T may be 0."""


class ExpertParallel:
    """This rank's part of a plan, in one generation of ranks. Raises ValueError for a plan of another number of ranks.

    wire: of tokens that go home again; hierarchical is all_to_all where nodes have unequal numbers of ranks.
    """

    def __init__(self, groups: Groups, plan: Plan, wire: WireFormat | None = None, broadcast_tokens: int = 0) -> None:
        if plan.num_ranks != groups.world_size:
            raise ValueError(
                f"the plan is for {plan.num_ranks} ranks, this run has {groups.world_size}; solve it again for them"
            )
        self.groups = groups
        # Counts that travel with the rows cost no round that sending every row to every rank could save.
        self.broadcast_tokens = broadcast_tokens = 0 if groups.mailboxes else broadcast_tokens
        wire = wire or WireFormat()
        self.combine = wire.combine
        rank_of = torch.from_numpy(plan.rank_of_physical())
        self.dispatcher: TokenDispatcher
        if groups.world_size == 1:
            self.dispatcher = LocalDispatcher(groups, rank_of)
        else:
            in_two = wire.dispatcher == "hierarchical" and groups.is_even
            kind = HierarchicalDispatcher if in_two else AllToAllDispatcher
            self.dispatcher = kind(groups, rank_of, combine=wire.combine, broadcast_tokens=broadcast_tokens)
        self.later_bytes = LATER_BYTES if groups.num_nodes > 1 else math.inf  # see moe/layer/home_first.py
        self.plan = plan
        self.launch: LayerLaunch | None = None
        self.tokens: tuple[int, ...] | None = None  # of every rank in this forward, where all know them
        self.use(plan)
        self._coming: deque[Plan] = deque()

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
        self.hosted = experts_of_rank(plan, self.groups.rank)  # the logical experts of this rank, by layer
        self._logical_of = self._table(plan.phy2log[:, mine])
        self._physical_of = self._table(plan.log2phy[:, :, 0])
        copies = plan.replicas.max(axis=1)
        served = [ServingTable.of(plan, layer) if most > 1 else None for layer, most in enumerate(copies)]
        self._served: list[ServingTable | DeviceTable | None] = [*served]
        if self.groups.device.type != "cpu":
            self._served = [None if one is None else DeviceTable.of(one, self.groups.device) for one in served]

    def _table(self, of_layer: npt.NDArray[np.integer]) -> tuple[Tensor, ...]:
        """int64 [N + 1] of each layer on the device, from [L, N]; id -1 reads the last, which is -1."""
        none = np.full((len(of_layer), 1), -1, np.int64)
        table = np.concatenate([of_layer, none], axis=1).astype(np.int64)
        return torch.from_numpy(table).to(self.groups.device).unbind()

    def migrate(self, states: Iterable[Plan]) -> None:
        """Takes on one plan after another, one a step (`Migration.states`). All ranks must call it between the same
        steps with the same plans; requests go on running."""
        self._coming.extend(states)

    def begin_step(self, tokens: tuple[int, ...] | None) -> bool:
        """Takes on the next plan of a migration; whether there was one. tokens: of every rank, if all run one forward;
        else None."""
        self.tokens = tokens
        if not self._coming:
            return False
        self.use(self._coming.popleft())
        return True

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

    def physical(self, layer: int, topk_ids: Tensor) -> Tensor:
        """int64 [T, K]: the physical expert that serves each pair of int64 topk_ids, -1 kept.

        On the device: by one index, or in a layer with copies of an expert by the serving rule (placement/replicas.py).
        """
        table, home_first = self._served[layer], self.combine == "exact"
        if table is None:
            return self._physical_of[layer].take(topk_ids)
        if isinstance(table, DeviceTable):
            return choose_on_device(topk_ids, self.groups.rank, table, home_first=home_first)
        return torch.from_numpy(choose_replicas(topk_ids.numpy(), self.groups.rank, table, home_first=home_first))

    def compute(
        self,
        layer: int,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        run: Callable[[int, Tensor, Tensor, int, float], Generator[Tensor, None, None]],
        rows_per_token: int = 1,
    ) -> Tensor:
        """One layer's experts for this rank's rows. run: `SlotExperts.home_first`.

        topk_ids: int64 [T, K]. rows_per_token: rows that a token of the step has here, 1 unless each of its pairs is a
        row of its own.
        """
        physical = self.physical(layer, topk_ids)
        known = None if self.tokens is None else tuple(t * rows_per_token for t in self.tokens)
        if self.launch is not None and known is not None and self.launch.takes(layer, max(known)):
            return self.launch.run(layer, x, physical, topk_weights)
        sent = self.dispatcher.dispatch(
            x.contiguous(), physical, topk_weights.float(), layer=layer, tokens_per_rank=known
        )
        ids = self.logical_here(layer, sent.local_ids)
        with closing(run(layer, sent.rows, ids, sent.num_first, self.later_bytes)) as turns:
            return self.dispatcher.combine(next(turns), sent.handle, lambda: next(turns, None))

    def logical_here(self, layer: int, local_ids: Tensor) -> Tensor:
        """int64: logical ids of this rank's local expert ids, int64 of any shape, -1 kept."""
        return self._logical_of[layer].take(local_ids)


def experts_of_rank(plan: Plan, rank: int) -> list[list[int]]:
    """The logical experts that a rank holds, by layer."""
    return [[int(e) for e in layer[:, rank].nonzero()[0]] for layer in plan.hosted]
