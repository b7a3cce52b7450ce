"""The routes of one user's memory under `/v1/memories`, but for ingest (`ingest.py`)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from opentelemetry.trace import SpanKind
from starlette.requests import Request
from starlette.responses import Response

from cluster.backend import Record
from cluster.door import door_of
from cluster.errors import BadRequest
from storage.names import UserKey
from titanmem.tracing import continued

router = APIRouter(prefix="/v1/memories")
PAGE_USERS_MAX = 10_000
VERSION_MAX = 2**63 - 1


@router.get("")
async def users(request: Request) -> dict[str, Any]:
    """The tenant's users in order of name; `?after=NAME&limit=N` pages, `next` names where to go on."""
    door = door_of(request)
    tenant = door.tenant(request)
    limit = _whole(request.query_params.get("limit", str(PAGE_USERS_MAX)), "limit", PAGE_USERS_MAX)
    after = request.query_params.get("after", "")
    found = sorted(await door.backend.users(tenant), key=lambda record: record["user"])
    rows = [record for record in found if record["user"] > after]
    page = rows[:limit]
    return {"users": page, "next": page[-1]["user"] if len(rows) > limit else None}


@router.get("/{user}")
async def describe(request: Request, user: str) -> Record:
    """The memory's figures."""
    door = door_of(request)
    key = door.key(request, user)
    return _named(key, await door.backend.describe(key))


@router.get("/{user}/versions")
async def versions(request: Request, user: str) -> dict[str, Any]:
    """Stored versions, newest first."""
    door = door_of(request)
    key = door.key(request, user)
    return _named(key, {"versions": await door.backend.versions(key)})


@router.post("/{user}/rollback")
async def rollback(request: Request, user: str) -> Record:
    """Back to version `to`; without it, to the one before the current one."""
    door = door_of(request)
    key = door.key(request, user)
    to = (await door.json(request)).get("to")
    if to is not None and (type(to) is not int or not 0 <= to <= VERSION_MAX):
        raise BadRequest("to: must be the number of a stored version.", "to", "invalid_type")
    return _named(key, await door.backend.rollback(key, to))


@router.put("/{user}/pin")
async def pin(request: Request, user: str) -> Record:
    """Keeps the current version."""
    door = door_of(request)
    key = door.key(request, user)
    return _named(key, await door.backend.pin(key))


@router.get("/{user}/export")
async def export(request: Request, user: str) -> Response:
    """The memory as a `.titanmem` file."""
    door = door_of(request)
    key = door.key(request, user)
    data = await door.backend.export(key)
    name = key.user.replace(":", "_")  # no file name on Windows holds a colon
    headers = {"Content-Disposition": f'attachment; filename="{name}.titanmem"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


@router.put("/{user}/import")
async def import_(request: Request, user: str) -> Record:
    """Replaces the memory by a `.titanmem` file's."""
    door = door_of(request)
    key = door.key(request, user)
    data = await door.body(request, door.settings.import_bytes_max)
    with continued(
        request.headers, "update_memory", SpanKind.SERVER, gen_ai__operation__name="update_memory"
    ):
        return _named(key, await door.backend.import_(key, data))


@router.delete("/{user}")
async def forget(request: Request, user: str) -> Record:
    """Erases the user everywhere; the receipt says what is gone."""
    door = door_of(request)
    key = door.key(request, user)
    with continued(
        request.headers, "delete_memory", SpanKind.SERVER, gen_ai__operation__name="delete_memory"
    ):
        return _named(key, await door.backend.forget(key))


def _named(key: UserKey, record: Record) -> Record:
    return {"user": key.user, **record}


def _whole(text: str, name: str, high: int) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= high:
        return int(text)
    raise BadRequest(f"{name}: must be a whole number from 1 to {high}.", name)
