"""Prompts as users give them, and what a tokenizer and a chat template make of them."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from moe.params import SamplingParams, token_ids

Prompt = str | Sequence[int] | Mapping[str, Any]  # a mapping has `prompt` or `prompt_token_ids`
Message = Mapping[str, Any]


class PromptEncoder:
    """Text to token ids. tokenizer: None if the model has none; name: of the model, for what it says."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def encode(self, prompt: Prompt) -> list[int]:
        """Raises ValueError for text where the model has no tokenizer, or that is no text."""
        if isinstance(prompt, Mapping):
            ids = prompt.get("prompt_token_ids")
            return self.encode(ids if ids is not None else prompt["prompt"])
        if not isinstance(prompt, str):
            return list(token_ids("the prompt's token ids", prompt))
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer; give token ids, or put tokenizer.json of the model beside its weights"
            )
        _check_text(prompt)
        return self._ids(prompt, True) or ([] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id])

    def encode_chat(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> list[int]:
        """A conversation by the model's chat template. options: arguments of `apply_chat_template`, None left out.

        Content that is a list of parts is joined if all of them are text; templates render nothing else alike.
        """
        given = {"add_generation_prompt": True} | {k: v for k, v in (options or {}).items() if v is not None}
        if self.tokenizer is None or (self.tokenizer.chat_template is None and "chat_template" not in given):
            raise ValueError(
                f"{self.name} has no chat template; give a written prompt (generate, /v1/completions), or put "
                "chat_template.jinja of the model beside its weights"
            )
        text = self._written([with_plain_content(message) for message in messages], given)
        _check_text(text)
        return self._ids(text, False)

    def _written(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """By the template. Most take the arguments of a call as an object, DeepSeek's as the text that is sent."""
        forms = [[with_read_arguments(message) for message in messages], messages]
        errors = []
        for form in forms[: 1 + any(message.get("tool_calls") for message in messages)]:
            try:
                return str(self.tokenizer.apply_chat_template(form, tokenize=False, **options))
            except Exception as error:  # of any kind: a template is a program that came with the model
                errors.append(error)
        raise ValueError(f"the model's chat template does not take these messages: {errors[0]}")

    def with_bad_words(self, params: SamplingParams) -> SamplingParams:
        """bad_words as token ids, as they begin a text and as they follow a space."""
        if not params.bad_words:
            return params
        if self.tokenizer is None:
            raise ValueError("bad_words need a tokenizer; use bad_words_ids")
        forms = [self._ids(form, False) for word in params.bad_words for form in (word, f" {word.lstrip()}")]
        ids = {tuple(form) for form in forms if form} | set(params.bad_words_ids)
        return dataclasses.replace(params, bad_words=(), bad_words_ids=tuple(sorted(ids)))

    def token_text(self, token: int) -> str:
        """One token by itself; "" without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def token_bytes(self, token: int) -> bytes | None:
        """Of one token, which may be part of a character; None where the tokenizer does not tell them."""
        text = self.token_text(token)
        piece = "" if self.tokenizer is None else str(self.tokenizer.convert_ids_to_tokens(token))
        if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
            return bytes.fromhex(match[1])
        if "\ufffd" not in text:
            return text.encode(errors="replace")
        if "ByteLevel" not in str(getattr(getattr(self.tokenizer, "backend_tokenizer", None), "decoder", "")):
            return None
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        values = {letter: value for value, letter in bytes_to_unicode().items()}
        told = bytes(values[letter] for letter in piece) if values.keys() >= set(piece) else b""
        return told if told.decode(errors="replace") == text else None

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids


def with_plain_content(message: Message) -> dict[str, Any]:
    """The message with its parts of text joined. Raises ValueError for parts of another kind, and for no role."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("every message must have a role, a string")
    content = message.get("content")
    if content is None and not (message.get("tool_calls") or message.get("function_call")):
        raise ValueError(f"the message of role {message['role']!r} has no content")
    if isinstance(content, list):
        content = "".join(map(_text_of_part, content))
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content must be a string or a list of parts of text, it is {str(content)[:60]!r}")
    return {**message, "content": content}


def with_read_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as objects, where they are the text of one."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    return {**message, "tool_calls": [_read_call(call) for call in calls]}


def _read_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
        raise ValueError(f"content has a part of type {kind!r}; only text is served")
    return text


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid text: character {error.start} is half a surrogate pair") from None


def text_of(prompt: Prompt) -> str | None:
    """The text that the prompt was given as; None if it was given as token ids."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt") or ()
    return prompt if isinstance(prompt, str) else None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Raises ValueError for a mixture that could be read in two ways."""
    if isinstance(prompts, (str, Mapping)):
        return as_prompts([prompts])
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a text, token ids, or a list of these; it is a {type(prompts).__name__}")
    given = list(prompts)
    tokens = [p for p in given if isinstance(p, Integral)]
    if tokens and len(tokens) == len(given):
        return [token_ids("the prompt's token ids", tokens)]
    if tokens:
        raise ValueError("prompts must be either texts or lists of token ids; a token id stands among them")
    listed: list[Prompt] = [p for p in given if not isinstance(p, (int, Integral))]
    if wrong := [p for p in listed if isinstance(p, bytes) or not isinstance(p, Iterable)]:
        raise ValueError(f"a prompt must be a text, token ids or a dict of one; one is a {type(wrong[0]).__name__}")
    for prompt in listed:
        if isinstance(prompt, Mapping):
            _check_mapping(prompt)
    return listed


def _check_mapping(prompt: Mapping[str, Any]) -> None:
    if other := sorted(k for k, v in prompt.items() if k not in ("prompt", "prompt_token_ids") and v is not None):
        raise ValueError(f"a prompt has {', '.join(other)}; only prompt and prompt_token_ids are served")
    if prompt.get("prompt_token_ids") is None and not isinstance(prompt.get("prompt"), str):
        raise ValueError("a prompt that is a dict must have prompt (a string) or prompt_token_ids (a list)")


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation, or several, as several."""
    if messages and isinstance(messages[0], Mapping):
        return [[m for m in messages if isinstance(m, Mapping)]]
    return [m for m in messages if not isinstance(m, Mapping)]
