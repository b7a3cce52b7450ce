"""Objects in Redis: `redis://host:port/db?prefix=…` (or `rediss://`), for sessions that hop between hosts quickly.

An object is a string with its bytes, a hash with its tag and time, and a line of one sorted set that is the listing. A
write compares the tag and replaces all three in one Lua script, so that a shard whose epoch is over can change nothing.

What is acknowledged must be on the disk: the server has an append-only file that is flushed before it answers
(`appendonly yes`, `appendfsync always`), and does not evict keys to make room. `probe` refuses any other. A replica
that takes over may lack the last writes: do not fail over by itself unless you can lose them.
"""

from __future__ import annotations

import io
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import SplitResult

import redis
import xxhash
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from storage.attempts import Attempts
from storage.errors import StoreUnavailable, StoreUnfit, VersionConflict
from storage.objects import ObjectInfo, check_object_name, check_prefix, probe_conditions

T = TypeVar("T")

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
BYTES_MAX = 512 << 20
"""Longest string that Redis holds."""
PAGE = 1000
REWRITE_WAIT_S = 10.0
"""How long to wait for a rewrite of the append-only file that runs already."""

_log = logging.getLogger(__name__)

# KEYS: bytes, tag and time, names. ARGV: rule, tag expected, bytes, new tag, name.
# Answer: whether it was written, and the tag that stands.
_PUT = """
local found = redis.call('HGET', KEYS[2], 'tag')
if ARGV[1] == 'absent' and found then return {0, found} end
if ARGV[1] == 'tag' and found ~= ARGV[2] then return {0, found or ''} end
local now = redis.call('TIME')
redis.call('SET', KEYS[1], ARGV[3])
redis.call('HSET', KEYS[2], 'tag', ARGV[4], 'seconds', now[1])
redis.call('ZADD', KEYS[3], 0, ARGV[5])
return {1, ARGV[4]}
"""

_AGAIN = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError)


class _Lost(Exception):
    """A request failed in a way that may pass; whether it was carried out is not known."""


class RedisObjects:
    """`Objects` under `prefix` in one database of one Redis."""

    def __init__(
        self,
        host: str,
        port: int,
        db: int,
        prefix: str = "titanmem",
        *,
        tls: bool = False,
        attempts: Attempts | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """User and password come from `REDIS_USERNAME` and `REDIS_PASSWORD`. Contacts nothing."""
        self.prefix = prefix
        self.url = f"redis{'s' if tls else ''}://{host}:{port}/{db}?prefix={prefix}"
        self._attempts = attempts or Attempts()
        # redis-py's own repetitions are off: it would repeat a conditional write that had succeeded.
        self._client: Any = redis.Redis(
            host=host, port=port, db=db, ssl=tls, username=os.environ.get("REDIS_USERNAME"),
            password=os.environ.get("REDIS_PASSWORD"), socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=read_timeout_s, retry=Retry(NoBackoff(), 0), health_check_interval=30,
        )  # fmt: skip
        weakref.finalize(self, self._client.close)

    def get(self, name: str) -> tuple[bytes, str] | None:
        data, meta, _ = self._keys(name)

        def read() -> tuple[bytes | None, bytes | None]:
            with self._client.pipeline(transaction=True) as pipe:
                return tuple(pipe.get(data).hget(meta, "tag").execute())

        content, tag = self._often("read", name, read)
        return None if content is None or tag is None else (content, tag.decode())

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        if len(data) > BYTES_MAX:
            raise StoreUnfit(
                f"{self.url}: {name} has {len(data)} bytes, and a string of Redis at most {BYTES_MAX}: "
                "keep it in file:// or s3://",
                name=name,
            )
        rule = "absent" if if_absent else "any" if if_tag is None else "tag"
        tag = xxhash.xxh3_128_hexdigest(data)
        lost: _Lost | None = None
        for _ in self._attempts:
            try:
                written, found = self._once("write", name, lambda: self._write(name, rule, if_tag, data, tag))
            except _Lost as error:
                lost = error
                continue
            # Once an answer was lost, a refusal may be our own success.
            if written or (lost is not None and found == tag):
                return tag
            raise VersionConflict(
                f"{self.url}: {name}: expected {if_tag or 'nothing'}, the store holds {found or 'nothing'}",
                name=name,
                expected=if_tag,
                found=found or None,
            )
        raise StoreUnavailable(
            f"{self.url}: whether {name} was written is not known: {lost}. Read it again before you decide.",
            name=name,
            ambiguous=True,
        ) from lost

    def put_file(self, name: str, path: Path) -> None:
        if path.stat().st_size > BYTES_MAX:
            raise StoreUnfit(
                f"{self.url}: {name} has {path.stat().st_size} bytes, and a string of Redis at most {BYTES_MAX}: "
                "keep it in file:// or s3://",
                name=name,
            )
        self.put(name, path.read_bytes())

    def get_range(self, name: str, start: int, length: int) -> bytes:
        data, _, _ = self._keys(name)
        if length <= 0:
            return b""

        def read() -> tuple[bytes, int]:
            with self._client.pipeline(transaction=True) as pipe:
                return tuple(pipe.getrange(data, start, start + length - 1).exists(data).execute())

        content, there = self._often("read", name, read)
        if not there:
            raise FileNotFoundError(f"{self.url}: no object {name}")
        return content

    def open_read(self, name: str) -> BinaryIO:
        found = self.get(name)
        if found is None:
            raise FileNotFoundError(f"{self.url}: no object {name}")
        return cast(BinaryIO, io.BytesIO(found[0]))

    def delete(self, name: str) -> None:
        data, meta, names = self._keys(name)

        def remove() -> None:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(data, meta).zrem(names, name).execute()

        self._often("delete", name, remove)

    def sweep(self, prefix: str = "", *, older_than_s: float, replaced: bool = False) -> list[str]:
        """As `Objects.sweep`. A write leaves nothing; what was replaced stands in the append-only file until that is
        written anew, which the server is asked for and does in the background."""
        deadline = time.monotonic() + REWRITE_WAIT_S
        while replaced:
            try:
                self._often("rewrite", "", lambda: self._client.bgrewriteaof())
                break
            except StoreUnavailable as error:
                # One that runs began before this: another one has to follow it.
                if "in progress" not in str(error) or time.monotonic() > deadline:
                    _log.warning("%s: its append-only file may hold what was removed: %s", self.url, error)
                    break
                time.sleep(0.05)
        return []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        start = f"[{prefix}" if prefix else "-"
        end = f"({prefix}\xff" if prefix else "+"
        while True:
            first = start
            names = self._often(
                "list",
                prefix,
                lambda: self._client.zrangebylex(self._names, first, end, 0, PAGE),  # noqa: B023
            )
            yield from self._described([name.decode() for name in names])
            if len(names) < PAGE:
                return
            start = f"({names[-1].decode()}"

    def probe(self) -> None:
        info = self._often("ask", "", lambda: self._client.info())
        persistence, role = info.get("aof_enabled"), info.get("role")
        policy = str(info.get("maxmemory_policy", ""))
        if role != "master":
            raise StoreUnfit(
                f"{self.url}: this Redis is a {role}: name the one that takes writes", rule="role"
            )
        if not persistence:
            raise StoreUnfit(
                f"{self.url}: this Redis forgets at a restart: set `appendonly yes`", rule="appendonly"
            )
        if policy.startswith("allkeys"):
            raise StoreUnfit(
                f"{self.url}: this Redis removes keys when it is full ({policy}): "
                "set `maxmemory-policy noeviction`",
                rule="maxmemory-policy",
            )
        if self._flushes() != "always":
            raise StoreUnfit(
                f"{self.url}: this Redis answers before a write is on its disk, or does not tell: "
                "set `appendfsync always`, and allow the user CONFIG GET",
                rule="appendfsync",
            )
        probe_conditions(self)

    @property
    def _names(self) -> str:
        return f"{self.prefix}:names"

    def _keys(self, name: str) -> tuple[str, str, str]:
        check_object_name(name)
        return f"{self.prefix}:data:{name}", f"{self.prefix}:tag:{name}", self._names

    def _write(self, name: str, rule: str, if_tag: str | None, data: bytes, tag: str) -> tuple[bool, str]:
        written, found = self._client.eval(_PUT, 3, *self._keys(name), rule, if_tag or "", data, tag, name)
        return bool(written), found.decode()

    def _flushes(self) -> str:
        """The server's `appendfsync`; empty where it does not tell."""
        try:
            return str(self._client.config_get("appendfsync").get("appendfsync", ""))
        except (NoPermissionError, ResponseError):  # a managed Redis may hide its settings
            return ""

    def _described(self, names: list[str]) -> Iterator[ObjectInfo]:
        if not names:
            return

        def read() -> Any:
            with self._client.pipeline(transaction=True) as pipe:
                for name in names:
                    data, meta, _ = self._keys(name)
                    pipe.strlen(data).hget(meta, "seconds")
                return pipe.execute()

        found = self._often("list", "", read)
        for name, size, seconds in zip(names, found[::2], found[1::2], strict=True):
            if seconds is not None:  # else it was deleted meanwhile
                yield ObjectInfo(name, size, datetime.fromtimestamp(int(seconds), UTC))

    def _often(self, what: str, name: str, call: Callable[[], T]) -> T:
        """`call`, repeated while it fails in ways that pass; for requests that may safely be repeated."""
        lost: _Lost | None = None
        for _ in self._attempts:
            try:
                return self._once(what, name, call)
            except _Lost as error:
                lost = error
        raise StoreUnavailable(
            f"{self.url}: can not {what} {name or 'the server'}, tried again and again: {lost}. "
            "Check that Redis answers and the network is up.",
            name=name,
        ) from lost

    def _once(self, what: str, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (AuthenticationError, NoPermissionError) as error:
            raise StoreUnavailable(
                f"{self.url}: can not {what} {name or 'the server'}: {error}. "
                "Check REDIS_USERNAME, REDIS_PASSWORD and the user's permissions.",
                name=name,
            ) from error
        except _AGAIN as error:
            raise _Lost(str(error)) from error
        except RedisError as error:
            raise StoreUnavailable(
                f"{self.url}: can not {what} {name or 'the server'}: {error}", name=name
            ) from error


def from_url(url: str, parts: SplitResult, options: dict[str, str]) -> RedisObjects:
    """The store of a parsed `redis://` URL. Raises ValueError for one that names none."""
    expected = "expected redis://host:port/db?prefix=…"
    if parts.username or parts.password:
        raise ValueError(f"store: credentials in the URL: set REDIS_USERNAME and REDIS_PASSWORD: {expected}")
    if not parts.hostname or set(options) - {"prefix"}:
        raise ValueError(f"store: {url!r}: {expected}")
    database, prefix = parts.path.strip("/") or "0", options.get("prefix", "titanmem")
    if not database.isdigit():
        raise ValueError(f"store: {url!r}: the database is a number: {expected}")
    check_object_name(prefix)
    return RedisObjects(
        parts.hostname, parts.port or 6379, int(database), prefix, tls=parts.scheme == "rediss"
    )
