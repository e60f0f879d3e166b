"""The HTTP face of a service: OpenAI's endpoints, health, metrics and a live page (`moe serve`).

Bodies are read by `moe/openai.py`, requests are answered by the one thread of `moe/service.py`; this file only carries.
Nothing of a prompt or an answer is written anywhere but to whoever asked.
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe import __version__
from moe.answers import chunk_body, chunk_choice, error_body, prompt_token_ids, response_body, token_ids, usage
from moe.engine.limits import ContextExceeded
from moe.launch.live import live_state
from moe.launch.openapi import answers, request_schema, takes
from moe.launch.page import PAGE
from moe.launch.server_files import add_file_routes
from moe.launch.uploads import Uploads
from moe.metrics import exposition
from moe.openai import CHAT, COMPLETIONS, Ask, BadRequest, json_of, parse_request
from moe.service import Delta, QueueFull, Service, Ticket

log = logging.getLogger(__name__)

EVENTS = "text/event-stream"
_ENDS = "the server ends"
_TOO_LONG = "context_length_exceeded"  # by which clients know that they must shorten a prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one request. seconds: until an answer that is not complete is given up."""

    body_bytes: int = 1 << 20
    file_bytes: int = 200 << 20
    seconds: float = 3600.0
    drain_seconds: float = 30.0


def make_app(service: Service, uploads: Uploads, limits: Limits, api_key: str | None = None) -> FastAPI:
    """api_key: what a caller must send as a bearer token; health needs none."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(uploads.close)
        await asyncio.to_thread(service.close, limits.drain_seconds)

    # Its documentation pages would load scripts from elsewhere; /openapi.json is what they show.
    app = FastAPI(title="moe", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    app.add_middleware(_Border, limits=limits, api_key=api_key)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        """A path or a method that is not served, in the format's own form."""
        what = f"{request.method} {request.url.path}"
        return JSONResponse(error_body(f"{what}: {error.detail.lower()}"), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        """In the middle of its body: there is nobody to answer, and nothing to log."""
        return Response(status_code=499)

    @app.get("/health", responses=answers(503))
    async def health() -> JSONResponse:
        is_well = service.why_ill is None
        return JSONResponse({"status": "ok" if is_well else service.why_ill}, 200 if is_well else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(exposition([(service.stats, {}), *service.llm.engine.metric_sources()]))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/live")
    def live() -> JSONResponse:
        return JSONResponse(live_state(service.llm, service))

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", responses=answers(404))
    async def model(name: str) -> Response:
        if name != service.llm.name:
            return _refused(404, f"there is no model {name!r}; {service.llm.name!r} is served", code="model_not_found")
        return JSONResponse(_model(service))

    may_say = answers(400, 413, 429, 500, 503, 504, stream=True)

    @app.post(COMPLETIONS, responses=may_say, openapi_extra=takes(request_schema(COMPLETIONS)))
    async def completions(request: Request) -> Response:
        return await _answer(service, limits, request, COMPLETIONS)

    @app.post(CHAT, responses=may_say, openapi_extra=takes(request_schema(CHAT)))
    async def chat(request: Request) -> Response:
        return await _answer(service, limits, request, CHAT)

    add_file_routes(app, uploads)
    return app


def make_server(app: FastAPI, limits: Limits, host: str, port: int) -> uvicorn.Server:
    """port 0: any that is free. Told to end, it takes no more calls, and cuts off what `drain_seconds` do not finish:
    a caller that reads no more would keep it for ever."""
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "http": _Protocol}
    settings["timeout_graceful_shutdown"] = limits.drain_seconds
    return _Server(uvicorn.Config(app, host=host, port=port, **settings))


def serve_until_told(server: uvicorn.Server) -> None:
    """Until SIGTERM or Ctrl-C, on the main thread; a second one cuts off what is open. Returns: uvicorn raises every
    signal again when it has ended, which would end the process before the model, its hosts and a recording are closed,
    and a second Ctrl-C while asyncio clears up."""

    def end(*_: object) -> None:
        server.should_exit = True  # of one that comes before uvicorn handles them itself

    before = {one: signal.signal(one, end) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Server(uvicorn.Server):
    """uvicorn's; told twice, it leaves callers and the app's own end as they are: the former are cut off, so that the
    latter, which closes what was begun, waits for nobody."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.server_state.tasks and not self.force_exit:
            count, seconds = len(self.server_state.tasks), self.config.timeout_graceful_shutdown
            log.warning("ends: %d open calls have %g s, or until it is told again", count, seconds)
        await super().shutdown(sockets)
        if self.force_exit:
            for connection in list(self.server_state.connections):
                assert isinstance(connection, H11Protocol), connection
                connection.transport.abort()
            await self.lifespan.shutdown()


class _Protocol(H11Protocol):
    """uvicorn's; it answers what is no HTTP with 400, but a caller may send that in the middle of a body: then the app
    answers too, or has answered already, and one of the two raised."""

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response has begun, or this caller has had one
            self.transport.close()
        if self.cycle is not None:  # what the app still has to say is for nobody, like after the end of a connection
            self.cycle.disconnected = True
            self.cycle.message_event.set()


class _Border:
    """Refuses callers without the key and bodies that are too long, before anything of them is read; tells those whom
    the end of the server cuts off."""

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str | None) -> None:
        self.app, self.limits, self.api_key = app, limits, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._why_refused(Request(scope)) if scope["type"] == "http" else None
        receive = receive if scope["type"] != "http" else self._up_to_limit(scope["path"], receive)
        begun = is_stream = False

        async def say(message: Message) -> None:
            nonlocal begun, is_stream
            if message["type"] == "http.response.start":
                begun, is_stream = True, _is_stream(message)
            await send(message)

        try:
            await (refused or self.app)(scope, receive, say)
        except asyncio.CancelledError:  # by uvicorn, after the drain; it logs a traceback of whatever is not caught
            if scope["type"] != "http":
                raise
            if not begun:
                await _refused(503, _ENDS, "server_error")(scope, receive, send)
            elif is_stream:
                last = {"type": "http.response.body", "body": _event(error_body(_ENDS, "server_error")).encode()}
                with suppress(asyncio.CancelledError):  # at the loop's end: who reads no more is not waited for
                    await send(last)

    def _why_refused(self, request: Request) -> Response | None:
        path = request.url.path
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and path not in ("/health", "/") and not _is_same(given, self.api_key):
            return _refused(401, "the API key is missing or wrong", "authentication_error")
        limit, length = self._limit(path), request.headers.get("content-length", "0")
        if not (length.isdecimal() and int(length) <= limit):
            return _refused(413, f"{path}: {_too_long(limit)}")
        return None

    def _limit(self, path: str) -> int:
        return self.limits.file_bytes if path == "/v1/files" else self.limits.body_bytes

    def _up_to_limit(self, path: str, receive: Receive) -> Receive:
        """Ends the call where its body grows longer: it may come in chunks, without a length."""
        limit, read = self._limit(path), 0

        async def take() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, _too_long(limit))
            return message

        return take


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.llm.name, "object": "model", "created": int(service.started), "owned_by": "moe"}


def _is_stream(message: Message) -> bool:
    return any(name == b"content-type" and value.startswith(EVENTS.encode()) for name, value in message["headers"])


def _too_long(limit: int) -> str:
    return f"a body may have at most {limit} bytes"


def _is_same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode(), key.encode())


def _refused(status: int, message: str, kind: str = "invalid_request_error", **more: Any) -> JSONResponse:
    return JSONResponse(error_body(message, kind, **more), status)


class _Call:
    """A request between the service's thread and this loop."""

    def __init__(self, service: Service, ask: Ask, prompts: list[list[int]]) -> None:
        self.service, self.ask, self.prompts = service, ask, prompts
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self.id, self.created = secrets.token_hex(12), int(time.time())
        loop = asyncio.get_running_loop()

        def deliver(delta: Delta) -> None:
            if not ask.stream and delta.completion is None:
                return  # only whole samples matter
            loop.call_soon_threadsafe(self.deltas.put_nowait, delta)

        self.ticket: Ticket = service.submit(prompts, ask.params, deliver)

    @property
    def names(self) -> dict[str, Any]:
        named = {"request_id": self.id, "created": self.created, "model": self.service.llm.name}
        return named | {"fingerprint": self.service.fingerprint}

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


async def _answer(service: Service, limits: Limits, request: Request, url: str) -> Response:
    try:
        llm = service.llm
        ask = parse_request(url, json_of(await request.body(), "the body"), llm.recommended, llm.tool_format)
        prompts = await asyncio.to_thread(llm.tokens_of, ask)
        if service.why_ill is not None:
            return _refused(503, service.why_ill, "server_error")
        call = _Call(service, ask, prompts)
    except QueueFull as error:
        response = _refused(429, str(error), "rate_limit_error", code="queue_full")
        response.headers["Retry-After"] = "1"
        return response
    except BadRequest as error:
        return _refused(400, str(error), param=error.param)
    except ValueError as error:
        return _refused(400, str(error), code=_TOO_LONG if isinstance(error, ContextExceeded) else None)
    if ask.stream:
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(_stream(call, limits.seconds), media_type=EVENTS, headers=headers)
    return await _whole(call, request, limits.seconds)


async def _whole(call: _Call, request: Request, seconds: float) -> Response:
    """The answer in one piece; a caller that goes away meanwhile ends it."""
    gone, collected = asyncio.ensure_future(_left(request)), asyncio.ensure_future(_collected(call))
    try:
        await asyncio.wait({gone, collected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not collected.done():
            if gone.done():
                return Response(status_code=499)
            return _refused(504, f"the answer was not complete after {seconds:g} s", "timeout_error")
        ends = await collected
    finally:
        gone.cancel()
        collected.cancel()
        call.service.cancel(call.ticket)
    answers = [end.completion for end in ends if end.completion is not None]
    if (error := next((one.error for one in answers if one.error is not None), None)) is not None:
        return _refused(500, error, "server_error")
    of_prompts = [end.of_prompt for end in ends[:: call.ask.params.n]]
    body = response_body(call.ask, answers, **call.names, prompts=call.prompts, of_prompts=of_prompts)
    return JSONResponse(body)


async def _left(request: Request) -> None:
    """Returns when the caller has gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(call: _Call) -> list[Delta]:
    """The ends of all samples in order, or as many as there were when one failed."""
    ends: dict[int, Delta] = {}
    while len(ends) < call.ticket.num_samples:
        delta = await call.deltas.get()  # no limit: who collects has one
        if delta.completion is not None:
            ends[delta.sample] = delta
            if delta.completion.error is not None:
                break
    return [ends[i] for i in sorted(ends)]


async def _stream(call: _Call, seconds: float) -> AsyncIterator[str]:
    """Server-sent events; the generator is closed when the caller goes away, and then the request ends."""
    seen: set[int] = set()
    readers = [call.ask.reader() for _ in range(call.ticket.num_samples)]
    offsets = [0] * call.ticket.num_samples
    no_usage = {"usage": None} if call.ask.include_usage else {}  # until the last piece, as the format has it
    finished = num_tokens = 0
    deadline = time.monotonic() + seconds
    try:
        while finished < call.ticket.num_samples:
            delta = await asyncio.wait_for(call.deltas.get(), max(0.0, deadline - time.monotonic()))
            num_tokens += len(delta.tokens)
            done = delta.completion
            if done is not None and done.error is not None:
                yield _event(error_body(done.error, "server_error"))
                return
            finished += done is not None
            finish = None if done is None else done.finish_reason
            is_first = delta.sample not in seen
            seen.add(delta.sample)
            prompt = call.prompts[delta.sample // call.ask.params.n]
            choice = chunk_choice(
                call.ask,
                delta.sample,
                delta.text,
                finish,
                delta.logprobs,
                first=is_first,
                reader=readers[delta.sample],
                ids=token_ids(call.ask, delta.tokens, prompt if is_first else None),
                offset=offsets[delta.sample],
            )
            offsets[delta.sample] += sum(len(next(iter(step.values())).decoded_token) for step in delta.logprobs or ())
            if choice is not None:
                of_prompt = prompt_token_ids(call.ask, prompt) if is_first else {}
                yield _event(chunk_body(call.ask, [choice], **call.names) | of_prompt | no_usage)
        if call.ask.include_usage:
            yield _event(chunk_body(call.ask, [], **call.names) | {"usage": usage(call.prompt_tokens, num_tokens)})
        yield "data: [DONE]\n\n"
    except TimeoutError:
        yield _event(error_body(f"the answer was not complete after {seconds:g} s", "timeout_error"))
    finally:
        call.service.cancel(call.ticket)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"
