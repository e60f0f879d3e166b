"""Which tokens the next step computes: continuous batching with chunked prefill and shared prefixes."""

from collections import deque
from collections.abc import Mapping, Sequence

from moe.config import BatchConfig
from moe.engine.requests import Chunk, Request
from moe.engine.turns import Turns
from moe.models.kv import BlockPool
from moe.outputs import FinishReason


class Scheduler:
    """Running sequences first, oldest first; then as many waiting ones as tokens, places and blocks allow.

    Out of blocks, the youngest running request is put back to wait and is computed again later.
    `can_chunk`: whether a prompt may be computed in parts. turns: who chooses where more run than decode in a step.
    places: sequences that run at once (`let_in`). num_added, num_put_back: requests so far, and how often one was.
    num_begun, begun_tokens, shared_tokens: requests that were let in, their tokens, and those found computed.
    """

    def __init__(
        self, config: BatchConfig, pool: BlockPool, can_chunk: bool = True, turns: Turns | None = None
    ) -> None:
        self.config, self.pool, self.can_chunk, self.turns = config, pool, can_chunk, turns
        self.places, self.max_tokens = config.max_sequences if turns is None else turns.places, config.max_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_added = self.num_put_back = 0
        self.num_begun = self.begun_tokens = self.shared_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Behind those that wait; one whose answer has begun, on a host that was lost, behind its like only."""
        place = len(self.waiting)
        if request.num_output:
            place = next((n for n, other in enumerate(self.waiting) if not other.num_output), place)
        self.waiting.insert(place, request)
        self.num_added += 1

    def schedule(self) -> list[Chunk]:
        """The chunks of one step; empty only if there is no work."""
        chunks = self._going_on(self._whose_turn())
        left = self.max_tokens - sum(chunk.end - chunk.start for chunk in chunks)
        while left and self.waiting and len(self.running) < self.places:
            if not (chunk := self._admit(self.waiting[0], left, alone=not chunks)):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            left -= chunk.end - chunk.start
        running = set(map(id, self.running))
        chunks = [c for c in chunks if id(c.request) in running]  # a later request may have pushed one out
        if not chunks:  # those whose turn it was had no blocks, which the others have
            chunks = self._going_on(list(self.running))
        assert chunks or not self.has_work, (len(self.waiting), len(self.running))
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk is in the KV cache now: its full blocks can be shared."""
        request, size = chunk.request, self.pool.block_size
        request.num_computed = chunk.end
        for index in range(chunk.start // size, chunk.end // size):
            self.pool.publish(request.blocks, index, request.tokens[index * size : (index + 1) * size])

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request, running or waiting; its blocks are free."""
        request.finish_reason = reason
        self._take_out(request)

    def let_in(self, places: int) -> None:
        """So many sequences run at once from now on, each with a token in a step at least; those that run stay."""
        assert self.turns is None, "turns have places of their own"
        self.places, self.max_tokens = places, max(self.config.max_tokens, places)

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Blocks have other numbers: new by old."""
        for request in self.running:
            request.blocks = [moved.get(block, block) for block in request.blocks]

    def hand_over(self) -> None:
        """Another scheduler goes on with the requests."""
        for request in [*self.running, *self.waiting]:
            self._take_out(request)

    def _going_on(self, requests: Sequence[Request]) -> list[Chunk]:
        """Chunks of running requests, as far as tokens and blocks allow."""
        chunks: list[Chunk] = []
        left = self.max_tokens
        for request in requests:
            if left and request in self.running and (chunk := self._continue(request, left)):
                chunks.append(chunk)
                left -= chunk.end - chunk.start
        return chunks

    def _whose_turn(self) -> list[Request]:
        """Running requests that this step goes on with, oldest first: all, or prompts and those whose turn it is."""
        if self.turns is None:
            return list(self.running)
        decoding = [r for r in self.running if r.num_computed == len(r.tokens) - 1]
        chosen = set(map(id, self.turns.choose(decoding, self.config.max_sequences)))
        passed_over = {id(r) for r in decoding} - chosen
        return [r for r in self.running if id(r) not in passed_over]

    def _take_out(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self._forget(request)
        else:
            self.waiting.remove(request)

    def _continue(self, request: Request, left: int) -> Chunk | None:
        end = min(len(request.tokens), request.num_computed + left)
        if end < len(request.tokens) and not self.can_chunk:
            return None
        while not self._reserve(request, end):
            victim = self.running[-1]
            self._put_back(victim)
            if victim is request:
                return None
        return Chunk(request, request.num_computed, end)

    def _admit(self, request: Request, left: int, alone: bool) -> Chunk | None:
        # What is shared is not computed, and leaves no logits.
        blocks = self.pool.match(request.tokens) if request.params.prompt_logprobs is None else []
        start = len(blocks) * self.pool.block_size
        end = min(len(request.tokens), start + left)
        if end < len(request.tokens) and not self.can_chunk:
            if not alone:  # wait for a step of its own
                self.pool.release(blocks)
                return None
            end = len(request.tokens)
        request.blocks, request.num_computed = blocks, start
        if not self._reserve(request, end):
            self._forget(request)
            return None
        request.num_shared = max(request.num_shared, start)
        self.num_begun += 1
        self.begun_tokens += len(request.tokens)
        self.shared_tokens += start
        return Chunk(request, start, end)

    def _reserve(self, request: Request, end: int) -> bool:
        missing = -(-end // self.pool.block_size) - len(request.blocks)
        if missing > self.pool.num_available:
            return False
        request.blocks += self.pool.take(max(0, missing))
        return True

    def _put_back(self, request: Request) -> None:
        self.running.remove(request)
        self._forget(request)
        request.num_preempted += 1
        self.num_put_back += 1
        self.waiting.appendleft(request)

    def _forget(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.num_computed, request.state = [], 0, None
        if self.turns is not None:
            self.turns.forget(request)
