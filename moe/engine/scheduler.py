"""Which tokens the next step computes: continuous batching with chunked prefill and shared prefixes."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from moe.config import BatchConfig
from moe.engine.sampling import Logprobs, Sampler, SamplingParams
from moe.models.kv import BlockPool

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and what was generated for it. tokens: [0, num_computed) are in the KV cache."""

    id: int
    tokens: list[int]
    params: SamplingParams
    num_prompt: int
    sampler: Sampler
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_shared: int = 0  # tokens that a shared prefix saved at admission
    num_preempted: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    owner: int = 0  # the rank whose request it is
    place: int = 0  # the rank where its next token begins, in coherent decode
    state: Any = None  # what a model that is not packed keeps between steps

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


class Chunk(NamedTuple):
    """Tokens [start, end) of a sequence, to be computed now; `samples` if the next token follows."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Running sequences first, oldest first; then as many waiting ones as tokens, places and blocks allow.

    Out of blocks, the youngest running sequence is put back to wait and is computed again later.
    `can_chunk`: whether a prompt may be computed in parts.
    """

    def __init__(self, config: BatchConfig, pool: BlockPool, can_chunk: bool = True) -> None:
        self.config, self.pool, self.can_chunk = config, pool, can_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of one step; empty only if there is no work."""
        chunks: list[Chunk] = []
        left = self.config.max_tokens
        for sequence in list(self.running):
            if left and sequence in self.running and (chunk := self._continue(sequence, left)):
                chunks.append(chunk)
                left -= chunk.end - chunk.start
        while left and self.waiting and len(self.running) < self.config.max_sequences:
            if not (chunk := self._admit(self.waiting[0], left, alone=not chunks)):
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            left -= chunk.end - chunk.start
        running = set(map(id, self.running))
        chunks = [c for c in chunks if id(c.sequence) in running]  # a later sequence may have pushed one out
        assert chunks or not self.has_work, (len(self.waiting), len(self.running))
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk is in the KV cache now: its full blocks can be shared."""
        sequence, size = chunk.sequence, self.pool.block_size
        sequence.num_computed = chunk.end
        for index in range(chunk.start // size, chunk.end // size):
            self.pool.publish(sequence.blocks, index, sequence.tokens[index * size : (index + 1) * size])

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._forget(sequence)

    def abort(self, sequence: Sequence) -> None:
        sequence.finish_reason = "abort"
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Takes out a sequence, running or waiting."""
        if sequence in self.running:
            self.finish(sequence)
        else:
            self.waiting.remove(sequence)

    def _continue(self, sequence: Sequence, left: int) -> Chunk | None:
        end = min(len(sequence.tokens), sequence.num_computed + left)
        if end < len(sequence.tokens) and not self.can_chunk:
            return None
        while not self._reserve(sequence, end):
            victim = self.running[-1]
            self._put_back(victim)
            if victim is sequence:
                return None
        return Chunk(sequence, sequence.num_computed, end)

    def _admit(self, sequence: Sequence, left: int, alone: bool) -> Chunk | None:
        blocks = self.pool.match(sequence.tokens)
        start = len(blocks) * self.pool.block_size
        end = min(len(sequence.tokens), start + left)
        if end < len(sequence.tokens) and not self.can_chunk:
            if not alone:  # wait for a step of its own
                self.pool.release(blocks)
                return None
            end = len(sequence.tokens)
        sequence.blocks, sequence.num_computed = blocks, start
        if not self._reserve(sequence, end):
            self._forget(sequence)
            return None
        sequence.num_shared = max(sequence.num_shared, start)
        return Chunk(sequence, start, end)

    def _reserve(self, sequence: Sequence, end: int) -> bool:
        missing = -(-end // self.pool.block_size) - len(sequence.blocks)
        if missing > self.pool.num_available:
            return False
        sequence.blocks += self.pool.take(max(0, missing))
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._forget(sequence)
        sequence.num_preempted += 1
        self.waiting.appendleft(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.num_computed, sequence.state = [], 0, None
