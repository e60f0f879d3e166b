"""What the service's own OpenAPI document says of bodies and answers, from the tables that requests are read by."""

from typing import Any

from moe.openai import CHAT, FLAGS, NEUTRAL, NUMBERS, TOKEN_LISTS, WITHOUT_EFFECT

_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_OBJECT = {"type": ["object", "null"]}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "null", "array"]}},
    "required": ["role"],
}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "integer"}},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}}},
    ]
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_SAYS = {
    400: "what is wrong, with the field at fault in `param`",
    401: "the key is missing or wrong",
    404: "there is none of that name",
    413: "the body is too long",
    429: "the queue is full; Retry-After says when to try again",
    500: "the request ended with an error of its own",
    503: "the model cannot be used any more",
    504: "it took longer than is allowed",
}


def request_schema(url: str) -> dict[str, Any]:
    """JSON schema of the body of a request to `url`."""
    kinds = {int: "integer", float: "number"}
    properties: dict[str, Any] = {name: {"type": [kinds[kind], "null"]} for name, kind in NUMBERS.items()}
    properties |= {name: {"type": ["boolean", "null"]} for name in (*FLAGS, "stream", "return_token_ids")}
    properties |= {name: {"type": ["array", "null"], "items": {"type": "integer"}} for name in TOKEN_LISTS}
    properties |= dict.fromkeys(("stop", "bad_words"), _TEXTS)
    properties |= {name: {"enum": [*values, None]} for name, values in NEUTRAL.items()}
    properties |= {name: {} for name in WITHOUT_EFFECT}
    properties |= {
        "model": {"type": ["string", "null"]},
        "logit_bias": _OBJECT | {"additionalProperties": {"type": "number"}},
        "logprobs": {"type": ["boolean", "integer", "null"]},
        "top_logprobs": {"type": ["integer", "null"]},
        "max_completion_tokens": {"type": ["integer", "null"]},
        "stream_options": _OBJECT,
        "chat_template_kwargs": _OBJECT,
        "reasoning_effort": {"type": ["string", "null"]},
        "response_format": _OBJECT,
        "structured_outputs": _OBJECT,
        "guided_json": {"type": ["object", "string", "null"]},
        "guided_regex": {"type": ["string", "null"]},
        "guided_grammar": {"type": ["string", "null"]},
        "guided_choice": {"type": ["array", "null"], "items": {"type": "string"}},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {"type": ["string", "object", "null"]},
        "parallel_tool_calls": {"type": ["boolean", "null"]},
    }
    own = "messages" if url == CHAT else "prompt"
    properties[own] = {"type": "array", "minItems": 1, "items": _MESSAGE} if url == CHAT else _PROMPT
    return {"type": "object", "properties": properties, "required": [own], "additionalProperties": False}


BATCH = {
    "type": "object",
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"type": "string"},
        "completion_window": {"type": "string"},
        "metadata": _OBJECT,
    },
    "required": ["input_file_id", "endpoint"],
}
FILE = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}},
    "required": ["file", "purpose"],
}


def takes(schema: dict[str, Any], content_type: str = "application/json") -> dict[str, Any]:
    """`openapi_extra` of a route whose body is this."""
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}


def pages(most: int) -> dict[str, Any]:
    """`openapi_extra` of a route that lists: at most so many at a time, those after another, newest or oldest first."""
    kinds: dict[str, dict[str, Any]] = {
        "limit": {"type": "integer", "minimum": 1, "maximum": most},
        "after": {"type": "string"},
        "order": {"enum": ["desc", "asc"]},
    }
    return {"parameters": [{"name": name, "in": "query", "schema": kind} for name, kind in kinds.items()]}


def answers(*statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that can refuse with these. stream: whether 200 may also be server-sent events."""
    content = {"application/json": {"schema": ERROR}}
    found: dict[int | str, dict[str, Any]] = {s: {"description": _SAYS[s], "content": content} for s in statuses}
    if stream:
        found[200] = {
            "description": "the answer, or its pieces",
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {}}},
        }
    return found
