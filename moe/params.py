"""How a request wants its tokens chosen and its text ended: plain data, which loads neither torch nor transformers."""

import copy
import dataclasses
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

MAX_SEED = (1 << 63) - 1
MAX_SAMPLES = 1 << 14  # of one request: what a service must be able to hold
_MOST_STOP = 10_000  # characters of stop strings
_MOST_WORDS = 10_000  # bad words
_MAX_FACTOR = 1e6  # of temperatures and repetition penalties: beyond it, or under its inverse, float32 overflows


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What an answer must look like: exactly one of these. Needs the extra `grammar`.

    json: a JSON schema, or its text; json_object: any JSON object; regex: of the whole answer, in the syntax of Rust's
    regex; choice: one of these texts; grammar: in Lark's form (llguidance's docs/syntax.md) or GBNF.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        said = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        given = [name for name, value in said.items() if value not in (None, False)]
        if len(given) != 1:
            names = ", ".join(said)
            raise ValueError(f"structured_outputs must give exactly one of {names}; it gives {given or 'none'}")
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", json.dumps(self.json))
        if self.choice is not None:
            is_list = isinstance(self.choice, (list, tuple)) and all(isinstance(one, str) for one in self.choice)
            if not (is_list and self.choice and all(self.choice)):
                raise ValueError("structured_outputs.choice must be a list of texts that are not empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json", "regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"structured_outputs.{name} must be a text")

    @property
    def form(self) -> tuple[str, str]:
        """Its name, and its text; choices as a JSON list."""
        if self.json_object:
            return "json_object", ""
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        return next((n, str(v)) for n in ("json", "regex", "grammar") if (v := getattr(self, n)) is not None)


GuidedDecodingParams = StructuredOutputsParams  # its former name in vLLM


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The parameters that offline batch APIs have. A value of None stands for the default.

    temperature 0 is greedy. `seed` makes a request's tokens independent of what it is batched with; without one (None,
    or -1) every request draws its own. `n` samples come from seeds seed, seed + 1, …; a negative one is
    2^63 more. `max_tokens` None: to the end or the context.
    `logprobs`: how many alternatives to report beside the chosen token (0: only the chosen one; None: nothing);
    `prompt_logprobs`: the same for the prompt. `stop` strings end the text before them. Presence and frequency
    penalties count the answer's tokens, the repetition penalty the prompt's too. Until `min_tokens` nothing ends but an
    answer that `structured_outputs` leaves nothing to add to. `guided_decoding` is its former name.
    """

    max_tokens: int | None = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0 or -1 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    bad_words: tuple[str, ...] = ()  # texts that must not be completed; needs a tokenizer
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # the same as token ids
    allowed_token_ids: tuple[int, ...] | None = None  # all others are never chosen
    skip_special_tokens: bool = True
    detokenize: bool = True  # False: outputs have no text
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: InitVar[StructuredOutputsParams | Mapping[str, Any] | None] = None
    end_token_ids: tuple[int, ...] = ()  # all that end the answer; filled in when a request is queued

    def __post_init__(self, guided_decoding: StructuredOutputsParams | Mapping[str, Any] | None) -> None:
        self._set(
            "structured_outputs",
            _structured(guided_decoding if self.structured_outputs is None else self.structured_outputs),
        )
        for one in dataclasses.fields(self):
            if getattr(self, one.name) is None and one.name not in _MAY_BE_NONE:
                self._set(one.name, {} if one.name == "logit_bias" else one.default)
        self._read_kinds()
        self._set("top_k", 0 if self.top_k == -1 else self.top_k)
        if self.seed is not None and -MAX_SEED - 1 <= self.seed < 0:
            self._set("seed", None if self.seed == -1 else self.seed & MAX_SEED)
        _check(self._rules())

    def _read_kinds(self) -> None:
        """Every value as its field says, numpy's numbers too. Raises ValueError for another kind."""
        for name in _WHOLE:
            if getattr(self, name) is not None:
                self._set(name, _whole(name, getattr(self, name)))
        for name in _REAL:
            self._set(name, _real(name, getattr(self, name)))
        for name in _FLAGS:
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be true or false")
            self._set(name, bool(getattr(self, name)))
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            listed = (texts,) if isinstance(texts, str) else _listed(name, texts)
            if not all(isinstance(text, str) for text in listed):
                raise ValueError(f"{name} must be a text or a list of texts")
            self._set(name, listed)
        for name in ("stop_token_ids", "end_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                self._set(name, token_ids(name, getattr(self, name)))
        words = _listed("bad_words_ids", self.bad_words_ids)
        self._set("bad_words_ids", tuple(token_ids("bad_words_ids", word) for word in words))
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, it is a {type(self.logit_bias).__name__}")
        biases = [(_id_of(token), _real("logit_bias", bias)) for token, bias in self.logit_bias.items()]
        self._set("logit_bias", dict(biases))

    def resolved(self, *, seed: int, max_tokens: int, end_token_ids: Iterable[int]) -> "SamplingParams":
        """These parameters with what only the engine knows."""
        # A form says itself where it may end; the model's end is how the model says that it does.
        ends = () if self.ignore_eos and self.structured_outputs is None else tuple(end_token_ids)
        one = self if self.max_tokens is not None else dataclasses.replace(self, max_tokens=max_tokens)
        seed = seed if self.seed is None else self.seed
        return one._with(seed=seed, end_token_ids=tuple(sorted({*ends, *self.stop_token_ids})))

    def sample(self, index: int) -> "SamplingParams":
        """Of sample `index` of n; the first tells of the prompt."""
        seed = None if self.seed is None else self.seed + index & MAX_SEED
        return self._with(n=1, seed=seed, prompt_logprobs=self.prompt_logprobs if index == 0 else None)

    def _with(self, **values: Any) -> "SamplingParams":
        """The same but for these values, which are right: nothing is checked again."""
        one = copy.copy(self)
        for name, value in values.items():
            one._set(name, value)
        return one

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _rules(self) -> dict[str, bool]:
        """What must be true, by the sentence that says so."""
        low, high = 1 / _MAX_FACTOR, _MAX_FACTOR
        allowed = self.allowed_token_ids
        return {
            f"max_tokens ({self.max_tokens}) must be >= 1": self.max_tokens is None or self.max_tokens >= 1,
            f"min_tokens ({self.min_tokens}) must lie in [0, max_tokens]": self.min_tokens >= 0
            and (self.max_tokens is None or self.min_tokens <= self.max_tokens),
            f"temperature ({self.temperature}) must be 0 (greedy) or lie in [1e-6, 1e6]": self.temperature == 0
            or low <= self.temperature <= high,
            f"top_k ({self.top_k}) must be >= 0; 0 or -1 keeps all": self.top_k >= 0,
            f"top_p ({self.top_p}) must lie in [0, 1]": 0 <= self.top_p <= 1,
            f"min_p ({self.min_p}) must lie in [0, 1]": 0 <= self.min_p <= 1,
            f"repetition_penalty ({self.repetition_penalty}) must lie in [1e-6, 1e6]": low
            <= self.repetition_penalty
            <= high,
            f"presence_penalty ({self.presence_penalty}) must lie in [-2, 2]": -2 <= self.presence_penalty <= 2,
            f"frequency_penalty ({self.frequency_penalty}) must lie in [-2, 2]": -2 <= self.frequency_penalty <= 2,
            f"n ({self.n}) must lie in [1, {MAX_SAMPLES}]": 1 <= self.n <= MAX_SAMPLES,
            f"seed ({self.seed}) must lie in [-2^63, 2^63)": self.seed is None or 0 <= self.seed <= MAX_SEED,
            f"logprobs ({self.logprobs}) must be >= 0": self.logprobs is None or self.logprobs >= 0,
            f"prompt_logprobs ({self.prompt_logprobs}) must be >= 0": self.prompt_logprobs is None
            or self.prompt_logprobs >= 0,
            "stop strings must not be empty": all(self.stop),
            "stop strings need text; leave out detokenize=False, or use stop_token_ids": self.detokenize
            or not self.stop,
            f"stop must have at most {_MOST_STOP} characters in all, which every step looks for": sum(
                map(len, self.stop)
            )
            <= _MOST_STOP,
            f"bad_words must be at most {_MOST_WORDS}, of two forms each, which every step looks for": (
                len(self.bad_words) <= _MOST_WORDS and len(self.bad_words_ids) <= 2 * _MOST_WORDS
            ),
            "bad_words must not be empty texts": all(self.bad_words) and all(self.bad_words_ids),
            "logit_bias must lie in [-100, 100]": all(-100 <= b <= 100 for b in self.logit_bias.values()),
            "allowed_token_ids must name at least one token": allowed is None or bool(allowed),
        }


_WHOLE = ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs")
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
_MAY_BE_NONE = {"max_tokens", "seed", "logprobs", "prompt_logprobs", "allowed_token_ids", "structured_outputs"}


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} ({str(value)[:60]!r}) must be a whole number") from None


def _real(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{name} ({str(value)[:60]!r}) must be a number") from None


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, it is a {type(values).__name__}")
    return tuple(values)


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """As plain numbers, whatever they were given as (numpy, torch). Raises ValueError for what is no list of them."""
    return tuple(_whole(name, value) for value in _listed(name, values))


def _id_of(token: Any) -> int:
    """Of logit_bias: keys of JSON are texts."""
    if isinstance(token, str) and token.removeprefix("-").isdecimal():
        return int(token)
    return _whole("logit_bias", token)


def _structured(given: StructuredOutputsParams | Mapping[str, Any] | None) -> StructuredOutputsParams | None:
    """given: also as plain data, as ranks tell each other. Raises ValueError for fields that it does not have."""
    if given is None or isinstance(given, StructuredOutputsParams):
        return given
    known = {one.name for one in dataclasses.fields(StructuredOutputsParams)}
    if not isinstance(given, Mapping) or set(given) - known:
        raise ValueError(f"structured_outputs must be an object with one of {', '.join(sorted(known))}")
    return StructuredOutputsParams(**given)


def _check(rules: Mapping[str, bool]) -> None:
    for message, is_right in rules.items():
        if not is_right:
            raise ValueError(message)


class Logprob(NamedTuple):
    """Of one token at one place: natural log-probability before temperature and filters, 1 + how many were likelier,
    its text, and its bytes, which may be a part of a character's; None where they are not known."""

    logprob: float
    rank: int
    decoded_token: str
    token_bytes: bytes | None = None
