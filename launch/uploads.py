"""Files and batches of the service, kept in a folder so that a restarted server goes on with them.

FOLDER/files/ID        what was uploaded                   FOLDER/files/ID.json    its record, as the client sees it
FOLDER/batches/ID.json a batch                             FOLDER/batches/ID.jsonl its results so far, resumable
FOLDER/lock            held by the one server of the folder

A batch's output and its errors are files that have a record alone, with `results_of` beside what the client sees: their
content is read from the results. So they take no room, and a batch that a full disk ended has them, too.

Ids grow with time, so that a list goes on after one that was deleted meanwhile.
"""

import fcntl
import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.batch import BatchProgress, NamesOfLines, ResultFile, failed_line, refused_line, result_line
from moe.llm import LLM
from moe.offload.json_object import read_object
from moe.openai import Ask, BadRequest, custom_id_of, json_of, lines_of, parse_batch_line
from moe.placement.written import written_whole
from moe.service import Delta, QueueFull, Service

_WINDOW = 32  # lines of a batch on their way at a time; the queue is for those who wait for an answer
_DAY = 24 * 3600
_SERVED = b'"error": null}\n'  # how a result ends that is none of a failure
FILE_ID, BATCH_ID = "file-", "batch_"  # before 24 hexadecimal digits


@contextmanager
def only_server_of(folder: Path) -> Iterator[Path]:
    """The folder, which is made if it is not there; nobody else has it until the end. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when it is closed, or we end
        except BlockingIOError:
            raise ValueError(f"another server keeps its files in {folder}; give another folder, --state") from None
        yield folder


class Uploads:
    """The folder, and one thread that works its batches off, oldest first."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.folder = service, folder
        for name in ("files", "batches"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._wake, self._is_closing = threading.Event(), False
        self._lock, self._naming = threading.Lock(), threading.Lock()
        ids = [record["id"] for name in ("files", "batches") for record in _newest_first(folder / name)[:1]]
        self._newest = max((int(id[-24:-8], 16) for id in ids), default=0)
        self._thread = threading.Thread(target=self._run, name="moe-batches", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing = True
        self._wake.set()
        self._thread.join()  # no limit: it looks up every 0.2 s

    # Files.

    def add_file(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        record = _file_record(self._later(), name, purpose, len(content))
        with written_whole(self._file(record["id"])) as part:
            part.write_bytes(content)
        _write_json(self._record_of(record["id"]), record)
        return record

    def files(self) -> list[dict[str, Any]]:
        """The newest first."""
        return [_as_shown(record) for record in _newest_first(self.folder / "files")]

    def file(self, id: str) -> dict[str, Any] | None:
        return None if (record := _read_json(self.folder / "files", id)) is None else _as_shown(record)

    def content(self, id: str) -> bytes:
        record = _read_json(self.folder / "files", id)
        if record is None or (batch := record.get("results_of")) is None:
            return self._file(id).read_bytes()
        return _split(self._results(batch).read_bytes())[record["is_of_errors"]]

    def delete_file(self, id: str) -> None:
        record = _read_json(self.folder / "files", id)
        self._record_of(id).unlink()
        if record is None or (batch := record.get("results_of")) is None:
            self._file(id).unlink()
        elif not any(other.get("results_of") == batch for other in _newest_first(self.folder / "files")):
            self._results(batch).unlink()

    def _file(self, id: str) -> Path:
        return self.folder / "files" / id

    def _record_of(self, id: str) -> Path:
        return self._file(id).with_suffix(".json")

    def _later(self) -> str:
        """What follows all that came before, as text, whatever the clock is set to."""
        with self._naming:
            self._newest = max(time.time_ns(), self._newest + 1)
            return f"{self._newest:016x}{secrets.token_hex(4)}"

    def _results(self, batch: str) -> Path:
        return self.folder / "batches" / f"{batch}.jsonl"

    # Batches.

    def add_batch(self, body: Any) -> dict[str, Any]:
        """Raises BadRequest."""
        if not isinstance(body, dict):
            raise BadRequest("body must be a JSON object")
        source, endpoint, metadata = body.get("input_file_id"), body.get("endpoint"), body.get("metadata")
        if not isinstance(source, str) or self.file(source) is None:
            raise BadRequest(f"there is no file {source!r}", "input_file_id")
        if endpoint not in ("/v1/completions", "/v1/chat/completions"):
            raise BadRequest(f"endpoint {endpoint!r} is not served", "endpoint")
        if body.get("completion_window") != "24h":
            raise BadRequest("completion_window must be '24h'", "completion_window")
        now = int(time.time())
        batch = {
            "id": f"{BATCH_ID}{self._later()}",
            "object": "batch",
            "endpoint": endpoint,
            "input_file_id": source,
            "completion_window": "24h",
            "status": "validating",
            "created_at": now,
            "expires_at": now + _DAY,
            "metadata": metadata if isinstance(metadata, dict) else None,
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self._save(batch)
        self._wake.set()
        return batch

    def batches(self) -> list[dict[str, Any]]:
        """The newest first."""
        return _newest_first(self.folder / "batches")

    def batch(self, id: str) -> dict[str, Any] | None:
        return _read_json(self.folder / "batches", id)

    def cancel_batch(self, id: str) -> dict[str, Any]:
        with self._lock:
            batch = self.batch(id)
            assert batch is not None
            if batch["status"] in ("validating", "in_progress"):
                batch |= {"status": "cancelling", "cancelling_at": int(time.time())}
                self._save(batch)
        self._wake.set()
        return batch

    def _save(self, batch: dict[str, Any]) -> None:
        _write_json(self.folder / "batches" / f"{batch['id']}.json", batch)

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.clear()
            open_ones = [b for b in self.batches() if b["status"] in ("validating", "in_progress", "cancelling")]
            for batch in reversed(open_ones):
                try:
                    status = self._work_off(batch)
                except Exception as error:  # of any kind: later batches must not wait for ever
                    batch["errors"] = {"object": "list", "data": [_error_of(error)]}
                    status = "failed"
                if status is not None:
                    self._finish(batch, status)
            if not self._is_closing:
                self._wake.wait()  # no limit: until there is a batch, or `close`

    def _work_off(self, batch: dict[str, Any]) -> str | None:
        """Returns how it ended; None if a restart is to go on with it."""
        if self.file(batch["input_file_id"]) is None:
            raise ValueError(f"the file {batch['input_file_id']} was deleted before the batch had ended")
        lines = lines_of(self.content(batch["input_file_id"]), "the file")
        progress = BatchProgress(total=sum(bool(line.strip()) for line in lines))
        with ResultFile(self._results(batch["id"]), progress) as results:
            done = results.finished_lines(lines, lambda: self.service.llm.system_fingerprint)
            progress.finished = progress.resumed = len(done)
            todo = deque((n, line) for n, line in enumerate(lines, 1) if line.strip() and n not in done)
            run = _Run(self.service, results, batch["endpoint"], NamesOfLines(lines))
            try:
                while (todo or run.num_open) and not self._is_closing:
                    if self._note_progress(batch, progress) == "cancelling":
                        return "cancelled"
                    while todo and run.num_open < _WINDOW and run.begin(*todo[0]):
                        todo.popleft()
                    run.wait(0.2)
            finally:
                run.cancel()
        batch["request_counts"] = _counts(progress)
        return None if self._is_closing else "completed"

    def _note_progress(self, batch: dict[str, Any], progress: BatchProgress) -> str:
        """Returns its status, which a caller may have changed."""
        with self._lock:
            stored = self.batch(batch["id"]) or batch
            if stored["status"] == "cancelling":
                batch |= stored
            else:
                batch |= {"status": "in_progress", "in_progress_at": batch.get("in_progress_at") or _now()}
            batch["request_counts"] = _counts(progress)
            self._save(batch)
            return str(batch["status"])

    def _finish(self, batch: dict[str, Any], status: str) -> None:
        """What there is of results becomes files that clients can fetch."""
        results, made = self._results(batch["id"]), list[Path]()
        parts = _split(results.read_bytes() if results.exists() else b"")
        try:
            for is_of_errors, kind in enumerate(("output", "error")):
                if content := parts[is_of_errors]:
                    record = _file_record(self._later(), f"{batch['id']}_{kind}.jsonl", "batch_output", len(content))
                    made.append(self._record_of(record["id"]))
                    _write_json(made[-1], record | {"results_of": batch["id"], "is_of_errors": is_of_errors})
                    batch[f"{kind}_file_id"] = record["id"]
            completed, failed = (part.count(b"\n") for part in parts)
            counts = batch["request_counts"] | {"completed": completed, "failed": failed}
            self._save(batch | {"status": status, f"{status}_at": _now(), "request_counts": counts})
        except OSError:  # a full disk: the batch stays as it was stored, and the next look goes on with it
            for record_file in made:
                record_file.unlink(missing_ok=True)
            time.sleep(1.0)
            self._wake.set()


class _Run:
    """The lines of a batch that are on their way. Results are written by the thread that waits."""

    def __init__(self, service: Service, results: ResultFile, endpoint: str, names: NamesOfLines) -> None:
        self.service, self.results, self.endpoint, self.names = service, results, endpoint, names
        self._finished: deque[dict[str, Any]] = deque()
        self._changed = threading.Event()
        self._tickets: dict[int, Any] = {}

    @property
    def num_open(self) -> int:
        return len(self._tickets)

    def begin(self, number: int, line: bytes) -> bool:
        """Whether the line was taken in: served, or refused with a result that says why."""
        custom_id: str | None = None
        llm = self.service.llm
        try:
            fields = json_of(line)
            custom_id = name = custom_id_of(fields)
            self.names.check(name, number)
            if fields.get("url") != self.endpoint:
                raise BadRequest(f"url must be the batch's endpoint {self.endpoint}, not {fields.get('url')!r}")
            ask = parse_batch_line(fields, llm.recommended, llm.tool_format)
            prompts = llm.tokens_of(ask)
            ends: dict[int, Delta] = {}

            def deliver(delta: Delta) -> None:
                if delta.completion is None:
                    return
                ends[delta.sample] = delta
                if len(ends) == ask.params.n or delta.completion.error is not None:
                    entry = _result(number, name, ask, [ends[i] for i in sorted(ends)], prompts[0], llm)
                    self._finished.append(entry | {"_number": number})
                    self._changed.set()

            self._tickets[number] = self.service.submit(prompts, ask.params, deliver)
        except QueueFull:
            return False
        except Exception as error:  # of any kind: a tokenizer's own code runs here
            self.results.write(refused_line(number, custom_id, error))
        return True

    def wait(self, seconds: float) -> None:
        """Writes what is finished, after at most so long."""
        self._changed.wait(seconds)
        self._changed.clear()
        while self._finished:
            entry = self._finished.popleft()
            if self._tickets.pop(entry.pop("_number"), None) is not None:
                self.results.write(entry)

    def cancel(self) -> None:
        for ticket in self._tickets.values():
            self.service.cancel(ticket)


def _result(number: int, name: str, ask: Ask, ends: list[Delta], prompt: list[int], llm: LLM) -> dict[str, Any]:
    """Of a line whose samples have ended. ends: in their order."""
    try:
        answers = [end.completion for end in ends if end.completion is not None]
        return result_line(number, name, ask, answers, prompt, llm, ends[0].of_prompt)
    except Exception as error:  # of any kind: readers of what the model wrote run here
        return failed_line(number, name, "server_error", f"{type(error).__name__}: {error}")


def _error_of(error: Exception) -> dict[str, str]:
    """What ended a batch, for its client."""
    if isinstance(error, OSError) and error.errno is not None:
        why = f"{os.strerror(error.errno)}: what is finished is in the files of this batch; see to the folder of the "
        return {"code": "server_error", "message": why + "server's --state, and send the other lines again"}
    code = "invalid_request" if isinstance(error, ValueError) else "server_error"
    return {"code": code, "message": str(error) or type(error).__name__}


def _file_record(id: str, name: str, purpose: str, size: int) -> dict[str, Any]:
    """Of a new file, as clients see it."""
    return {
        "id": f"{FILE_ID}{id}",
        "object": "file",
        "bytes": size,
        "created_at": _now(),
        "filename": name,
        "purpose": purpose,
        "status": "processed",
    }


def _as_shown(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("results_of", "is_of_errors")}


def _split(results: bytes) -> tuple[bytes, bytes]:
    """Those of lines that were served, and those of lines that failed; one that was cut off is neither."""
    whole = results[: results.rfind(b"\n") + 1].splitlines(keepends=True)
    good = b"".join(line for line in whole if line.endswith(_SERVED))
    return good, b"".join(line for line in whole if not line.endswith(_SERVED))


def _now() -> int:
    return int(time.time())


def _counts(progress: BatchProgress) -> dict[str, int]:
    done = progress.finished - progress.failed
    return {"total": progress.total, "completed": done, "failed": progress.failed}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(value))


def _read_json(folder: Path, id: str) -> dict[str, Any] | None:
    """The record of that id; ids come from outside and are never a path."""
    return _record(folder / f"{id}.json") if id.replace("-", "").replace("_", "").isalnum() else None


def _record(path: Path) -> dict[str, Any] | None:
    """None if it is not there, or was deleted since somebody saw it. Raises ValueError for another's file."""
    try:
        found = read_object(path)
    except OSError:  # not there, or a name that is too long to be
        return None
    except ValueError as error:
        raise ValueError(f"{error}; it is no record of this server: move it away") from None
    if found.get("id") != path.stem:
        raise ValueError(f"{path} is no record of this server; move it away")
    return found


def _newest_first(folder: Path) -> list[dict[str, Any]]:
    records = [found for path in folder.glob("[!.]*.json") if (found := _record(path)) is not None]
    return sorted(records, key=lambda record: str(record["id"]), reverse=True)
