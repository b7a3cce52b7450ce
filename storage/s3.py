"""Objects in an S3 bucket: `s3://bucket/prefix?endpoint=…&region=…`.

Preconditions are `If-Match` with an object's ETag and `If-None-Match: *`. botocore's own retries are off for
single requests: it would repeat a conditional write whose first attempt had succeeded and report a conflict
with ourselves. Here, an answer that was lost is settled by reading the object again.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import boto3.session
import botocore.loaders
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)

from storage.attempts import Attempts
from storage.errors import StoreUnavailable, StoreUnfit, VersionConflict
from storage.objects import ObjectInfo, check_object_name, check_prefix, probe_conditions
from storage.ranges import RangeFile

T = TypeVar("T")

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
ATTEMPTS_MAX = 5
BUDGET_S = 30.0
PART_BYTES = 16 << 20
READ_AHEAD_BYTES = 256 << 10

_AGAIN_CODES = {"SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "BadDigest"}
_AGAIN_ERRORS = (
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
    FlexibleChecksumError,
)


@functools.cache
def _loader() -> Any:
    """botocore's descriptions of services, parsed once a process: they are most of a client's making."""
    return botocore.loaders.create_loader()


class _Lost(Exception):
    """A request failed in a way that may pass; whether it was carried out is not known."""


class _Missing(Exception):
    """There is no such object."""


class _Refused(Exception):
    """A precondition did not hold."""


class S3Objects:
    """`Objects` under `prefix` in `bucket`.

    A request is tried `attempts_max` times, and no more once `budget_s` has passed since the first.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        attempts_max: int = ATTEMPTS_MAX,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        read_timeout_s: float = READ_TIMEOUT_S,
        budget_s: float = BUDGET_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}"
        self._attempts = Attempts(
            most=attempts_max, budget_s=budget_s, sleep=sleep, clock=clock, jitter=jitter
        )
        common: dict[str, Any] = {
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
            "max_pool_connections": 32,
            "s3": {"addressing_style": "path" if endpoint else "auto"},
        }
        core = botocore.session.get_session()
        core.register_component("data_loader", _loader())
        self._session = boto3.session.Session(botocore_session=core)
        self._where = {
            "endpoint_url": endpoint,
            "region_name": region or self._session.region_name or "us-east-1",
        }
        self._config = Config(**common)
        try:
            self._client: Any = self._make_client({"total_max_attempts": 1})
        except (BotoCoreError, ValueError) as error:
            raise ValueError(f"store: {self.url}: {error}") from error

    def get(self, name: str) -> tuple[bytes, str] | None:
        key = self._key(name)

        def read() -> tuple[bytes, str]:
            response = self._client.get_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
            return response["Body"].read(), response["ETag"]

        try:
            return self._often("read", name, read)
        except _Missing:
            return None

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        key, condition = self._key(name), {}
        if if_absent:
            condition = {"IfNoneMatch": "*"}
        elif if_tag is not None:
            condition = {"IfMatch": if_tag}

        def write() -> str:
            body = {"Body": data, "ChecksumAlgorithm": "CRC32"}
            return self._client.put_object(Bucket=self.bucket, Key=key, **body, **condition)["ETag"]

        if not condition:
            try:
                return self._often("write", name, write)
            except (_Missing, _Refused) as error:
                raise StoreUnavailable(f"{self.url}: can not write {name}: {error}", name=name) from error
        return self._put_if(name, data, write, if_tag)

    def _put_if(self, name: str, data: bytes, write: Callable[[], str], if_tag: str | None) -> str:
        """A conditional write. Once an answer was lost, a refusal may be our own success: read it again."""
        lost: _Lost | None = None
        for _ in self._attempts:
            try:
                return self._once("write", name, write)
            except (_Missing, _Refused) as error:
                current = self.get(name)
                if lost and current is not None and current[0] == data:
                    return current[1]
                found = current[1] if current else None
                raise VersionConflict(
                    f"{self.url}{name}: expected {if_tag or 'nothing'}, the store holds {found or 'nothing'}",
                    name=name,
                    expected=if_tag,
                    found=found,
                ) from error
            except _Lost as error:
                lost = error
        current = self.get(name)
        if current is not None and current[0] == data:
            return current[1]
        raise StoreUnavailable(
            f"{self.url}: whether {name} was written is not known: {lost}. Read it again before you decide.",
            name=name,
            ambiguous=True,
        )

    def put_file(self, name: str, path: Path) -> None:
        key, size = self._key(name), path.stat().st_size
        config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4
        )
        checksums = {"ChecksumAlgorithm": "CRC32"}

        bulk = self._make_client({"total_max_attempts": self._attempts.most, "mode": "standard"})

        def upload() -> int:
            bulk.upload_file(str(path), self.bucket, key, ExtraArgs=checksums, Config=config)
            return self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]

        try:
            stored = self._often("upload", name, upload)
        except (_Missing, _Refused) as error:
            raise StoreUnavailable(f"{self.url}: can not upload {name}: {error}", name=name) from error
        if stored != size:
            raise StoreUnfit(f"{self.url}: {name}: {size} bytes went up, the store holds {stored}", name=name)

    def get_range(self, name: str, start: int, length: int) -> bytes:
        return self._read_range(name, start, length, None)

    def open_read(self, name: str) -> BinaryIO:
        key = self._key(name)
        try:
            head = self._often("read", name, lambda: self._client.head_object(Bucket=self.bucket, Key=key))
        except _Missing:
            raise FileNotFoundError(f"{self.url}: no object {name}") from None
        raw = RangeFile(
            head["ContentLength"], lambda start, n: self._read_range(name, start, n, head["ETag"])
        )
        return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD_BYTES))

    def delete(self, name: str) -> None:
        key = self._key(name)
        try:
            self._often("delete", name, lambda: self._client.delete_object(Bucket=self.bucket, Key=key))
        except _Missing:
            return

    def sweep(self, prefix: str = "", *, older_than_s: float, replaced: bool = False) -> list[str]:
        """As `Objects.sweep`: unfinished multipart uploads, and with `replaced` versions that are not the newest."""
        where = {"Bucket": self.bucket, "Prefix": self.prefix + check_prefix(prefix)}
        removed: list[str] = []
        for upload in self._pages("list_multipart_uploads", where, ("Uploads",)):
            if (datetime.now(UTC) - upload["Initiated"]).total_seconds() < older_than_s:
                continue
            about = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with contextlib.suppress(_Missing):
                self._often("sweep", prefix, lambda: self._client.abort_multipart_upload(**about))  # noqa: B023
                removed.append(f"{upload['Key'].removeprefix(self.prefix)} (unfinished upload)")
        for old in (
            self._pages("list_object_versions", where, ("Versions", "DeleteMarkers")) if replaced else ()
        ):
            if old["IsLatest"] and "Size" in old:
                continue  # the object itself
            about = {"Bucket": self.bucket, "Key": old["Key"], "VersionId": old["VersionId"]}
            with contextlib.suppress(_Missing):
                self._often("sweep", prefix, lambda: self._client.delete_object(**about))  # noqa: B023
                removed.append(f"{old['Key'].removeprefix(self.prefix)} (version {old['VersionId']})")
        return removed

    def _pages(self, call: str, where: dict[str, str], lines: tuple[str, ...]) -> list[dict[str, Any]]:
        """What a listing with markers gives on all its pages; nothing where the store has no such listing."""
        found: list[dict[str, Any]] = []
        more: dict[str, str] = {}
        while True:
            asked = {**where, **more}
            try:
                page = self._often("list", where["Prefix"], lambda: getattr(self._client, call)(**asked))  # noqa: B023
            except StoreUnfit:
                return found
            found += [line for kind in lines for line in page.get(kind, ())]
            if not page.get("IsTruncated"):
                return found
            more = {
                marker: page[f"Next{marker}"]
                for marker in ("KeyMarker", "UploadIdMarker", "VersionIdMarker")
                if page.get(f"Next{marker}")
            }

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        where = {"Bucket": self.bucket, "Prefix": self.prefix + check_prefix(prefix)}
        token: dict[str, str] = {}
        while True:
            more = dict(token)
            try:
                page = self._often("list", prefix, lambda: self._client.list_objects_v2(**where, **more))  # noqa: B023
            except _Missing as error:
                raise StoreUnavailable(f"{self.url}: can not list: {error}") from error
            for line in page.get("Contents", ()):
                yield ObjectInfo(line["Key"].removeprefix(self.prefix), line["Size"], line["LastModified"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def probe(self) -> None:
        probe_conditions(self)

    def _make_client(self, retries: dict[str, Any]) -> Any:
        config = self._config.merge(Config(retries=retries))  # type: ignore[arg-type]
        return self._session.client("s3", config=config, **self._where)

    def _key(self, name: str) -> str:
        return self.prefix + check_object_name(name)

    def _read_range(self, name: str, start: int, length: int, tag: str | None) -> bytes:
        if length <= 0:
            return b""
        where = {
            "Bucket": self.bucket,
            "Key": self._key(name),
            "Range": f"bytes={start}-{start + length - 1}",
        }
        if tag is not None:
            where["IfMatch"] = tag
        try:
            return self._often("read", name, lambda: self._client.get_object(**where)["Body"].read())
        except _Missing:
            raise FileNotFoundError(f"{self.url}: no object {name}") from None
        except _Refused as error:
            raise StoreUnavailable(f"{self.url}: {name} has changed while it was read", name=name) from error

    def _often(self, what: str, name: str, call: Callable[[], T]) -> T:
        """`call`, repeated while it fails in ways that pass; for requests that may safely be repeated."""
        lost: _Lost | None = None
        for _ in self._attempts:
            try:
                return self._once(what, name, call)
            except _Lost as error:
                lost = error
        raise StoreUnavailable(
            f"{self.url}: can not {what} {name or 'the bucket'}, tried again and again: {lost}. "
            "Check that the endpoint answers and the network is up.",
            name=name,
        ) from lost

    def _once(self, what: str, name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except ClientError as error:
            raise self._translate(what, name, error) from error
        except _AGAIN_ERRORS as error:
            raise _Lost(str(error)) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreUnavailable(
                f"{self.url}: can not {what} {name or 'the bucket'}: {error}. Check the credentials.",
                name=name,
            ) from error

    def _translate(self, what: str, name: str, error: ClientError) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status == 412 or code == "PreconditionFailed":
            return _Refused(str(error))
        if code == "NoSuchBucket":
            return StoreUnavailable(
                f"{self.url}: there is no bucket {self.bucket}. Make it first.", name=name
            )
        if status == 404:
            return _Missing(str(error))
        if status == 501 or code == "NotImplemented":
            return StoreUnfit(f"{self.url}: this store can not do what {what} needs: {error}", name=name)
        if code == "RequestTimeTooSkewed":
            return StoreUnavailable(
                f"{self.url}: can not {what} {name or 'the bucket'}: {error}. Set this machine's clock: S3 refuses "
                "requests that are dated more than 15 minutes off.",
                name=name,
            )
        if status >= 500 or status == 429 or code in _AGAIN_CODES:
            return _Lost(str(error))
        return StoreUnavailable(
            f"{self.url}: can not {what} {name or 'the bucket'}: {error}. Check credentials and permissions.",
            name=name,
        )
