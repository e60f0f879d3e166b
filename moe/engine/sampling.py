"""How the next token is chosen: the parameters that users of offline batch APIs know, on transformers' processors."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """temperature 0 is greedy. `seed` makes a request's tokens independent of what it is batched with.

    `logprobs`: how many alternatives to report beside the chosen token (0: only the chosen one; None: nothing).
    `stop` strings end the text before them; `n` samples come from seeds seed, seed + 1, …
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] | str = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = {
            f"max_tokens ({self.max_tokens}) must be >= 1": self.max_tokens >= 1,
            f"temperature ({self.temperature}) must be 0 (greedy) or lie in [1e-6, 1e6]": self.temperature == 0
            or 1e-6 <= self.temperature <= 1e6,
            f"top_k ({self.top_k}) must be >= 0, 0 keeps all": self.top_k >= 0,
            f"top_p ({self.top_p}) must lie in (0, 1]": 0 < self.top_p <= 1,
            f"min_p ({self.min_p}) must lie in [0, 1]": 0 <= self.min_p <= 1,
            f"repetition_penalty ({self.repetition_penalty}) must lie in [1e-6, 1e6]": 1e-6
            <= self.repetition_penalty
            <= 1e6,
            f"n ({self.n}) must be >= 1": self.n >= 1,
            f"seed ({self.seed}) must lie in [0, 2^63 - n]": 0 <= self.seed <= (1 << 63) - max(1, self.n),
            f"logprobs ({self.logprobs}) must be >= 0": self.logprobs is None or self.logprobs >= 0,
            "stop strings must not be empty": all(self.stop),
        }
        for message, is_right in checks.items():
            if not is_right:
                raise ValueError(message)


class Logprobs(NamedTuple):
    """Natural log-probabilities before temperature and filters: of the chosen token, and of the likeliest ones."""

    chosen: float
    top: dict[int, float]


class Choice(NamedTuple):
    """The next token of a request."""

    token: int
    logprobs: Logprobs | None


class Sampler:
    """Chooses the tokens of one request; owns its random generator."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.temperature > 0:
            if params.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                self._processors.append(MinPLogitsWarper(params.min_p))

    def choose(self, logits: Tensor, tokens: list[int]) -> Choice:
        """The next token, with log-probabilities if they were asked for. Arguments as `sample`."""
        token = self.sample(logits, tokens)
        return Choice(token, self.logprobs(logits, token))

    def skip(self, vocabulary: int) -> None:
        """Moves the generator on as one `sample` of logits [vocabulary] would, where another rank took it."""
        if self.params.temperature > 0:
            torch.multinomial(torch.ones(1, vocabulary), 1, generator=self._generator)

    def sample(self, logits: Tensor, tokens: list[int]) -> int:
        """logits: fp32 [V] on the CPU; tokens: prompt and output so far."""
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), scores)
        if self.params.temperature == 0:
            return int(scores[0].argmax())
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))

    def logprobs(self, logits: Tensor, token: int) -> Logprobs | None:
        if self.params.logprobs is None:
            return None
        scores = logits.log_softmax(-1)
        top = scores.topk(min(self.params.logprobs, len(scores)))
        return Logprobs(float(scores[token]), dict(zip(top.indices.tolist(), top.values.tolist())))
