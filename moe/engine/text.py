"""Tokens to text as they come, and where a stop string ends it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_REPLACEMENT = "�"  # what an unfinished byte sequence decodes to


def decoder_of(tokenizer: Any, skips_special: bool) -> Callable[[list[int]], str]:
    """What turns token ids into text as `tokenizer.decode` does.

    Where that only asks its compiled tokenizer, this one is asked directly: the way there takes longer than it does.
    """
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    kind, stock = type(tokenizer), TokenizersBackend
    is_stock = (
        getattr(kind, "decode", None) is PreTrainedTokenizerBase.decode
        and getattr(kind, "_decode", None) is stock._decode
    )
    if is_stock and not tokenizer.clean_up_tokenization_spaces:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skips_special)
    return partial(tokenizer.decode, skip_special_tokens=skips_special)


class TextStream:
    """The text of one output. Decodes only the last few tokens at each step; cost per token does not grow.

    `text` never holds a stop string, and in `delta` nothing is handed out that could still become part of one.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), *, keeps_stop: bool = False, skips_special: bool = True
    ) -> None:
        self._decode = None if tokenizer is None else decoder_of(tokenizer, skips_special)
        self._stop, self._keeps_stop = tuple(stop), keeps_stop
        self._stops_from = 0  # stop strings that begin before this place are part of the text
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # tokens before `_read` are in the text; decoding starts at `_context`
        self._handed_out = 0
        self.text = ""
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def add(self, token: int, may_stop: bool = True) -> None:
        """may_stop: whether a stop string that is complete with this token ends the text."""
        self._ids.append(token)
        self._read_on(may_stop)

    def add_all(self, tokens: Sequence[int]) -> None:
        """As `add` of each, decoded together: where bytes of no text are among them, as the tokenizer decodes all of
        them. No stop string may end the text."""
        assert not self._stop, self._stop
        self._ids += tokens
        self._read_on()

    def _read_on(self, may_stop: bool = True) -> None:
        if self._decode is None or self.is_stopped:
            return
        before = self._decode(self._ids[self._context : self._read])
        now = self._decode(self._ids[self._context :])
        if len(now) > len(before) and not now.endswith(_REPLACEMENT):
            self._append(now[len(before) :], may_stop)
            self._context, self._read = self._read, len(self._ids)

    def finish(self) -> None:
        """Nothing follows: an unfinished byte sequence becomes replacement characters."""
        if self._decode is not None and not self.is_stopped and self._read < len(self._ids):
            before = self._decode(self._ids[self._context : self._read])
            self._append(self._decode(self._ids[self._context :])[len(before) :])
            self._read = len(self._ids)

    def settled(self, finished: bool) -> str:
        """The text without what could still become part of a stop string."""
        return self.text if finished or self.is_stopped else self.text[: len(self.text) - self._uncertain()]

    def delta(self, finished: bool) -> str:
        """What is new and certain since the last call."""
        new = self.settled(finished)[self._handed_out :]
        self._handed_out += len(new)
        return new

    def _append(self, piece: str, may_stop: bool = True) -> None:
        known = len(self.text)
        self.text += piece
        if not may_stop:
            self._stops_from = len(self.text)
            return
        starts = ((s, max(self._stops_from, known - len(s) + 1)) for s in self._stop)
        places = [(at, s) for s, start in starts if (at := self.text.find(s, start)) >= 0]
        if places:
            at, self.stopped_by = min(places)
            self.text = self.text[: at + len(self.stopped_by) if self._keeps_stop else at]

    def _uncertain(self) -> int:
        """Characters at the end that begin a stop string."""
        return max((self._begun(s) for s in self._stop), default=0)

    def _begun(self, stop: str) -> int:
        """Characters at the end that begin this one. Looks only at places of its first character."""
        at = self.text.find(stop[0], max(0, len(self.text) - len(stop) + 1))
        while at >= 0 and not stop.startswith(self.text[at:]):
            at = self.text.find(stop[0], at + 1)
        return 0 if at < 0 else len(self.text) - at
