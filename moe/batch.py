"""Batch files in OpenAI's format: one request a line in, one result a line out, in the order in which they finish.

A run that was stopped goes on where it was: lines that are in the output file are not computed again. A line that
cannot be served gets an error of its own and the others are served.

    in:  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "…", "max_tokens": 48}}
    out: {"id": "line-1", "custom_id": "a", "response": {"status_code": 200, "body": {…}}, "error": null}
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moe.engine.sampling import SamplingParams
from moe.layer.parallel import broadcast_lines
from moe.llm import LLM, Generation

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_FIELDS = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "n": int,
}
_DEFAULT_TEMPERATURE = 1.0  # what the format says when a request does not
_START = b'{"id": "line-'  # of every result
_IGNORED = {"model", "prompt", "messages", "stop", "logprobs", "top_logprobs", "stream", "user"}


class BadRequest(ValueError):
    """One line cannot be served; the sentence goes into its result."""


class _Request(NamedTuple):
    line: int
    custom_id: str
    url: str
    tokens: list[int]
    params: SamplingParams


@dataclass(slots=True)
class _Open:
    """A request whose n samples are on their way."""

    request: _Request
    generations: list[Generation]
    num_finished: int = 0


@dataclass(slots=True)
class BatchProgress:
    """How far a batch is, in lines. `resumed`: what an earlier run had finished; `failed`: of all that are finished."""

    total: int
    finished: int = 0
    failed: int = 0
    resumed: int = 0


def run_batch(
    llm: LLM, source: str | Path, target: str | Path, on_progress: Callable[[BatchProgress], None] | None = None
) -> BatchProgress:
    """Serves every line of `source` that `target` does not have yet, and appends the results to `target`.

    Raises ValueError if `target` is the output of another file, OSError if it cannot be written (a full disk): what
    was finished stays, and the same call goes on from there.
    """
    lines = Path(source).read_bytes().splitlines()
    parallel = llm.engine.parallel
    rank, world_size = (0, 1) if parallel is None else (parallel.groups.rank, parallel.groups.world_size)
    progress = BatchProgress(total=sum(bool(line.strip()) for line in lines))
    results = _Results(Path(target), progress) if parallel is None or rank == 0 else _Remote(parallel.outbox)
    with results:
        done = results.finished_lines(lines)
        finished = set(done) if parallel is None else broadcast_lines(parallel.groups, list(done))
        progress.resumed = progress.finished = len(finished)
        todo = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and n not in finished]
        todo = todo[rank::world_size][::-1]
        names = _NamesOfLines(lines)
        open_requests: dict[int, _Open] = {}  # by id of a generation
        window = 4 * llm.engine.config.batch.max_sequences  # prompts are encoded as they are needed
        llm.engine.start()
        try:
            while todo or open_requests or llm.engine.has_work:
                while todo and len(open_requests) < window:
                    _open_line(llm, *todo.pop(), names, open_requests, results)
                for generation in llm.step():
                    entry = open_requests.pop(id(generation))
                    entry.num_finished += 1
                    if entry.num_finished == len(entry.generations):
                        results.write(_response(entry))
                if parallel is not None and rank == 0:
                    for line in parallel.inbox:
                        results.write(json.loads(line))
                    parallel.inbox.clear()
                if on_progress is not None:
                    on_progress(progress)
        finally:  # after an error the same engine can go on
            llm.abort(g for entry in open_requests.values() for g in entry.generations)
    return progress


def first_requests(llm: LLM, source: str | Path, limit: int) -> list[list[int]]:
    """The prompts, as token ids, of the first `limit` lines of `source` that can be served."""
    prompts: list[list[int]] = []
    for number, line in enumerate(Path(source).read_bytes().splitlines(), 1):
        if len(prompts) == limit:
            break
        try:
            request = _parse_request(llm, number, _parse_line(line))
            llm.engine.check_request(request.tokens, request.params)
        except ValueError:  # its result says so
            continue
        prompts.append(request.tokens)
    return prompts


def _open_line(
    llm: LLM,
    number: int,
    line: bytes,
    names: "_NamesOfLines",
    open_requests: dict[int, _Open],
    results: "_Results | _Remote",
) -> None:
    custom_id: str | None = None
    try:
        fields = _parse_line(line)
        custom_id = fields["custom_id"]
        if (earlier := names.first_line_of(fields["custom_id"])) < number:
            raise BadRequest(f"custom_id {custom_id!r} was used by line {earlier}")
        request = _parse_request(llm, number, fields)
        params = request.params
        entry = _Open(request, [])
        for i in range(params.n):
            entry.generations.append(llm.add(request.tokens, replace(params, n=1, seed=params.seed + i)))
        open_requests.update((id(g), entry) for g in entry.generations)
    except ValueError as error:
        results.write(
            {
                "id": f"line-{number}",
                "custom_id": custom_id,
                "response": None,
                "error": {"code": "invalid_request", "message": f"line {number}: {error}"},
            }
        )


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"is not valid JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str):
        raise BadRequest("must be a JSON object with a custom_id string")
    return fields


def _parse_request(llm: LLM, number: int, fields: dict[str, Any]) -> _Request:
    url, body = fields.get("url"), fields.get("body")
    if fields.get("method", "POST") != "POST" or url not in (COMPLETIONS, CHAT):
        raise BadRequest(f"method and url must be POST {COMPLETIONS} or POST {CHAT}, not {url!r}")
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object")
    unknown = sorted(set(body) - set(_FIELDS) - _IGNORED - {"max_completion_tokens"})
    if unknown:
        raise BadRequest(f"body has unknown fields {', '.join(unknown)}")
    if url == CHAT:
        messages = body.get("messages")
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
            raise BadRequest("messages must be a list of {role, content}")
        tokens = llm.encode_chat(messages)
    else:
        prompt: Any = body.get("prompt")
        is_tokens = isinstance(prompt, list) and bool(prompt) and all(type(t) is int for t in prompt)
        if not (isinstance(prompt, str) or is_tokens):
            raise BadRequest("prompt must be a string or a list of token ids")
        tokens = llm.encode(prompt)
    return _Request(number, fields["custom_id"], url, tokens, _params(body))


def _params(body: dict[str, Any]) -> SamplingParams:
    values: dict[str, Any] = {"temperature": _DEFAULT_TEMPERATURE}
    renamed = {"max_completion_tokens": "max_tokens"}
    for name, value in body.items():
        name = renamed.get(name, name)
        if name in _FIELDS and value is not None:
            kind = _FIELDS[name]
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise BadRequest(f"{name} ({value!r}) must be a {'whole number' if kind is int else 'number'}")
            try:
                values[name] = kind(value)
            except OverflowError:
                raise BadRequest(f"{name} is too large") from None
    stop = [] if body.get("stop") is None else body["stop"]
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise BadRequest("stop must be a string or a list of strings")
    values["stop"] = tuple(stop)
    logprobs, top = body.get("logprobs"), body.get("top_logprobs")
    if logprobs is True:  # the chat format; the other one gives the number itself
        logprobs = 0 if top is None else top
        if type(logprobs) is not int:
            raise BadRequest(f"top_logprobs ({logprobs!r}) must be a whole number")
    elif logprobs is not None and logprobs is not False and type(logprobs) is not int:
        raise BadRequest(f"logprobs ({logprobs!r}) must be true, false or a whole number")
    values["logprobs"] = None if logprobs is False else logprobs
    return SamplingParams(**values)


def _response(entry: _Open) -> dict[str, Any]:
    request = entry.request
    choices: list[dict[str, Any]] = []
    used = 0
    for index, generation in enumerate(entry.generations):
        answer = generation.completion()
        used += len(answer.token_ids)
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": answer.text}} if request.url == CHAT else {"text": answer.text}
        )
        logprobs = None
        if answer.logprobs is not None:
            logprobs = {
                "token_ids": answer.token_ids,
                "token_logprobs": [one.chosen for one in answer.logprobs],
                "top_logprobs": [{str(t): p for t, p in one.top.items()} for one in answer.logprobs],
            }
        choices.append({"index": index, **content, "finish_reason": answer.finish_reason, "logprobs": logprobs})
    prompt = len(request.tokens)
    body = {
        "object": "chat.completion" if request.url == CHAT else "text_completion",
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used},
    }
    return {
        "id": f"line-{request.line}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": f"line-{request.line}", "body": body},
        "error": None,
    }


def _check_same_file(lines: list[bytes], done: dict[int, str | None], target: Path) -> None:
    for number, custom_id in done.items():
        if not 1 <= number <= len(lines):
            raise ValueError(
                f"{target} has a result for line {number}, the input has {len(lines)} lines: it is the output of "
                "another file; give another name"
            )
        try:
            expected = json.loads(lines[number - 1]).get("custom_id")
        except (ValueError, AttributeError, RecursionError):
            expected = None
        if custom_id is not None and expected != custom_id:
            raise ValueError(
                f"{target} has a result for line {number} with custom_id {custom_id!r}, the input has {expected!r} "
                "there: it is the output of another file; give another name"
            )


class _NamesOfLines:
    """Which line used a custom_id first; the same on every rank and after a restart. Parsed when first asked."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self._first: dict[str, int] | None = None

    def first_line_of(self, custom_id: str) -> int:
        if self._first is None:
            self._first = {}
            for number, line in enumerate(self._lines, 1):
                if not line.strip():
                    continue
                try:
                    self._first.setdefault(_parse_line(line)["custom_id"], number)
                except BadRequest:  # that line says so itself
                    continue
        return self._first[custom_id]


class _Remote:
    """The output file as a rank other than 0 sees it: lines travel to rank 0 with the next step."""

    def __init__(self, outbox: list[bytes]) -> None:
        self._outbox = outbox

    def __enter__(self) -> "_Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self._outbox.clear()

    def finished_lines(self, lines: list[bytes]) -> dict[int, str | None]:
        return {}

    def write(self, entry: dict[str, Any]) -> None:
        self._outbox.append(json.dumps(entry).encode() + b"\n")


class _Results:
    """The output file: whole lines only, whatever happens while one is written."""

    def __init__(self, path: Path, progress: BatchProgress) -> None:
        self.path, self.progress = path, progress
        self._file: BinaryIO

    def __enter__(self) -> "_Results":
        self._file = self.path.open("a+b", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def finished_lines(self, lines: list[bytes]) -> dict[int, str | None]:
        """Input line -> custom_id of every result; a line that was cut off is removed from the file.

        Raises ValueError, and leaves the file as it is, if it holds anything but results of the input `lines`.
        """
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        done = self._parse(content[:whole])
        _check_same_file(lines, done, self.path)
        if not (content[whole:].startswith(_START) or _START.startswith(content[whole:])):
            raise ValueError(f"the end of {self.path} is no result of this program; give another output file")
        if whole < len(content):
            self._file.truncate(whole)
        return done

    def _parse(self, content: bytes) -> dict[int, str | None]:
        done: dict[int, str | None] = {}
        for number, line in enumerate(content.splitlines(), 1):
            try:
                entry = json.loads(line)
                word, _, place = entry["id"].partition("-")
                if word != "line":
                    raise ValueError
                done[int(place)] = entry["custom_id"]
                self.progress.failed += entry["error"] is not None
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{self.path}, line {number}, is no result of this program; give another output file"
                ) from None
        return done

    def write(self, entry: dict[str, Any]) -> None:
        # Half a surrogate pair, which JSON can name, is written as it was named.
        line = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            self._file.truncate(end)
            raise OSError(
                error.errno,
                f"{error.strerror}; all finished lines are kept: make room and run the same command again",
                str(self.path),
            ) from None
        self.progress.finished += 1
        self.progress.failed += entry["error"] is not None
