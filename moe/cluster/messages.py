"""What controller and hosts tell each other, one record per sentence. Tokens of a forward never go this way."""

from dataclasses import dataclass

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
    """A request for a host. tokens: the prompt, num_prompt of them, and what was said of the answer so far."""

    id: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Said:
    """What a host says of a request: a token, or its end, or both."""

    id: int
    token: int | None
    finish: FinishReason | None = None
    logprobs: Logprobs | None = None
    error: str | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()  # with the first token of an answer

    @staticmethod
    def of(request: Request, number: int) -> "Said":
        """The newest of a request that its asker knows as `number`."""
        token = None if request.error is not None else request.tokens[-1]
        chosen = request.logprobs[-1] if request.params.logprobs is not None and token is not None else None
        of_prompt = tuple(request.prompt_logprobs) if request.num_output == 1 else ()
        return Said(number, token, request.finish_reason, chosen, request.error, of_prompt)


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
    plan: that it served last, which may have moved since `Serve`, None if it never began."""

    generation: int
    lost: str | None
    seconds: dict[str, float]
    plan: Plan | None = None


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
class Collected:
    """What a host has to say: words from number `first` on, and its placement, None if that is known already."""

    first: int
    said: list[Said]
    placed: Placed | None


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A host that has loaded the model. state: as it was then."""

    pid: int
    node: str
    limits: Limits
    shape: tuple[int, int]  # layers, experts of each
    state: State
    notes: tuple[str, ...]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Where:
    """How a host finds the controller: the port of its lines, and the word that opens them."""

    address: str
    line_port: int
    word: str
    job: str
