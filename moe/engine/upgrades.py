"""When experts get more bits (offload.bits=upgrade): every so many tokens, by what was asked until then.

    tokens      0 ──────── 1024 ──────── 2048 ──────── 3072
    counts      ····uses·····│·············│
    reads                    └─ planes ────┤           the hottest experts' next bits, for half of what is left
    counts for                             └─ answers

Lossy. Everything here follows from the tokens that were computed: not from time, from reads, nor from who else runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe.config import OffloadConfig
from moe.layer.experts import SlotExperts
from moe.layer.routing import Routing, StepContext
from moe.models.blueprint import Blueprint
from moe.offload.more_bits import MoreBits
from moe.offload.nested import Sensitivity, bytes_of, more_bits, read_sensitivity, sizes_of
from moe.offload.segments import ExpertIndex
from moe.offload.stores import ExpertStore

PERIOD = 1024  # tokens: each expert of 64, of which a token takes 6, is asked 96 times in a layer, on average


class Upgrades:
    """Counts uses as an observer of routing. worth: of each expert's bits, as packed; budget: bytes of all experts.

    An interrupted forward counts as far as it came.
    """

    def __init__(self, more: MoreBits, worth: Sequence[Sequence[Sensitivity]], budget: int) -> None:
        self.more, self._worth, self._budget = more, worth, budget
        self._sizes = sizes_of(more.index)
        self.counts = [np.zeros(site.num_experts, np.int64) for site in more.index.sites]
        self._tokens = 0  # since the last plan

    def begin(self, step: StepContext) -> None:
        self._tokens += step.num_tokens

    def routed(self, x: object, routing: Routing, step: StepContext) -> None:
        counts = self.counts[routing.layer]
        ids = routing.topk_ids.numpy(force=True).reshape(-1) + 1  # -1 is no expert
        counts += np.bincount(ids, minlength=len(counts) + 1)[1:]

    def step(self) -> None:
        """Before anything is computed. Raises OSError if a plane cannot be read; then the next call tries again."""
        if self._tokens < PERIOD:
            return
        self.more.finish()
        self._tokens = 0
        counts = [layer.tolist() for layer in self.counts]
        self.more.start(more_bits(counts, self._worth, self._sizes, self.more.bits, self._budget))

    @property
    def metric_sources(self) -> list[tuple[Any, dict[str, str]]]:
        return [(self.more.stats, {}), *self.more.served]


def make_upgrades(
    blueprint: Blueprint, offload: OffloadConfig, experts: SlotExperts, open_store: Callable[[ExpertIndex], ExpertStore]
) -> Upgrades | None:
    """What gives these experts more bits from now on; None where bits stay as they are."""
    if offload.bits != "upgrade":
        return None
    checkpoint, budget = blueprint.checkpoint, bytes_of(offload.bits, offload.budget)
    is_checked = offload.check != "never"
    more = MoreBits(checkpoint, blueprint.index, experts.cache, open_store, is_checked=is_checked)
    upgrades = Upgrades(more, read_sensitivity(checkpoint), budget)
    experts.routing.observers.append(upgrades)
    return upgrades
