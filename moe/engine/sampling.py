"""How the next token is chosen: the parameters that users of offline batch APIs know, for all rows of a step at once.

    logits [B, V] ─▶ edits (bias, penalties, what is forbidden) ─▶ greedy, or drawn (moe/engine/draw.py) ─▶ ids ─▶ host

Logits stay on their device: small lists go there, one number a row comes back. Nothing is kept between tokens: what a
request says next follows from its tokens, its parameters and its seed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe.engine.draw import NONE_LEFT, NOT_FINITE, Draws, draw, uniform
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


class Edits(NamedTuple):
    """What changes a row of logits before a token is chosen. Distinct tokens in each list.

    allowed: bool [V] on the CPU, of all others the row is -inf; penalized: tokens whose scores are divided by the
    repetition penalty, or multiplied below 0.
    """

    allowed: Tensor | None
    added: list[tuple[int, float]]
    subtracted: list[tuple[int, float]]
    forbidden: list[int]
    penalized: list[int]


class Sampler:
    """The rules of one request's tokens. params: resolved, or with a seed.

    num_prompt: how many of the tokens that it gets are the prompt's; form: what the answer must look like.
    """

    def __init__(self, params: SamplingParams, num_prompt: int = 0, form: Form | None = None) -> None:
        self.params, self.num_prompt, self.form = params, num_prompt, form
        self.fault: str | None = None  # why nothing may be chosen
        self._added = [(token, bias) for token, bias in params.logit_bias.items() if bias]
        self._allowed: Tensor | None = None

    def is_complete(self, tokens: list[int]) -> bool:
        """Whether the form of the answer leaves nothing to add to it. tokens: prompt and output.

        A form that cannot tell is a fault, which `choose` says where the next token would be.
        """
        if self.form is None:
            return False
        try:
            return self.form.is_complete(tokens[self.num_prompt :])
        except Exception as error:  # of any kind: the others of the step must not end with it
            self.fault = str(error) or type(error).__name__
            return False

    def edits(self, tokens: list[int], vocabulary: int) -> Edits:
        """What this request's rules do to the logits after `tokens`, prompt and output so far."""
        params, output = self.params, tokens[self.num_prompt :]
        subtracted: list[tuple[int, float]] = []
        if params.presence_penalty or params.frequency_penalty:
            per_token, per_use = params.presence_penalty, params.frequency_penalty
            subtracted = [(token, per_token + per_use * count) for token, count in Counter(output).items()]
        forbidden = (
            {t for t in params.end_token_ids if 0 <= t < vocabulary} if len(output) < params.min_tokens else set()
        )
        for *start, last in params.bad_words_ids:
            if not start or tokens[-len(start) :] == start:
                forbidden.add(last)
        penalized = list(dict.fromkeys(tokens)) if params.repetition_penalty != 1.0 else []
        return Edits(self._allowed_of(output, vocabulary), self._added, subtracted, list(forbidden), penalized)

    def draws(self, tokens: list[int], vocabulary: int) -> Draws:
        """How the token after `tokens` is drawn: its number follows from the seed and its place in the answer."""
        params = self.params
        number = uniform(params.seed or 0, len(tokens) - self.num_prompt)
        top_k = params.top_k if params.top_k < vocabulary else 0
        return Draws(params.temperature, top_k, params.top_p, params.min_p, number)

    def _allowed_of(self, output: list[int], vocabulary: int) -> Tensor | None:
        if self.params.allowed_token_ids is not None and self._allowed is None:
            self._allowed = torch.zeros(vocabulary, dtype=torch.bool)
            self._allowed[list(self.params.allowed_token_ids)] = True
        if self.form is None:
            return self._allowed
        form = self.form.allowed(output)
        return form if self._allowed is None else form & self._allowed


def choose(logits: Tensor, asking: Sequence[tuple[Sampler, list[int]]]) -> list[Choice]:
    """The next token of every row. logits: fp32 [B, V] on any device; asking: a row's sampler, its tokens so far.

    Whatever goes wrong with a row is its request's alone: the choice then says what. One copy to the host, one more a
    row that wants log-probabilities.
    """
    vocabulary = logits.shape[1]
    failed: dict[int, str] = {}
    edits: dict[int, Edits] = {}
    draws: dict[int, Draws] = {}
    for row, (sampler, tokens) in enumerate(asking):
        if sampler.fault is not None:
            failed[row] = sampler.fault
            continue
        try:
            edits[row] = sampler.edits(tokens, vocabulary)
            if sampler.params.temperature > 0:
                draws[row] = sampler.draws(tokens, vocabulary)
        except Exception as error:  # of any kind: the others of the step must not end with it
            failed[row] = str(error) or type(error).__name__
    scores = edited(logits, edits, {row: asking[row][0].params.repetition_penalty for row in edits})
    ids = next_tokens(logits, scores, draws).tolist()  # host sync: the step's one
    choices = []
    for row, ((sampler, _), token) in enumerate(zip(asking, ids)):
        wrong = failed.get(row) or _error_of(token, logits[row])
        if wrong is not None:
            choices.append(Choice(-1, None, wrong))
        else:
            wanted = sampler.params.logprobs
            choices.append(
                Choice(token, None if wanted is None else logprobs_of(logits[row][None], [token], wanted)[0])
            )
    return choices


def next_tokens(logits: Tensor, scores: Tensor, draws: dict[int, Draws]) -> Tensor:
    """int64 [B]: the likeliest of each row of scores, or drawn; NOT_FINITE and NONE_LEFT say why there is none.

    logits: what the model said, fp32 [B, V]; scores: after edits. No host sync.
    """
    likeliest = scores.argmax(-1)
    tokens = likeliest.where(scores.amax(-1) > -torch.inf, NONE_LEFT)
    finite = logits.amax(-1).isfinite()  # NaN, if one is
    if draws:
        rows = torch.tensor([*draws]).to(logits.device, non_blocking=True)
        sound = scores[rows].where(finite[rows, None], 0.0)
        tokens = tokens.index_copy(0, rows, draw(sound, [*draws.values()]))
    return tokens.where(finite, NOT_FINITE)


def edited(logits: Tensor, edits: dict[int, Edits], penalties: dict[int, float]) -> Tensor:
    """Scores [B, V] after every row's edits; logits itself where there are none. penalties: of repetition, by row."""
    vocabulary = logits.shape[1]
    scores = logits

    def place(tokens: Callable[[Edits], Sequence[int]]) -> Tensor | None:
        """Places in the flat scores, by row and list."""
        places = [row * vocabulary + token for row, one in edits.items() for token in tokens(one)]
        return torch.tensor(places).to(logits.device, non_blocking=True) if places else None

    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype).to(logits.device, non_blocking=True)

    def put(at: Tensor, values: Tensor) -> None:
        nonlocal scores
        scores = scores.flatten().index_copy(0, at, values).view_as(logits)

    limited = [row for row, one in edits.items() if one.allowed is not None]
    if limited:
        masks = torch.stack([mask for row in limited if (mask := edits[row].allowed) is not None])
        rows = torch.tensor(limited).to(logits.device, non_blocking=True)
        kept = scores[rows].masked_fill(~masks.to(logits.device, non_blocking=True), -torch.inf)
        scores = scores.index_copy(0, rows, kept)
    if (at := place(lambda one: [token for token, _ in one.added])) is not None:
        put(at, scores.flatten()[at] + numbers([bias for one in edits.values() for _, bias in one.added]))
    if (at := place(lambda one: [token for token, _ in one.subtracted])) is not None:
        put(at, scores.flatten()[at] - numbers([n for one in edits.values() for _, n in one.subtracted]))
    if (at := place(lambda one: one.forbidden)) is not None:
        put(at, torch.full(at.shape, -torch.inf, dtype=logits.dtype, device=logits.device))
    if (at := place(lambda one: one.penalized)) is not None:
        old = scores.flatten()[at]
        factors = numbers([penalties[row] for row, one in edits.items() for _ in one.penalized])
        put(at, torch.where(old < 0, old * factors, old / factors))
    return scores


def _error_of(token: int, logits: Tensor) -> str | None:
    if token == NOT_FINITE:
        worst = int(logits.argmax())  # of NaN, its place
        return f"the model's logits are not finite: {float(logits[worst])} for token {worst}"
    if token == NONE_LEFT:
        return "bad_words, allowed_token_ids, structured_outputs and min_tokens leave no token to choose"
    return None


def logprobs_of(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[Logprobs]:
    """Of one token of each row, and of the row's `num_top` likeliest. logits: fp32 [N, V]. A host sync."""
    scores = logits.log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = 1 + (scores > chosen).sum(1)
    top = scores.topk(min(num_top, scores.shape[1]))
    each = zip(chosen[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist())
    return [Logprobs(one, dict(zip(ids, values)), rank) for one, rank, ids, values in each]
