"""Stores for the tests of this room: folders, and a real S3 server and a real Redis that all of them share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.objects import Objects, open_objects
from storage.store import MemoryStore
from tests.servers import RedisServer, S3Server, ministack, redis_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One ministack for the session, with the bucket `titanmem`."""
    with ministack(tmp_path_factory.mktemp("ministack")) as server:
        server.make_bucket("titanmem")
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """A store's URL with a prefix of its own."""
    return s3_server.url("titanmem", f"test/{next(_numbers)}")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One redis-server for the session; nobody kills it."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """A store's URL with a prefix of its own."""
    return shared_redis.url(f"test{next(_numbers)}")


@pytest.fixture(params=["file", "s3", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue(f"{request.param}_url")


@pytest.fixture
def objects(url: str) -> Objects:
    return open_objects(url)


@pytest.fixture
def store(objects: Objects) -> MemoryStore:
    return MemoryStore(objects)


@pytest.fixture
def folder_store(tmp_path: Path) -> MemoryStore:
    """An empty store in a folder, for what does not depend on the kind."""
    return MemoryStore(open_objects(f"file://{tmp_path}/store"))
