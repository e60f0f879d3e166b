"""Where requests come in and what is said of them goes out: between a thread that steps and callers of other threads.

Results go by long poll: one call brings everything since a number, and the next call says what has arrived.
"""

import threading
from collections.abc import Callable, Sequence

from moe.cluster.messages import Dealt, Said


class Desk:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._dealt: list[Dealt] = []
        self._cancelled: set[int] = set()
        self._said: list[Said] = []
        self._first_said = 0

    # For callers.

    def submit(self, requests: Sequence[Dealt]) -> None:
        with self._changed:
            self._dealt += requests
            self._changed.notify_all()

    def cancel(self, ids: Sequence[int]) -> None:
        with self._changed:
            self._cancelled.update(ids)
            self._changed.notify_all()

    def collect(self, after: int, wait_s: float) -> tuple[int, list[Said]]:
        """What was said from number `after` on, and the number of its first; waits for one. What is before is dropped:
        the caller has it."""
        with self._changed:
            self._said = self._said[max(0, after - self._first_said) :]
            self._first_said = max(self._first_said, after)
            if not self._said:
                self._changed.wait_for(lambda: bool(self._said), wait_s)
            return self._first_said, list(self._said)

    # For the thread that steps.

    def take(self) -> tuple[list[Dealt], set[int]]:
        """Requests that came since the last call, and ids of those that nobody waits for any more."""
        with self._changed:
            dealt, self._dealt = self._dealt, []
            cancelled, self._cancelled = self._cancelled, set()
        return [one for one in dealt if one.id not in cancelled], cancelled

    def tell(self, said: Sequence[Said]) -> None:
        if said:
            with self._changed:
                self._said += said
                self._changed.notify_all()

    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Until a request comes or `condition` is true."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._dealt) or condition(), seconds)
