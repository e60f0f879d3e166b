"""Calls of tools in every form that is read: as the makers' templates write them, whole and in pieces."""

import json
import random
import sys

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from moe.answers import chunk_body, chunk_choice, response_body
from moe.openai import CHAT, COMPLETIONS, BadRequest, parse_request
from moe.outputs import Completion
from moe.prompts import PromptEncoder
from moe.tools import FORMATS, FreeReader, forced_schema, format_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": None}},
]
WEATHER, NOW = ("weather", {"city": "Lübeck <3", "days": 2}), ("now", {})
ARGUMENTS = json.dumps(WEATHER[1], ensure_ascii=False)
BY_NAME = {form.name: form for form in FORMATS}
# (format, what the model says, content, calls)
SAID = [
    (
        "Hermes and Qwen",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see.",
        [WEATHER, NOW],
    ),
    ("Hermes and Qwen", "a < b, and <tool> is a word\n", "a < b, and <tool> is a word\n", []),
    ("Hermes and Qwen", "<tool_call>\nnot JSON\n</tool_call> b", "<tool_call>\nnot JSON\n</tool_call> b", []),
    ("Hermes and Qwen", '<tool_call>{"name": "now", "arguments": "{}"}', "", [NOW]),
    (
        "Qwen3-Coder",
        "<tool_call>\n<function=weather>\n<parameter=city>\nLübeck <3\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        [WEATHER],
    ),
    (
        "GLM",
        "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Lübeck <3</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "",
        [WEATHER, NOW],
    ),
    (
        "Mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        [WEATHER, NOW],
    ),
    ("Mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}", "", [WEATHER, NOW]),
    (
        "DeepSeek",
        "Yes.\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        + ARGUMENTS
        + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n"
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Yes.",
        [WEATHER, NOW],
    ),
    (
        "DeepSeek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        + ARGUMENTS
        + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [WEATHER],
    ),
    (
        "Kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        + ARGUMENTS
        + "<|tool_call_end|><|tool_calls_section_end|>",
        "",
        [WEATHER],
    ),
    (
        "gpt-oss",
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        "<|constrain|>json<|message|>" + ARGUMENTS,
        "",
        [WEATHER],
    ),
    ("gpt-oss", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.", "Hi.", []),
]


def ask(**more):
    body = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS} | more
    form = more.pop("form", BY_NAME["Hermes and Qwen"])
    body.pop("form", None)
    return parse_request(CHAT, body, None, form)


@pytest.mark.parametrize(("name", "text", "content", "calls"), SAID)
def test_a_whole_answer(name, text, content, calls):
    asked = ask(form=BY_NAME[name])
    assert not asked.params.skip_special_tokens
    body = response_body(asked, [Completion(0, text, [1], "stop")], request_id="1", created=1, model="m", prompts=[[1]])
    choice = ChatCompletion.model_validate(body).choices[0]
    assert (choice.message.content or "") == content
    found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]
    assert found == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert len({c.id for c in choice.message.tool_calls or []}) == len(calls)
    if name == "Mistral":
        assert all(len(c.id) == 9 and c.id.isalnum() for c in choice.message.tool_calls)
    assert body["choices"][0]["message"].get("reasoning_content") == {"They ask.": "They ask."}.get(
        "They ask." if "They ask." in text else "", "Hm." if "Hm." in text else None
    )


def streamed(asked, pieces, finish="stop"):
    """What a client makes of the chunks of these pieces."""
    reader, content, calls, finished = asked.reader(), "", {}, None
    for n, piece in enumerate(pieces):
        is_last = n == len(pieces) - 1
        choice = chunk_choice(asked, 0, piece, finish if is_last else None, None, first=n == 0, reader=reader)
        if choice is None:
            continue
        chunk = ChatCompletionChunk.model_validate(
            chunk_body(asked, [choice], request_id="1", created=1, model="m")
        ).choices[0]
        content += chunk.delta.content or ""
        finished = chunk.finish_reason or finished
        for one in chunk.delta.tool_calls or []:
            call = calls.setdefault(one.index, ["", ""])
            assert (one.id is None) == bool(call[0])
            call[0] += one.function.name or ""
            call[1] += one.function.arguments
    return (
        content,
        [(name, json.loads(arguments, parse_constant=pytest.fail)) for _, (name, arguments) in sorted(calls.items())],
        finished,
    )


@pytest.mark.parametrize(("name", "text", "content", "calls"), SAID)
@pytest.mark.parametrize("seed", range(6))
def test_pieces_say_what_the_whole_says(name, text, content, calls, seed):
    cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=seed * 9))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])] if seed < 5 else [*text, ""]
    assert streamed(ask(form=BY_NAME[name]), pieces) == (content, calls, "tool_calls" if calls else "stop")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_arguments_that_are_no_json_are_no_call(word):
    """Python reads and writes them; a client's parser would not."""
    text = f'<tool_call>{{"name": "weather", "arguments": {{"days": {word}}}}}</tool_call>'
    assert streamed(ask(), list(text)) == (text, [], "stop")
    coder = f"<tool_call><function=weather><parameter=days>{word}</parameter></function></tool_call>"
    assert streamed(ask(form=BY_NAME["Qwen3-Coder"]), [coder])[1] == [("weather", {"days": word})]


def test_a_number_that_is_too_large_is_the_largest():
    said = '{"name": "weather", "arguments": {"days": [1e999, -1e999, 2.5]}}'
    largest = ("weather", {"days": [sys.float_info.max, -sys.float_info.max, 2.5]})
    assert streamed(ask(), [f"<tool_call>{said}</tool_call>"])[1] == [largest]
    assert streamed(ask(tool_choice="required"), [f"[{said}]"])[1] == [largest]


def test_text_is_not_held_back_longer_than_it_must_be():
    reader = FreeReader(BY_NAME["Hermes and Qwen"], TOOLS)
    assert reader.feed("It is <tool", False).content == "It is"
    assert reader.feed("box> and", False).content == " <toolbox> and"


def test_one_call_alone():
    asked = ask(parallel_tool_calls=False)
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 3
    assert streamed(asked, list(text))[1] == [NOW]


def test_a_call_that_must_be_made():
    asked = ask(tool_choice={"type": "function", "function": {"name": "weather"}})
    assert json.loads(asked.params.structured_outputs.json) == TOOLS[0]["function"]["parameters"]
    assert streamed(asked, [*ARGUMENTS, ""]) == ("", [WEATHER], "tool_calls")
    some = ask(tool_choice="required", parallel_tool_calls=False)
    schema = json.loads(some.params.structured_outputs.json)
    assert schema == forced_schema(TOOLS, None, 1)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    text = f'[ {{"name": "weather", "arguments": {ARGUMENTS}}} , {{"name":"now","arguments":{{}}}}]'
    assert streamed(some, [*text, ""]) == ("", [WEATHER, NOW], "tool_calls")
    assert streamed(some, [text[:-20], ""], "length")[1:] == ([WEATHER], "length")


def test_no_call_may_be_made():
    asked = ask(tool_choice="none")
    assert asked.reader() is None
    assert "tools" not in asked.template
    assert ask().template["tools"] == TOOLS


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": {}, "tool_choice": "none"}, None),
        ({"tools": "weather"}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"form": None}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_asked_for(body, param):
    if param is None:
        assert ask(**body).tools is None
        return
    with pytest.raises(BadRequest) as error:
        ask(**body)
    assert error.value.param == param
    with pytest.raises(BadRequest, match="tools are of"):
        parse_request(COMPLETIONS, {"prompt": "a", "tools": TOOLS})


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ({"response_format": {"type": "json_object"}}, ("json_object", "")),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}}, ("json", '{"a": 1}')),
        ({"response_format": {"type": "json_object", "value": {"a": 1}}}, ("json", '{"a": 1}')),
        ({"guided_json": {"b": 1}}, ("json", '{"b": 1}')),
        ({"guided_choice": ["x", "y"]}, ("choice", '["x", "y"]')),
        ({"guided_regex": "x"}, ("regex", "x")),
        ({"structured_outputs": {"grammar": "start: x"}}, ("grammar", "start: x")),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None}, None),
    ],
)
def test_forms_of_answers(body, form):
    found = parse_request(COMPLETIONS, {"prompt": "a"} | body).params.structured_outputs
    assert (None if found is None else found.form) == form


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}}, "response_format"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
    ],
)
def test_forms_that_are_wrong(body, param):
    with pytest.raises(BadRequest) as error:
        parse_request(COMPLETIONS, {"prompt": "a"} | body)
    assert error.value.param == param


def test_a_template_tells_the_format():
    for form in FORMATS:
        assert format_of("{% if tools %}" + "".join(form.signs) + "{% endif %}") is form
        assert format_of({"default": "x", "tool_use": "tools" + "".join(form.signs)}) is form
        marks = [*(s.opens for s in form.spans), *form.dropped]
        assert not [(a, b) for a in marks for b in marks if a != b and b.startswith(a)]  # the first found is the one
    assert format_of(None) is format_of("{{ messages }} <tool_call>") is format_of("tools") is None


def test_templates_get_arguments_as_they_take_them():
    class Tokenizer:
        chat_template, bos_token_id = "x", None

        def __init__(self, take):
            self.take = take

        def apply_chat_template(self, messages, **_):
            return self.take(messages[1]["tool_calls"][0]["function"]["arguments"])

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for take in (lambda a: json.dumps(a | {}), lambda a: "" + a):
        assert bytes(PromptEncoder(Tokenizer(take), "m").encode_chat(messages)) == b'{"a": 1}'
    with pytest.raises(ValueError, match="does not take these messages"):
        PromptEncoder(Tokenizer(lambda a: 1 / 0), "m").encode_chat(messages)
