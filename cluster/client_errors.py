"""What can go wrong between our client and a server, made of what httpx and the server say.

ClientError
├── NoServer        nothing listens there
├── ConnectionLost  the connection broke or timed out after it stood: the outcome is not known
├── BadAnswer       somebody answered, but not a titanmem server
└── Refused         the server answered with an error: `status`, `code`, `param`, `retry_after_s`
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from storage.errors import TitanmemError, shorten

if TYPE_CHECKING:
    import httpx

# httpx is a third of the time that `titanmem --help` would take: it is imported where a request is made.

URL_DEFAULT = "http://127.0.0.1:8000"
ERROR_BYTES_MAX = 65536
PORT_MAX = 65535
RETRY_AFTER_MAX_S = 3600.0


class ClientError(TitanmemError):
    """A request to a server did not do what it was asked."""


class NoServer(ClientError):
    """Nothing listens at the address."""


class ConnectionLost(ClientError):
    """The connection broke or timed out; whether the request was carried out is not known."""


class BadAnswer(ClientError):
    """The answer is not one that a titanmem server gives."""


class Refused(ClientError):
    """The server answered with an error body; with `status`, `code`, `param` and `retry_after_s`."""


class Network:
    """Turns what httpx raises about the network into `ClientError`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        import httpx

        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise NoServer(f"no server at {self.url} : start one with `make serve`", url=self.url) from error
        if isinstance(error, httpx.TimeoutException):
            raise ConnectionLost(f"{self.url} did not answer in time", url=self.url) from error
        if isinstance(error, httpx.RequestError):
            why = shorten(str(error)) or type(error).__name__
            raise ConnectionLost(f"lost the connection to {self.url}: {why}", url=self.url) from error


def check_url(url: str) -> str:
    """`url` without a slash at its end; ValueError if it is no http or https address."""
    import httpx

    try:
        parts = httpx.URL(url)
        fits = parts.scheme in ("http", "https") and parts.host and (parts.port or 1) <= PORT_MAX
        if fits and url.isprintable() and " " not in url:
            return url.rstrip("/")
    except httpx.InvalidURL:
        pass
    raise ValueError(f"url: {shorten(url, 64)!r} is no address like {URL_DEFAULT}")


def check(reply: httpx.Response) -> None:
    """Raises `Refused` with the server's own words when the answer is an error."""
    if reply.is_success:
        return
    try:
        body = json.loads(reply.content[:ERROR_BYTES_MAX])
    except ValueError:
        body = {}
    raise refused(reply.status_code, body, reply.headers.get("Retry-After", ""))


def refused(status: int, body: Any, retry_after: str) -> Refused:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {}
    retry_after_s = min(float(retry_after), RETRY_AFTER_MAX_S) if retry_after.isdecimal() else 1.0
    return Refused(
        str(error.get("message") or f"the server answered {status} without saying why"),
        status=status,
        code=error.get("code"),
        param=error.get("param"),
        retry_after_s=retry_after_s,
    )
