"""`/v1/files` and `/v1/batches` of the server."""

import asyncio
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from moe.answers import error_body
from moe.launch.openapi import BATCH, FILE, answers, pages, takes
from moe.launch.uploads import BATCH_ID, FILE_ID, Uploads
from moe.openai import BadRequest, json_of

_MOST_FILES, _MOST_BATCHES = 10_000, 100  # of one page
_ORDERS = ("desc", "asc")


def add_file_routes(app: FastAPI, uploads: Uploads) -> None:
    """Adds them to the app."""

    @app.post("/v1/files", responses=answers(400, 413), openapi_extra=takes(FILE, "multipart/form-data"))
    async def upload(request: Request) -> Response:
        async with request.form(max_files=1) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if file is None or isinstance(file, str):
                return _error(400, "file is missing", "file")
            if purpose != "batch":
                return _error(400, f"purpose ({purpose!r}) must be batch", "purpose")
            content = await file.read()
            return JSONResponse(await asyncio.to_thread(uploads.add_file, file.filename or "file", "batch", content))

    @app.get("/v1/files", responses=answers(400), openapi_extra=pages(_MOST_FILES))
    async def files(request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        records = [one for one in uploads.files() if purpose in (None, one["purpose"])]
        return _page(records, FILE_ID, request, _MOST_FILES, _MOST_FILES)

    @app.get("/v1/files/{id}", responses=answers(404))
    async def file(id: str) -> Response:
        return _found(uploads.file(id), "file", id)

    bytes_of: dict[int | str, dict[str, Any]] = {
        200: {"description": "the file", "content": {"application/octet-stream": {"schema": {}}}}
    }

    @app.get("/v1/files/{id}/content", response_class=Response, responses=answers(404) | bytes_of)
    async def content(id: str) -> Response:
        if uploads.file(id) is None:
            return _missing("file", id)
        return Response(await asyncio.to_thread(uploads.content, id), media_type="application/octet-stream")

    @app.delete("/v1/files/{id}", responses=answers(404))
    async def delete(id: str) -> Response:
        if uploads.file(id) is None:
            return _missing("file", id)
        uploads.delete_file(id)
        return JSONResponse({"id": id, "object": "file", "deleted": True})

    _add_batch_routes(app, uploads)


def _add_batch_routes(app: FastAPI, uploads: Uploads) -> None:
    @app.post("/v1/batches", responses=answers(400, 413), openapi_extra=takes(BATCH))
    async def create(request: Request) -> Response:
        try:
            return JSONResponse(uploads.add_batch(json_of(await request.body(), "the body")))
        except BadRequest as error:
            return _error(400, str(error), error.param)
        except ValueError as error:
            return _error(400, str(error))

    @app.get("/v1/batches", responses=answers(400), openapi_extra=pages(_MOST_BATCHES))
    async def batches(request: Request) -> Response:
        return _page(uploads.batches(), BATCH_ID, request, 20, _MOST_BATCHES)

    @app.get("/v1/batches/{id}", responses=answers(404))
    async def batch(id: str) -> Response:
        return _found(uploads.batch(id), "batch", id)

    @app.post("/v1/batches/{id}/cancel", responses=answers(404, 413))
    async def cancel(id: str) -> Response:
        return _missing("batch", id) if uploads.batch(id) is None else JSONResponse(uploads.cancel_batch(id))


def _page(records: list[dict[str, Any]], kind: str, request: Request, usual: int, most: int) -> Response:
    """Those that `limit` (None: `usual`), `after` and `order` of the query ask for. records: the newest first; kind:
    how their ids begin. What was deleted may still be what the next page comes after."""
    limit, after = request.query_params.get("limit", str(usual)), request.query_params.get("after")
    order = request.query_params.get("order", _ORDERS[0])
    if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or not 1 <= int(limit) <= most:
        return _error(400, f"limit ({limit[:20]!r}) must be a whole number from 1 to {most}", "limit")
    if after is not None and not re.fullmatch(f"{kind}[0-9a-f]{{24}}", after):
        return _error(400, f"after ({after[:80]!r}) must be an id of this list, {kind}…", "after")
    if order not in _ORDERS:
        return _error(400, f"order ({order[:20]!r}) must be {' or '.join(_ORDERS)}", "order")
    if order == "asc":
        rest = [one for one in reversed(records) if after is None or one["id"] > after]
    else:
        rest = [one for one in records if after is None or one["id"] < after]
    page = rest[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(page) < len(rest)
    return JSONResponse({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


def _found(record: dict[str, Any] | None, kind: str, id: str) -> Response:
    return _missing(kind, id) if record is None else JSONResponse(record)


def _missing(kind: str, id: str) -> JSONResponse:
    return _error(404, f"there is no {kind} {id!r}", "id")


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, param=param), status)
