"""One answer on its way: the request as an engine has it, and its text so far."""

import time
from typing import TYPE_CHECKING, NamedTuple

from moe.engine.text import TextStream
from moe.outputs import FinishReason

if TYPE_CHECKING:
    from moe.engine.requests import Request


class Generation:
    """One sample on its way: as the engine has it, and its text so far. arrival, first_token, finished: of
    `time.monotonic`, since the clock of a machine may be set meanwhile."""

    def __init__(self, request: "Request", text: TextStream, index: int) -> None:
        self.request, self.text, self.index = request, text, index
        self.read = len(request.tokens)  # how many of them are in the text
        self.arrival = time.monotonic()
        self.first_token: float | None = None
        self.finished: float | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.request.tokens[self.request.num_prompt :]


class Event(NamedTuple):
    """What a step did for one sample: new text that is certain, its new tokens, and why it ended if it did."""

    generation: Generation
    text: str
    tokens: list[int]
    finish: FinishReason | None
