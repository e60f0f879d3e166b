"""What controller and hosts tell each other, one record per sentence. Tokens of a forward never go this way."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe.engine.limits import Limits
from moe.engine.requests import Request
from moe.engine.sampling import Logprobs
from moe.engine.stats import State
from moe.outputs import FinishReason
from moe.params import SamplingParams
from moe.placement.loop import PlacementStats
from moe.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Dealt:
    """A request for a host. tokens: the prompt, num_prompt of them, and what was said of the answer so far.
    is_awaited: as of `Request`."""

    id: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    is_awaited: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """What a host says of a request: tokens, or its end, or both. logprobs: of these tokens, where they are wanted."""

    id: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    logprobs: tuple[Logprobs, ...] = ()
    error: str | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()  # with the first token of an answer

    @staticmethod
    def of(request: Request, number: int, told: int) -> "Said":
        """What is new of a request that its asker knows as `number`, and of which he has `told` tokens."""
        tokens = tuple(request.tokens[told:])
        chosen = tuple(request.logprobs[-len(tokens) :]) if tokens and request.params.logprobs is not None else ()
        of_prompt = tuple(request.prompt_logprobs) if tokens and told == request.num_prompt else ()
        return Said(number, tokens, request.finish_reason, chosen, request.error, of_prompt)

    def to_json(self) -> list[Any]:
        """The fields in order; those at the end that say nothing are left out."""
        fields: list[Any] = [self.id, self.tokens, self.finish, _of_logprobs(self.logprobs), self.error]
        fields.append(_of_logprobs(self.prompt_logprobs))
        while fields[-1] in (None, [], ()):
            fields.pop()
        return fields

    @staticmethod
    def from_json(fields: list[Any]) -> "Said":
        number, tokens, finish, logprobs, error, of_prompt = fields + [None] * (6 - len(fields))
        return Said(int(number), tuple(tokens or ()), finish, _to_logprobs(logprobs), error, _to_logprobs(of_prompt))


def _of_logprobs(several: Sequence[Logprobs]) -> list[Any]:
    return [[one.chosen, one.rank, *one.top.items()] for one in several]


def _to_logprobs(several: list[Any] | None) -> tuple[Logprobs, ...]:
    return tuple(Logprobs(chosen, dict(top), rank) for chosen, rank, *top in several or ())


@dataclass(frozen=True, slots=True)
class Beat:
    """What a host says on its line: how many steps it has finished, how many KV blocks are free, the number of its last
    `Placed`, and of its requests what is new since the beat before."""

    steps: int
    free_blocks: int
    placed: int
    said: Sequence[Said] = ()

    def to_line(self) -> bytes:
        fields = [self.steps, self.free_blocks, self.placed, [one.to_json() for one in self.said]]
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes | bytearray) -> "Beat":
        """Raises ValueError for anything else."""
        try:
            steps, free_blocks, placed, said = json.loads(line)
            return Beat(int(steps), int(free_blocks), int(placed), [Said.from_json(one) for one in said])
        except (TypeError, IndexError, ValueError) as error:
            raise ValueError(f"no beat of a host: {error}") from None


@dataclass(frozen=True, slots=True)
class Serve:
    """Take rank `rank` of a generation, and step until it ends. store_port: where its ranks meet, and nobody else; it
    closes when the generation must end. nodes: of each rank."""

    generation: int
    store_port: int
    nodes: tuple[str, ...]
    rank: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a host serves a generation no more: all agreed to stop, or a peer was lost. seconds: what starting took;
    said: how many words it has said in its life; plan: that it served last, which may have moved since `Serve`, None if
    it never began; placed: its last, if it is of this generation."""

    generation: int
    lost: str | None
    seconds: dict[str, float]
    said: int
    plan: Plan | None
    placed: "Placed | None"


@dataclass(frozen=True, slots=True)
class Placed:
    """Rank 0 of a generation that re-balances: the plan it serves, and what its loop has done and said so far.

    number: grows with every change of one of them.
    """

    generation: int
    number: int
    plan: Plan
    stats: PlacementStats
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A host that has loaded the model. state: as it was then."""

    pid: int
    node: str
    limits: Limits
    shape: tuple[int, int]  # layers, experts of each
    state: State
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Where:
    """How a host finds the controller: the port of its lines, and the word that opens them; the port of the store
    where hosts of a node that load at the same time say what was free before. weights: the `fingerprint` of what all
    hosts must load, "" = whatever is there."""

    address: str
    line_port: int
    word: str
    job: str
    store_port: int = 0
    weights: str = ""


@dataclass(frozen=True, slots=True)
class Together:
    """Hosts that are started at the same time: how many, and the number of that start."""

    count: int
    start: int
