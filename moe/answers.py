"""OpenAI's responses as data: whole answers, pieces of streamed ones, errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe.openai import Ask, PromptLogprobs
from moe.outputs import Completion
from moe.params import Logprob
from moe.tools import CallDelta, Reader


def response_body(
    ask: Ask,
    answers: Sequence[Completion],
    *,
    request_id: str,
    created: int,
    model: str,
    fingerprint: str | None = None,
    prompts: Sequence[Sequence[int]],
    of_prompts: Sequence[PromptLogprobs] = (),
) -> dict[str, Any]:
    """The whole answer. prompts: token ids; answers: of all prompts, n of each, in order; of_prompts: prompt_logprobs
    of each prompt."""
    num_top = ask.params.logprobs or 0
    choices: list[dict[str, Any]] = [
        {"index": i, **(_chat_choice(answer, num_top, ask.reader()) if ask.is_chat else _completion_choice(answer))}
        for i, answer in enumerate(answers)
    ]
    body = {
        "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if ask.is_chat else "text_completion",
        "created": created,
        "model": ask.model or model,
        "system_fingerprint": fingerprint,
        "choices": choices,
        "usage": usage(sum(map(len, prompts)), sum(len(answer.token_ids) for answer in answers)),
    }
    if ask.tells_ids:
        for index, (choice, answer) in enumerate(zip(choices, answers)):
            choice |= token_ids(ask, answer.token_ids, prompts[index // ask.params.n])
        body |= prompt_token_ids(ask, prompts[0])
    if ask.params.prompt_logprobs is None:
        return body
    told = [None if one is None else [entry and _by_token(entry) for entry in one] for one in of_prompts]
    if ask.is_chat:  # there is one prompt; these places are vLLM's
        return body | {"prompt_logprobs": told[0]}
    for index, choice in enumerate(choices):
        choice["prompt_logprobs"] = told[index // ask.params.n]
    return body


def token_ids(ask: Ask, tokens: Sequence[int], prompt: Sequence[int] | None) -> dict[str, Any]:
    """What a choice says of them where the request asks, by vLLM's names. prompt: None where it was told before."""
    if not ask.tells_ids:
        return {}
    of_prompt = {} if ask.is_chat or prompt is None else {"prompt_token_ids": list(prompt)}
    return of_prompt | {"token_ids": list(tokens)}


def prompt_token_ids(ask: Ask, prompt: Sequence[int]) -> dict[str, Any]:
    """Beside the choices: a chat has one prompt."""
    return {"prompt_token_ids": list(prompt)} if ask.tells_ids and ask.is_chat else {}


def _by_token(step: Mapping[int, Logprob]) -> dict[str, Any]:
    return {
        str(token): {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
        for token, one in step.items()
    }


def chunk_body(
    ask: Ask,
    choices: Sequence[Mapping[str, Any]],
    *,
    request_id: str,
    created: int,
    model: str,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    return {
        "id": f"{'chatcmpl' if ask.is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion.chunk" if ask.is_chat else "text_completion",
        "created": created,
        "model": ask.model or model,
        "system_fingerprint": fingerprint,
        "choices": list(choices),
    }


def chunk_choice(
    ask: Ask,
    index: int,
    text: str,
    finish: str | None,
    logprobs: Sequence[dict[int, Logprob]] | None,
    *,
    first: bool,
    reader: Reader | None = None,
    ids: Mapping[str, Any] | None = None,
    offset: int = 0,
) -> dict[str, Any] | None:
    """What is new of one sample; None if that is nothing. reader: of this sample, where tools are offered; ids: its
    `token_ids`; offset: characters of the tokens before these."""
    ids = ids or {}
    if not (text or finish or logprobs is not None or first or ids):
        return None
    if not ask.is_chat:
        found = None if logprobs is None else completion_logprobs(logprobs, offset)
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": found, **ids}
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    if reader is None:
        delta |= {"content": text} if text or first else {}
    else:
        said = reader.feed(text, finish is not None)
        delta |= {"content": said.content} if said.content or first else {}
        delta |= {"reasoning_content": said.reasoning} if said.reasoning else {}
        delta |= {"tool_calls": [_call_delta(one) for one in said.calls]} if said.calls else {}
        if reader.has_called and finish == "stop":
            finish = "tool_calls"
        if not (delta or finish or logprobs is not None or ids):
            return None
    found = None if logprobs is None else chat_logprobs(logprobs, ask.params.logprobs or 0)
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": found, **ids}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """What a failed call answers."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _completion_choice(answer: Completion) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else completion_logprobs(answer.logprobs)
    return {"text": answer.text, "finish_reason": answer.finish_reason, "logprobs": logprobs}


def _call_delta(one: CallDelta) -> dict[str, Any]:
    function = ({} if one.name is None else {"name": one.name}) | {"arguments": one.arguments}
    told = {} if one.id is None else {"id": one.id, "type": "function"}
    return {"index": one.number, **told, "function": function}


def _chat_choice(answer: Completion, num_top: int, reader: Reader | None) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else chat_logprobs(answer.logprobs, num_top)
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    finish: str = answer.finish_reason
    if reader is not None:
        said = reader.feed(answer.text, is_finished=True)
        message |= {"content": said.content or (None if said.calls else "")}
        message |= {"reasoning_content": said.reasoning} if said.reasoning else {}
        calls = [{k: v for k, v in _call_delta(one).items() if k != "index"} for one in said.calls]
        message |= {"tool_calls": calls} if calls else {}
        finish = "tool_calls" if calls and finish == "stop" else finish
    return {"message": message, "finish_reason": finish, "logprobs": logprobs}


def completion_logprobs(logprobs: Sequence[dict[int, Logprob]], offset: int = 0) -> dict[str, Any]:
    """As /v1/completions reports them. offset: of the first token's text in the answer."""
    chosen = [next(iter(step.values())) for step in logprobs]
    offsets = []
    for one in chosen:
        offsets.append(offset)
        offset += len(one.decoded_token)
    return {
        "tokens": [one.decoded_token for one in chosen],
        "token_logprobs": [_finite(one.logprob) for one in chosen],
        "top_logprobs": [_likeliest(step) for step in logprobs],
        "text_offset": offsets,
    }


def _likeliest(step: Mapping[int, Logprob]) -> dict[str, float]:
    """By text; of two tokens that read the same, the likelier. The chosen one is among them, as the format has it."""
    found: dict[str, float] = {}
    for one in sorted(step.values(), key=lambda one: one.rank):
        found.setdefault(one.decoded_token, _finite(one.logprob))
    return found


def chat_logprobs(logprobs: Sequence[dict[int, Logprob]], num_top: int) -> dict[str, Any]:
    """As /v1/chat/completions reports them, with the `num_top` likeliest beside each chosen token."""
    content = []
    for step in logprobs:
        ranked = sorted(step.values(), key=lambda one: one.rank)
        content.append(_token(next(iter(step.values()))) | {"top_logprobs": [_token(one) for one in ranked[:num_top]]})
    return {"content": content, "refusal": None}


def _token(one: Logprob) -> dict[str, Any]:
    said = None if one.token_bytes is None else list(one.token_bytes)
    return {"token": one.decoded_token, "logprob": _finite(one.logprob), "bytes": said}


def _finite(logprob: float) -> float:
    """JSON has no infinity; the format's own number for what cannot happen."""
    return max(logprob, -9999.0)
