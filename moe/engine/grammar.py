"""What an answer must look like, as a mask over the next token: llguidance's parser, one state per request.

Nothing else of sampling changes: the mask is what `allowed_token_ids` is, by the state of the text. A request's state
is a function of its tokens alone, so that any rank, or the same one after a loss, has the same.

Needs the extra `grammar`. Compiling a schema takes milliseconds and is done once for equal ones, its first mask with
it, in the thread of whoever asks; a mask takes tens of microseconds to a few milliseconds for each token, in the step.
It is as long as the longest text that the form spells out, which is therefore bounded.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.models.load import load_tokenizer
from moe.params import StructuredOutputsParams

# As much white space between two words of JSON as a generous indentation takes, and no endless rows of it.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \t\n\r]{1,32}"}
_SAID_OF_IT = ("title", "description", "$comment", "examples")  # of a schema: bind nothing
_KEPT = 64  # compiled forms
_LONGEST = 10_000  # characters that a form may spell out in a row: some 3 ms a mask, which others of the step wait for


class Constraint:
    """Of one request: which tokens may follow what it said so far. matcher: fresh, and nobody else's."""

    def __init__(self, matcher: Any, tokenizer: Any, vocabulary: int) -> None:
        self._matcher, self._tokenizer, self._vocabulary, self._num_read = matcher, tokenizer, vocabulary, 0

    def allowed(self, output: Sequence[int]) -> Tensor:
        """Bool [V]. output: the answer's tokens so far. Raises ValueError if it broke the form or is too complex."""
        self._read(output)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(mask, count=self._vocabulary, bitorder="little")
        is_one = np.count_nonzero(mask) == 1 and bits.sum() == 1
        if is_one and (spelled := self._spelled(int(bits.argmax()))) is not None:
            bits[:] = 0
            bits[spelled] = 1
        return torch.from_numpy(bits).bool()

    def _spelled(self, token: int) -> int | None:
        """Where only the text of a special token can follow, llguidance asks for that token, which has no text: the
        ordinary token that its text begins with. None where `token` is what is meant."""
        if not self._tokenizer.is_special_token(token):
            return None
        text = self._matcher.compute_ff_bytes()
        if not text.startswith(self._tokenizer.decode_bytes([token])):
            return None  # the end, or a grammar that names the token itself
        ordinary = _ordinary(self._tokenizer)
        return next((ordinary[text[:n]] for n in range(len(text), 0, -1) if text[:n] in ordinary), None)

    def is_complete(self, output: Sequence[int]) -> bool:
        """Whether nothing but the end can follow."""
        self._read(output)
        return bool(self._matcher.is_stopped())

    def _read(self, output: Sequence[int]) -> None:
        assert len(output) >= self._num_read, (len(output), self._num_read)
        for token in output[self._num_read :]:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
        self._num_read = len(output)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"structured_outputs: {_why(self._matcher)}")


class Grammars:
    """Compiles what requests to one model ask for. Thread-safe; the tokenizer is read at the first use.

    eos_ids: that end an answer. Raises ValueError, at each use, for a model without a fast tokenizer, without the
    extra, and for a form that llguidance does not take.
    """

    def __init__(self, folder: Path, vocabulary: int, eos_ids: Iterable[int], trust_remote_code: bool) -> None:
        self.vocabulary = vocabulary
        self._folder, self._trusts = folder, trust_remote_code
        self._eos_ids = tuple(sorted(eos_ids))
        self._lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def check(self, wanted: StructuredOutputsParams | None) -> None:
        """Raises ValueError for what cannot be asked for."""
        if wanted is not None:
            self._matcher(wanted)

    def of(self, wanted: StructuredOutputsParams | None) -> Constraint | None:
        """The state of a request that has said nothing yet."""
        if wanted is None:
            return None
        return Constraint(self._matcher(wanted).deep_copy(), self._tokenizer(), self.vocabulary)

    def _tokenizer(self) -> Any:
        return _read_tokenizer(self._folder, self.vocabulary, self._eos_ids, self._trusts)

    def _matcher(self, wanted: StructuredOutputsParams) -> Any:
        """Fresh; to be copied."""
        try:
            import llguidance  # of the extra `grammar`
        except ImportError:
            raise ValueError("structured_outputs need llguidance: pip install 'moeflow[grammar]'") from None
        with self._lock:
            found = self._compiled.get(wanted)
        if found is None:  # outside of the lock: a large schema takes a second, and others must not wait for it
            found = self._compile(llguidance, wanted)
        with self._lock:
            self._compiled[wanted] = found
            self._compiled.move_to_end(wanted)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, llguidance: Any, wanted: StructuredOutputsParams) -> Any:
        tokenizer = self._tokenizer()
        form, text = wanted.form
        try:
            if (longest := max(map(len, _spelled_out(form, text)), default=0)) > _LONGEST:
                raise ValueError(
                    f"spells out {longest} characters in a row, at most {_LONGEST}: every step waits for it"
                )
            grammar = _grammar(llguidance, form, text)
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise ValueError(f"structured_outputs.{form}: {first_line(str(error))}") from None
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{form} is not supported: {first_line(matcher.get_error())}")
        matcher.compute_bitmask()  # the slowest one, here and not in a step; copies have it
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{form}: {_why(matcher)}")
        return matcher


@lru_cache(maxsize=2)
def _read_tokenizer(folder: Path, vocabulary: int, eos_ids: tuple[int, ...], trusts: bool) -> Any:
    """llguidance's form of it: a second for a large vocabulary, and some 100 MB."""
    from llguidance.hf import from_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code=trusts)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"structured_outputs need a fast tokenizer; {folder.name} has none")
    if not eos_ids and tokenizer.eos_token_id is None:
        raise ValueError(f"structured_outputs need a token that ends an answer; {folder.name} names none")
    return from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos_ids) or None)


@lru_cache(maxsize=2)
def _ordinary(tokenizer: Any) -> dict[bytes, int]:
    """Tokens that are not special, by their bytes."""
    every = range(tokenizer.vocab_size)
    return {tokenizer.decode_bytes([token]): token for token in every if not tokenizer.is_special_token(token)}


def _grammar(llguidance: Any, form: str, text: str) -> str:
    if form in ("json", "json_object"):
        schema = '{"type": "object"}' if form == "json_object" else text
        return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS))
    if form == "choice":
        form, text = "regex", "|".join(map(re.escape, json.loads(text)))  # one word of the lexer, however many
    return str(llguidance.grammar_from(form, text))


def _spelled_out(form: str, text: str) -> Iterable[str]:
    """What may be one word of the lexer: its states are as long as what is left of a word."""
    if form == "choice":
        return list(json.loads(text))
    if form in ("regex", "grammar"):
        return re.split(r"[|\n]", text)
    return [] if form == "json_object" else _texts_of(json.loads(text))


def _texts_of(schema: Any) -> Iterator[str]:
    """Names and texts, wherever they stand."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, (list, dict)):
        yield from (schema if isinstance(schema, dict) else ())
        for one in schema if isinstance(schema, list) else [schema[key] for key in schema if key not in _SAID_OF_IT]:
            yield from _texts_of(one)


def _why(matcher: Any) -> str:
    """One sentence on a matcher that cannot go on."""
    error = str(matcher.get_error())
    if error.startswith("NoExtensionBias"):
        return "no token of the vocabulary can follow: no answer has this form"
    return first_line(error)


def first_line(text: str) -> str:
    """Of a parser's message, without its drawing of the place and its state."""
    return " ".join(re.split(r"\n\n|<state>", text)[0].split())[:300]
