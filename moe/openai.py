"""OpenAI's requests as data: pure functions that batch files, the server and the client share.

What a request asks for and cannot have is refused by its name; what is there and asks for nothing is accepted.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from moe.params import Logprob, SamplingParams, StructuredOutputsParams
from moe.plain_text import utf8_of
from moe.tools import FORMATS, FreeReader, ListReader, NamedReader, Reader, Tool, ToolFormat, forced_schema, name_of

PromptLogprobs = Sequence[Mapping[int, Logprob] | None] | None  # one per token
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_N = 128  # samples of one request, as in the format
MAX_LOGPROBS = 20  # alternatives of a token, as in the format: each is text that every step makes
_COMPLETION_TOKENS = 16  # of an answer on COMPLETIONS, by the format; a chat goes to its end or the context
_TEMPERATURE = 1.0  # what the format says when neither request nor model does

NUMBERS: dict[str, type] = {
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
    "prompt_logprobs": int,
}
FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
TOKEN_LISTS = ("stop_token_ids", "allowed_token_ids")
_READ_ELSEWHERE = {
    *("model", "prompt", "messages", "stop", "logprobs", "top_logprobs", "stream", "stream_options", "logit_bias"),
    *("max_completion_tokens", "bad_words", "chat_template_kwargs", "reasoning_effort"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("tools", "tool_choice", "parallel_tool_calls", "return_token_ids"),
}
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
# Accepted with these values (and null), which ask for nothing; refused with any other.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
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
}


_GUIDED = {f"guided_{form}": form for form in ("json", "regex", "choice", "grammar")}  # vLLM's former names


class BadRequest(ValueError):
    """The request cannot be served; the sentence is for whoever sent it. param: the field that is at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request whose form is right. Either prompts (texts or token ids) or messages. tells_ids: the answer has the
    token ids of prompt and answer, too."""

    url: str
    params: SamplingParams
    model: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    stream: bool = False
    include_usage: bool = False
    tells_ids: bool = False
    tools: "Tools | None" = None

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT

    def reader(self) -> Reader | None:
        """Of one answer that may hold calls; None where no tools are offered."""
        return None if self.tools is None else self.tools.reader()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What a request offers. name: of the tool that must be called; is_forced: some call must be made."""

    form: ToolFormat
    offered: tuple[Tool, ...]
    is_forced: bool = False
    name: str | None = None
    most: int | None = None  # calls of an answer

    def reader(self) -> Reader:
        if self.name is not None:
            return NamedReader(self.name, self.form.new_id)
        return ListReader(self.form.new_id) if self.is_forced else FreeReader(self.form, self.offered, self.most)


def parse_request(
    url: Any, body: Any, recommended: Mapping[str, Any] | None = None, tool_format: ToolFormat | None = None
) -> Ask:
    """Reads the body of a request to `url`. recommended: the model's own sampling, for what the request leaves open;
    tool_format: how it writes calls of tools, None if it has no form for them.

    Raises BadRequest, or ValueError for values that sampling does not take.
    """
    if url not in (COMPLETIONS, CHAT):
        raise BadRequest(f"url must be {COMPLETIONS} or {CHAT}, not {url!r}", "url")
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object")
    _check_fields(body)
    if url == COMPLETIONS and body.get("tools"):
        raise BadRequest(f"tools are of {CHAT}, not of {COMPLETIONS}", "tools")
    tools = _tools(body, tool_format) if url == CHAT else None
    values = _sampling(body, url == CHAT, recommended or {}) | {"structured_outputs": _form(body, tools)}
    try:
        params = SamplingParams(**values)
    except ValueError as error:  # its sentences begin with a name
        raise BadRequest(str(error), next(filter(str(error).startswith, body), None)) from None
    if tools is not None and not tools.is_forced:
        params = dataclasses.replace(params, skip_special_tokens=False)  # calls may stand between special tokens
    model, stream = body.get("model"), _flag(body, "stream")
    if not (model is None or isinstance(model, str)):
        raise BadRequest(f"model ({model!r}) must be a string", "model")
    if stream and params.prompt_logprobs is not None:
        raise BadRequest("prompt_logprobs cannot be streamed; leave out stream", "prompt_logprobs")
    return Ask(
        url=url,
        params=params,
        model=model,
        prompts=() if url == CHAT else _prompts(body.get("prompt")),
        messages=_messages(body.get("messages")) if url == CHAT else (),
        template=_template(body) | ({} if tools is None else {"tools": list(tools.offered)}),
        tools=tools,
        stream=stream,
        tells_ids=_flag(body, "return_token_ids"),
        include_usage=_includes_usage(body.get("stream_options") or {}),
    )


def _includes_usage(options: Any) -> bool:
    if not isinstance(options, dict) or any(
        options[n] for n in set(options) - {"include_usage", "include_obfuscation"}
    ):
        raise BadRequest("stream_options must be an object, of which include_usage is supported", "stream_options")
    return _flag(options, "include_usage")


def _flag(body: Mapping[str, Any], name: str) -> bool:
    if not isinstance(value := body.get(name), bool | None):
        raise BadRequest(f"{name} ({value!r}) must be true or false", name)
    return bool(value)


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            if name == "best_of" and value == body.get("n"):
                continue
            raise BadRequest(f"{name} ({str(value)[:60]}) is not supported; leave it out", name)
    known = {*NUMBERS, *FLAGS, *TOKEN_LISTS, *_READ_ELSEWHERE, *WITHOUT_EFFECT, *NEUTRAL}
    if unknown := sorted(set(body) - known):
        raise BadRequest(f"body has unknown fields {', '.join(unknown)}", unknown[0])


def _form(body: Mapping[str, Any], tools: Tools | None) -> StructuredOutputsParams | None:
    """What the answer must look like, by whichever of the names for it was used."""
    given = {name: {form: body[name]} for name, form in _GUIDED.items() if body.get(name) is not None}
    if body.get("structured_outputs") is not None:
        given["structured_outputs"] = body["structured_outputs"]
    if (wanted := body.get("response_format")) is not None and wanted != {"type": "text"}:
        given["response_format"] = _response_format(wanted)
    if len(given) > 1:
        raise BadRequest(f"{' and '.join(given)} cannot be given together", next(iter(given)))
    if tools is not None and given:
        raise BadRequest(f"{next(iter(given))} and tools cannot be given together", next(iter(given)))
    if tools is not None and tools.is_forced:
        return StructuredOutputsParams(json=forced_schema(tools.offered, tools.name, tools.most))
    for name, form in given.items():
        known = {one.name for one in dataclasses.fields(StructuredOutputsParams)}
        if not isinstance(form, Mapping) or set(form) - known:
            raise BadRequest(f"{name} must be an object with one of {', '.join(sorted(known))}", name)
        try:
            return StructuredOutputsParams(**form)
        except ValueError as error:
            raise BadRequest(str(error), name) from None
    return None


def _response_format(wanted: Any) -> dict[str, Any]:
    """Also with `value`, a schema, as text-generation-inference and clients made for it have it."""
    match wanted:
        case {"type": "json_object", **rest} if not rest:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}, **rest} if not rest:
            return {"json": schema}
        case {"type": "json_object" | "json", "value": dict(schema), **rest} if not rest:
            return {"json": schema}
    raise BadRequest(
        "response_format must be of type text, json_object, or json_schema with json_schema.schema, an object",
        "response_format",
    )


def _tools(body: Mapping[str, Any], form: ToolFormat | None) -> Tools | None:
    """None where none are offered, or none may be called."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise BadRequest("tools must be a list of {type: function, function: {name, parameters}}", "tools")
    names = [name_of(tool) for tool in tools]
    name = None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
        if name not in names:
            has = ", ".join(names) or "none"
            raise BadRequest(f"tool_choice names no tool of the request; it has {has}", "tool_choice")
    elif choice not in (None, "none", "auto", "required"):
        raise BadRequest(f"tool_choice ({str(choice)[:60]}) must be none, auto, required or a function", "tool_choice")
    if choice == "required" and not tools:
        raise BadRequest("tool_choice is required, and there are no tools", "tool_choice")
    if not isinstance(parallel := body.get("parallel_tool_calls"), bool | None):
        raise BadRequest(f"parallel_tool_calls ({str(parallel)[:60]}) must be true or false", "parallel_tool_calls")
    if not tools or choice == "none":
        return None
    if form is None:
        known = ", ".join(one.name for one in FORMATS)
        raise BadRequest(
            f"tools ({len(tools)}) are not supported: the model's chat template writes calls in none of the forms that "
            f"are read ({known}); leave them out",
            "tools",
        )
    is_forced = choice == "required" or name is not None
    return Tools(form=form, offered=tuple(tools), is_forced=is_forced, name=name, most=1 if parallel is False else None)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return False
    parameters = function.get("parameters") or {}
    return isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict | None)


def _sampling(body: Mapping[str, Any], is_chat: bool, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of SamplingParams."""
    values: dict[str, Any] = {"temperature": _TEMPERATURE, "max_tokens": None if is_chat else _COMPLETION_TOKENS}
    values |= recommended
    given = dict(body)
    if given.get("max_completion_tokens") is not None:
        given["max_tokens"] = given["max_completion_tokens"]
    for name, kind in NUMBERS.items():
        if given.get(name) is not None:
            values[name] = _number(name, given[name], kind)
    for name in FLAGS:
        if given.get(name) is not None:
            values[name] = _flag(given, name)
    for name in TOKEN_LISTS:
        if given.get(name) is not None:
            if not (isinstance(given[name], list) and all(type(t) is int for t in given[name])):
                raise BadRequest(f"{name} must be a list of token ids", name)
            values[name] = tuple(given[name])
    if values.get("n", 1) > MAX_N:
        raise BadRequest(f"n ({values['n']}) must be <= {MAX_N}", "n")
    _check_most("prompt_logprobs", values.get("prompt_logprobs", 0))
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
    elif top:
        raise BadRequest(f"top_logprobs ({str(top)[:60]}) needs logprobs: true", "top_logprobs")
    if logprobs is None or logprobs is False:
        return None
    if type(logprobs) is not int:
        raise BadRequest(f"logprobs ({logprobs!r}) must be true, false or a whole number", "logprobs")
    _check_most("top_logprobs" if top is not None else "logprobs", logprobs)
    return logprobs


def _check_most(name: str, number: int) -> None:
    if number > MAX_LOGPROBS:
        raise BadRequest(f"{name} ({number}) must be <= {MAX_LOGPROBS}", name)


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


def lines_of(content: bytes, name: str) -> list[bytes]:
    """Of a batch file. Raises ValueError for UTF-16 and UTF-32."""
    return utf8_of(content, name).splitlines()


def json_of(content: bytes, name: str = "") -> Any:
    """Of a body, or of a line of a batch file. Raises BadRequest that says so of `name`."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} is not valid JSON: {error}".strip()) from None


def custom_id_of(fields: Any) -> str:
    """Of a line of a batch file. Raises BadRequest."""
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str):
        raise BadRequest("must be a JSON object with a custom_id string")
    return cast(str, fields["custom_id"])


def parse_batch_line(
    fields: Mapping[str, Any], recommended: Mapping[str, Any] | None = None, tool_format: ToolFormat | None = None
) -> Ask:
    """The request in a line of a batch file. Raises BadRequest, ValueError."""
    method = fields.get("method", "POST")
    if not isinstance(method, str) or method.upper() != "POST":
        raise BadRequest(f"method must be POST, not {method!r}", "method")
    ask = parse_request(fields.get("url"), fields.get("body"), recommended, tool_format)
    if ask.stream:
        raise BadRequest("stream (true) is not supported in a batch file; leave it out", "stream")
    if len(ask.prompts) > 1:
        raise BadRequest("prompt must be a string or a list of token ids: one prompt a line", "prompt")
    return ask
