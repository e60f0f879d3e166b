"""When experts get more bits (offload.bits=upgrade): every so many tokens, by what was asked until then.

    tokens      0 ──────── 1024 ──────── 2048 ──────── 3072
    counts      ····uses·····│·············│
    reads                    └─ planes ────┤           the hottest experts' next bits, for half of what is left
    counts for                             └─ answers

Lossy. Everything here follows from the tokens that were computed: not from time, nor from reads. Over ranks from those
of all, whose number every step's agreement has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moe.comm.control import Control
from moe.config import OffloadConfig
from moe.layer.experts import SlotExperts
from moe.layer.routing import Routing, StepContext
from moe.models.blueprint import Blueprint
from moe.offload.more_bits import MoreBits
from moe.offload.nested import Held, Sensitivity, bytes_of, more_bits, read_sensitivity, sizes_of
from moe.offload.segments import ExpertIndex
from moe.offload.stores import ExpertStore

PERIOD = 1024  # tokens: each expert of 64, of which a token takes 6, is asked 96 times in a layer, on average


class Upgrades:
    """Counts uses as an observer of routing. worth: of each expert's bits, as packed; budget: bytes, of each rank.

    Over ranks all add up what they counted, and make the same plan. An interrupted forward counts as far as it came.
    """

    def __init__(self, more: MoreBits, worth: Sequence[Sequence[Sensitivity]], budget: int) -> None:
        self.more, self._worth, self._budget = more, worth, budget
        self._sizes = sizes_of(more.index)
        self.counts = [np.zeros(site.num_experts, np.int64) for site in more.index.sites]
        self._tokens = 0  # since the last plan, of all ranks
        self._control: Control | None = None

    def begin(self, step: StepContext) -> None:
        if self._control is None:
            self._tokens += step.num_tokens

    def routed(self, x: object, routing: Routing, step: StepContext) -> None:
        counts = self.counts[routing.layer]
        ids = routing.topk_ids.numpy(force=True).reshape(-1) + 1  # -1 is no expert
        counts += np.bincount(ids, minlength=len(counts) + 1)[1:]

    def use_ranks(self, control: Control | None) -> None:
        """From now on `step` is a collective of these ranks, which hold what `more` says; None: alone."""
        self._control = control

    def step(self) -> None:
        """Before anything is computed, over ranks when they have agreed on a step.

        Raises OSError if a plane cannot be read; then the next call tries again.
        """
        if self._tokens >= PERIOD:
            self.more.finish()
            self._tokens = 0
            held = None if self.more.held is None else self.more.held.of_rank
            self.more.start(more_bits(self._uses(), self._worth, self._sizes, self.more.bits, self._budget, held))
        if self._control is not None:
            self._tokens += sum(self._control.agreement.tokens)

    def _uses(self) -> list[list[int]]:
        if self._control is None:
            return [layer.tolist() for layer in self.counts]
        of_all = self._control.sums(torch.from_numpy(np.concatenate(self.counts))).numpy()
        return [layer.tolist() for layer in np.split(of_all, np.cumsum([len(layer) for layer in self.counts])[:-1])]

    @property
    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        return [(self.more.stats, {}), *self.more.served]


def make_upgrades(
    blueprint: Blueprint,
    offload: OffloadConfig,
    experts: SlotExperts,
    open_store: Callable[[ExpertIndex], ExpertStore],
    held: Held | None,
) -> Upgrades | None:
    """What gives these experts more bits from now on; None where bits stay as they are. held: None = all."""
    if offload.bits != "upgrade":
        return None
    checkpoint, budget = blueprint.checkpoint, bytes_of(offload.bits, offload.budget)
    is_checked = offload.check != "never"
    more = MoreBits(checkpoint, blueprint.index, experts.cache, open_store, is_checked=is_checked, held=held)
    upgrades = Upgrades(more, read_sensitivity(checkpoint), budget)
    experts.routing.observers.append(upgrades)
    return upgrades
