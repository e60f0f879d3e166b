"""When to read ahead, and when to stop for a while: prefetch must pay, in time and in bytes, or it ends itself."""

import time
from statistics import median

import numpy as np

from moe.offload.cache import ExpertCache
from moe.offload.predictor import Floats

# An expert is read ahead if so many tokens are expected to want it. On recorded routing 0.6 makes 75 to 93 % of what is
# read ahead useful; 0.4 finds a third more, of which 58 to 84 % are.
LEAST_EXPECTED = 0.6


class Trial:
    """Forwards with and without prefetch in turn, until the medians say which is faster.

    A forward is measured from its start to the start of the next, in seconds per expert that it asked for; the first of
    every turn is left out, for its cache is the other turn's.
    """

    TURN = 8  # forwards
    SAMPLES = 56  # of each kind

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._num_forwards = 0

    @property
    def is_on(self) -> bool:
        """Whether the forward that begins now is one with prefetch."""
        return self._num_forwards // self.TURN % 2 == 0

    def add(self, seconds_per_expert: float | None) -> bool | None:
        """What the forward that ends now took, None if unknown. Returns whether prefetch pays once that is decided."""
        if self._num_forwards % self.TURN and seconds_per_expert is not None:
            self.seconds[self.is_on].append(seconds_per_expert)
        self._num_forwards += 1
        if min(map(len, self.seconds.values())) < self.SAMPLES:
            return None
        return median(self.seconds[True]) < median(self.seconds[False])


class Prefetcher:
    """Hands what is expected of a layer to the cache, for as long as that pays.

    verdict: one sentence, None before the first. is_stopped: nothing is read ahead. A verdict holds for TERM forwards;
    then routing, batch or disk may be others, and it is tried again. trial=False leaves out the comparison of times
    (for measurements), not that of bytes.
    """

    LEAST_BYTES = 64  # experts' worth of finished speculation before bytes are judged
    TERM = 4096

    def __init__(self, cache: ExpertCache, trial: bool = True) -> None:
        self.cache, self._compares_times = cache, trial
        self.verdict: str | None = None
        self._begin_term()

    def _begin_term(self) -> None:
        self.is_stopped = False
        self._trial = Trial() if self._compares_times else None
        self._began: tuple[float, int] | None = None  # time, experts asked for until then
        self._num_decided = 0  # forwards since the verdict
        self._before = self._speculated()

    def _speculated(self) -> tuple[int, int]:
        """Bytes read ahead that were never used, and that were."""
        stats = self.cache.stats
        return sum(s.wasted_bytes for s in stats), sum(s.useful_bytes + s.late_bytes for s in stats)

    @property
    def is_asking(self) -> bool:
        """Whether anything is read ahead in this forward: nothing where all that is asked for is in slots for good."""
        if self.is_stopped or self.cache.pinned is not None:
            return False
        return self._trial is None or self._trial.is_on

    def begin_forward(self) -> None:
        if self.cache.pinned is not None:
            return
        wasted, hidden = (now - before for now, before in zip(self._speculated(), self._before))
        if not self.is_stopped and wasted > hidden and wasted + hidden >= self.LEAST_BYTES * self.cache.blob_bytes:
            self._stop(f"{wasted} bytes read ahead were never used, {hidden} were")
        elif self._trial is not None:
            self._try(self._trial)
        elif self._num_decided == self.TERM:
            self._begin_term()
        else:
            self._num_decided += 1

    def ask(self, layer: int, expected: Floats) -> None:
        """expected: how many tokens will want each expert of `layer` here, [E]. Returns at once."""
        if not self.is_asking:
            return
        likely = np.flatnonzero(expected >= LEAST_EXPECTED)
        self.cache.prefetch(layer, likely[np.argsort(-expected[likely], kind="stable")])

    def _try(self, trial: Trial) -> None:
        now, asked = time.perf_counter(), sum(s.hits + s.misses for s in self.cache.stats)
        took = None
        if self._began is not None and asked > self._began[1]:
            took = (now - self._began[0]) / (asked - self._began[1])
        self._began = now, asked
        pays = trial.add(took)
        if pays is None:
            return
        on, off = (median(trial.seconds[key]) * 1e6 for key in (True, False))
        figures = f"{on:.0f} µs per expert asked for with it, {off:.0f} without"
        if pays:
            self.verdict = f"on: {figures}"
            self._trial, self._num_decided = None, 0
        else:
            self._stop(figures)

    def _stop(self, reason: str) -> None:
        self.is_stopped = True
        self._trial, self._num_decided = None, 0
        self.verdict = f"stopped, it does not pay: {reason}"
