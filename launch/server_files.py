"""`/v1/files` and `/v1/batches` of the server."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from moe.answers import error_body
from moe.launch.openapi import BATCH, FILE, answers, takes
from moe.launch.uploads import Uploads
from moe.openai import BadRequest, json_of


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

    @app.get("/v1/files")
    async def files() -> Response:
        return JSONResponse(_page(uploads.files()))

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

    @app.get("/v1/batches")
    async def batches() -> Response:
        return JSONResponse(_page(uploads.batches()))

    @app.get("/v1/batches/{id}", responses=answers(404))
    async def batch(id: str) -> Response:
        return _found(uploads.batch(id), "batch", id)

    @app.post("/v1/batches/{id}/cancel", responses=answers(404, 413))
    async def cancel(id: str) -> Response:
        return _missing("batch", id) if uploads.batch(id) is None else JSONResponse(uploads.cancel_batch(id))


def _page(records: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = (records[0]["id"], records[-1]["id"]) if records else (None, None)
    return {"object": "list", "data": records, "first_id": first, "last_id": last, "has_more": False}


def _found(record: dict[str, Any] | None, kind: str, id: str) -> Response:
    return _missing(kind, id) if record is None else JSONResponse(record)


def _missing(kind: str, id: str) -> JSONResponse:
    return _error(404, f"there is no {kind} {id!r}", "id")


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, param=param), status)
