"""Completions and chats of the service, asked by the official client, by another, and by callers that misbehave."""

import asyncio
import json
import socket
import time
from contextlib import suppress
from types import SimpleNamespace

import httpx
import jsonschema
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from moe.launch.server import Limits
from tests.launch.serving import PROMPT, idle, run_server
from tests.patience import PATIENCE_S


def test_completions_and_chat_by_the_official_client(client, right):
    done = client.completions.create(model="model", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    assert done.choices[0].text == right.text
    assert len(done.choices[0].logprobs.tokens) == done.usage.completion_tokens == 12
    two = client.completions.create(model="model", prompt=[PROMPT, "A"], n=2, max_tokens=12, temperature=0)
    assert [c.text for c in two.choices[:2]] == [right.text] * 2
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    chat = client.chat.completions.create(model="model", messages=messages, max_tokens=12, temperature=0)
    assert chat.choices[0].message.content == right.chat
    assert [m.id for m in client.models.list()] == ["model"] == [client.models.retrieve("model").id]


def test_streams(client, right):
    chunks = list(
        client.completions.create(
            model="model",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            logprobs=0,
            stream_options={"include_usage": True},
        )
    )
    whole = client.completions.create(model="model", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0)
    pieces = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.choices[0].logprobs.text_offset
    assert all("usage" in c.model_fields_set for c in chunks)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == right.text
    assert len(chunks) > 6
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(
        model="model", messages=messages, max_tokens=12, temperature=0, stream=True, logprobs=True, top_logprobs=1
    )
    chunks = list(chat)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == right.chat
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == 12


def test_token_ids(client, served, right):
    """By vLLM's names: of a completion with its choices, of a chat's prompt beside them; whole and in pieces."""
    encode, tokenizer = served.service.llm.encode, served.service.llm.tokenizer
    asked = {"model": "model", "max_tokens": 12, "temperature": 0, "extra_body": {"return_token_ids": True}}
    two = client.completions.create(prompt=[PROMPT, "A"], n=2, **asked).choices
    assert [c.prompt_token_ids for c in two] == [encode(PROMPT)] * 2 + [encode("A")] * 2
    assert tokenizer.decode(two[0].token_ids) == right.text
    pieces = [c.choices[0] for c in client.completions.create(prompt=PROMPT, stream=True, **asked)]
    assert [token for c in pieces for token in c.token_ids] == two[0].token_ids
    assert [c.prompt_token_ids for c in pieces if hasattr(c, "prompt_token_ids")] == [encode(PROMPT)]
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(messages=messages, **asked)
    assert tokenizer.decode(chat.choices[0].token_ids) == right.chat
    assert len(chat.prompt_token_ids) == chat.usage.prompt_tokens
    pieces = list(client.chat.completions.create(messages=messages, stream=True, **asked))
    assert [token for c in pieces for token in c.choices[0].token_ids] == chat.choices[0].token_ids
    assert pieces[0].prompt_token_ids == chat.prompt_token_ids
    silent = client.chat.completions.create(**(asked | {"extra_body": {}}), messages=messages)
    assert not hasattr(silent, "prompt_token_ids")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": PROMPT, "best_of": 3}, "best_of"),
        ({"prompt": PROMPT, "return_token_ids": 1}, "return_token_ids"),
        ({"prompt": PROMPT, "max_tokens": "many"}, "max_tokens"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [3] * 2000}, None),
        ({"prompt": PROMPT, "n": 1000}, "n"),
        ({"prompt": PROMPT, "guided_regex": "(a"}, None),
        ({"prompt": PROMPT, "temperature": -1}, "temperature"),
        ({"prompt": PROMPT, "response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_bad_requests_are_400_and_name_the_field(client, body, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="model", **{"extra_body": body, "prompt": body["prompt"]})
    assert error.value.param == param
    assert (error.value.code == "context_length_exceeded") == (len(body["prompt"]) == 2000)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_of_a_given_form(client):
    class Person(BaseModel):
        name: str
        age: int

    asked = {"model": "model", "messages": [{"role": "user", "content": "Who?"}], "temperature": 1, "seed": 3}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    whole = client.chat.completions.create(**asked, n=2, response_format=form)
    for choice in whole.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    stream = client.chat.completions.create(**asked, stream=True, response_format=form)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == whole.choices[0].message.content
    parsed = client.chat.completions.parse(**asked, max_tokens=900, response_format=Person)
    assert parsed.choices[0].finish_reason == "length" or isinstance(parsed.choices[0].message.parsed, Person)
    form["json_schema"]["schema"] = {"not": {}}
    with pytest.raises(openai.BadRequestError, match=r"structured_outputs\.json is not supported"):
        client.chat.completions.create(**asked, response_format=form)


def test_calls_of_tools(client):
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("greet", "part")]
    asked = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "tools": tools}
    named = {"type": "function", "function": {"name": "part"}}
    for choice, extra in ((named, {}), ("required", {"parallel_tool_calls": False})):
        whole = client.chat.completions.create(**asked, seed=1, tool_choice=choice, **extra).choices[0]
        (call,) = whole.message.tool_calls
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        stream = list(client.chat.completions.create(**asked, seed=1, tool_choice=choice, **extra, stream=True))
        deltas = [d for c in stream for d in c.choices[0].delta.tool_calls or []]
        assert deltas[0].function.name == call.function.name
        assert json.loads("".join(d.function.arguments for d in deltas)) == json.loads(call.function.arguments)
        assert stream[-1].choices[0].finish_reason == "tool_calls"
    said = [{"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}]
    said += [{"role": "tool", "tool_call_id": call.id, "content": "done"}]
    free = client.chat.completions.create(**(asked | {"messages": asked["messages"] + said}), max_tokens=8)
    assert free.choices[0].message.content


def test_hugging_faces_client(served, right, monkeypatch):
    """Which shares no code with the official one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not even call this machine
    asked = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    with InferenceClient(base_url=f"{served.url}/v1", api_key="none") as client:
        whole = client.chat_completion(**asked, logprobs=True, top_logprobs=2, stop=["zzz"], seed=1)
        assert whole.choices[0].message.content == right.chat
        assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) == 12
        pieces = list(client.chat_completion(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == right.chat
        assert pieces[-1].usage.completion_tokens == 12
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        person = client.chat_completion(asked["messages"], response_format=form, max_tokens=900).choices[0]
        jsonschema.validate(json.loads(person.message.content), SCHEMA)
        tools = [{"type": "function", "function": {"name": "greet", "parameters": SCHEMA}}]
        called = client.chat_completion(asked["messages"], tools=tools, tool_choice="required", max_tokens=900)
        assert called.choices[0].message.tool_calls[0].function.name == "greet"
        with pytest.raises(HfHubHTTPError) as error:
            client.chat_completion(asked["messages"], top_p=7)
        assert error.value.response.status_code == 400


def test_other_statuses(served, right, client):
    with httpx.Client(base_url=served.url, timeout=PATIENCE_S) as http:
        assert http.post("/v1/completions", content=b"{").status_code == 400
        assert http.post("/v1/completions", content=b"[" * 100_000).status_code == 400
        assert http.post("/v1/completions", content=b" " * (2 << 20)).status_code == 413
        assert (
            http.post("/v1/completions", content=iter([b" " * (1 << 20), b"{}"])).status_code == 413
        )  # without a length
        asked = json.dumps({"prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
        said = http.post("/v1/completions", content=iter([asked[:9], asked[9:]]))
        assert (said.status_code, said.json()["choices"][0]["text"]) == (200, right.text)
        assert http.post("/v1/completions").status_code == 400
        assert http.get("/v1/models/other").status_code == 404
        assert http.get("/v1/files/..%2Fsecret").status_code == 404
        assert http.get("/v1/batches/no").status_code == 404
        assert http.get("/health").json() == {"status": "ok"}
        page = http.get("/").text
        assert "<canvas" in page
        families = {f.name for f in text_string_to_metric_families(http.get("/metrics").text)}
        assert {"moe_hits", "moe_time_between_tokens_seconds", "moe_accepted", "moe_free_blocks"} <= families
        live = http.get("/live").json()
        assert (live["slots"], len(live["heat"]), len(live["heat"][0])) == (48, 6, 16)


ENDLESS = {"extra_body": {"ignore_eos": True}}  # all of `max_tokens`
LONG_STREAM = {"max_tokens": 900, "stream": True, **ENDLESS}


def test_a_caller_that_goes_away_frees_its_place(served, client):
    with client.completions.create(model="model", prompt=PROMPT, **LONG_STREAM) as stream:
        next(iter(stream))
    idle(served)
    before = served.service.stats.cancelled

    async def leaves() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as caller:
            body = {"model": "model", "prompt": PROMPT, "max_tokens": 1000, "n": 8, **ENDLESS}
            asked = asyncio.ensure_future(caller.completions.create(**body))
            while not served.service.stats.open:
                await asyncio.sleep(0.01)
            assert asked.cancel()

    asyncio.run(leaves())
    idle(served)
    assert served.service.stats.cancelled > before > 0


def test_a_full_queue_is_429(served, client):
    streams = [
        client.completions.create(model="model", prompt="A", max_tokens=900, stream=True, **ENDLESS) for _ in range(8)
    ]
    try:
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="model", prompt="A")
        assert error.value.response.headers["retry-after"] == "1"
    finally:
        for stream in streams:
            stream.close()
    idle(served)


NO_HTTP = b"ZZ what no log may have\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
LONG = json.dumps({"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}).encode()


@pytest.mark.parametrize(
    ("begins", "status"),
    [
        (b"", 400),  # no request at all
        (b"GET /health HTTP/1.1\r\n", 400),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 400),  # in place of the first chunk
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 20\r\n\r\n", 400),  # while the app waits for the rest
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 20\r\n\r\n5\r\nABCDE\r\n", 400),
        (HEAD + b"Content-Length: 2\r\n\r\n{}", 400),  # after a body, refused
        (HEAD + b"Content-Length: %d\r\n\r\n" % len(LONG) + LONG, 200),  # in the middle of a stream
        (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"PRI * HTTP/2.0\r\n\r\n", 404),
    ],
)
@pytest.mark.parametrize("is_split", [True, False])
def test_what_is_no_http_is_one_line_in_the_log_wherever_it_comes(served, caplog, begins, status, is_split):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as line:
        if is_split and begins:
            line.sendall(begins)
            if begins.startswith(HEAD + b"Transfer-Encoding"):
                time.sleep(0.2)  # the app has begun to read, and cannot answer yet
            elif b"\r\n\r\n" in begins:  # what is not a whole request has no answer yet
                line.recv(1, socket.MSG_PEEK)
        answer = b""
        with suppress(ConnectionError):  # the server may have answered and closed before it read the rest: a reset
            line.sendall(NO_HTTP if is_split else begins + NO_HTTP)
        with suppress(ConnectionError):
            while more := line.recv(65536):
                answer += more
    assert answer.startswith(b"HTTP/1.1 "), answer
    assert int(answer.split()[1]) in {status, 400} if not is_split else int(answer.split()[1]) == status, answer
    idle(served)
    logged = [record for record in caplog.records if record.name != "httpx"]
    assert len(logged) <= 1, caplog.text
    assert not any(record.exc_info for record in logged), caplog.text
    assert "no log may have" not in caplog.text


def test_api_key(served):
    face = SimpleNamespace(llm=served.service.llm, started=0, why_ill=None, close=lambda seconds: None)
    url, stop = run_server(face, SimpleNamespace(close=lambda: None), Limits(), "secret")
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
            assert http.get("/health").status_code == 200
    finally:
        stop()
