"""Where requests come in and what is said of them goes out, between a thread that steps and callers of others."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from moe.cluster.messages import Dealt, Said
from moe.engine.requests import Request
from moe.outputs import FinishReason
from moe.params import SamplingParams


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


class Desk:
    """tell: called by the thread that steps with what there is to say."""

    def __init__(self, tell: Callable[[Sequence[Said]], None]) -> None:
        self._tell = tell
        self._changed = threading.Condition()
        self._dealt: list[Dealt] = []
        self._cancelled: set[int] = set()
        self._running: dict[int, tuple[int, Request]] = {}  # by the engine's id: the caller's, and the request

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
                self._tell([Said(one.id, None, "error", error=str(error))])
                continue
            self._running[request.id] = one.id, request
        for number, (id_there, request) in list(self._running.items()):
            if id_there in cancelled:
                engine.finish(request, "abort")
                del self._running[number]

    def stepped(self, requests: Sequence[Request]) -> None:
        """Tells the caller what its requests among these have now."""
        said = []
        for request in requests:
            if request.id in self._running:
                said.append(Said.of(request, self._running[request.id][0]))
                if request.finish_reason is not None:
                    del self._running[request.id]
        if said:
            self._tell(said)

    def clear(self, engine: TakesRequests) -> None:
        """Ends all that runs: its caller is gone."""
        for _, request in self._running.values():
            engine.finish(request, "abort")
        self._running.clear()

    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Until a request comes or `condition` is true."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._dealt) or condition(), seconds)
