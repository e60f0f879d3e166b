"""What the output file of a batch holds, and whether it is that of an input: what resuming goes by."""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_START = b'{"id": "line-'  # of every result
OURS = "moe-"  # how a `system_fingerprint` of this program begins; those of other servers may change at any time


class Result(NamedTuple):
    """Of an input's line, from 1. mark: of what the line asks for, "" where none is told; fingerprint: of the model and
    settings that answered, None where none is told."""

    line: int
    custom_id: str | None
    has_failed: bool
    mark: str
    fingerprint: str | None


def results_in(path: Path, content: bytes) -> list[Result]:
    """One of every line of an output file. Raises ValueError for another's."""
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            word, _, place = entry["id"].partition("-")
            if word != "line":
                raise ValueError
            response = entry["response"] or {}
            mark = str(response.get("request_id", "")).removeprefix(entry["id"]).removeprefix("-")
            failed = entry["error"] is not None
            found.append(Result(int(place), entry["custom_id"], failed, mark, fingerprint_in(entry)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}, is no result of this program; give another output file") from None
    return found


def results_of(path: Path, content: bytes, lines: Sequence[bytes]) -> tuple[list[Result], int]:
    """Those of an output file, and the bytes of its whole lines: what follows them was cut off.

    lines: of the input. Raises ValueError if the file holds anything but results of these lines.
    """
    whole = content.rfind(b"\n") + 1
    results = results_in(path, content[:whole])
    _check_same_file(lines, results, path)
    if not (content[whole:].startswith(_START) or _START.startswith(content[whole:])):
        raise ValueError(f"the end of {path} is no result of this program; give another output file")
    return results, whole


def fingerprint_in(entry: dict[str, Any]) -> str | None:
    """The `system_fingerprint` of an answer of this program; None of others, and of failed lines."""
    found = ((entry["response"] or {}).get("body") or {}).get("system_fingerprint")
    return found if isinstance(found, str) and found.startswith(OURS) else None


def check_same_model(target: str | Path, before: str | None, now: str | None) -> None:
    """before, now: of an answer in the output file, and of those to come; None: not known. Raises ValueError."""
    if before is not None and now is not None and before != now:
        raise ValueError(
            f"{target} has answers of another model, or with other settings (system_fingerprint {before}, now {now}); "
            "go on with those, or give another name"
        )


def mark_result(entry: dict[str, Any], line: bytes) -> None:
    """Lets an answer tell what was asked for."""
    if entry["response"] is not None:
        entry["response"]["request_id"] = f"{entry['id']}-{mark_of(line)}"


def mark_of(line: bytes) -> str:
    """Tells a line from another of its name, however its fields are written."""
    with suppress(ValueError, RecursionError):  # what is no JSON stays as it is
        line = json.dumps(json.loads(line), sort_keys=True).encode()
    return f"{zlib.crc32(line):08x}"


def _check_same_file(lines: Sequence[bytes], results: Sequence[Result], target: Path) -> None:
    for number, custom_id, _, mark, _ in results:
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
        if mark and mark != mark_of(lines[number - 1]):
            raise ValueError(
                f"{target} has a result for line {number}, which asks for something else now; give another name, or "
                "remove results whose lines have changed"
            )
