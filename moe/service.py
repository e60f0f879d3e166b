"""One thread that owns a model and steps it; callers of other threads hand in requests and are told what comes.

submit ─▶ queue ─▶ the thread: add samples as there is room, step, hand out ─▶ deliver(delta), in that thread
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple

from moe.generation import Event, Generation
from moe.histogram import Histogram
from moe.llm import LLM
from moe.openai import PromptLogprobs
from moe.outputs import Completion
from moe.params import Logprob, SamplingParams

log = logging.getLogger(__name__)

_STEP_S = 60.0  # for the last step: hosts may be in the middle of a recovery


class Delta(NamedTuple):
    """What is new of one sample. completion: the whole sample, when it is finished."""

    sample: int
    text: str
    tokens: list[int]
    logprobs: list[dict[int, Logprob]] | None
    completion: Completion | None
    of_prompt: PromptLogprobs = None  # with the completion of a prompt's first sample, if asked for


@dataclass(slots=True)
class ServiceStats:
    """What the service counts beside the engine."""

    accepted: int = field(default=0, metadata={"help": "Requests taken in"})
    refused: int = field(default=0, metadata={"help": "Requests refused because the queue was full"})
    finished: int = field(default=0, metadata={"help": "Requests answered to their end"})
    cancelled: int = field(default=0, metadata={"help": "Requests whose caller went away or ran out of time"})
    failed: int = field(default=0, metadata={"help": "Requests that ended with an error"})
    open: int = field(default=0, metadata={"help": "Requests queued or running", "kind": "gauge"})
    time_between_tokens: Histogram = field(
        default_factory=Histogram,
        metadata={"help": "Between two tokens of a sample", "unit": "seconds", "kind": "histogram"},
    )


class QueueFull(RuntimeError):
    """As many requests are open as are allowed; try again later."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was handed in. Samples of its prompts are numbered through: prompt 0's n, then prompt 1's."""

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    deliver: Callable[[Delta], None]
    samples: list[Generation] = field(default_factory=list)
    num_finished: int = 0
    is_over: bool = False
    last_token: dict[int, float] = field(default_factory=dict)  # by sample: when it came

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.params.n


class Service:
    """Steps `llm` in a thread of its own until `close`, or the process's end. max_open: requests at a time, queued or
    running."""

    def __init__(self, llm: LLM, max_open: int = 256) -> None:
        self.llm, self.max_open = llm, max_open
        self.fingerprint = llm.system_fingerprint  # its folder may change while it is served
        self.stats = ServiceStats()
        self.started = time.time()
        self.why_ill: str | None = None
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._queueing: deque[Ticket] = deque()
        self._of: dict[int, tuple[Ticket, int]] = {}  # by id of a sample: its ticket and number
        self._window = 4 * llm.engine.config.batch.num_running
        self._counting = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="moe-service", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # Python aborts a process whose threads are within torch while it ends

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, deliver: Callable[[Delta], None]
    ) -> Ticket:
        """Takes a request in. Raises QueueFull, and ValueError for what can never run; after that, errors are told
        as a completion with finish_reason "error"."""
        for prompt in prompts:
            self.llm.check_request(prompt, params)
        with self._counting:
            if self.stats.open >= self.max_open or self._is_closing or self.why_ill is not None:
                self.stats.refused += 1
                raise QueueFull(f"{self.stats.open} requests are open, which is all that fit; try again later")
            self.stats.open += 1
            self.stats.accepted += 1
        ticket = Ticket(prompts, params, deliver)
        self._commands.put(lambda: self._queueing.append(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops what is not finished; nothing more is delivered. No effect on a finished request."""
        self._commands.put(lambda: self._cancel(ticket))

    def close(self, seconds: float = 0.0, step_s: float = _STEP_S) -> None:
        """Takes nothing in any more, lets what is open end for up to so many seconds, then drops it. A step that has
        not ended `step_s` later (a disk, or hosts that do not answer) is left behind, and the model cannot be closed.
        """
        atexit.unregister(self.close)
        with self._counting:
            self._is_closing = True
        deadline = time.monotonic() + seconds
        while self.stats.open and self.why_ill is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._commands.put(self._stop)
        self._thread.join(step_s)
        if self._thread.is_alive():
            log.warning("the step that was begun has not ended after %g s; it is left behind", step_s)

    def _stop(self) -> None:
        raise SystemExit

    def _run(self) -> None:
        self.llm.engine.start()
        try:
            while True:
                self._obey(wait=not (self._queueing or self._of))
                self._fill()
                if self._of:
                    self._step()
        except SystemExit:
            self.llm.abort(sample for ticket, _ in list(self._of.values()) for sample in ticket.samples)
        except BaseException as error:  # a fault of ours: whoever waits is told, and `/health`
            self.why_ill = f"the service stopped: {type(error).__name__}: {error}; start it again"
            with suppress(Exception, SystemExit):
                self._obey(wait=False)  # who was let in meanwhile
            for ticket in {id(t): t for t in [*self._queueing, *(t for t, _ in self._of.values())]}.values():
                self._fail(ticket, self.why_ill)
            raise

    def _obey(self, wait: bool) -> None:
        try:
            self._commands.get(block=wait)()  # no limit: nothing is open, and `close` wakes it
            while True:
                self._commands.get_nowait()()
        except Empty:
            return

    def _fill(self) -> None:
        """Adds samples of the oldest requests while there is room."""
        while self._queueing and len(self._of) < self._window:
            ticket = self._queueing[0]
            number = len(ticket.samples)
            try:
                index = number % ticket.params.n
                prompt = ticket.prompts[number // ticket.params.n]
                sample = self.llm.add(prompt, ticket.params.sample(index), number)
            except Exception as error:  # of any kind: it is this request's
                self._fail(ticket, str(error))
                continue
            ticket.samples.append(sample)
            self._of[id(sample)] = ticket, number
            if len(ticket.samples) == ticket.num_samples:
                self._queueing.popleft()

    def _step(self) -> None:
        try:
            events = self.llm.step()
        except Exception as error:  # a read error, a lost peer: those on their way end, the next may fare better
            for ticket in {id(t): t for t, _ in self._of.values()}.values():
                self._fail(ticket, f"the step failed: {str(error) or type(error).__name__}")
            if not self.llm.guard.is_usable_here:
                self.why_ill = str(error)
            return
        for event in events:
            if (found := self._of.get(id(event.generation))) is not None:
                self._hand_out(*found, event)

    def _hand_out(self, ticket: Ticket, number: int, event: Event) -> None:
        now = time.monotonic()
        if event.tokens:
            if (before := ticket.last_token.get(number)) is not None:
                self.stats.time_between_tokens.add(now - before)
            ticket.last_token[number] = now
        completion, of_prompt = None, None
        try:
            if event.finish is not None:
                completion = self.llm.completion(event.generation)
                of_prompt = self.llm.prompt_logprobs(event.generation)
            logprobs = self.llm.last_logprobs(event.generation)
        except Exception as error:  # of any kind: a tokenizer's own code runs here
            self._fail(ticket, f"its tokens cannot become text: {error}")
            return
        if event.finish is not None:
            del self._of[id(event.generation)]
            ticket.num_finished += 1
        self._deliver(ticket, Delta(number, event.text, event.tokens, logprobs, completion, of_prompt))
        if ticket.num_finished == ticket.num_samples and not ticket.is_over:
            self._end(ticket)
            self.stats.finished += 1

    def _deliver(self, ticket: Ticket, delta: Delta) -> None:
        try:
            ticket.deliver(delta)
        except Exception:  # the caller's loop is gone
            self._cancel(ticket)

    def _fail(self, ticket: Ticket, sentence: str) -> None:
        self._drop(ticket)
        self.stats.failed += 1
        completion = Completion(len(ticket.samples), "", [], "error", error=sentence)
        self._end(ticket)
        self._deliver(ticket, Delta(0, "", [], None, completion))

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.is_over:
            self._drop(ticket)
            self._end(ticket)
            self.stats.cancelled += 1

    def _drop(self, ticket: Ticket) -> None:
        if ticket in self._queueing:
            self._queueing.remove(ticket)
        for sample in ticket.samples:
            self._of.pop(id(sample), None)
        self.llm.abort(ticket.samples)

    def _end(self, ticket: Ticket) -> None:
        ticket.is_over = True
        with self._counting:
            self.stats.open -= 1
