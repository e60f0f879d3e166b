"""How the next token is chosen: the parameters that users of offline batch APIs know, on transformers' processors."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe.params import SamplingParams


class Form(Protocol):
    """What an answer must look like (moe/engine/grammar.py). output: its tokens so far."""

    def allowed(self, output: list[int]) -> Tensor: ...
    def is_complete(self, output: list[int]) -> bool: ...


class Logprobs(NamedTuple):
    """Natural log-probabilities before temperature and filters: of the chosen token, and of the likeliest ones.

    rank: 1 + how many tokens were likelier than the chosen one.
    """

    chosen: float
    top: dict[int, float]
    rank: int


class Choice(NamedTuple):
    """The next token of a request, or why there is none."""

    token: int
    logprobs: Logprobs | None
    error: str | None = None


class Sampler:
    """Chooses the tokens of one request; owns its random generator. params: resolved, or with a seed.

    num_prompt: how many of the tokens that `sample` gets are the prompt's; form: what the answer must look like.
    """

    def __init__(self, params: SamplingParams, num_prompt: int = 0, form: Form | None = None) -> None:
        self.params, self.num_prompt, self.form = params, num_prompt, form
        self._generator = torch.Generator().manual_seed(params.seed or 0)
        self._shifts = _shifts(params)
        self._allowed = None if params.allowed_token_ids is None else torch.tensor(params.allowed_token_ids)
        self._bad_words = (
            NoBadWordsLogitsProcessor([*map(list, params.bad_words_ids)]) if params.bad_words_ids else None
        )
        self._processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if params.temperature > 0:
            if params.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                self._warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0.0:
                self._warpers.append(MinPLogitsWarper(params.min_p))

    def choose(self, logits: Tensor, tokens: list[int]) -> Choice:
        """The next token, with log-probabilities if they were asked for. Arguments as `sample`.

        Whatever goes wrong is this request's alone: the choice then says what.
        """
        try:
            token = self.sample(logits, tokens)
            return Choice(token, self.logprobs(logits, token))
        except Exception as error:  # of any kind: the others of the step must not end with it
            return Choice(-1, None, str(error) or type(error).__name__)

    def skip(self, vocabulary: int) -> None:
        """Moves the generator on as one `sample` of logits [vocabulary] would, where another rank took it."""
        if self.params.temperature > 0:
            torch.multinomial(torch.ones(1, vocabulary), 1, generator=self._generator)

    def sample(self, logits: Tensor, tokens: list[int]) -> int:
        """logits: fp32 [V] on the CPU; tokens: prompt and output so far.

        Raises ValueError for logits that are not finite, and if every token is forbidden.
        """
        best = int(logits.argmax())  # of NaN, its place
        if not logits[best].isfinite():
            raise ValueError(f"the model's logits are not finite: {float(logits[best])} for token {best}")
        scores = self._shifted(logits, tokens)[None]
        if self._processors or self._warpers:
            ids = torch.tensor([tokens])
            scores = self._warpers(ids, self._processors(ids, scores))
        likeliest = int(scores[0].argmax())
        if scores[0, likeliest] == -torch.inf:
            raise ValueError("bad_words, allowed_token_ids, structured_outputs and min_tokens leave no token to choose")
        if self.params.temperature == 0:
            return likeliest
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))

    def is_complete(self, tokens: list[int]) -> bool:
        """Whether the form of the answer leaves nothing to add to it. tokens: prompt and output."""
        return self.form is not None and self.form.is_complete(tokens[self.num_prompt :])

    def logprobs(self, logits: Tensor, token: int) -> Logprobs | None:
        return None if self.params.logprobs is None else logprobs_of(logits, token, self.params.logprobs)

    def _shifted(self, logits: Tensor, tokens: list[int]) -> Tensor:
        """logits [V] with biases, penalties for what was said, and without forbidden tokens. A copy if it changes."""
        params, output = self.params, tokens[self.num_prompt :]
        banned = params.end_token_ids if len(output) < params.min_tokens else ()
        counts_matter = bool(params.presence_penalty or params.frequency_penalty) and bool(output)
        limits = (self._allowed, self._bad_words, self.form)
        if not (banned or counts_matter or self._shifts or any(one is not None for one in limits)):
            return logits
        scores = logits.clone()
        if self.form is not None:
            scores[~self.form.allowed(output)] = -torch.inf
        if self._allowed is not None:
            scores = torch.full_like(scores, -torch.inf).index_copy(0, self._allowed, scores[self._allowed])
        for token, bias in self._shifts.items():
            scores[token] += bias
        if counts_matter:
            said, times = torch.unique(torch.tensor(output), return_counts=True)
            scores[said] -= params.presence_penalty + params.frequency_penalty * times
        scores[list(banned)] = -torch.inf
        if self._bad_words is not None:
            scores = self._bad_words(torch.tensor([tokens]), scores[None])[0]
        return scores


def _shifts(params: SamplingParams) -> dict[int, float]:
    return {token: bias for token, bias in params.logit_bias.items() if bias}


def logprobs_of(logits: Tensor, token: int, num_top: int) -> Logprobs:
    """Of `token`, and of the `num_top` likeliest. logits: fp32 [V]."""
    scores = logits.log_softmax(-1)
    top = scores.topk(min(num_top, len(scores)))
    rank = 1 + int((scores > scores[token]).sum())
    return Logprobs(float(scores[token]), dict(zip(top.indices.tolist(), top.values.tolist())), rank)
