"""The operator's routes under `/admin`, the health routes, `/metrics`, and the console's page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response

from cluster.backend import Record
from cluster.config import SHARDS_MAX
from cluster.door import door_of
from cluster.errors import BadRequest, NotReady
from cluster.metrics import CONTENT_TYPE
from cluster.problems import error_body
from storage.errors import TitanmemError, shorten

router = APIRouter()
CONSOLE = Path(__file__).parent / "static" / "console.html"
CONSOLE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page is one file: nothing is loaded from anywhere, and it speaks to its own server alone."""
TARGET_CHARS_MAX = 2048
_SHARD = re.compile(r"[A-Za-z0-9_-]{1,64}")


@router.get("/admin/shards")
async def shards(request: Request) -> dict[str, Any]:
    """All shards and their figures."""
    door = door_of(request)
    door.operator(request)
    return {"shards": await door.backend.shards()}


@router.post("/admin/shards/scale")
async def scale(request: Request) -> Record:
    """Sets the number of shards: `{"shards": N}`."""
    door = door_of(request)
    door.operator(request)
    wanted = (await door.json(request)).get("shards")
    if type(wanted) is not int or not 1 <= wanted <= SHARDS_MAX:
        raise BadRequest(f"shards: must be a whole number from 1 to {SHARDS_MAX}.", "shards")
    return await door.backend.scale(wanted)


@router.post("/admin/shards/{shard}/drain")
async def drain(request: Request, shard: str) -> Record:
    """Moves everything off one shard."""
    door = door_of(request)
    door.operator(request)
    if not _SHARD.fullmatch(shard):
        raise BadRequest(f"shard: {shorten(shard, 64)!r} is no shard's name, such as shard-0.", "shard")
    return await door.backend.drain(shard)


@router.post("/admin/snapshots")
async def snapshot(request: Request) -> Record:
    """Writes a cold backup now; `{"target": URL}` says where if not to the configured place."""
    door = door_of(request)
    door.operator(request)
    target = (await door.json(request)).get("target")
    if target is not None and (not isinstance(target, str) or not 1 <= len(target) <= TARGET_CHARS_MAX):
        raise BadRequest("target: must be a URL such as file:///path or s3://bucket/prefix.", "target")
    try:
        return await door.backend.snapshot(target)
    except ValueError as error:
        if isinstance(error, TitanmemError):
            raise
        raise BadRequest(f"target: {error}", "target") from None


@router.get("/livez")
async def livez() -> Response:
    """The process answers; whether it should be sent requests is `/readyz`'s business."""
    return PlainTextResponse("ok\n")


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when requests are served, with a reason when something is wrong all the same; else 503 and the reason."""
    try:
        ready, reason = await door_of(request).backend.readiness()
    except TitanmemError as error:
        ready, reason = False, str(error)
    if ready:
        return JSONResponse({"ready": True, "reason": reason} if reason else {"ready": True})
    problem = NotReady(reason or "no reason is known")
    return JSONResponse({"ready": False, "reason": reason, **error_body(problem)}, 503, {"Retry-After": "1"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text of this door and of every shard that answers."""
    door = door_of(request)
    try:
        texts = await door.backend.shard_metrics()
    except TitanmemError:
        texts = []
    return Response(door.metrics.page(texts), headers={"Content-Type": CONTENT_TYPE})


@router.get("/console")
async def console() -> Response:
    """The operator's page."""
    headers = {"Content-Security-Policy": CONSOLE_POLICY, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(CONSOLE.read_bytes(), headers=headers)


@router.get("/")
async def root() -> Response:
    """A browser that is pointed at the address finds the console."""
    return RedirectResponse("/console", 307)
