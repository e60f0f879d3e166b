"""How a server begins and ends: a port that is taken, a thread that ends, a step that does not, SIGTERM, SIGKILL."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

from moe.launch.cli import main
from moe.launch.server import EVENTS, Limits, _Border, make_server, serve_until_told
from moe.launch.uploads import only_server_of
from moe.llm import LLM
from moe.params import SamplingParams
from moe.service import Service
from tests.launch.serving import PROMPT, batch_lines, finished
from tests.moe.moe_cases import ROOT, config
from tests.patience import NEVER_S, PATIENCE_S, until
from tests.ports import free_port


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_service_whose_thread_ends_says_so(chat_model, monkeypatch):
    with LLM(chat_model, config("0.5")) as llm:
        service, told = Service(llm), []
        came = threading.Event()

        def deliver(delta):
            told.append(delta)
            came.set()

        monkeypatch.setattr(service, "_fill", lambda: 1 / 0)
        service.submit([[1, 2]], SamplingParams(), deliver)
        assert came.wait(PATIENCE_S)
        service._thread.join(PATIENCE_S)
        assert "ZeroDivisionError" in told[-1].completion.error
        assert "ZeroDivisionError" in service.why_ill
        assert service.stats.open == 0
        service.close()


def test_a_step_that_does_not_end_is_left_behind(caplog):
    goes_on, begun = threading.Event(), threading.Event()

    def step():
        begun.set()
        goes_on.wait(PATIENCE_S)
        return []

    engine = SimpleNamespace(config=SimpleNamespace(batch=SimpleNamespace(num_running=1)), start=lambda: None)
    llm = SimpleNamespace(engine=engine, check_request=lambda *_: None, add=lambda *_: object(), step=step)
    llm.abort, llm.system_fingerprint = lambda samples: None, "moe-0"
    service = Service(llm)
    service.submit([[1]], SamplingParams(), lambda delta: None)
    assert begun.wait(PATIENCE_S)
    service.close(step_s=0.1)
    assert "the step that was begun has not ended after 0.1 s" in caplog.text
    goes_on.set()
    service.close()
    assert not service._thread.is_alive()


def test_the_command_drains_and_a_restart_goes_on_with_its_batches(chat_model, tmp_path, right):
    def start(port):
        arguments = ["serve", chat_model, "--port", port, "--state", tmp_path / "state", "--set", "dtype=float32"]
        arguments += ["--drain-seconds", "1", "--record", tmp_path / "run", "--overwrite"]
        process = subprocess.Popen(
            [sys.executable, "-m", "moe", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=60)
        deadline = time.monotonic() + PATIENCE_S
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
        _, said = process.communicate(timeout=PATIENCE_S)
        assert PROMPT not in said
        assert "Traceback" not in said
        return process.returncode

    port = free_port()
    process, client = start(port)
    count = 200
    file = client.files.create(file=("in.jsonl", batch_lines(count)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed)
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


@pytest.mark.parametrize("told", [[signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGINT] * 3])
def test_a_server_that_is_told_more_than_once_ends_without_a_traceback(told, capfd):
    """The second cuts off what is open: the drain of 60 s is not waited for."""
    server = make_server(FastAPI(), Limits(drain_seconds=60), "127.0.0.1", 0)
    late: list[int] = []  # those that come when the server has ended: they must not end the test
    before = {one: signal.signal(one, lambda number, _: late.append(number)) for one in (signal.SIGINT, signal.SIGTERM)}
    handlers = [signal.getsignal(one) for one in before]

    def tell() -> None:
        while not server.started:
            time.sleep(0.01)
        for one in told:
            os.kill(os.getpid(), one)
            time.sleep(0.05)

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        serve_until_told(server)
    finally:
        teller.join()
        after = [signal.getsignal(one) for one in before]
        for one, handler in before.items():
            signal.signal(one, handler)
    assert after == handlers
    assert len(late) < len(told)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_the_end_cuts_off_is_told_so(is_stream, capfd, caplog):
    """One in a piece by its status, one that has begun to come by its last event."""
    app, began = FastAPI(), threading.Event()
    app.add_middleware(_Border, limits=Limits(), api_key=None)

    async def events():
        yield "data: 1\n\n"
        began.set()
        await asyncio.sleep(NEVER_S)

    @app.get("/wait")
    async def wait() -> Response:
        if not is_stream:
            began.set()
            await asyncio.sleep(NEVER_S)
        return StreamingResponse(events(), media_type=EVENTS)

    server = make_server(app, Limits(drain_seconds=1), "127.0.0.1", 0)

    def ask() -> httpx.Response:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return httpx.get(f"http://127.0.0.1:{port}/wait", timeout=PATIENCE_S)

    def tell() -> None:
        began.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(2) as threads:
        asked, told = threads.submit(ask), threads.submit(tell)
        serve_until_told(server)
        told.result()
        answer = asked.result()
    assert answer.status_code == (200 if is_stream else 503)
    last = answer.text.removeprefix("data: 1\n\ndata: ") if is_stream else answer.text
    assert json.loads(last)["error"]["message"] == "the server ends"
    assert "ends: 1 open calls have 1 s" in caplog.text
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "without completing" not in said
