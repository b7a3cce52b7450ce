"""Named bytes with conditional writes: what all stores have in common, and all that we build on.

A name is made of components joined by `/`. An object is replaced as a whole or not at all. A tag stands for
an object's content; `put(…, if_tag=…)` and `put(…, if_absent=True)` are the only locks that shards share.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from storage.errors import InvalidName, StoreError, StoreUnfit, VersionConflict, shorten

OBJECT_NAME_CHARS_MAX = 600
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:+=-]{0,254}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing."""

    name: str
    bytes: int
    modified: datetime
    """With its zone; the store's clock."""


@runtime_checkable
class Objects(Protocol):
    """Named bytes. Every method raises `StoreUnavailable` when the store does not answer in time.

    All methods may be called from any thread.
    """

    url: str
    """Names the store in messages; no credentials in it."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Content and tag, or None when there is no such object."""
        ...

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        """Writes the object, durably, and returns its new tag.

        Raises `VersionConflict` when the object's tag is not `if_tag`, or when it exists and `if_absent` is
        set; then nothing has changed. An error of a conditional write whose outcome is unknown is settled by
        reading the object again: if it holds `data`, the write has happened. So content that two writers
        might write alike must carry something of its own (records carry a nonce).
        """
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Uploads a local file of any size, checksummed; the object appears at once and whole."""
        ...

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end. Raises `FileNotFoundError` if there is no object."""
        ...

    def open_read(self, name: str) -> BinaryIO:
        """A seekable binary file, read in ranges. Raises `FileNotFoundError` if there is no such object."""
        ...

    def delete(self, name: str) -> None:
        """Removes the object; fine if there is none."""
        ...

    def sweep(self, prefix: str = "", *, older_than_s: float, replaced: bool = False) -> list[str]:
        """Removes what interrupted writes have left under `prefix`, a folder, and no listing shows; names of it.

        Left alone is what is younger than `older_than_s` and may still be being written. With `replaced`, also what the
        store keeps of objects there that were replaced or deleted.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose names begin with `prefix`, in the order of their names."""
        ...

    def probe(self) -> None:
        """Raises `StoreUnfit` when preconditions are ignored, `StoreUnavailable` when it is unreachable."""
        ...


def check_object_name(name: str) -> str:
    """`name` itself if it may name an object, else raises `InvalidName`: no way leads out of the store."""
    parts = name.split("/")
    if len(name) > OBJECT_NAME_CHARS_MAX or not all(_COMPONENT.fullmatch(p) and ".." not in p for p in parts):
        raise InvalidName(f"object {shorten(name, 64)!r}: not a name that a store may hold", kind="object")
    return name


def check_prefix(prefix: str) -> str:
    """`prefix` itself if names may begin with it, else raises `InvalidName`."""
    if prefix:
        check_object_name(prefix + "_" if prefix.endswith("/") else prefix)
    return prefix


def probe_conditions(objects: Objects) -> None:
    """Writes, reads and deletes one small object, and raises `StoreUnfit` if a precondition is ignored."""
    name = f"probe/{secrets.token_hex(8)}"

    def must_conflict(data: bytes, rule: str, *, if_tag: str | None = None, if_absent: bool = False) -> None:
        try:
            objects.put(name, data, if_tag=if_tag, if_absent=if_absent)
        except VersionConflict:
            return
        raise StoreUnfit(
            f"{objects.url}: this store ignores {rule}, so two shards could write one memory at a time. "
            "Use one that honours conditional writes (file://, AWS S3, MinIO, Ceph from Squid on).",
            rule=rule,
        )

    try:
        first = objects.put(name, b"1", if_absent=True)
        must_conflict(b"2", "If-None-Match", if_absent=True)
        second = objects.put(name, b"3", if_tag=first)
        must_conflict(b"4", "If-Match", if_tag=first)
        if objects.get(name) != (b"3", second):
            raise StoreUnfit(
                f"{objects.url}: this store does not give back what was written last", rule="reads"
            )
        if [info.name for info in objects.list(name)] != [name]:
            raise StoreUnfit(f"{objects.url}: this store does not list what was written last", rule="lists")
        objects.delete(name)
        must_conflict(b"5", "If-Match on a missing object", if_tag=second)
    except StoreUnfit:
        with contextlib.suppress(StoreError):
            objects.delete(name)
        raise


def open_objects(url: str) -> Objects:
    """The store that `url` names. Raises `ValueError` for a URL that names none; contacts nothing.

    `file:///folder` (or `file://./folder`, from the current one), and
    `s3://bucket/prefix?endpoint=http://host:port&region=name`, where credentials come from the environment as
    boto3 has it, and the endpoint from `AWS_ENDPOINT_URL` when it is not given;
    `redis://host:port/db?prefix=name` (`rediss://` with TLS), credentials from `REDIS_USERNAME` and `REDIS_PASSWORD`.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        return _open_local(url, parts)
    if parts.scheme == "s3":
        return _open_s3(url, parts)
    if parts.scheme in ("redis", "rediss"):
        from storage.redis import from_url

        return from_url(shorten(url), parts, dict(parse_qsl(parts.query)))
    raise ValueError(
        f"store: {shorten(url)!r}: expected file:///folder, s3://bucket/prefix?endpoint=…&region=… "
        "or redis://host:port/db"
    )


def _open_local(url: str, parts: SplitResult) -> Objects:
    from storage.local import LocalObjects

    if parts.netloc not in ("", ".") or not parts.path.strip("/") or parts.query:
        raise ValueError(f"store: {shorten(url)!r}: expected file:///folder, or file://./folder from here")
    path = unquote(parts.path)
    return LocalObjects(Path(path.lstrip("/") if parts.netloc == "." else path))


def _open_s3(url: str, parts: SplitResult) -> Objects:
    from storage.s3 import S3Objects  # boto3 takes a third of a second to import; file:// does without it

    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - {"endpoint", "region"})
    prefix = unquote(parts.path).strip("/")
    if not parts.netloc or unknown or parts.username or parts.password:
        found = f"unknown option {unknown[0]!r}" if unknown else "no bucket, or credentials in the URL"
        raise ValueError(f"store: {shorten(url)!r}: {found}: expected s3://bucket/prefix?endpoint=…&region=…")
    if prefix:
        check_object_name(prefix)
    return S3Objects(
        parts.netloc, prefix, endpoint=options.get("endpoint"), region=options.get("region") or None
    )
