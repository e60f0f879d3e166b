"""The requests of all ranks on every rank: what one rank adds or ends, all do before the next step.

A coherent run needs it: any rank may compute the next token of any request.
"""

import json
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from moe.comm.control import Control
from moe.engine.grammar import Grammars
from moe.engine.requests import Request
from moe.engine.scheduler import Scheduler
from moe.outputs import FinishReason
from moe.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Added:
    """A rank has a request, new or with part of its answer. tokens: [0, num_prompt) are the prompt."""

    id: int
    tokens: list[int]
    num_prompt: int
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """A rank ends one of its requests."""

    id: int
    reason: FinishReason


class RequestMirror:
    """One rank's copy of all ranks' requests, kept equal by the lines of `control`."""

    def __init__(self, control: Control, grammars: Grammars) -> None:
        self.control, self.grammars = control, grammars
        self._known: dict[tuple[int, int], Request] = {}  # by owner and its id there

    def add(self, request: Request) -> None:
        self._known[request.owner, request.id] = request
        self._tell(Added(request.id, request.tokens, request.num_prompt, asdict(request.params)))

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends it here now, and on all ranks before the next step."""
        request.finish_reason = reason
        self._tell(Ended(request.id, reason))

    def forget(self, request: Request) -> None:
        self._known.pop((request.owner, request.id), None)

    def own(self) -> list[Request]:
        """This rank's, not finished, in the order in which they were added."""
        rank = self.control.groups.rank
        return [r for (owner, _), r in self._known.items() if owner == rank and r.finish_reason is None]

    def hear(self, scheduler: Scheduler) -> None:
        """Does what all ranks said, everywhere in the same order; a rank's requests take turns with the others'."""
        for turn in zip_longest(*self.control.heard()):
            for rank, line in enumerate(turn):
                if line is not None:
                    self._do(rank, _read(line), scheduler)

    def _tell(self, message: Added | Ended) -> None:
        self.control.tell(json.dumps({type(message).__name__: asdict(message)}).encode() + b"\n")

    def _do(self, rank: int, message: Added | Ended, scheduler: Scheduler) -> None:
        key = rank, message.id
        if isinstance(message, Ended):
            request = self._known.pop(key, None)
            if request is not None:
                scheduler.finish(request, message.reason)
            return
        if key not in self._known:
            params = SamplingParams(**message.params)
            request = Request(message.id, message.tokens, params, message.num_prompt)
            request.begin_again(rank, self.grammars)
            self._known[key] = request
        scheduler.add(self._known[key])


def _read(line: bytes) -> Added | Ended:
    ((name, fields),) = json.loads(line).items()
    return Added(**fields) if name == "Added" else Ended(**fields)
