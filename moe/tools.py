"""Tools: what a request offers, and the calls in what the model says, whole or as it comes.

How a model writes calls is told by its chat template; each form below is documented by its makers there. A model whose
template shows none of them is refused tools by name. Text that only looks like a call stays text.
"""

import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "parameters", …}}


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _finite(word: str) -> float:
    return min(max(float(word), -sys.float_info.max), sys.float_info.max)  # 1e999 is JSON, its infinity is not


# As JSON is, not as Python reads and writes it.
_STRICT: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite}


class Call(NamedTuple):
    """arguments: JSON text."""

    name: str
    arguments: str


class CallDelta(NamedTuple):
    """What is new of call `number` of an answer; id and name come once, with the first."""

    number: int
    id: str | None
    name: str | None
    arguments: str


class Said(NamedTuple):
    """What is new of an answer."""

    content: str
    reasoning: str
    calls: list[CallDelta]


class Reader(Protocol):
    """Of one answer, fed piece by piece; equal pieces or one, the same is said in all."""

    @property
    def has_called(self) -> bool: ...
    def feed(self, text: str, is_finished: bool) -> Said: ...


Parse = Callable[[str, Sequence[Tool]], list[Call] | None]  # None: not a call after all


class Span(NamedTuple):
    """From `opens` to the first of `closes`, or the end of the answer. parse: None for reasoning."""

    opens: str
    closes: tuple[str, ...]
    parse: Parse | None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """signs: that all stand in the chat template of a model that writes so. dropped: marks that say nothing."""

    name: str
    signs: tuple[str, ...]
    spans: tuple[Span, ...]
    dropped: tuple[str, ...] = ()
    new_id: Callable[[], str] = field(default=lambda: f"call_{secrets.token_hex(12)}")


def _hermes(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """{"name": …, "arguments": {…}}"""
    return _calls_of([_json(body)])


def _mistral(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """[{"name": …, "arguments": {…}}, …] or, since its tokenizer v11, name[CALL_ID]id[ARGS]{…}, each after its mark."""
    calls: list[Call] = []
    for part in body.split("[TOOL_CALLS]"):
        if "[ARGS]" in part:
            name, _, arguments = part.partition("[ARGS]")
            found = _calls_of([{"name": name.partition("[CALL_ID]")[0].strip(), "arguments": _json(arguments)}])
        else:
            listed = _json(part)
            found = _calls_of(listed if isinstance(listed, list) else [listed])
        if found is None:
            return None
        calls += found
    return calls


def _deepseek(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """function<｜tool▁sep｜>name, then JSON in a fence; since V3.1 name<｜tool▁sep｜>{…}."""
    head, _, rest = body.partition("<｜tool▁sep｜>")
    if head.strip() == "function":
        name, _, rest = rest.partition("\n")
        rest = rest.strip().removeprefix("```json").removesuffix("```")
    else:
        name = head
    return _calls_of([{"name": name.strip(), "arguments": _json(rest)}])


def _kimi(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """functions.name:0<|tool_call_argument_begin|>{…}"""
    head, _, rest = body.partition("<|tool_call_argument_begin|>")
    name = head.strip().removeprefix("functions.").rpartition(":")[0]
    return _calls_of([{"name": name, "arguments": _json(rest)}])


def _harmony(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """to=functions.name <|constrain|>json<|message|>{…}"""
    head, _, rest = body.partition("<|message|>")
    found = re.search(r"to=functions\.([^\s<]+)", head)
    return None if found is None else _calls_of([{"name": found[1], "arguments": _json(rest)}])


def _glm(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """name, then <arg_key>k</arg_key><arg_value>v</arg_value> for each; texts are bare, all else is JSON."""
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
    return _named(body.partition("<arg_key>")[0].strip(), pairs, tools)


def _qwen_coder(body: str, tools: Sequence[Tool]) -> list[Call] | None:
    """<function=name><parameter=k>\nv\n</parameter>…</function>"""
    found = re.fullmatch(r"\s*<function=([^>\s]+)>(.*?)(</function>)?\s*", body, re.DOTALL)
    if found is None:
        return None
    pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
    return _named(found[1], pairs, tools)


_THINKS = "<|channel|>analysis<|message|>"
FORMATS = (
    ToolFormat(
        "gpt-oss",
        ("<|channel|>", "<|call|>"),
        (Span(_THINKS, ("<|end|>",), None), Span("<|channel|>commentary", ("<|call|>", "<|end|>"), _harmony)),
        ("<|channel|>final<|message|>", "<|start|>assistant", "<|return|>", "<|end|>"),
    ),
    ToolFormat(
        "DeepSeek",
        ("<｜tool▁call▁begin｜>",),
        (Span("<｜tool▁call▁begin｜>", ("<｜tool▁call▁end｜>",), _deepseek),),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "Kimi",
        ("<|tool_call_argument_begin|>",),
        (Span("<|tool_call_begin|>", ("<|tool_call_end|>",), _kimi),),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    # Its templates take ids of nine letters and digits alone.
    ToolFormat(
        "Mistral", ("[TOOL_CALLS]",), (Span("[TOOL_CALLS]", (), _mistral),), (), lambda: secrets.token_hex(5)[:9]
    ),
    ToolFormat("GLM", ("<tool_call>", "<arg_key>"), (Span("<tool_call>", ("</tool_call>",), _glm),)),
    ToolFormat(
        "Qwen3-Coder",
        ("<tool_call>", "<function=", "<parameter="),
        (Span("<tool_call>", ("</tool_call>",), _qwen_coder),),
    ),
    ToolFormat("Hermes and Qwen", ("<tool_call>",), (Span("<tool_call>", ("</tool_call>",), _hermes),)),
)


def format_of(template: Any) -> ToolFormat | None:
    """template: a tokenizer's chat template, or several by name; None if it writes calls in no form that is read."""
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    text = "".join(map(str, texts))
    if "tools" not in text:
        return None
    return next((one for one in FORMATS if all(sign in text for sign in one.signs)), None)


class FreeReader:
    """Of an answer that may hold calls. most: calls that are told, None = all."""

    def __init__(self, form: ToolFormat, tools: Sequence[Tool], most: int | None = None) -> None:
        self._form, self._tools, self._most = form, tools, most
        self._spans = {span.opens: span for span in form.spans}
        self._marks = (*self._spans, *form.dropped)
        self._open: Span | None = None
        self._waiting = ""  # may still become part of a mark, or of the span that is open
        self._space = ""  # white space before what comes: layout if that is a call
        self._num_calls = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def feed(self, text: str, is_finished: bool) -> Said:
        self._waiting += text
        said = Said("", "", [])
        while (more := self._outside(is_finished) if self._open is None else self._inside(is_finished)) is not None:
            said = Said(said.content + more.content, said.reasoning + more.reasoning, said.calls + more.calls)
        if is_finished and not self._num_calls:
            said = said._replace(content=said.content + self._space)
        return said

    def _outside(self, is_finished: bool) -> Said | None:
        """Up to the next mark; None when nothing more is certain."""
        places = [(at, mark) for mark in self._marks if (at := self._waiting.find(mark)) >= 0]
        at, mark = min(places, default=(len(self._waiting), ""))
        if not mark and not is_finished:
            at -= max((n for m in self._marks for n in range(1, len(m)) if self._waiting.endswith(m[:n])), default=0)
        if not mark and not at:
            return None
        text, self._waiting = self._waiting[:at], self._waiting[at + len(mark) :]
        self._open = self._spans.get(mark)
        return Said(self._with_space(text), "", [])

    def _inside(self, is_finished: bool) -> Said | None:
        assert self._open is not None
        span = self._open
        places = [(at, mark) for mark in span.closes if (at := self._waiting.find(mark)) >= 0]
        if not places and not is_finished:
            return None
        at, mark = min(places, default=(len(self._waiting), ""))
        body, self._waiting, self._open = self._waiting[:at], self._waiting[at + len(mark) :], None
        if span.parse is None:
            return Said("", body, [])
        calls = span.parse(body, self._tools)
        if calls is None:
            return Said(self._with_space(span.opens + body + mark), "", [])
        self._space = ""
        first, self._num_calls = self._num_calls, self._num_calls + len(calls)
        numbered = [
            CallDelta(i, self._form.new_id(), *call)
            for i, call in enumerate(calls, first)
            if self._most is None or i < self._most
        ]
        return Said("", "", numbered)

    def _with_space(self, text: str) -> str:
        """The text without the white space at its end, which is kept for what follows."""
        whole = self._space + text
        shown = whole.rstrip()
        self._space = whole[len(shown) :]
        return shown


class NamedReader:
    """Of an answer that is the arguments of one call, by `forced_schema`."""

    def __init__(self, name: str, new_id: Callable[[], str]) -> None:
        self._name: str | None = name
        self._new_id = new_id

    @property
    def has_called(self) -> bool:
        return self._name is None

    def feed(self, text: str, is_finished: bool) -> Said:
        if not text:
            return Said("", "", [])
        name, self._name = self._name, None
        return Said("", "", [CallDelta(0, self._new_id() if name else None, name, text)])


class ListReader:
    """Of an answer that is a list of calls, by `forced_schema`; each is told when it is whole."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._text, self._num_calls, self._new_id = "", 0, new_id

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def feed(self, text: str, is_finished: bool) -> Said:
        self._text += text
        found = []
        while start := re.match(r"\s*[\[,]\s*(?=\{)", self._text):
            try:
                one, end = json.JSONDecoder(**_STRICT).raw_decode(self._text, start.end())
            except ValueError:
                break
            self._text = self._text[end:]
            for call in _calls_of([one]) or []:
                found.append(CallDelta(self._num_calls, self._new_id(), *call))
                self._num_calls += 1
        return Said("", "", found)


def forced_schema(tools: Sequence[Tool], name: str | None, most: int | None) -> dict[str, Any]:
    """Of an answer that must be calls: of the tool `name` its arguments, else a list of calls, at most `most`."""
    if name is not None:
        return _parameters(next(tool for tool in tools if name_of(tool) == name))
    one = [
        {
            "type": "object",
            "properties": {"name": {"const": name_of(tool)}, "arguments": _parameters(tool)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    bound = {} if most is None else {"maxItems": most}
    return {"type": "array", "minItems": 1, **bound, "items": {"anyOf": one}}


def name_of(tool: Tool) -> str:
    return str(tool["function"]["name"])


def _parameters(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **(tool["function"].get("parameters") or {})}


def _named(name: str, pairs: Sequence[tuple[str, str]], tools: Sequence[Tool]) -> list[Call] | None:
    """A call whose values are bare texts where the tool asks for a string."""
    tool = next((one for one in tools if name_of(one) == name), None)
    types = {} if tool is None else _parameters(tool).get("properties") or {}
    arguments = {}
    for key, value in pairs:
        kind = types.get(key.strip())
        is_text = isinstance(kind, Mapping) and kind.get("type") == "string"
        read = value if is_text else _json(value)
        arguments[key.strip()] = value if read is None and value.strip() != "null" else read
    return _calls_of([{"name": name, "arguments": arguments}])


def _calls_of(listed: Sequence[Any]) -> list[Call] | None:
    """None unless each has a name and arguments that are an object, or its text."""
    calls = []
    for one in listed:
        if not isinstance(one, Mapping):
            return None
        arguments = one.get("arguments", one.get("parameters"))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not (isinstance(one.get("name"), str) and one["name"] and isinstance(arguments, Mapping)):
            return None
        calls.append(Call(one["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
    return calls


def _json(text: str) -> Any:
    """None if it is not JSON, which has no NaN and no infinity, whatever Python reads and writes."""
    try:
        return json.loads(text, **_STRICT)
    except (ValueError, RecursionError):
        return None
