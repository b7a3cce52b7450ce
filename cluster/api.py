"""The HTTP door: one FastAPI app over a `Backend`. Knows nothing of Ray; each replica has its own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster import admin, chat, ingest, memories
from cluster.auth import Keys
from cluster.backend import Backend
from cluster.door import Door, DoorSettings
from cluster.guard import Guard
from cluster.metrics import DoorMetrics
from cluster.problems import PROBLEMS, REQUEST, Problem, body_of, error_response
from titanmem.tokenizer import ChatTokenizer


def build_api(
    backend: Backend,
    tokenizer: ChatTokenizer,
    settings: DoorSettings,
    *,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """The app with all routes. `new_id` names requests, `now` dates them (seconds since 1970)."""
    # No /docs: bodies are read by hand, within limits, so FastAPI knows no schemas to show; its page also
    # loads scripts from elsewhere.
    app = FastAPI(title="titanmem", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    door = Door(
        backend=backend,
        tokenizer=tokenizer,
        settings=settings,
        keys=Keys(settings.api_keys, settings.admin_key),
        metrics=DoorMetrics(settings.model),
        new_id=new_id,
        now=now,
    )
    app.state.door = door
    app.state.created = int(now())
    for part in (chat, ingest, memories, admin):
        app.include_router(part.router)
    for kind in PROBLEMS:
        app.add_exception_handler(kind, _on_problem)
    app.add_exception_handler(HTTPException, _on_unknown)
    app.add_middleware(Guard, metrics=door.metrics)
    return app


async def _on_problem(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_unknown(request: Request, error: Exception) -> Response:
    """No such route, or not with that method: routing's own answers, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:128]}"
    if error.status_code == 404:
        body = body_of(f"Unknown request URL: {what}.", Problem(404, REQUEST, "unknown_url"))
    elif error.status_code == 405:
        body = body_of(f"Not a method of this URL: {what}.", Problem(405, REQUEST, "method_not_allowed"))
    else:
        body = body_of(str(error.detail), Problem(error.status_code, REQUEST, "http_error"))
    return JSONResponse(body, error.status_code, error.headers)
