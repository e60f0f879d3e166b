"""OpenAI's requests and responses as data: pure functions that batch files, the server and the client share.

What a request asks for and cannot have is refused by its name; what is there and asks for nothing is accepted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from moe.outputs import Completion
from moe.params import Logprob, SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_N = 128  # samples of one request, as in the format
_COMPLETION_TOKENS = 16  # of an answer on COMPLETIONS, by the format; a chat goes to its end or the context
_TEMPERATURE = 1.0  # what the format says when neither request nor model does

_NUMBERS: dict[str, type] = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "seed": int,
    "n": int,
}
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
_TOKEN_LISTS = ("stop_token_ids", "allowed_token_ids")
_READ_ELSEWHERE = {
    *("model", "prompt", "messages", "stop", "logprobs", "top_logprobs", "stream", "stream_options", "logit_bias"),
    *("max_completion_tokens", "bad_words", "chat_template_kwargs", "reasoning_effort"),
}
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
# Accepted with these values (and null), which ask for nothing; refused with any other.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
}


class BadRequest(ValueError):
    """The request cannot be served; the sentence is for whoever sent it. param: the field that is at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request whose form is right. Either prompts (texts or token ids) or messages."""

    url: str
    params: SamplingParams
    model: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    stream: bool = False
    include_usage: bool = False

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT


def parse_request(url: Any, body: Any, recommended: Mapping[str, Any] | None = None) -> Ask:
    """Reads the body of a request to `url`. recommended: the model's own sampling, for what the request leaves open.

    Raises BadRequest, or ValueError for values that sampling does not take.
    """
    if url not in (COMPLETIONS, CHAT):
        raise BadRequest(f"url must be {COMPLETIONS} or {CHAT}, not {url!r}", "url")
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object")
    _check_fields(body)
    params = SamplingParams(**_sampling(body, url == CHAT, recommended or {}))
    model, stream = body.get("model"), body.get("stream")
    if not (model is None or isinstance(model, str)):
        raise BadRequest(f"model ({model!r}) must be a string", "model")
    if not (stream is None or isinstance(stream, bool)):
        raise BadRequest(f"stream ({stream!r}) must be true or false", "stream")
    options = body.get("stream_options") or {}
    return Ask(
        url=url,
        params=params,
        model=model,
        prompts=() if url == CHAT else _prompts(body.get("prompt")),
        messages=_messages(body.get("messages")) if url == CHAT else (),
        template=_template(body),
        stream=bool(stream),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            if name == "best_of" and value == body.get("n"):
                continue
            raise BadRequest(f"{name} ({str(value)[:60]}) is not supported; leave it out", name)
    known = {*_NUMBERS, *_FLAGS, *_TOKEN_LISTS, *_READ_ELSEWHERE, *_WITHOUT_EFFECT, *_NEUTRAL}
    if unknown := sorted(set(body) - known):
        raise BadRequest(f"body has unknown fields {', '.join(unknown)}", unknown[0])


def _sampling(body: Mapping[str, Any], is_chat: bool, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SamplingParams."""
    values: dict[str, Any] = {"temperature": _TEMPERATURE, "max_tokens": None if is_chat else _COMPLETION_TOKENS}
    values |= recommended
    given = dict(body)
    if given.get("max_completion_tokens") is not None:
        given["max_tokens"] = given["max_completion_tokens"]
    for name, kind in _NUMBERS.items():
        if given.get(name) is not None:
            values[name] = _number(name, given[name], kind)
    for name in _FLAGS:
        if given.get(name) is not None:
            if not isinstance(given[name], bool):
                raise BadRequest(f"{name} ({given[name]!r}) must be true or false", name)
            values[name] = given[name]
    for name in _TOKEN_LISTS:
        if given.get(name) is not None:
            if not (isinstance(given[name], list) and all(type(t) is int for t in given[name])):
                raise BadRequest(f"{name} must be a list of token ids", name)
            values[name] = tuple(given[name])
    if values.get("n", 1) > MAX_N:
        raise BadRequest(f"n ({values['n']}) must be <= {MAX_N}", "n")
    return values | {
        "stop": _strings("stop", given.get("stop")),
        "bad_words": _strings("bad_words", given.get("bad_words")),
        "logit_bias": _logit_bias(given.get("logit_bias")),
        "logprobs": _num_logprobs(given),
    }


def _number(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise BadRequest(f"{name} ({value!r}) must be a {'whole number' if kind is int else 'number'}", name)
    try:
        return kind(value)
    except OverflowError:
        raise BadRequest(f"{name} is too large", name) from None


def _strings(name: str, value: Any) -> tuple[str, ...]:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not (isinstance(listed, list) and all(isinstance(s, str) for s in listed)):
        raise BadRequest(f"{name} must be a string or a list of strings", name)
    return tuple(listed)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    try:
        if not isinstance(value, dict) or any(isinstance(bias, (bool, str)) for bias in value.values()):
            raise ValueError
        return {int(token): float(bias) for token, bias in value.items()}
    except (ValueError, TypeError, OverflowError):
        raise BadRequest("logit_bias must be an object of token ids and numbers", "logit_bias") from None


def _num_logprobs(body: Mapping[str, Any]) -> int | None:
    """Alternatives to report. A chat says true and `top_logprobs`, a completion gives the number itself."""
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if logprobs is True:
        logprobs = 0 if top is None else top
        if type(logprobs) is not int:
            raise BadRequest(f"top_logprobs ({logprobs!r}) must be a whole number", "top_logprobs")
    if logprobs is None or logprobs is False:
        return None
    if type(logprobs) is not int:
        raise BadRequest(f"logprobs ({logprobs!r}) must be true, false or a whole number", "logprobs")
    return logprobs


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several: a text, a list of token ids, or a list of these."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(t) is int for t in value):
            return (tuple(value),)
        if all(isinstance(p, str) or (isinstance(p, list) and p and all(type(t) is int for t in p)) for p in value):
            return tuple(p if isinstance(p, str) else tuple(p) for p in value)
    raise BadRequest("prompt must be a string or a list of token ids, or a list of these", "prompt")


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not (isinstance(value, list) and value and all(isinstance(m, dict) for m in value)):
        raise BadRequest("messages must be a list of {role, content}", "messages")
    return tuple(value)


def _template(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs")
    effort = body.get("reasoning_effort")
    return ({} if effort is None else {"reasoning_effort": effort}) | given


# What comes back.


def response_body(
    ask: Ask, answers: Sequence[Completion], *, request_id: str, created: int, model: str, prompt_tokens: int
) -> dict[str, Any]:
    """The whole answer. answers: of all prompts, n of each, in order."""
    num_top = ask.params.logprobs or 0
    return {
        "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if ask.is_chat else "text_completion",
        "created": created,
        "model": ask.model or model,
        "choices": [
            {"index": i, **(_chat_choice(answer, num_top) if ask.is_chat else _completion_choice(answer))}
            for i, answer in enumerate(answers)
        ],
        "usage": usage(prompt_tokens, sum(len(answer.token_ids) for answer in answers)),
    }


def chunk_body(
    ask: Ask, choices: Sequence[Mapping[str, Any]], *, request_id: str, created: int, model: str
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    return {
        "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion.chunk" if ask.is_chat else "text_completion",
        "created": created,
        "model": ask.model or model,
        "choices": list(choices),
    }


def chunk_choice(
    ask: Ask, index: int, text: str, finish: str | None, logprobs: Sequence[dict[int, Logprob]] | None, *, first: bool
) -> dict[str, Any]:
    """What is new of one sample."""
    if not ask.is_chat:
        found = None if logprobs is None else completion_logprobs(logprobs)
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": found}
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    delta |= {"content": text} if text or first else {}
    found = None if logprobs is None else chat_logprobs(logprobs, ask.params.logprobs or 0)
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": found}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What a failed call answers."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _completion_choice(answer: Completion) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else completion_logprobs(answer.logprobs)
    return {"text": answer.text, "finish_reason": answer.finish_reason, "logprobs": logprobs}


def _chat_choice(answer: Completion, num_top: int) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else chat_logprobs(answer.logprobs, num_top)
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {"message": message, "finish_reason": answer.finish_reason, "logprobs": logprobs}


def completion_logprobs(logprobs: Sequence[dict[int, Logprob]], offset: int = 0) -> dict[str, Any]:
    """As /v1/completions reports them. offset: of the first token's text in the answer."""
    chosen = [next(iter(step.values())) for step in logprobs]
    offsets = []
    for one in chosen:
        offsets.append(offset)
        offset += len(one.decoded_token)
    return {
        "tokens": [one.decoded_token for one in chosen],
        "token_logprobs": [_finite(one.logprob) for one in chosen],
        "top_logprobs": [_likeliest(step) for step in logprobs],
        "text_offset": offsets,
    }


def _likeliest(step: Mapping[int, Logprob]) -> dict[str, float]:
    """By text; of two tokens that read the same, the likelier. The chosen one is among them, as the format has it."""
    found: dict[str, float] = {}
    for one in sorted(step.values(), key=lambda one: one.rank):
        found.setdefault(one.decoded_token, _finite(one.logprob))
    return found


def chat_logprobs(logprobs: Sequence[dict[int, Logprob]], num_top: int) -> dict[str, Any]:
    """As /v1/chat/completions reports them, with the `num_top` likeliest beside each chosen token."""
    content = []
    for step in logprobs:
        ranked = sorted(step.values(), key=lambda one: one.rank)
        content.append(_token(next(iter(step.values()))) | {"top_logprobs": [_token(one) for one in ranked[:num_top]]})
    return {"content": content, "refusal": None}


def _token(one: Logprob) -> dict[str, Any]:
    text = one.decoded_token
    return {"token": text, "logprob": _finite(one.logprob), "bytes": list(text.encode(errors="replace"))}


def _finite(logprob: float) -> float:
    """JSON has no infinity; the format's own number for what cannot happen."""
    return max(logprob, -9999.0)


def custom_id_of(fields: Any) -> str:
    """Of a line of a batch file. Raises BadRequest."""
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str):
        raise BadRequest("must be a JSON object with a custom_id string")
    return cast(str, fields["custom_id"])


def parse_batch_line(fields: Mapping[str, Any], recommended: Mapping[str, Any] | None = None) -> Ask:
    """The request in a line of a batch file. Raises BadRequest, ValueError."""
    method = fields.get("method", "POST")
    if not isinstance(method, str) or method.upper() != "POST":
        raise BadRequest(f"method must be POST, not {method!r}", "method")
    ask = parse_request(fields.get("url"), fields.get("body"), recommended)
    if ask.stream:
        raise BadRequest("stream (true) is not supported in a batch file; leave it out", "stream")
    if len(ask.prompts) > 1:
        raise BadRequest("prompt must be a string or a list of token ids: one prompt a line", "prompt")
    return ask
