"""What comes back for a prompt, with the names that offline batch APIs know; plain data."""

from dataclasses import dataclass, field
from typing import Literal

from moe.params import Logprob

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `logprobs` has one entry per token if they were asked for, the chosen token first.

    stop_reason: the stop string or stop token that ended it; None for the model's own end. error: why
    `finish_reason` is "error"; what was said before it stays.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Seconds since the epoch. first_token: None if none came."""

    arrival: float
    first_token: float | None
    finished: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its n answers. `prompt_logprobs` has one entry per prompt token, None for the first."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestTimes | None = field(default=None, compare=False)
