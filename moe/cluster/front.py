"""The face of an `Engine` for a process that computes nothing itself: requests in, tokens out as they are told.

`LLM`, batch files and a service use it like an engine of this process. Every request stays here with its tokens so far
(`Ledger`), so that whoever computes may be lost.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.cluster.ledger import Ledger
from moe.config import EngineConfig
from moe.engine.limits import Limits
from moe.engine.requests import Request
from moe.engine.stats import StepStats
from moe.models.blueprint import Blueprint, read_blueprint
from moe.offload.fingerprint import fingerprint
from moe.offload.layer_stats import LayerStats
from moe.outputs import FinishReason
from moe.params import SamplingParams

_TICK_S = 0.05  # between two looks at what became of those who compute


class Front(ABC):
    """num_hosts: that compute. One thread at a time."""

    control = None  # ranks are not this process's,
    experts = None  # nor are slots
    limits: Limits

    def __init__(self, folder: str | Path, config: EngineConfig, num_hosts: int) -> None:
        if num_hosts < 1:
            raise ValueError(f"hosts ({num_hosts}) must be >= 1")
        # What callers keep in flight: as much as all hosts together take.
        self.config = replace(config, batch=config.batch.for_ranks(num_hosts))
        self.blueprint: Blueprint = read_blueprint(folder, trust_remote_code=config.trust_remote_code)
        self.weights = fingerprint(self.blueprint.checkpoint)  # as they were when this run began
        self.stats, self.next_id, self.ledger = StepStats(), 0, Ledger()
        self._asked: dict[int, float] = {}  # when, of requests without a token

    @abstractmethod
    def exchange(self, wait_s: float) -> None:
        """Hands out what is in the queue, and hears what was said; waits for it up to `wait_s`."""

    @abstractmethod
    def drop(self, request: Request, host: int) -> None:
        """Tells `host` that nobody waits for the request any more."""

    @property
    def max_context(self) -> int:
        return self.limits.max_context

    @property
    def has_work(self) -> bool:
        return len(self.ledger) > 0

    def start(self) -> None:  # noqa: B027 - done, for every kind of front
        """Nothing is agreed: hosts step by themselves."""

    def check_request(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for a prompt of token ids that cannot ever run."""
        self.limits.check(tokens, params)

    def add_request(self, tokens: Sequence[int], params: SamplingParams, num_prompt: int | None = None) -> Request:
        """Queues a prompt of token ids; num_prompt: where its answer begins, if a part of that is there already.

        Raises ValueError if it cannot ever run.
        """
        num_prompt = num_prompt or len(tokens)
        self.limits.check(tokens[:num_prompt], params)
        request = Request(self.next_id, list(tokens), self.limits.resolved(params, num_prompt), num_prompt)
        self.next_id += 1
        self._asked[request.id] = time.perf_counter()
        self.ledger.add(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """As `Engine.finish`: nothing more is said of the request."""
        if request.finish_reason == "length" and reason == "stop":
            request.finish_reason = reason
        if request.finish_reason is None:
            self._asked.pop(request.id, None)
            host = self.ledger.finish(request, reason)
            if host is not None:
                self.drop(request, host)

    def step(self) -> list[Request]:
        """Waits shortly for what hosts say. Returns the requests that moved: each has tokens more, or ended."""
        started = time.perf_counter()
        self.exchange(0.0 if self.ledger.has_news else _TICK_S)
        before = self.ledger.num_handed_out
        stepped = self.ledger.hand_out()
        now = time.perf_counter()
        for request in stepped:
            if (asked := self._asked.pop(request.id, None)) is not None:
                self.stats.time_to_first_token.add(now - asked)
        self.stats.steps += 1
        self.stats.decode_tokens += self.ledger.num_handed_out - before
        self.stats.decode_seconds += now - started
        return stepped

    def layer_stats(self) -> list[LayerStats]:
        """Of the slots of this process: none."""
        return []

    def keep_logits(self) -> None:
        raise ValueError("logits stay on the hosts; load the model without hosts")

    def record(self) -> Any:
        raise ValueError("routing stays on the hosts; record without hosts")
