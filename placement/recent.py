"""The tokens routed of late, counted as they come: how uneven, and how many of the newest are of one traffic."""

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from moe.placement.plan import Plan
from moe.placement.solve.program import Floats, Ints
from moe.placement.turn import Serving, Window

PARTS = 16  # of a window, between which traffic may be seen to change


class Part(NamedTuple):
    """Some tokens, one after another: how often each expert was chosen, int64 [L, E], and what each rank then serves,
    int64 [L, G]."""

    window: Window
    counts: Ints
    busy: Ints


class Recent:
    """The latest `size` tokens, counted once, as they come: in parts of a sixteenth of them, but not below what comes
    between two looks.

    Whole parts are dropped, so that up to one more than `size` is held. Costs a look only what is new since the last.
    """

    def __init__(self, size: int, plan: Plan, *, is_exact: bool) -> None:
        self.size, self._serving = size, Serving(plan, is_exact=is_exact)
        self.num_tokens = 0
        self._parts: deque[Part] = deque()
        self._pending: deque[Window] = deque()

    def add(self, window: Window) -> None:
        window = window.part(slice(max(0, len(window.ids) - self.size), None))
        if len(window.ids):
            self._pending.append(window)
            self.num_tokens += len(window.ids)
            self._drop_oldest()

    def parts(self) -> list[Part]:
        """Oldest first, none is empty."""
        if self._pending:
            new = Window.joined(self._pending)
            self._pending.clear()
            number = max(1, len(new.ids) // max(1, self.size // PARTS))
            self._parts += self._counted(new, [len(new.ids) * n // number for n in range(1, number)])
        self._drop_oldest()
        return list(self._parts)

    def use(self, plan: Plan) -> None:
        """Who serves what from now on, and would have."""
        self._serving = Serving(plan, is_exact=self._serving.is_exact)
        if self._parts:
            ends = np.cumsum([len(part.window.ids) for part in self._parts])
            self._parts = deque(self._counted(Window.joined([part.window for part in self._parts]), ends[:-1].tolist()))

    def _drop_oldest(self) -> None:
        while self.num_tokens > self.size:
            oldest = self._parts[0].window if self._parts else self._pending[0]
            if self.num_tokens - len(oldest.ids) < self.size:
                return
            self.num_tokens -= len(oldest.ids)
            (self._parts or self._pending).popleft()

    def _counted(self, window: Window, cuts: list[int]) -> list[Part]:
        """Parts that end at the cuts and at the end; dealt as one batch."""
        parts = [window.part(slice(a, b)) for a, b in pairwise([0, *cuts, len(window.ids)])]
        counts = np.stack([part.counts(self._serving.plan.num_experts) for part in parts])
        return [Part(*one) for one in zip(parts, counts, self._serving.busy(window, cuts, counts), strict=True)]


def in_time(told: Sequence[Window]) -> Window:
    """What ranks told at once, each its own tokens of the same time, oldest first, as one window in that order."""
    when = np.concatenate([(np.arange(len(one.ids)) + 0.5) / len(one.ids) for one in told])
    joined, order = Window.joined(told), np.argsort(when, kind="stable")
    return Window(joined.ids[order], joined.home[order])


def newest_alike(counts: Ints, num_tokens: int) -> int:
    """How many of the newest parts are of one traffic: all since the experts chosen changed most, if they changed.

    counts: int64 [P, L, E], oldest first. The split into two multinomials per layer with the greatest likelihood, where
    it beats one by Schwarz's criterion (L * (E - 1) more parameters, half a logarithm of the tokens each). Costs
    O(P L E).
    """
    parts, num_layers, num_experts = len(counts), *counts.shape[1:]
    if parts < 2:
        return parts
    older = counts.cumsum(axis=0)
    pairs = older.sum(axis=2)
    entropy = _x_log_x(int(pairs.max(initial=0)))

    def likelihood(of: Ints, total: Ints) -> Floats:
        """Of multinomials [..., L, E] at their own frequencies."""
        return np.asarray(entropy[of].sum(axis=(-2, -1)) - entropy[total].sum(axis=-1))

    gains = likelihood(older[:-1], pairs[:-1]) + likelihood(older[-1] - older[:-1], pairs[-1] - pairs[:-1])
    gains -= likelihood(older[-1], pairs[-1])
    penalty = num_layers * (num_experts - 1) / 2 * math.log(max(2, num_tokens))
    best = int(gains.argmax())
    return parts - 1 - best if gains[best] > penalty else parts


def since_change(parts: list[Part], alike: int) -> Window:
    """The tokens of the newest `alike` parts, from the very token on at which traffic changed before them, if it did.

    Parts are cut where ranks told, so that the change lies in the part before the cut or in the one after it: where the
    tokens of both are likeliest, the earlier by the shares of the parts before and the later by those of the parts
    after (with one more use of each expert). Of fewer than two parts after it nothing is known.
    """
    newer, older = parts[-alike:], parts[:-alike]
    joined = Window.joined([part.window for part in newer])
    if not older or alike < 2:
        return joined
    counts = [sum((part.counts for part in some), np.ones_like(parts[0].counts)) for some in (older[:-1], newer[1:])]
    before, after = (np.log(of / of.sum(axis=1, keepdims=True)) for of in counts)
    last = older[-1].window
    near = Window.joined([last, newer[0].window])
    gain = np.pad(after - before, ((0, 0), (0, 1)))  # [L, E + 1]; the last, -1: no expert
    gains = gain[np.arange(near.ids.shape[1])[:, None], near.ids].sum(axis=(1, 2))  # [N]
    first = int(np.append(gains[::-1].cumsum()[::-1], 0.0).argmax())
    later = Window.joined([part.window for part in newer[1:]])
    return Window.joined([near.part(slice(first, None)), later])


def _x_log_x(most: int) -> Floats:
    """Of all integers up to `most`."""
    x = np.arange(most + 1, dtype=np.float64)
    return np.asarray(x * np.log(np.maximum(x, 1)))


def imbalance_of(parts: list[Part]) -> float:
    """As `Window.imbalance` of their tokens."""
    busy = np.sum([part.busy for part in parts], axis=0)
    return float((busy.max(axis=1) / np.maximum(busy.mean(axis=1), 1e-12)).mean())


def imbalance_of_chance(num_pairs: int, num_ranks: int) -> float:
    """What the busiest of G ranks has over the mean where pairs go to ranks by even chance, in expectation, at most.

    The maximum of G sums of about N / G draws: 1 + sqrt(2 ln G * G / N), the bound for sub-Gaussian variables.
    """
    return 1 + math.sqrt(2 * math.log(max(2, num_ranks)) * num_ranks / max(1, num_pairs))
