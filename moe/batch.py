"""Batch files in OpenAI's format: one request a line in, one result a line out, in the order in which they finish.

A run that was stopped goes on where it was: lines that are in the output file are not computed again. A line that
cannot be served gets an error of its own and the others are served. One process at a time writes an output file.

    in:  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "…", "max_tokens": 48}}
    out: {"id": "line-1", "custom_id": "a", "response": {"status_code": 200, "body": {…}}, "error": null}
"""

import fcntl
import json
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moe.answers import response_body
from moe.batch_results import check_same_model, mark_result, results_in, results_of
from moe.comm.control import Control
from moe.config import EngineConfig
from moe.engine.layer_major import Workload
from moe.generation import Generation
from moe.llm import LLM
from moe.models.blueprint import read_blueprint
from moe.models.load import load_tokenizer
from moe.offload.checkpoint import Checkpoint
from moe.openai import Ask, BadRequest, PromptLogprobs, custom_id_of, json_of, lines_of, parse_batch_line
from moe.outputs import Completion
from moe.prompts import PromptEncoder
from moe.system_fingerprint import system_fingerprint
from moe.tools import format_of


@dataclass(slots=True)
class _Entry:
    """A line on its way; its n samples are queued as there is room."""

    line: int
    custom_id: str
    ask: Ask
    tokens: list[int]
    samples: list[Generation] = field(default_factory=list)
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

    Raises ValueError if `source` is no UTF-8, `target` is the output of another file or model, or another process
    writes it; OSError if it cannot be written (a full disk): what was finished stays, and the same call goes on there.
    """
    lines = lines_of(Path(source).read_bytes(), str(source))
    control = llm.engine.control
    rank, world_size = (0, 1) if control is None else (control.groups.rank, control.groups.world_size)
    progress = BatchProgress(total=sum(bool(line.strip()) for line in lines))
    results = ResultFile(Path(target), progress) if control is None or rank == 0 else _Remote(control)
    with results:
        done = results.finished_lines(lines, lambda: llm.system_fingerprint)
        finished = set(done) if control is None else control.numbers_of_first(list(done))
        progress.resumed = progress.finished = len(finished)
        todo = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and n not in finished]
        run = _Run(llm, NamesOfLines(lines), results, deque(todo[rank::world_size]))
        with llm.guard as guard:
            llm.engine.start()
            tell = on_progress or (lambda progress: None)
            tell(progress)
            try:
                while run.has_work:
                    run.step()
                    tell(progress)
                    guard.check()
            finally:  # after an error the same engine can go on
                llm.abort(run.samples())
    return progress


def finished_batch(
    model: str | Path, config: EngineConfig, source: str | Path, target: str | Path
) -> BatchProgress | None:
    """What `run_batch` would return if no line is left to be served, so that no model need be loaded; None if one is.

    The model's files are looked at if results say which model they are of. Raises as `run_batch` does.
    """
    lines = lines_of(Path(source).read_bytes(), str(source))
    progress = BatchProgress(total=sum(bool(line.strip()) for line in lines))
    if progress.total and not Path(target).exists():
        return None
    with ResultFile(Path(target), progress) as results:
        done = results.finished_lines(lines, lambda: system_fingerprint(Checkpoint.open(model), config))
        progress.resumed = progress.finished = len(done)
    return progress if progress.finished == progress.total else None


def first_requests(llm: LLM, source: str | Path, limit: int) -> list[list[int]]:
    """The prompts, as token ids, of the first `limit` lines of `source` that can be served."""
    prompts: list[list[int]] = []
    for number, line in enumerate(lines_of(Path(source).read_bytes(), str(source)), 1):
        if len(prompts) == limit:
            break
        try:
            entry = _read_line(llm, number, json_of(line))
            llm.check_request(entry.tokens, entry.ask.params)
        except ValueError:  # its result says so
            continue
        prompts.append(entry.tokens)
    return prompts


def lines_done(target: str | Path) -> set[int]:
    """The lines that an output file has results of; there may be no such file. Raises ValueError for another's."""
    content = Path(target).read_bytes() if Path(target).is_file() else b""
    return {result.line for result in results_in(Path(target), content[: content.rfind(b"\n") + 1])}


def batch_workload(
    model: str | Path, config: EngineConfig, source: str | Path, done: Collection[int], part: slice = slice(None)
) -> Workload:
    """What `run_batch` will compute of this file, before the model is loaded: lines that can be read, every sample.

    done: lines that have results already; part: which of the others. Raises ValueError for what it would refuse.
    """
    blueprint = read_blueprint(model, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(Path(model), trust_remote_code=config.trust_remote_code)
    encoder, tools = PromptEncoder(tokenizer, Path(model).name), format_of(getattr(tokenizer, "chat_template", None))
    recommended = blueprint.generation.recommended
    lines = enumerate(lines_of(Path(source).read_bytes(), str(source)), 1)
    found: list[tuple[int, int | None]] = []
    for line in [line for number, line in lines if line.strip() and number not in done][part]:
        try:
            ask = parse_batch_line(json_of(line), recommended, tools)
            tokens = encoder.encode_chat(ask.messages, ask.template) if ask.is_chat else encoder.encode(ask.prompts[0])
        except Exception:  # of any kind, as when the line is served: its result will say so
            continue
        found += [(len(tokens), ask.params.max_tokens)] * ask.params.n
    return Workload([prompt for prompt, _ in found], [answer for _, answer in found])


class _Run:
    """The lines of one rank, from the file to the results."""

    def __init__(
        self, llm: LLM, names: "NamesOfLines", results: "ResultFile | _Remote", todo: deque[tuple[int, bytes]]
    ) -> None:
        self.llm, self.names, self.results, self.todo = llm, names, results, todo
        self.queueing: deque[_Entry] = deque()  # entries with samples that are not queued yet
        self.entry_of: dict[int, _Entry] = {}  # by id of a sample on its way
        self.window = 4 * llm.engine.config.batch.num_running  # prompts are encoded as they are needed

    @property
    def has_work(self) -> bool:
        return bool(self.todo or self.queueing or self.entry_of) or self.llm.engine.has_work

    def samples(self) -> list[Generation]:
        return [sample for entry in {id(e): e for e in self.entry_of.values()}.values() for sample in entry.samples]

    def step(self) -> None:
        """Queues what there is room for, computes one step, and writes what is finished."""
        while (self.todo or self.queueing) and len(self.entry_of) < self.window:
            if self.queueing:
                self._queue_sample(self.queueing[0])
            else:
                self._read(*self.todo.popleft())
        for event in self.llm.step():
            if event.finish is not None:
                entry = self.entry_of.pop(id(event.generation))
                entry.num_finished += 1
                if entry.num_finished == entry.ask.params.n:
                    self.results.write(self._result(entry))
        control = self.llm.engine.control
        for handed in control.received() if control is not None else ():  # by other ranks
            self.results.write(json.loads(handed))

    def _read(self, number: int, line: bytes) -> None:
        custom_id: str | None = None
        try:
            fields = json_of(line)
            custom_id = custom_id_of(fields)
            self.names.check(custom_id, number)
            entry = _read_line(self.llm, number, fields)
            self.llm.check_request(entry.tokens, entry.ask.params)
        except Exception as error:  # of any kind: a tokenizer's own code runs here
            self.results.write(refused_line(number, custom_id, error))
        else:
            self.queueing.append(entry)

    def _queue_sample(self, entry: _Entry) -> None:
        index = len(entry.samples)
        try:
            sample = self.llm.add(entry.tokens, entry.ask.params.sample(index), index, is_awaited=False)
        except ValueError as error:
            self.queueing.popleft()
            self.results.write(refused_line(entry.line, entry.custom_id, error))
            return
        entry.samples.append(sample)
        self.entry_of[id(sample)] = entry
        if len(entry.samples) == entry.ask.params.n:
            self.queueing.popleft()

    def _result(self, entry: _Entry) -> dict[str, Any]:
        try:
            answers = [self.llm.completion(sample) for sample in entry.samples]
            of_prompt = self.llm.prompt_logprobs(entry.samples[0])
            return result_line(entry.line, entry.custom_id, entry.ask, answers, entry.tokens, self.llm, of_prompt)
        except Exception as error:  # of any kind: a tokenizer's own code, and readers of what the model wrote, run here
            return failed_line(entry.line, entry.custom_id, "server_error", f"{type(error).__name__}: {error}")


def _read_line(llm: LLM, number: int, fields: Any) -> _Entry:
    custom_id = custom_id_of(fields)
    ask = parse_batch_line(fields, llm.recommended, llm.tool_format)
    return _Entry(number, custom_id, ask, llm.tokens_of(ask)[0])


def result_line(
    number: int,
    custom_id: str,
    ask: Ask,
    answers: list[Completion],
    prompt: list[int],
    llm: LLM,
    of_prompt: PromptLogprobs = None,
) -> dict[str, Any]:
    """The result of a line whose samples are all finished, or of which one failed."""
    error = next((answer.error for answer in answers if answer.error is not None), None)
    if error is not None:
        return failed_line(number, custom_id, "server_error", error)
    name = f"line-{number}"
    body = response_body(
        ask,
        answers,
        request_id=name,
        created=int(time.time()),
        model=llm.name,
        fingerprint=llm.system_fingerprint,
        prompts=[prompt],
        of_prompts=[of_prompt],
    )
    response = {"status_code": 200, "request_id": name, "body": body}
    return {"id": name, "custom_id": custom_id, "response": response, "error": None}


def failed_line(number: int, custom_id: str | None, code: str, sentence: str) -> dict[str, Any]:
    """The result of a line that cannot be served."""
    error = {"code": code, "message": f"line {number}: {sentence}"}
    return {"id": f"line-{number}", "custom_id": custom_id, "response": None, "error": error}


def refused_line(number: int, custom_id: str | None, error: Exception) -> dict[str, Any]:
    """The result of a line that was not taken in."""
    if isinstance(error, ValueError):
        return failed_line(number, custom_id, "invalid_request", str(error))
    return failed_line(number, custom_id, "server_error", f"{type(error).__name__}: {error}")


class NamesOfLines:
    """Which line used a custom_id first: later ones are refused. The same on every rank and after a restart.

    Parsed when first asked.
    """

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self._first: dict[str, int] | None = None

    def check(self, custom_id: str, number: int) -> None:
        """Raises BadRequest if line `number` is not the first of this name."""
        if self._first is None:
            self._first = {}
            for place, line in enumerate(self._lines, 1):
                if not line.strip():
                    continue
                try:
                    self._first.setdefault(custom_id_of(json_of(line)), place)
                except BadRequest:  # that line says so itself
                    continue
        if (earlier := self._first[custom_id]) < number:
            raise BadRequest(f"custom_id {custom_id!r} was used by line {earlier}")


class _Remote:
    """The output file as a rank other than 0 sees it: lines travel to rank 0 with the next step."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __enter__(self) -> "_Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self._control.take_back()

    def finished_lines(self, lines: list[bytes], fingerprint: Callable[[], str]) -> dict[int, str | None]:
        return {}

    def write(self, entry: dict[str, Any]) -> None:
        self._control.hand_over(json.dumps(entry).encode() + b"\n")


class ResultFile:
    """The output file: whole lines only, whatever happens while one is written."""

    def __init__(self, path: Path, progress: BatchProgress) -> None:
        self.path, self.progress = path, progress
        self._file: BinaryIO
        self._lines: list[bytes] = []  # of the input

    def __enter__(self) -> "ResultFile":
        self._file = self.path.open("a+b", buffering=0)
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):  # /dev/full is read for ever
            self._file.close()
            raise ValueError(f"{self.path} is no regular file: what is finished is read from it again; name a file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the file is closed, or we end
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is writing {self.path}; wait for it, or give another name") from None
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def finished_lines(self, lines: list[bytes], fingerprint: Callable[[], str]) -> dict[int, str | None]:
        """Input line -> custom_id of every result; a line that was cut off is removed from the file.

        fingerprint: of whoever answers the others, asked where results tell theirs. Raises ValueError, and leaves the
        file as it is, if it holds anything but results of the input `lines`, or those of another model.
        """
        self._file.seek(0)
        results, whole = results_of(self.path, self._file.read(), lines)
        for known in {result.fingerprint for result in results} - {None}:
            check_same_model(self.path, known, fingerprint())
        self._file.truncate(whole)
        self.progress.failed += sum(result.has_failed for result in results)
        self._lines = lines
        return {result.line: result.custom_id for result in results}

    def write(self, entry: dict[str, Any]) -> None:
        mark_result(entry, self._lines[int(entry["id"].removeprefix("line-")) - 1])
        # Half a surrogate pair, which JSON can name, is written as it was named.
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
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
