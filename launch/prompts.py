"""Prompts from a file: JSON lines, a batch file, or plain text."""

import json
from pathlib import Path
from typing import Any

from moe.plain_text import read_text


def read_prompts(path: Path, limit: int | None) -> list[str]:
    """The prompts of a text, prompt or batch file; lines that are no JSON objects are prompts themselves."""
    prompts: list[str] = []
    lines = read_text(path).split("\n")  # splitlines also cuts at separators inside a text
    for number, line in enumerate(lines, 1):
        if limit is not None and len(prompts) >= limit:
            break
        if not line.strip():
            continue
        entry: Any = line
        if line.lstrip().startswith("{"):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is not valid JSON: {error}") from None
            body = fields.get("body")
            entry = fields.get("prompt", body.get("prompt") if isinstance(body, dict) else None)
        if not isinstance(entry, str):
            raise ValueError(f"{path}, line {number}, has no prompt")
        prompts.append(entry)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts
