"""The service, asked by the official client, by ours, and by callers that misbehave."""

import asyncio
import fcntl
import json
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import jsonschema
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from moe.batch import run_batch
from moe.client import AsyncClient, Client, ServerError
from moe.launch.cli import main
from moe.launch.console import out
from moe.launch.server import Limits, make_app, make_server
from moe.launch.uploads import Uploads, _newest_first, only_server_of
from moe.llm import LLM
from moe.params import SamplingParams
from moe.service import Service
from tests.moe.moe_cases import ROOT, check_whole, config
from tests.moe.test_openai import TEMPLATE, chat_folder

PROMPT = "Once upon a time, there was"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"), TEMPLATE + "{%- if tools %}{{ ' <tool_call>' }}{%- endif %}")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, config("0.5", max_tokens=64, max_sequences=8)) as llm:
        yield llm


def run_server(service, uploads, limits, api_key=None):
    server = make_server(make_app(service, uploads, limits, api_key), limits, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (port,) = {s.getsockname()[1] for one in server.servers for s in one.sockets}

    def stop():
        server.should_exit = True
        thread.join()

    return f"http://127.0.0.1:{port}", stop


@pytest.fixture(scope="module")
def served(llm, tmp_path_factory):
    service = Service(llm, max_open=8)
    uploads = Uploads(service, tmp_path_factory.mktemp("state"))
    url, stop = run_server(service, uploads, Limits(drain_seconds=1))
    yield SimpleNamespace(url=url, service=service, uploads=uploads)
    stop()
    check_whole(llm)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def right(folder):
    """What the model says greedily, from an LLM of its own."""
    with LLM(folder, config("1.0")) as llm:
        text = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0].outputs[0].text
        chat = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=12))[0].outputs[0].text
    return SimpleNamespace(text=text, chat=chat)


def idle(served):
    deadline = time.monotonic() + 20
    while served.service.stats.open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert served.service.stats.open == 0
    state = served.service.llm.engine.state()
    assert (state.running, state.waiting, state.free_blocks) == (0, 0, state.blocks)


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
            stream_options={"include_usage": True},
        )
    )
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": PROMPT, "best_of": 3}, "best_of"),
        ({"prompt": PROMPT, "max_tokens": "many"}, "max_tokens"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [3] * 2000}, None),
        ({"prompt": PROMPT, "n": 1000}, "n"),
        ({"prompt": PROMPT, "guided_regex": "(a"}, None),
        ({"prompt": PROMPT, "response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_bad_requests_are_400_and_name_the_field(client, body, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="model", **{"extra_body": body, "prompt": body["prompt"]})
    assert error.value.param == param


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


def test_other_statuses(served, client):
    with httpx.Client(base_url=served.url) as http:
        assert http.post("/v1/completions", content=b"{").status_code == 400
        assert http.post("/v1/completions", content=b"[" * 100_000).status_code == 400
        assert http.post("/v1/completions", content=b" " * (2 << 20)).status_code == 413
        assert http.post("/v1/completions", content=iter([b"{}"])).status_code == 413  # no length: not read
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


def test_a_caller_that_goes_away_frees_its_place(served, client):
    with client.completions.create(model="model", prompt=PROMPT, max_tokens=900, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="model", prompt=PROMPT, max_tokens=1000, n=8)
    idle(served)
    assert served.service.stats.cancelled >= 2


def test_a_full_queue_is_429(served, client):
    streams = [client.completions.create(model="model", prompt="A", max_tokens=900, stream=True) for _ in range(8)]
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


def batch_lines(count):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(count)]
    lines[1] = {**lines[1], "body": {**body, "top_p": 7}}
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def finished(client, batch):
    deadline = time.monotonic() + 400
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def test_files_and_batches_by_the_official_client(client, right):
    file = client.files.create(file=("in.jsonl", batch_lines(20)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 19, 1)
    results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(r["custom_id"] for r in results) == sorted(f"r{i}" for i in range(20) if i != 1)
    assert {r["response"]["body"]["choices"][0]["text"] for r in results} == {right.text}
    (failed,) = (json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines())
    assert "top_p" in failed["error"]["message"]
    assert batch.id in [b.id for b in client.batches.list()]
    assert {file.id, batch.output_file_id} <= {f.id for f in client.files.list()}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def test_lists_come_in_pages(served, client):
    mine = [client.files.create(file=(f"{i}.jsonl", batch_lines(2)), purpose="batch").id for i in range(3)]
    page = client.files.list(limit=2)
    assert len(page.data) == 2
    assert page.has_more
    assert [f.id for f in page] == [f.id for f in client.files.list()]  # the client asks for the pages that follow
    assert set(mine) <= {f.id for f in page}
    assert not client.files.list(limit=2, after=[f.id for f in page][-2]).has_more
    assert [f.id for f in page if f.id in mine] == mine[::-1], "the newest first, within a second, too"
    assert [f.id for f in client.files.list(limit=2, order="asc")] == [f.id for f in page][::-1]
    assert set(mine) <= {f.id for f in client.files.list(limit=1, purpose="batch")}
    assert not set(mine) & {f.id for f in client.files.list(purpose="batch_output")}
    for one in client.files.list(limit=1):  # each page comes after one that is deleted by then
        if one.id in mine:
            client.files.delete(one.id)
    assert not set(mine) & {f.id for f in client.files.list()}
    with httpx.Client(base_url=served.url) as http:
        for path in ("files", "batches"):
            for query in (
                "limit=0",
                "limit=-1",
                "limit=abc",
                "limit=",
                "limit=99999999999999999999",
                "after=none",
                "order=up",
            ):
                refused = http.get(f"/v1/{path}?{query}")
                assert refused.status_code == 400, (path, query)
                assert refused.json()["error"]["param"] == query.split("=")[0]
        assert http.get("/v1/batches?limit=101").status_code == 400


def test_a_file_that_is_deleted_while_all_are_listed(served, client):
    class Folder:
        def glob(self, pattern):
            return [
                *(served.uploads.folder / "files").glob(pattern),
                served.uploads.folder / "files" / "file-gone.json",
            ]

    kept = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    assert kept.id in [record["id"] for record in _newest_first(Folder())]
    with httpx.Client(base_url=served.url) as http:
        assert http.get(f"/v1/files/{'a' * 300}").status_code == 404  # longer than a name may be


def test_a_batch_whose_file_was_deleted(tmp_path):
    uploads = Uploads(None, tmp_path)
    uploads.close()
    file = uploads.add_file("in.jsonl", "batch", batch_lines(2))
    body = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file["id"]}
    batch = uploads.add_batch(body)
    uploads.delete_file(file["id"])
    uploads = Uploads(None, tmp_path)  # as after a restart
    deadline = time.monotonic() + 20
    while (found := uploads.batch(batch["id"]))["status"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found["errors"]["data"][0]["message"] == f"the file {file['id']} was deleted before the batch had ended"
    uploads.close()


def test_a_port_or_a_folder_that_another_server_has(served, tmp_path, monkeypatch, capsys):
    """Seen before anything is loaded, or the hosts of the first are taken over."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("moe.launch.serve.loaded", fail)
    port = served.url.rpartition(":")[2]
    assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert re.search(
        rf"port {port} of 127.0.0.1 cannot be listened on .*; give another --port", capsys.readouterr().err
    )
    with only_server_of(tmp_path):
        assert main(["serve", str(tmp_path), "--port", "0", "--state", str(tmp_path)]) == 2
    assert f"another server keeps its files in {tmp_path}; give another folder" in capsys.readouterr().err


def test_a_name_that_is_used_twice_and_a_file_that_is_no_utf8(served, client):
    """As batch files have it: the second line of the name is refused; what is split at wrong bytes is not begun."""
    lines = batch_lines(4).replace(b'"r3"', b'"r2"')
    failed = {}
    for name, content in {"twice": lines, "utf16": lines.decode().encode("utf-16")}.items():
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        failed[name] = finished(client, batch)
    assert (failed["twice"].request_counts.completed, failed["twice"].request_counts.failed) == (2, 2)
    assert "custom_id 'r2' was used by line 3" in client.files.content(failed["twice"].error_file_id).text
    assert failed["utf16"].status == "failed"
    assert "UTF-8 is wanted" in failed["utf16"].errors.data[0].message
    idle(served)


def test_a_batch_of_the_service_says_what_a_file_does(served, client, llm, tmp_path):
    body = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0, "logprobs": 1, "prompt_logprobs": 1, "n": 2}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    content = json.dumps(line).encode() + b"\n"
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    (said,) = client.files.content(finished(client, batch).output_file_id).text.splitlines()
    idle(served)
    (tmp_path / "in.jsonl").write_bytes(content)
    with LLM(llm.engine.blueprint.folder, config("1.0")) as alone:
        run_batch(alone, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    one, other = (json.loads(text)["response"]["body"] for text in (said, (tmp_path / "out.jsonl").read_text()))
    assert [c.keys() for c in one["choices"]] == [c.keys() for c in other["choices"]]
    assert one["choices"][0]["prompt_logprobs"] == other["choices"][0]["prompt_logprobs"] != None  # noqa: E711
    assert [c["text"] for c in one["choices"]] == [c["text"] for c in other["choices"]]


@pytest.mark.parametrize("where", ["moe.llm.LLM.completion", "moe.launch.uploads.result_line"])
def test_what_fails_in_making_a_result_is_its_own(served, client, monkeypatch, where):
    module, _, name = where.rpartition(".")
    whole, calls = pkgutil.resolve_name(where), []

    def fail_once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise RecursionError("deep inside")
        return whole(*given)

    monkeypatch.setattr(pkgutil.resolve_name(module), name, fail_once)
    file = client.files.create(file=("in.jsonl", batch_lines(6)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 4, 2)
    assert "deep inside" in client.files.content(batch.error_file_id).text
    idle(served)


def test_a_batch_that_cannot_be_worked_off_is_failed_and_the_next_is_served(served, client, monkeypatch):
    def fail(self, batch):
        monkeypatch.undo()
        raise KeyError("a fault of ours")

    monkeypatch.setattr(Uploads, "_work_off", fail)
    file = client.files.create(file=("in.jsonl", batch_lines(3)), purpose="batch")
    first, second = (
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        for _ in range(2)
    )
    assert {finished(client, first).status, finished(client, second).status} == {"failed", "completed"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_service_whose_thread_ends_says_so(folder, monkeypatch):
    with LLM(folder, config("0.5")) as llm:
        service, told = Service(llm), []
        came = threading.Event()

        def deliver(delta):
            told.append(delta)
            came.set()

        monkeypatch.setattr(service, "_fill", lambda: 1 / 0)
        service.submit([[1, 2]], SamplingParams(), deliver)
        assert came.wait(60)
        service._thread.join(60)
        assert "ZeroDivisionError" in told[-1].completion.error
        assert "ZeroDivisionError" in service.why_ill
        assert service.stats.open == 0
        service.close()


def test_a_step_that_does_not_end_is_left_behind(caplog):
    goes_on, begun = threading.Event(), threading.Event()

    def step():
        begun.set()
        goes_on.wait(60)
        return []

    engine = SimpleNamespace(config=SimpleNamespace(batch=SimpleNamespace(num_running=1)), start=lambda: None)
    llm = SimpleNamespace(engine=engine, check_request=lambda *_: None, add=lambda *_: object(), step=step)
    llm.abort = lambda samples: None
    service = Service(llm)
    service.submit([[1]], SamplingParams(), lambda delta: None)
    assert begun.wait(60)
    service.close(step_s=0.1)
    assert "the step that was begun has not ended after 0.1 s" in caplog.text
    goes_on.set()
    service.close()
    assert not service._thread.is_alive()


def test_a_batch_is_cancelled(served, client):
    file = client.files.create(file=("in.jsonl", batch_lines(2000)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    client.batches.cancel(batch.id)
    assert finished(client, batch).status == "cancelled"
    idle(served)


def test_our_client(served, right, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(batch_lines(12))
    with Client(served.url) as client:
        assert client.generate(PROMPT, max_tokens=12, temperature=0) == right.text
        assert "".join(client.stream(PROMPT, max_tokens=12, temperature=0)) == right.text
        assert client.chat("Hello", max_tokens=12, temperature=0) == right.chat
        messages = [{"role": "user", "content": "Hello"}]
        assert "".join(client.stream(messages, max_tokens=12, temperature=0)) == right.chat
        with pytest.raises(ServerError, match="400: top_p"):
            client.generate(PROMPT, top_p=9)
        seen = []
        out = tmp_path / "out.jsonl"
        assert client.batch(tmp_path / "in.jsonl", out, at_once=20, on_progress=lambda *p: seen.append(p)) == 1
        assert seen[-1] == (12, 12)
        whole = out.read_bytes()
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]) + b'{"id": "line-')  # killed meanwhile
        client.batch(tmp_path / "in.jsonl", out)
        ids = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
        assert sorted(ids) == sorted(f"r{i}" for i in range(12))
        with out.open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match="another process is writing"):
                client.batch(tmp_path / "in.jsonl", out)
        (tmp_path / "notes").write_text("mine\n")
        with pytest.raises(ValueError, match="is no result of this input"):
            client.batch(tmp_path / "in.jsonl", tmp_path / "notes")

    async def several():
        async with AsyncClient(served.url) as client:
            texts = await asyncio.gather(*(client.generate(PROMPT, max_tokens=12, temperature=0) for _ in range(3)))
            return texts, [piece async for piece in client.stream(PROMPT, max_tokens=12, temperature=0)]

    async def leaves():
        async def listen(client):
            async for _ in client.stream(PROMPT, max_tokens=900, ignore_eos=True):
                pass

        async with AsyncClient(served.url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(listen(client), 0.3)

    asyncio.run(leaves())  # in the middle of a piece, which another thread waits for
    idle(served)
    texts, pieces = asyncio.run(several())
    assert texts == [right.text] * 3
    assert "".join(pieces) == right.text
    with Client("http://127.0.0.1:9", retries=0) as nobody, pytest.raises(ServerError, match="does not answer"):
        nobody.generate("A")


def test_top(served, capfd, monkeypatch):
    assert main(["top", served.url, "--once"]) == 0
    assert "48 of 96 in slots" in capfd.readouterr().out
    assert main(["top", "http://127.0.0.1:9", "--once"]) == 2
    assert "does not answer" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["top", served.url, "--once"]) == 2
    assert "pip install 'moeflow[serve]'" in capfd.readouterr().err


def test_top_goes_on_when_a_service_is_started_again(capsys, monkeypatch):
    """Totals begin anew: no rate is below nothing."""
    face = SimpleNamespace(llm=None, why_ill=None, close=lambda seconds: None)
    state = {
        "model": "m",
        "ill": None,
        "open": 0,
        "running": 0,
        "waiting": 0,
        "free_blocks": 1,
        "blocks": 1,
        "slots": 1,
    }
    state |= {"experts": 1, "hits": 0, "misses": 0, "stall_seconds": 0, "first_token_p50": 0, "token_p99": None}
    told = [
        state | {"time": at, "tokens": tokens, "bytes_read": 0} for at, tokens in ((1, 500), (2, 7), (3, 9), (4, 9))
    ]
    monkeypatch.setattr("moe.launch.server.live_state", lambda *_: told[0])
    url, stop = run_server(face, SimpleNamespace(close=lambda: None), Limits())
    acts = iter([lambda: told.pop(0), lambda: told.pop(0), stop])
    seen = []

    class Shown:
        def __init__(self, table, **_):
            seen.append(table)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, table):
            seen.append(table)

    def sleep(seconds):
        if (act := next(acts, None)) is None:
            raise KeyboardInterrupt
        act()

    monkeypatch.setattr("rich.live.Live", Shown)
    monkeypatch.setattr("moe.launch.live.time", SimpleNamespace(sleep=sleep))
    assert main(["top", url]) == 130
    *tables, last = seen
    for table in tables:
        out.print(table)
    assert re.findall(r"tokens/s +\S (\S+)", capsys.readouterr().out) == ["0.0", "0.0", "2.0"]
    assert "does not answer as a moe service" in last


def test_api_key(served):
    face = SimpleNamespace(llm=served.service.llm, started=0, why_ill=None, close=lambda seconds: None)
    url, stop = run_server(face, SimpleNamespace(close=lambda: None), Limits(), "secret")
    try:
        with httpx.Client(base_url=url) as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
            assert http.get("/health").status_code == 200
    finally:
        stop()


def test_the_command_drains_and_a_restart_goes_on_with_its_batches(folder, tmp_path, right):
    def start(port):
        arguments = ["serve", folder, "--port", port, "--state", tmp_path / "state", "--set", "dtype=float32"]
        arguments += ["--drain-seconds", "1", "--record", tmp_path / "run"]
        process = subprocess.Popen(
            [sys.executable, "-m", "moe", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=60)
        deadline = time.monotonic() + 400
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                return process, client
            except httpx.TransportError:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def end(process, with_signal):
        process.send_signal(with_signal)
        _, said = process.communicate(timeout=400)
        assert PROMPT not in said
        return process.returncode

    port = 18000 + hash(str(tmp_path)) % 4000
    process, client = start(port)
    count = 200
    file = client.files.create(file=("in.jsonl", batch_lines(count)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    deadline = time.monotonic() + 400
    while client.batches.retrieve(batch.id).request_counts.completed == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    end(process, signal.SIGKILL)
    process, client = start(port)
    try:
        batch = finished(client, batch)
        results = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert sorted(r["custom_id"] for r in results) == sorted(f"r{i}" for i in range(count) if i != 1)
        answer = client.completions.create(model="m", prompt=PROMPT, max_tokens=12, temperature=0)
        assert answer.choices[0].text == right.text
        endless = {"prompt": PROMPT, "max_tokens": 900, "n": 100, "ignore_eos": True, "stream": True, "temperature": 1}
        content = json.dumps(endless).encode()
        stalled = socket.create_connection(("127.0.0.1", port))  # reads nothing, and keeps the line
        stalled.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(content))
        stalled.sendall(content)
        assert stalled.recv(1, socket.MSG_PEEK)
    finally:
        status = end(process, signal.SIGTERM)
    stalled.close()
    assert status == 0  # of its own accord: all was closed
