"""What the engine works on: a request, and the part of it that one step computes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.engine.grammar import Grammars
from moe.engine.sampling import Logprobs, Sampler, logprobs_of
from moe.layer.routing import Span, StepContext
from moe.outputs import FinishReason
from moe.params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and what was generated for it. tokens: [0, num_computed) are in the KV cache. is_awaited: somebody
    reads every token as it comes; else hosts of a cluster say several at a time."""

    id: int
    tokens: list[int]
    params: SamplingParams
    num_prompt: int
    sampler: Sampler = field(init=False)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_shared: int = 0  # tokens that a shared prefix saved at admission
    num_preempted: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # of prompt tokens 1, 2, …, if they were asked for
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it ended with "error"
    owner: int = 0  # the rank whose request it is
    place: int = 0  # the rank where its next token begins, in coherent decode
    state: Any = None  # what a model that is not packed keeps between steps
    is_awaited: bool = True

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params, self.num_prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def note_prompt(self, start: int, rows: Tensor) -> None:
        """rows: logits fp32 [N, V] at the places `start`, `start` + 1, …; what a place says is of the token after it.

        What is known already (of a prompt that is computed again) stays.
        """
        known, wanted = len(self.prompt_logprobs), self.params.prompt_logprobs
        first, end = known, min(start + len(rows), self.num_prompt - 1)
        if wanted is None or not start <= first < end:
            return
        found = logprobs_of(rows[first - start : end - start], self.tokens[first + 1 : end + 1], wanted)
        if any(isnan(one.chosen) for one in found):
            self.sampler.fault = "the model's logits of the prompt are not finite"
        self.prompt_logprobs += found

    def begin_again(self, rank: int, grammars: Grammars) -> None:
        """Nothing of it is computed on `rank`, its owner from now on; what it says next is what it would have said.

        Raises ValueError for a form of answers that cannot be asked for.
        """
        self.owner = self.place = rank
        self.blocks, self.num_computed, self.state = [], 0, None
        self.sampler = Sampler(self.params, self.num_prompt, grammars.of(self.params.structured_outputs))


class Chunk(NamedTuple):
    """Tokens [start, end) of a request, to be computed now; `samples` if the next token follows."""

    request: Request
    start: int
    end: int

    @property
    def samples(self) -> bool:
        return self.end == len(self.request.tokens)

    @property
    def span(self) -> Span:
        request = self.request
        return Span(request.id, self.start, self.end, request.num_prompt, request.owner)

    @property
    def tells_prompt(self) -> bool:
        """Whether logits of other places than its last are asked for, or of its last for the prompt's next token."""
        return self.request.params.prompt_logprobs is not None and self.start < self.request.num_prompt - 1

    @property
    def num_rows(self) -> int:
        """How many of its last tokens' logits are wanted."""
        return self.end - self.start if self.tells_prompt else 1


def step_of(chunks: Iterable[Chunk]) -> StepContext:
    """What layers are told of a forward of these chunks."""
    return StepContext(tuple(chunk.span for chunk in chunks))


def rows_wanted(chunks: Sequence[Chunk]) -> Tensor:
    """Which tokens' logits the chunks want, int64 [N]; tokens are numbered through all chunks."""
    ends = accumulate(c.end - c.start for c in chunks)
    return torch.cat([torch.arange(end - c.num_rows, end) for c, end in zip(chunks, ends)])


def keep_last_rows(chunks: Sequence[Chunk], logits: Tensor) -> Tensor:
    """Of the rows that `rows_wanted` names, those of the chunks' last tokens [len(chunks), V]; prompts keep theirs."""
    ends = list(accumulate(c.num_rows for c in chunks))
    for chunk, end in zip(chunks, ends):
        if chunk.tells_prompt:
            chunk.request.note_prompt(chunk.start, logits[end - chunk.num_rows : end])
    return logits if len(ends) == len(logits) else logits[[end - 1 for end in ends]]
