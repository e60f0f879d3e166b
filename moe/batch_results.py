"""What the output file of a batch holds, and whether it is that of an input: what resuming goes by."""

import json
import zlib
from pathlib import Path


def results_in(path: Path, content: bytes) -> list[tuple[int, str | None, bool, str]]:
    """(input line, custom_id, whether it failed, its mark or "") of every line of an output file.

    Raises ValueError for another's.
    """
    found: list[tuple[int, str | None, bool, str]] = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            word, _, place = entry["id"].partition("-")
            if word != "line":
                raise ValueError
            mark = str((entry.get("response") or {}).get("request_id", "")).removeprefix(entry["id"]).removeprefix("-")
            found.append((int(place), entry["custom_id"], entry["error"] is not None, mark))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}, is no result of this program; give another output file") from None
    return found


def mark_of(line: bytes) -> str:
    """Tells a line from another of its name, however its fields are written. Raises ValueError for what is no JSON."""
    return f"{zlib.crc32(json.dumps(json.loads(line), sort_keys=True).encode()):08x}"


def check_same_file(lines: list[bytes], results: list[tuple[int, str | None, bool, str]], target: Path) -> None:
    """Raises ValueError if `results` of `target` are not those of the input's `lines`."""
    for number, custom_id, _, mark in results:
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
