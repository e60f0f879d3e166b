"""What the engine works on: a request, and the part of it that one step computes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe.engine.grammar import Grammars
from moe.engine.sampling import Logprobs, Sampler
from moe.layer.routing import Span, StepContext
from moe.outputs import FinishReason
from moe.params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and what was generated for it. tokens: [0, num_computed) are in the KV cache."""

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
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it ended with "error"
    owner: int = 0  # the rank whose request it is
    place: int = 0  # the rank where its next token begins, in coherent decode
    state: Any = None  # what a model that is not packed keeps between steps

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params, self.num_prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

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


def step_of(chunks: Iterable[Chunk]) -> StepContext:
    """What layers are told of a forward of these chunks."""
    return StepContext(tuple(chunk.span for chunk in chunks))
