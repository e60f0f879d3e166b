"""What is worth reading ahead, and when to stop for a while: it must pay in time, and may waste so many bytes."""

import math
import time
from statistics import median

import numpy as np
import numpy.typing as npt

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


class WasteBudget:
    """How sure a guess must be, so that what is read ahead in vain stays below `LIMIT` of all bytes read.

    share: what was wasted, and what was read ahead and has not served yet, of all that was read, where a byte counts
    half when `HALF_LIFE` experts' worth more were read; at the start FEWEST count as read. least: the expected tokens
    from which an expert is read ahead: LEAST_EXPECTED up to a share of EASY, from there on more and more; nothing is
    enough from LIMIT on, until the share is EASY again. Reads on demand alone bring it there.
    """

    LIMIT = 0.15
    EASY = 0.14
    HALF_LIFE = 1024
    FEWEST = 64

    def __init__(self, blob_bytes: int) -> None:
        self._blob_bytes = blob_bytes
        self._last = (0.0, 0.0)
        self._read = self._wasted = self.share = 0.0
        self.least = LEAST_EXPECTED

    def judge(self, read: float, wasted: float, unused: float) -> None:
        """Bytes read and wasted from the start on, and those read ahead that are still unused."""
        now = read, wasted
        if read < self._last[0]:  # counted anew
            self._last = (0.0, 0.0)
        grown, wasted_since = (a - b for a, b in zip(now, self._last))
        self._last = now
        fading = 0.5 ** (grown / (self.HALF_LIFE * self._blob_bytes))
        self._read, self._wasted = self._read * fading + grown, self._wasted * fading + wasted_since
        self.share = (self._wasted + unused) / max(self._read, self.FEWEST * self._blob_bytes)
        used_up = (self.share - self.EASY) / (self.LIMIT - self.EASY)
        if used_up <= 0:
            self.least = LEAST_EXPECTED
        elif used_up >= 1 or math.isinf(self.least):
            self.least = math.inf
        else:
            self.least = LEAST_EXPECTED - math.log(1 - used_up)


def likely(expected: Floats, least: float = LEAST_EXPECTED) -> npt.NDArray[np.intp]:
    """What is worth reading ahead of a layer, best first. expected: tokens that will want each of its experts, [E]."""
    found = np.flatnonzero(expected >= least)
    return found if len(found) < 2 else found[np.argsort(-expected[found], kind="stable")]


class Prefetcher:
    """Hands what is expected of a layer to the cache, for as long as that pays.

    budget: of bytes, which raises and lowers what must be expected of an expert. verdict: of times, one sentence, None
    before the first. is_stopped: it does not pay, nothing is read ahead. A verdict holds for TERM forwards; then
    routing, batch or disk may be others, and it is tried again. trial=False leaves out the comparison of times (for
    measurements).
    """

    TERM = 4096

    def __init__(self, cache: ExpertCache, trial: bool = True) -> None:
        self.cache, self._compares_times = cache, trial
        self.budget = WasteBudget(cache.blob_bytes)
        self.verdict: str | None = None
        self._begin_term()

    def _begin_term(self) -> None:
        self.is_stopped = False
        self._trial = Trial() if self._compares_times else None
        self._began: tuple[float, int] | None = None  # time, experts asked for until then
        self._num_decided = 0  # forwards since the verdict

    @property
    def is_asking(self) -> bool:
        """Whether anything may be read ahead in this forward: nothing where what is asked for is in slots for good."""
        if self.is_stopped or self.cache.pinned is not None or math.isinf(self.budget.least):
            return False
        return self._trial is None or self._trial.is_on

    def begin_forward(self) -> None:
        if self.cache.pinned is not None:
            return
        stats = self.cache.stats
        read, wasted = sum(s.bytes_read for s in stats), sum(s.wasted_bytes for s in stats)
        self.budget.judge(read, wasted, sum(self.cache.ahead.unused.values()))
        if self._trial is not None:
            self._try(self._trial)
        elif self._num_decided == self.TERM:
            self._begin_term()
        else:
            self._num_decided += 1

    def ask(self, layer: int, expected: Floats) -> None:
        """expected: how many tokens will want each expert of `layer` here, [E]. Returns at once."""
        if not self.is_asking:
            return
        self.cache.prefetch(layer, likely(expected, self.budget.least))

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
        self.is_stopped = not pays
        self._trial, self._num_decided = None, 0
        self.verdict = f"on: {figures}" if pays else f"stopped, it does not pay: {figures}"
