"""Ways in which a store fails, planted where its client meets the world: the server's answer, the socket, the disk."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.client
import pytest
import redis.connection
from botocore.exceptions import ClientError, ReadTimeoutError
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from tests.storage.wounds import half_writing

ENDPOINT = "http://127.0.0.1"


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to fail of one kind of store, for as long as `planted` lasts."""

    name: str
    store: str
    """file, s3 or redis."""
    plant: Callable[[pytest.MonkeyPatch, Path], None]
    reads: bool = False
    """Whether reads go on."""

    @contextmanager
    def planted(self, store: Path) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("storage.attempts.BACKOFF_FIRST_S", 0.0)
            self.plant(patch, store)
            yield


def answer(
    status: int, code: str, *, writes_only: bool = False
) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """S3 answers requests with an error, and does not carry them out."""

    def plant(patch: pytest.MonkeyPatch, _: Path) -> None:
        real = botocore.client.BaseClient._make_api_call  # type: ignore[attr-defined]

        def call(client: Any, operation: str, arguments: Any) -> Any:
            if writes_only and operation.startswith(("Get", "Head", "List")):
                return real(client, operation, arguments)
            response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise ClientError(response, operation)

        patch.setattr(botocore.client.BaseClient, "_make_api_call", call)

    return plant


def s3_network(error: Exception, *, carried_out: bool) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """No answer of S3 comes; `carried_out`: what was asked for is done all the same."""

    def plant(patch: pytest.MonkeyPatch, _: Path) -> None:
        real = botocore.client.BaseClient._make_api_call  # type: ignore[attr-defined]

        def call(client: Any, operation: str, arguments: Any) -> Any:
            if carried_out:
                with contextlib.suppress(ClientError):  # that is an answer, too
                    real(client, operation, arguments)
            raise error

        patch.setattr(botocore.client.BaseClient, "_make_api_call", call)

    return plant


def redis_away(patch: pytest.MonkeyPatch, _: Path) -> None:
    def send(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    patch.setattr(redis.connection.AbstractConnection, "send_packed_command", send)


def redis_answers(error: Exception) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """Redis carries out what it is asked, and another answer comes."""

    def plant(patch: pytest.MonkeyPatch, _: Path) -> None:
        real = redis.connection.AbstractConnection.read_response

        def read(connection: Any, *arguments: Any, **named: Any) -> Any:
            real(connection, *arguments, **named)
            raise error

        patch.setattr(redis.connection.AbstractConnection, "read_response", read)

    return plant


def disk(code: int, step: str) -> Callable[[pytest.MonkeyPatch, Path], None]:
    """The disk of a `file://` store fails in one step of a write."""
    problem = OSError(code, os.strerror(code))

    def fail(*_: Any, **__: Any) -> Any:
        raise problem

    def plant(patch: pytest.MonkeyPatch, _: Path) -> None:
        if step == "write":
            patch.setattr("storage.local.open", half_writing(problem), raising=False)
        else:
            # A module of its own, so that nothing else on this machine fails.
            patch.setattr("storage.local.os", Steps(**{{"fsync": "fsync", "rename": "replace"}[step]: fail}))

    return plant


class Steps:
    """The module `os`, some of whose functions are replaced."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def unmounted(patch: pytest.MonkeyPatch, store: Path) -> None:
    """The folder is another one; mounted again when the test is over."""
    store.rename(store.with_name("unmounted"))
    store.mkdir()


# Other answers of S3 that are asked again for (500, 429, OperationAborted) are told apart nowhere above its client:
# tests/storage/test_s3.py has them.
FAULTS = (
    Fault("s3 503", "s3", answer(503, "SlowDown")),
    Fault("s3 409", "s3", answer(409, "ConditionalRequestConflict")),
    Fault("s3 403 of writes", "s3", answer(403, "AccessDenied", writes_only=True), reads=True),
    Fault("s3 time-out", "s3", s3_network(ReadTimeoutError(endpoint_url=ENDPOINT), carried_out=False)),
    Fault("s3 lost answers", "s3", s3_network(ReadTimeoutError(endpoint_url=ENDPOINT), carried_out=True)),
    Fault("redis away", "redis", redis_away),
    Fault("redis lost answers", "redis", redis_answers(TimeoutError("timed out"))),
    Fault(
        "redis disk full",
        "redis",
        redis_answers(ResponseError("MISCONF Errors writing to the AOF file: No space")),
    ),
    *(
        Fault(f"file {errno.errorcode[code]} on {step}", "file", disk(code, step), reads=True)
        for code in (errno.ENOSPC, errno.EIO)
        for step in ("write", "fsync", "rename")
    ),
)
