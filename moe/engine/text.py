"""Tokens to text as they come, and where a stop string ends it."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "�"  # what an unfinished byte sequence decodes to


class TextStream:
    """The text of one output. Decodes only the last few tokens at each step; cost per token does not grow.

    `text` never holds a stop string, and in `delta` nothing is handed out that could still become part of one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # tokens before `_read` are in the text; decoding starts at `_context`
        self._handed_out = 0
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> None:
        self._ids.append(token)
        if self._tokenizer is None or self.is_stopped:
            return
        before = self._decode(self._context, self._read)
        now = self._decode(self._context, len(self._ids))
        if len(now) > len(before) and not now.endswith(_REPLACEMENT):
            self._append(now[len(before) :])
            self._context, self._read = self._read, len(self._ids)

    def finish(self) -> None:
        """Nothing follows: an unfinished byte sequence becomes replacement characters."""
        if self._tokenizer is not None and not self.is_stopped and self._read < len(self._ids):
            before = self._decode(self._context, self._read)
            self._append(self._decode(self._context, len(self._ids))[len(before) :])
            self._read = len(self._ids)

    def delta(self, finished: bool) -> str:
        """What is new and certain since the last call."""
        end = len(self.text) if finished or self.is_stopped else len(self.text) - self._uncertain()
        new = self.text[self._handed_out : max(end, self._handed_out)]
        self._handed_out += len(new)
        return new

    def _append(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self.text) - longest)
        self.text += piece
        places = [at for s in self._stop if (at := self.text.find(s, search_from)) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True

    def _uncertain(self) -> int:
        """Characters at the end that begin a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)  # type: ignore[no-any-return]
