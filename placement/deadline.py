"""One end of time for all parts of a search, by one clock, which tests replace by a counter."""

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from math import inf
from types import FrameType

ASK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


class _Told:
    """What the parts of one deadline share: whether one of them ended a search before its rounds did."""

    has_cut = False


class Deadline:
    """So many seconds from now on. clock: seconds, whatever their origin."""

    def __init__(self, seconds: float = inf, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.began = clock, clock()
        self.until = self.began + seconds
        self._told = _Told()

    @property
    def has_cut(self) -> bool:
        """Whether something was left out for it, in a part or in the whole; then another run may find another plan."""
        return self._told.has_cut

    def cut(self) -> None:
        """Say that something is left out for it."""
        self._told.has_cut = True

    @staticmethod
    def of(limit: "float | Deadline") -> "Deadline":
        """Itself, or so many seconds from now on."""
        return limit if isinstance(limit, Deadline) else Deadline(limit)

    def left(self) -> float:
        """Seconds, below 0 where it is over."""
        return self.until - self.clock()

    def is_over(self) -> bool:
        over = self.until < inf and self.left() <= 0
        if over:
            self.cut()
        return over

    def spent(self) -> float:
        """Seconds since it was made."""
        return self.clock() - self.began

    def share(self) -> float:
        """Of the whole that is spent."""
        whole = self.until - self.began
        return 0.0 if whole == inf else self.spent() / max(whole, 1e-9)

    def at(self, share: float) -> "Deadline":
        """One that is over when this share of the whole has gone."""
        return self._from(self.began, self.began + (self.until - self.began) * share if self.until < inf else inf)

    def part(self, share: float) -> "Deadline":
        """One that is over when this share of what is left has gone."""
        now = self.clock()
        return self._from(now, now + max(self.until - now, 0.0) * share if self.until < inf else inf)

    def _from(self, began: float, until: float) -> "Deadline":
        out = copy(self)
        out.began, out.until = began, until
        return out


NEVER = Deadline()


class Pace:
    """Asked by compiled code every few iterations: how many it may do in all.

    All that were planned, or as many as the pace so far leaves time for, so that a search which cools ends cold.
    """

    def __init__(self, deadline: Deadline, planned: int) -> None:
        self.planned = planned
        self._deadline, self._began = deadline, deadline.left()
        self._call, self._is_interrupted = ASK(self._allowed), False

    @property
    def address(self) -> int:
        """For compiled code; 0 where time has no end. Valid as long as this object lives."""
        return 0 if self._deadline.until == inf else ctypes.cast(self._call, ctypes.c_void_p).value or 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Inside, compiled code may ask. Ctrl-C ends its search, and is what it always is when the block ends: an
        exception where compiled code asks would be printed and lost, and the answer be any number."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self._is_interrupted:
            signal.raise_signal(signal.SIGINT)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True

    def _allowed(self, done: int) -> int:
        if self._is_interrupted:
            return done
        left = self._deadline.left()
        spent = self._began - left
        allowed = self.planned
        if left <= 0:
            allowed = done
        elif done and spent > 0:
            allowed = min(self.planned, done + int(done * left / spent))
        if allowed < self.planned:
            self._deadline.cut()
        return allowed
