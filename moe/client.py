"""`moe.Client(url)`: a served model, or any server that speaks OpenAI's protocol, from Python.

    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("Once upon a time", max_tokens=20))
        for piece in client.stream("Once upon a time"):
            print(piece, end="")
        client.batch("in.jsonl", "out.jsonl")

Needs the extra `serve` (httpx). A batch is resumable: lines whose results are in the output file are not asked again,
and a line is written once, whatever was tried how often.
"""

import asyncio
import fcntl
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError(f"moe.Client needs httpx ({error}): pip install 'moeflow[serve]'") from None

from moe.openai import CHAT, COMPLETIONS, lines_of

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try


class ServerError(RuntimeError):
    """What the server answered instead of a result. status: of HTTP; 0 if there was no answer at all."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Thread-safe. model: None asks the server for the first that it has. retries: of calls that may succeed later."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, retries: int = 4, seconds: float = 600
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        base = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(seconds, connect=10))
        self._model, self._retries = model, retries

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def model(self) -> str:
        if self._model is None:
            self._model = str(self._call("GET", "/v1/models")["data"][0]["id"])
        return self._model

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The text of one answer. options: fields of the request, such as max_tokens."""
        return str(self.complete(prompt, **options)["choices"][0]["text"])

    def chat(self, messages: Sequence[Mapping[str, Any]] | str, **options: Any) -> str:
        """The answer to a conversation, or to one message of the user's."""
        body = {"model": self.model, "messages": _as_messages(messages), **options}
        return str(self._call("POST", CHAT, body)["choices"][0]["message"]["content"])

    def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """The whole result body of a completion."""
        return self._call("POST", COMPLETIONS, {"model": self.model, "prompt": _plain(prompt), **options})

    def stream(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], **options: Any) -> Iterator[str]:
        """The text as it comes; of a conversation if messages are given. Leaving it ends the request."""
        is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        asked = {"messages": list(prompt)} if is_chat else {"prompt": _plain(prompt)}
        body = {"model": self.model, "stream": True, **asked, **options}
        with self._http.stream("POST", CHAT if is_chat else COMPLETIONS, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _texts(json.loads(line.removeprefix("data: ")))

    def batch(
        self,
        source: str | Path,
        target: str | Path,
        *,
        at_once: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Sends every line of a batch file that `target` has no result for, and appends the results.

        Returns how many lines failed. on_progress(finished, total) is called after each. Raises ValueError if `target`
        is the output of another file or another process writes it, or `source` is no UTF-8; ServerError if the server
        cannot be reached: what is finished stays.
        """
        lines = lines_of(Path(source).read_bytes(), str(source))
        with Path(target).open("ab", buffering=0) as file, ThreadPoolExecutor(at_once) as pool:
            _lock(file, target)
            done, failed = _finished(Path(target), lines)
            todo = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and n not in done]
            total, finished = len(done) + len(todo), len(done)
            waiting = iter(todo)
            open_ones: set[Future[dict[str, Any]]] = set()
            try:
                while True:
                    for one in waiting:
                        open_ones.add(pool.submit(self._line, *one))
                        if len(open_ones) >= at_once:
                            break
                    if not open_ones:
                        return failed
                    ended, open_ones = wait(open_ones, return_when=FIRST_COMPLETED)  # no limit: each call has one
                    for future in ended:
                        entry = future.result(0)
                        file.write(json.dumps(entry).encode() + b"\n")
                        finished, failed = finished + 1, failed + (entry["error"] is not None)
                        if on_progress is not None:
                            on_progress(finished, total)
            finally:
                for future in open_ones:
                    future.cancel()

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        name = f"line-{number}"
        entry: dict[str, Any] = {"id": name, "custom_id": None, "response": None, "error": None}
        try:
            fields = json.loads(line)
            entry["custom_id"] = fields["custom_id"]
            body = {"model": self.model, **fields["body"]}
            result = self._call("POST", fields["url"], body)
        except (ValueError, KeyError, TypeError) as error:
            return entry | {"error": {"code": "invalid_request", "message": f"line {number}: {error}"}}
        except ServerError as error:
            if error.status in (0, *_AGAIN):
                raise  # the server's fault: the line is not finished
            return entry | {"error": {"code": "invalid_request", "message": f"line {number}: {error}"}}
        return entry | {"response": {"status_code": 200, "request_id": name, "body": result}}

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer's JSON; tries again where that may help: a completion leaves nothing behind on the server."""
        for attempt in range(self._retries + 1):
            pause = 0.25 * 2**attempt
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                failure = ServerError(f"{self._http.base_url} does not answer: {error}", 0)
            else:
                if response.status_code == 200:
                    found: dict[str, Any] = response.json()
                    return found
                failure = _error_of(response)
                if response.status_code not in _AGAIN:
                    raise failure
                pause = float(response.headers.get("retry-after", pause))
            if attempt < self._retries:
                time.sleep(min(pause, 30.0))
        raise failure


class AsyncClient:
    """The same for asyncio: each call runs in a thread of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        self.client = Client(url, **options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        return await asyncio.to_thread(self.client.generate, prompt, **options)

    async def chat(self, messages: Sequence[Mapping[str, Any]] | str, **options: Any) -> str:
        return await asyncio.to_thread(self.client.chat, messages, **options)

    async def batch(self, source: str | Path, target: str | Path, **options: Any) -> int:
        return await asyncio.to_thread(self.client.batch, source, target, **options)

    async def stream(
        self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], **options: Any
    ) -> AsyncIterator[str]:
        pieces = self.client.stream(prompt, **options)
        coming: asyncio.Future[str | None] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
                if (piece := await asyncio.shield(coming)) is None:
                    return
                yield piece
        finally:
            if coming is not None and not coming.done():  # cancelled: what runs in a thread cannot be closed yet
                await asyncio.wait({coming})  # no limit: the call has one
                coming.exception()
            await asyncio.to_thread(pieces.close)  # type: ignore[attr-defined]


def _as_messages(messages: Sequence[Mapping[str, Any]] | str) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


def _texts(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise ServerError(chunk["error"]["message"], 500)
    for choice in chunk["choices"]:
        if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
            yield text


def _error_of(response: httpx.Response) -> ServerError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    return ServerError(f"{response.status_code}: {message}", response.status_code)


def _lock(file: IO[bytes], target: str | Path) -> None:
    """Let go of when the file is closed, or we end. Raises ValueError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing {target}; wait for it, or give another name") from None


def _finished(target: Path, lines: Sequence[bytes]) -> tuple[set[int], int]:
    """Numbers of the lines that `target` has results of, and how many of these failed; a line that was cut goes."""
    if not target.exists():
        return set(), 0
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    done, failed = set(), 0
    for place, line in enumerate(content[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            number = int(entry["id"].removeprefix("line-"))
            is_same = entry["custom_id"] is None or json.loads(lines[number - 1])["custom_id"] == entry["custom_id"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            is_same = False
        if not is_same:
            raise ValueError(f"{target}, line {place}, is no result of this input; give another output file")
        done.add(number)
        failed += entry["error"] is not None
    if whole < len(content):
        with target.open("r+b") as file:
            file.truncate(whole)
    return done, failed
