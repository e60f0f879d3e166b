"""Every request of a cluster with its tokens so far: what lets any host die."""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe.cluster.messages import Dealt, Said
from moe.config import BatchConfig
from moe.engine.requests import Request
from moe.outputs import FinishReason


def most_dealt(batch: BatchConfig) -> int:
    """Requests that whoever computes may have; with half as many it is dealt others."""
    return 4 * batch.num_running


@dataclass(slots=True, eq=False)
class Entry:
    """A request and where it is. given: tokens that it came with, the prompt and maybe a part of the answer; said: all
    that hosts said of it since; [0, handed) of it were handed out."""

    request: Request
    given: int
    host: int | None = None  # None: in the queue
    said: list[Said] = field(default_factory=list)
    handed: int = 0

    @property
    def is_ended(self) -> bool:
        return bool(self.said and self.said[-1].finish is not None)

    @property
    def has_begun(self) -> bool:
        return bool(self.said) or self.given > self.request.num_prompt

    def as_dealt(self) -> Dealt:
        request = self.request
        so_far = [token for one in self.said for token in one.tokens]
        tokens = request.tokens[: self.given] + so_far
        return Dealt(request.id, tokens, request.num_prompt, request.params, request.is_awaited)


class Ledger:
    """Requests that are not finished: in the queue, with a host, or with words that nobody has been handed yet."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._queue: deque[Entry] = deque()
        self._moved: deque[Entry] = deque()  # with something to hand out
        self._load: defaultdict[int, int] = defaultdict(int)  # by host: of those that are not ended
        self.num_handed_out = 0  # tokens

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_news(self) -> bool:
        return bool(self._moved)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    def load(self, host: int) -> int:
        """How many requests a host has."""
        return self._load[host]

    def add(self, request: Request) -> None:
        entry = self._entries[request.id] = Entry(request, len(request.tokens))
        self._queue.append(entry)

    def finish(self, request: Request, reason: FinishReason) -> int | None:
        """Nothing more is said of it. Returns the host that has it, if one has."""
        request.finish_reason = reason
        entry = self._entries.pop(request.id)
        if entry.host is None:
            self._queue.remove(entry)
        elif not entry.is_ended:
            self._load[entry.host] -= 1
        return entry.host

    def deal(self, hosts: Iterable[int], most: int) -> dict[int, list[Dealt]]:
        """Requests from the queue to the hosts with the fewest, up to `most` each; the rest stays where nothing can be
        lost. A host that still has more than half is left alone: one message for many requests. Those whose answer has
        begun wait for neither."""
        load = {host: self._load[host] for host in hosts}
        may_take = [host for host in load if load[host] <= most // 2]
        dealt: dict[int, list[Dealt]] = {}
        while self._queue and load:
            has_begun = self._queue[0].has_begun
            candidates = load if has_begun else may_take
            host = min(candidates, key=lambda one: load[one], default=None)
            if host is None or (load[host] >= most and not has_begun):
                break
            entry = self._queue.popleft()
            entry.host, load[host] = host, load[host] + 1
            dealt.setdefault(host, []).append(entry.as_dealt())
        self._load.update(load)
        return dealt

    def hear(self, host: int, said: Sequence[Said]) -> None:
        """What a host said that was not known yet."""
        for one in said:
            entry = self._entries.get(one.id)
            if entry is None or entry.host != host or entry.is_ended:
                continue  # cancelled, or given to another host meanwhile
            if len(entry.said) == entry.handed:
                self._moved.append(entry)
            entry.said.append(one)
            self._load[host] -= entry.is_ended

    def hand_out(self) -> list[Request]:
        """The requests that have moved, each with what was said of it next."""
        handed = []
        for _ in range(len(self._moved)):
            entry = self._moved.popleft()
            if entry.request.finish_reason is None:  # else nobody waits for it any more
                handed.append(self._hand_out(entry))
        return handed

    def take_back(self, alive: Iterable[int]) -> int:
        """Puts requests of hosts that are not `alive` first in the queue, with what was said of them. Their number."""
        there = set(alive)
        orphans = [e for e in self._entries.values() if e.host is not None and e.host not in there and not e.is_ended]
        for entry in reversed(orphans):
            assert entry.host is not None
            self._load[entry.host] -= 1
            entry.host = None
            self._queue.appendleft(entry)
        return len(orphans)

    def _hand_out(self, entry: Entry) -> Request:
        request, one = entry.request, entry.said[entry.handed]
        entry.handed += 1
        request.tokens += one.tokens
        request.logprobs += one.logprobs
        self.num_handed_out += len(one.tokens)
        if one.prompt_logprobs:
            request.prompt_logprobs = list(one.prompt_logprobs)
        request.error = one.error
        if one.finish is not None:
            request.finish_reason = one.finish
            del self._entries[request.id]
        elif entry.handed < len(entry.said):
            self._moved.append(entry)
        return request
