"""The outermost layer of the door: users' names in paths, failures that nobody foresaw, and a count."""

from __future__ import annotations

import uuid
from urllib.parse import quote, unquote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.metrics import DoorMetrics
from cluster.problems import error_response
from storage.errors import InvalidName
from storage.names import check_name

MEMORIES = "/v1/memories/"
UNMATCHED = "unmatched"


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, metrics: DoorMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            check_path(scope)
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499  # nginx's word for it: nobody is left to be answered
        except InvalidName as error:
            await error_response(error)(scope, receive, watched)
        except Exception as error:
            if status:
                raise  # half an answer has gone out: the server cuts the connection, so that it shows
            await error_response(error, f"req-{uuid.uuid4().hex}")(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            self._metrics.answered(scope["method"], route, status)


def check_path(scope: Scope) -> None:
    """Raises `InvalidName` for a user in the path who cannot be one.

    Looks at the path before it was decoded: a name with a slash in it, however it is spelled, would otherwise
    be taken for a longer path, and found or not found under somebody else's name.
    """
    raw = scope.get("raw_path") or quote(scope["path"]).encode()
    path = raw.decode("latin-1").partition("?")[0].removeprefix(quote(scope.get("root_path", "")))
    if path.startswith(MEMORIES):
        check_name("user", unquote(path.removeprefix(MEMORIES).partition("/")[0]))
