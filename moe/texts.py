"""Texts in windows: what a lookahead is fitted to, and what a mode is judged on."""

from collections.abc import Sequence
from pathlib import Path

from moe.llm import LLM
from moe.plain_text import read_text


def read_windows(llm: LLM, paths: Sequence[Path], length: int, limit: int | None = None) -> list[list[int]]:
    """Token ids of all files, each cut into windows of `length`, in turn from every file; at most `limit` windows.

    A rest of fewer than 16 tokens is left out. Raises ValueError for a file that is no text, and where none is left.
    """
    length = min(length, llm.engine.max_context - 1)
    by_file = []
    for path in paths:
        tokens = llm.encode(read_text(path))
        by_file.append([w for a in range(0, len(tokens), length) if len(w := tokens[a : a + length]) >= 16])
    longest = max(map(len, by_file), default=0)
    windows = [own[n] for n in range(longest) for own in by_file if n < len(own)][:limit]
    if not windows:
        raise ValueError("there is no text of 16 tokens or more")
    return windows
