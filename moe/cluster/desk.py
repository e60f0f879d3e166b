"""Where requests come in and what is said of them goes out, between a thread that steps and callers of others."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moe.cluster.messages import Dealt, Said
from moe.engine.requests import Request
from moe.outputs import FinishReason
from moe.params import SamplingParams

HOLD_S = 0.2  # how long tokens wait that nobody reads one by one: what is told costs more than a token of a quick step


class TakesRequests(Protocol):
    """What a desk needs of an engine, of this process or of a cluster."""

    def add_request(self, tokens: Sequence[int], params: SamplingParams, num_prompt: int | None = None) -> Request: ...
    def finish(self, request: Request, reason: FinishReason) -> None: ...


class Outbox:
    """What was said, for a caller who asks by long poll: one call brings everything since a number, and the next call
    says what has arrived."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._said: list[Said] = []
        self._first_said = 0

    def tell(self, said: Sequence[Said]) -> None:
        with self._changed:
            self._said += said
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


@dataclass(slots=True, eq=False)
class _Running:
    """A request of a caller, who knows it as `number`, and of which he has `told` tokens."""

    number: int
    request: Request
    told: int


class Desk:
    """tell: called by the thread that steps with what there is to say: of requests that somebody reads token by token
    after the step, of others within `hold_s`. few: requests, with no more of which the caller may send others; the end
    of one is then told after the step."""

    def __init__(self, tell: Callable[[Sequence[Said]], None], hold_s: float = HOLD_S, *, few: int = 0) -> None:
        self._tell, self._hold_s, self._few = tell, hold_s, few
        self._changed = threading.Condition()
        self._dealt: list[Dealt] = []
        self._cancelled: set[int] = set()
        self._running: dict[int, _Running] = {}  # by the engine's id
        self._moved: dict[int, _Running] = {}  # of those, with something that was not told yet
        self._held_since = 0.0

    # For callers.

    def submit(self, requests: Sequence[Dealt]) -> None:
        with self._changed:
            self._dealt += requests
            self._changed.notify_all()

    def cancel(self, ids: Sequence[int]) -> None:
        with self._changed:
            self._cancelled.update(ids)
            self._changed.notify_all()

    # For the thread that steps.

    def hand_over(self, engine: TakesRequests) -> None:
        """Gives the engine what came since the last call, and ends there what nobody waits for any more."""
        with self._changed:
            dealt, self._dealt = self._dealt, []
            cancelled, self._cancelled = self._cancelled, set()
        for one in dealt:
            if one.id in cancelled:
                continue
            try:
                request = engine.add_request(one.tokens, one.params, one.num_prompt)
            except ValueError as error:  # there may be less room here than where it was asked first
                self._tell([Said(one.id, (), "error", error=str(error))])
                continue
            request.is_awaited = one.is_awaited
            self._running[request.id] = _Running(one.id, request, len(one.tokens))
        for id_here, running in list(self._running.items()) if cancelled else ():
            if running.number in cancelled:
                engine.finish(running.request, "abort")
                del self._running[id_here]
                self._moved.pop(id_here, None)

    def stepped(self, requests: Sequence[Request], *, may_hold: bool = True) -> None:
        """Tells the caller what its requests among these have now, and what was held; may_hold: another call follows
        soon."""
        is_awaited, has_ended = not may_hold, False
        for request in requests:
            if (running := self._running.get(request.id)) is not None:
                if not self._moved:
                    self._held_since = time.monotonic()
                self._moved[request.id] = running
                is_awaited = is_awaited or request.is_awaited
                if request.finish_reason is not None:
                    del self._running[request.id]
                    has_ended = True
        is_awaited = is_awaited or (has_ended and len(self._running) <= self._few)
        if self._moved and (is_awaited or time.monotonic() - self._held_since >= self._hold_s):
            self.tell_all()

    def tell_all(self) -> None:
        """Tells what was held."""
        moved, self._moved = self._moved, {}
        said = [Said.of(running.request, running.number, running.told) for running in moved.values()]
        for running in moved.values():
            running.told = len(running.request.tokens)
        if said:
            self._tell(said)

    def clear(self, engine: TakesRequests) -> None:
        """Ends all that runs: its caller is gone."""
        for running in self._running.values():
            engine.finish(running.request, "abort")
        self._running.clear()
        self._moved.clear()

    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Until a request comes or `condition` is true."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._dealt) or condition(), seconds)
