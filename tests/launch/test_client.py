"""`moe.Client` beside a service of ours."""

import asyncio
import fcntl
import json
import threading
from contextlib import contextmanager

import pytest

from moe.client import AsyncClient, Client, ServerError
from tests.launch.serving import PROMPT, batch_lines, idle
from tests.patience import PATIENCE_S


def test_our_client(served, right, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(batch_lines(12))
    with Client(served.url) as client:
        assert client.generate(PROMPT, max_tokens=12, temperature=0) == right.text
        assert "".join(client.stream(PROMPT, max_tokens=12, temperature=0)) == right.text
        assert client.chat("Hello", max_tokens=12, temperature=0) == right.chat
        messages = [{"role": "user", "content": "Hello"}]
        assert "".join(client.stream(messages, max_tokens=12, temperature=0)) == right.chat
        said = client.complete(PROMPT, max_tokens=12, temperature=0, return_token_ids=True)["choices"][0]
        assert client.token_ids(said["prompt_token_ids"], max_tokens=12, temperature=0) == said["token_ids"]
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
        for notes in ("mine\n", "mine"):
            (tmp_path / "notes").write_text(notes)
            with pytest.raises(ValueError, match="is no result of this program"):
                client.batch(tmp_path / "in.jsonl", tmp_path / "notes")
            assert (tmp_path / "notes").read_text() == notes
        (tmp_path / "other.jsonl").write_bytes(
            (tmp_path / "in.jsonl").read_bytes().replace(b'"max_tokens": ', b'"max_tokens": 1')
        )
        before = out.read_bytes()
        with pytest.raises(ValueError, match="asks for something else now"):
            client.batch(tmp_path / "other.jsonl", out)
        assert out.read_bytes() == before
        assert before.count(f'"system_fingerprint": "{served.service.fingerprint}"'.encode()) == 11
        answer = next(line for line in before.splitlines(keepends=True) if b'"moe-' in line)
        other = answer.replace(b'"moe-', b'"moe-0')
        out.write_bytes(other)
        with pytest.raises(ValueError, match="has answers of another model"):
            client.batch(tmp_path / "in.jsonl", out)
        assert out.read_bytes().startswith(other)
        assert out.read_bytes().count(b'"moe-') == 1

    async def several():
        async with AsyncClient(served.url) as client:
            texts = await asyncio.gather(*(client.generate(PROMPT, max_tokens=12, temperature=0) for _ in range(3)))
            assert len(await client.token_ids(PROMPT, max_tokens=3, ignore_eos=True)) == 3
            return texts, [piece async for piece in client.stream(PROMPT, max_tokens=12, temperature=0)]

    async def leaves():
        async def listen(client):
            async for _ in client.stream(PROMPT, max_tokens=900, ignore_eos=True):
                pass

        async with AsyncClient(served.url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(listen(client), 0.3)

    asyncio.run(leaves())  # in the middle of a piece
    idle(served)
    texts, pieces = asyncio.run(several())
    assert texts == [right.text] * 3
    assert "".join(pieces) == right.text
    with Client("http://127.0.0.1:9", retries=0) as nobody, pytest.raises(ServerError, match="does not answer"):
        nobody.generate("A")


@contextmanager
def answering(reply):
    """The address of a server that says `await reply(head and body)`, in bytes, to each caller and hangs up."""
    loop = asyncio.new_event_loop()

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        said = head + await reader.readexactly(length)
        gone = asyncio.ensure_future(reader.read())
        answer = asyncio.ensure_future(reply(said))
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel() if not answer.done() else writer.write(answer.result())
        gone.cancel()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()


def whole(body, status="200 OK", more=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n{body}".encode()


PIECE = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
ANSWERS = [
    b"",
    b"no HTTP\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{",  # ends early
    whole("<html>"),
    whole(""),
    whole("[]"),
    whole("{}"),
    whole('{"choices": []}'),
    whole('{"choices": 3}'),
    whole("<html>", "404 Not Found"),
    whole('{"error": "x"}', "503 Busy", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n"),
    whole(PIECE),  # without its end
    whole(PIECE + "data: {no JSON\n\n"),
    whole(PIECE + 'data: {"error": {"message": "x"}}\n\n'),
    whole(PIECE + 'data: {"error": 1}\n\n'),
    whole(PIECE + "data: {}\n\n"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stream_is_cut_at_the_ends_of_its_lines_alone(end):
    """JSON may hold what ends a line in Python: U+2028 and its like, which many servers send as they are."""
    odd = "a\u2028b\u2029c\x85d"
    chunk = f'data: {{"choices": [{{"text": "{odd}", "finish_reason": null}}]}}'
    body = f"{chunk}{end}{end}{chunk}{end}{end}data: [DONE]"

    async def reply(said):
        size = len(body.encode())
        return f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n{body}".encode()

    async def collect(url):
        async with AsyncClient(url, model="m", retries=0) as client:
            return [piece async for piece in client.stream("a")]

    with answering(reply) as url:
        with Client(url, model="m", retries=0) as client:
            assert list(client.stream("a")) == [odd, odd]
        assert asyncio.run(collect(url)) == [odd, odd]


@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_a_server_answers_ends_in_a_server_error(answer):
    async def reply(said):
        return answer

    async def collect(client):
        return [piece async for piece in client.stream("a")]

    async def asynchronous():
        async with AsyncClient(url, model="m", retries=0) as client:
            for call in (client.generate("a"), client.chat("a"), collect(client)):
                with pytest.raises(ServerError):
                    await call

    with answering(reply) as url:
        with Client(url, model="m", retries=0) as client:
            for call in (client.generate, client.chat, lambda prompt: list(client.stream(prompt))):
                with pytest.raises(ServerError):
                    call("a")
        asyncio.run(asynchronous())


def test_asynchronous_calls_are_made_at_once_and_end_when_they_are_cancelled():
    num_calls, open_ones, ended = 40, [], []

    async def reply(said):
        open_ones.append(said)
        try:
            while len(open_ones) < num_calls:  # nobody has an answer before all have asked
                await asyncio.sleep(0.01)
            if len(open_ones) > num_calls:
                await asyncio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            ended.append(said)
            raise
        return whole('{"choices": [{"text": "yes"}]}')

    async def several():
        async with AsyncClient(url, model="m", retries=0, seconds=PATIENCE_S) as client:
            texts = await asyncio.gather(*(client.generate("a") for _ in range(num_calls)))
            last = asyncio.ensure_future(client.generate("b"))
            while len(open_ones) == num_calls:
                await asyncio.sleep(0.01)
            assert last.cancel()
            while not ended:  # its line is closed
                await asyncio.sleep(0.01)
            return texts

    with answering(reply) as url:
        assert asyncio.run(asyncio.wait_for(several(), PATIENCE_S)) == ["yes"] * num_calls


def test_a_batch_line_goes_to_the_server_that_was_named(tmp_path):
    asked = []

    async def reply(said):
        asked.append(said)
        return whole('{"choices": [{"text": "yes"}]}')

    urls = ["https://127.0.0.1:9/v1/completions", "//x/y", "\n", 3, None, "/v1/completions"]
    lines = [json.dumps({"custom_id": str(n), "url": url, "body": {}}) for n, url in enumerate(urls)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with answering(reply) as url, Client(url, model="m", api_key="secret", retries=0) as client:
        assert client.batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", at_once=1) == len(urls) - 2
    assert len(asked) == 2
    errors = {e["custom_id"]: e["error"] for e in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "must be a path such as /v1/completions" in errors["0"]["message"]
    assert errors["5"] is None


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "localhost:8000", "", "ftp://x", "http://", "http://a:b", "file:///x"]
)
def test_what_is_no_address_is_said_at_once(url):
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="is no address of a server; give one such as http"):
            kind(url)
