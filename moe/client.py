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
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError(f"moe.Client needs httpx ({error}): pip install 'moeflow[serve]'") from None

from moe.batch_results import check_same_model, fingerprint_in, mark_result, results_of
from moe.openai import CHAT, COMPLETIONS, lines_of

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try


class ServerError(RuntimeError):
    """What the server answered instead of a result. status: of HTTP; 0 if there was no whole answer.

    pause_s: after which it asks to be asked again, if it does.
    """

    def __init__(self, message: str, status: int, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.pause_s = status, pause_s


def server_address(url: str) -> str:
    """Without the /v1 that other clients want. Raises ValueError for what is no address of a server."""
    try:
        found = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        found = httpx.URL("")
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


class Client:
    """Thread-safe. model: None asks the server for the first that it has. retries: of calls that may succeed later.

    seconds: without a word of the server until a call is given up. Raises ValueError for what is no address.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, retries: int = 4, seconds: float = 600
    ) -> None:
        self._http = httpx.Client(**_settings(url, api_key, seconds))
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
            self._model = str(_part(self._call("GET", "/v1/models"), "data", 0, "id"))
        return self._model

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The text of one answer. options: fields of the request, such as max_tokens."""
        return _text(self.complete(prompt, **options))

    def chat(self, messages: Sequence[Mapping[str, Any]] | str, **options: Any) -> str:
        """The answer to a conversation, or to one message of the user's; "" where it is a call of tools."""
        body = {"model": self.model, "messages": _as_messages(messages), **options}
        return _said(self._call("POST", CHAT, body))

    def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        """The whole result body of a completion."""
        return self._call("POST", COMPLETIONS, {"model": self.model, "prompt": _plain(prompt), **options})

    def token_ids(self, prompt: str | Sequence[int], **options: Any) -> list[int]:
        """Of one answer, where the server has vLLM's `return_token_ids`: a model without a tokenizer has no text."""
        return list(_part(self.complete(prompt, return_token_ids=True, **options), "choices", 0, "token_ids"))

    def stream(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], **options: Any) -> Iterator[str]:
        """The text as it comes; of a conversation if messages are given. Leaving it ends the request."""
        path, body = _streamed(self.model, prompt, options)
        pieces = _Pieces()
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error_of(response)
                for text in response.iter_text():
                    yield from pieces.of(text)
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None
        pieces.check_end()

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
        is the output of another file or model or another process writes it, or `source` is no UTF-8; ServerError if the
        server cannot be reached: what is finished stays.
        """
        lines = lines_of(Path(source).read_bytes(), str(source))
        with Path(target).open("ab", buffering=0) as file:
            _lock(file, target)
            results, whole = results_of(Path(target), Path(target).read_bytes(), lines)
            file.truncate(whole)
            done, failed = {result.line for result in results}, sum(result.has_failed for result in results)
            todo = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and n not in done]
            known = next((result.fingerprint for result in results if result.fingerprint is not None), None)
            with closing(self._answers(todo, at_once)) as answers:
                for finished, entry in enumerate(answers, len(done) + 1):
                    check_same_model(target, known, now := fingerprint_in(entry))
                    known = known or now
                    file.write(json.dumps(entry).encode() + b"\n")
                    failed += entry["error"] is not None
                    if on_progress is not None:
                        on_progress(finished, len(done) + len(todo))
        return failed

    def _answers(self, todo: Iterable[tuple[int, bytes]], at_once: int) -> Generator[dict[str, Any], None, None]:
        """Results of lines in the order in which they come. Closed early, it asks for no more of them."""
        waiting, open_ones, pool = iter(todo), set[Future[dict[str, Any]]](), ThreadPoolExecutor(at_once)
        try:
            while True:
                open_ones |= {pool.submit(self._line, *one) for one in islice(waiting, at_once - len(open_ones))}
                if not open_ones:
                    return
                ended, open_ones = wait(open_ones, return_when=FIRST_COMPLETED)  # no limit: each call has one
                yield from (future.result(0) for future in ended)
        finally:
            pool.shutdown(cancel_futures=True)

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        name = f"line-{number}"
        entry: dict[str, Any] = {"id": name, "custom_id": None, "response": None, "error": None}
        try:
            fields = json.loads(line)
            entry["custom_id"] = fields["custom_id"]
            if not str(fields["url"]).startswith("/"):  # whose key would it be sent?
                raise ValueError(f"url ({fields['url']!r}) must be a path such as {COMPLETIONS}")
            body = {"model": self.model, **fields["body"]}
            result = self._call("POST", fields["url"], body)
        except (ValueError, KeyError, TypeError, httpx.InvalidURL, ServerError) as error:
            if isinstance(error, ServerError) and error.status in (0, *_AGAIN):
                raise  # the server's fault: the line is not finished
            return entry | {"error": {"code": "invalid_request", "message": f"line {number}: {error}"}}
        entry |= {"response": {"status_code": 200, "request_id": name, "body": result}}
        mark_result(entry, line)
        return entry

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer's JSON; tries again where that may help: a completion leaves nothing behind on the server."""
        for attempt in range(self._retries):
            try:
                return _taken(self._http.request(method, path, json=body))
            except (httpx.TransportError, ServerError) as error:
                time.sleep(_pause(error, attempt))
        try:
            return _taken(self._http.request(method, path, json=body))
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None


class AsyncClient:
    """The same for asyncio: as many calls at a time as are made; one that is cancelled ends on the server."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, retries: int = 4, seconds: float = 600
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(url, api_key, seconds))
        self._model, self._retries = model, retries
        self._in_threads = Client(url, model=model, api_key=api_key, retries=retries, seconds=seconds)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._in_threads.close()
        await self._http.aclose()

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        return _text(await self.complete(prompt, **options))

    async def chat(self, messages: Sequence[Mapping[str, Any]] | str, **options: Any) -> str:
        body = {"model": await self._name(), "messages": _as_messages(messages), **options}
        return _said(await self._call("POST", CHAT, body))

    async def complete(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        body = {"model": await self._name(), "prompt": _plain(prompt), **options}
        return await self._call("POST", COMPLETIONS, body)

    async def token_ids(self, prompt: str | Sequence[int], **options: Any) -> list[int]:
        return list(_part(await self.complete(prompt, return_token_ids=True, **options), "choices", 0, "token_ids"))

    async def stream(
        self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], **options: Any
    ) -> AsyncIterator[str]:
        path, body = _streamed(await self._name(), prompt, options)
        pieces = _Pieces()
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _error_of(response)
                async for text in response.aiter_text():
                    for piece in pieces.of(text):
                        yield piece
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None
        pieces.check_end()

    async def batch(self, source: str | Path, target: str | Path, **options: Any) -> int:
        """As `Client.batch`, in threads of its own."""
        return await asyncio.to_thread(self._in_threads.batch, source, target, **options)

    async def _name(self) -> str:
        if self._model is None:
            self._model = str(_part(await self._call("GET", "/v1/models"), "data", 0, "id"))
        return self._model

    async def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        for attempt in range(self._retries):
            try:
                return _taken(await self._http.request(method, path, json=body))
            except (httpx.TransportError, ServerError) as error:
                await asyncio.sleep(_pause(error, attempt))
        try:
            return _taken(await self._http.request(method, path, json=body))
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from None


def _settings(url: str, api_key: str | None, seconds: float) -> dict[str, Any]:
    return {
        "base_url": server_address(url),
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        "timeout": httpx.Timeout(seconds, connect=10),
        "limits": httpx.Limits(max_connections=None),  # the server says what is too much
    }


def _unreachable(url: httpx.URL, error: httpx.TransportError) -> ServerError:
    return ServerError(f"{url} does not answer: {str(error) or type(error).__name__}", 0)


def _taken(response: httpx.Response) -> dict[str, Any]:
    """Raises ServerError for all but an object of JSON with status 200."""
    if response.status_code != 200:
        raise _error_of(response)
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerError(f"{response.url} answers with no JSON object: {response.text[:80]!r}", response.status_code)
    return found


def _pause(error: httpx.TransportError | ServerError, attempt: int) -> float:
    """Seconds before the next attempt. Raises `error` where none would help."""
    asked = None
    if isinstance(error, ServerError):
        if error.status not in _AGAIN:
            raise error
        asked = error.pause_s
    return min(0.25 * 2**attempt if asked is None else asked, 30.0)


def _part(found: Any, *path: str | int) -> Any:
    """Raises ServerError where an answer has no such part."""
    part = found
    try:
        for name in path:
            part = part[name]
    except (KeyError, IndexError, TypeError):
        raise ServerError(f"the server's answer has no {'.'.join(map(str, path))}: {str(found)[:80]}", 200) from None
    return part


def _text(body: dict[str, Any]) -> str:
    return str(_part(body, "choices", 0, "text"))


def _said(body: dict[str, Any]) -> str:
    return _part(body, "choices", 0, "message", "content") or ""


def _streamed(model: str, prompt: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where to ask for a stream, and what."""
    is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    asked = {"messages": list(prompt)} if is_chat else {"prompt": _plain(prompt)}
    return CHAT if is_chat else COMPLETIONS, {"model": model, "stream": True, **asked, **options}


class _Pieces:
    """The text in a stream, and whether it has come to its end."""

    def __init__(self) -> None:
        self._is_whole, self._rest = False, ""  # of a line that goes on

    def of(self, received: str) -> list[str]:
        """Lines end with \\n, \\r\\n or \\r; httpx would cut them at U+2028, too, which JSON may hold as it is."""
        *lines, self._rest = re.split(r"[\r\n]+", self._rest + received)
        return [text for line in lines for text in self._of_line(line)]

    def _of_line(self, line: str) -> list[str]:
        if not line.startswith("data:"):
            return []  # a comment, an empty line, the name of an event
        said = line.removeprefix("data:").strip()
        if said == "[DONE]":
            self._is_whole = True
            return []
        try:
            chunk = json.loads(said)
        except ValueError:
            raise ServerError(f"the stream has a line that is no JSON: {said[:80]!r}", 200) from None
        if "error" in chunk:
            raise ServerError(str(_part(chunk, "error", "message")), 500)
        texts = []
        for choice in _part(chunk, "choices"):
            self._is_whole |= choice.get("finish_reason") is not None
            texts.append(choice.get("text") or (choice.get("delta") or {}).get("content"))
        return [text for text in texts if text]

    def check_end(self) -> None:
        """Raises ServerError for a stream that was cut, or that was none."""
        self.of("\n")  # a last line may lack its end
        if not self._is_whole:
            raise ServerError("the stream ended before the answer did", 0)


def _as_messages(messages: Sequence[Mapping[str, Any]] | str) -> list[Mapping[str, Any]]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _plain(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)


def _error_of(response: httpx.Response) -> ServerError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    asked = response.headers.get("retry-after", "")
    pause = float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else None  # it may be a date
    return ServerError(f"{response.status_code}: {message}", response.status_code, pause)


def _lock(file: IO[bytes], target: str | Path) -> None:
    """Let go of when the file is closed, or we end. Raises ValueError if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing {target}; wait for it, or give another name") from None
