"""Reading a request's body: never more than a limit, never for ever, and as what it claims to be."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from cluster.errors import BadRequest, BodyTooLarge, BodyTooSlow
from storage.errors import shorten

DRAINED_BYTES_MAX = 32 << 20
"""How much of a body that is too large is still taken, and thrown away: a client that is still sending does
not look for an answer, and would see a broken connection instead of the reason."""
DEPTH_ERROR = "The body is nested too deeply."


async def body_chunks(request: Request, idle_s_max: float) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises `BodyTooSlow` when nothing comes for `idle_s_max`."""
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout(idle_s_max):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise BodyTooSlow(idle_s_max) from None
        if chunk:
            yield chunk


async def read_body(request: Request, bytes_max: int, idle_s_max: float) -> bytes:
    """The whole body. Raises `BodyTooLarge`, going by what really comes and not by `Content-Length` alone."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > bytes_max + DRAINED_BYTES_MAX:
        raise BodyTooLarge(bytes_max)
    kept, count = bytearray(), 0
    async for chunk in body_chunks(request, idle_s_max):
        count += len(chunk)
        if count <= bytes_max:
            kept += chunk
        elif count > bytes_max + DRAINED_BYTES_MAX:
            break
        else:
            kept.clear()
    if count > bytes_max:
        raise BodyTooLarge(bytes_max)
    return bytes(kept)


def parse_json(body: bytes, *, optional: bool = False) -> dict[str, Any]:
    """The body as one JSON object; {} for none at all if `optional`. Raises `BadRequest`."""
    if optional and not body.strip():
        return {}
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        message = f"The body is not UTF-8: byte {error.start} ({body[error.start]:#04x}) begins no character."
        raise BadRequest(message, None, "invalid_utf8") from None
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        raise BadRequest(message, None, "invalid_json") from None
    except RecursionError:
        raise BadRequest(DEPTH_ERROR, None, "invalid_json") from None
    except ValueError as error:  # a number of thousands of digits, or NaN
        raise BadRequest(f"The body is not JSON: {error}.", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be one JSON object.", None, "invalid_json")
    if b"\\u" in body:
        _refuse_half_characters(value)
    return value


async def read_json(
    request: Request, bytes_max: int, idle_s_max: float, *, optional: bool = False
) -> dict[str, Any]:
    """`read_body`, then `parse_json`."""
    return parse_json(await read_body(request, bytes_max, idle_s_max), optional=optional)


class Utf8Stream:
    """UTF-8 that comes in pieces, cut anywhere. A byte-order mark at the start is left out."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._bytes = 0
        self._begun = False
        self.wrong: BadRequest | None = None
        """Set when a byte was wrong, and names its offset. The text before it has been given out."""

    def feed(self, data: bytes, *, last: bool = False) -> str:
        """The characters that `data` completes, up to the first wrong byte."""
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, last)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            offset = self._bytes - held + error.start
            what = "ends inside a character" if error.reason == "unexpected end of data" else "begins none"
            message = f"The text is not UTF-8: the byte at offset {offset} {what}."
            self.wrong = BadRequest(message, None, "invalid_utf8")
        self._bytes += len(data)
        if text and not self._begun:
            self._begun = True
            return text.removeprefix("\ufeff")
        return text


def _refuse_half_characters(value: Any) -> None:
    """JSON can spell half a surrogate pair (`\\ud800`): no character, and nothing that UTF-8 can carry on."""
    rest: list[tuple[str, Any]] = [("", value)]
    while rest:
        where, item = rest.pop()
        if isinstance(item, dict):
            rest += [(f"{where}.{name}" if where else name, inner) for name, inner in item.items()]
        elif isinstance(item, list):
            rest += [(f"{where}[{index}]", inner) for index, inner in enumerate(item)]
        elif isinstance(item, str) and any("\ud800" <= c <= "\udfff" for c in item):
            where = shorten(where, 128)
            raise BadRequest(f"{where}: holds half of a surrogate pair.", where, "invalid_unicode")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
