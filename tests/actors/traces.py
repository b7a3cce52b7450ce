"""What a user leaves, as bytes to look for: token ids, the name, θ_M and reservoir at rest; and where to look."""

from __future__ import annotations

import contextlib
import io
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis

from storage.names import UserKey
from tests.servers import RedisServer

RUN_IDS = 12
"""Token ids in a row that only one user was told: 48 bytes."""
SLICE_BYTES = 48
ALLOWED = ("tombstones/", "forgotten/")
"""Where the name may stay: the tombstone, and the mark at the backups."""


@dataclass(kw_only=True)
class Traces:
    """Needles of one user."""

    key: UserKey
    needles: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.needles["name"] = f"{self.key.tenant}/{self.key.user}".encode()

    def told(self, tokens: np.ndarray, label: str) -> None:
        """Runs of the ids, int32 little-endian, as the journal and segments have them."""
        for start in range(0, len(tokens) - RUN_IDS + 1, RUN_IDS):
            self.needles[f"{label}, tokens from {start}"] = np.asarray(
                tokens[start : start + RUN_IDS], "<i4"
            ).tobytes()

    def rests(self, file: bytes, label: str) -> None:
        """Slices of each member of a `.titanmem` file, packed, as it lies in a store; and unpacked."""
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            for line in archive.infolist():
                if line.filename == "header" or line.compress_size < 2 * SLICE_BYTES:
                    continue
                at = line.header_offset + 30 + len(line.filename) + line.compress_size // 2
                self.needles[f"{label}, packed {line.filename}"] = file[at : at + SLICE_BYTES]
                plain = archive.read(line.filename)
                middle = plain[len(plain) // 2 :][:SLICE_BYTES]
                if len(set(middle)) > 8:
                    self.needles[f"{label}, {line.filename}"] = middle

    def found(self, places: Iterable[tuple[str, bytes]]) -> dict[str, list[str]]:
        """Needle → where it stands."""
        hits: dict[str, list[str]] = {}
        for name, data in places:
            for label, needle in self.needles.items():
                in_name = label == "name" and needle.decode() in name
                if (in_name or needle in data) and not (label == "name" and name.startswith(ALLOWED)):
                    hits.setdefault(label, []).append(name)
        return hits


def in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file under a folder: name from there on, content. Hidden ones too."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def in_bucket(endpoint: str, bucket: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Every version of every object, and the parts of unfinished uploads, through the API."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    page = client.list_object_versions(Bucket=bucket, Prefix=prefix)
    assert not page["IsTruncated"]
    for line in page.get("Versions", ()):
        body = client.get_object(Bucket=bucket, Key=line["Key"], VersionId=line["VersionId"])["Body"]
        yield line["Key"].removeprefix(prefix).lstrip("/"), body.read()
    for line in page.get("DeleteMarkers", ()):
        yield line["Key"].removeprefix(prefix).lstrip("/"), b""
    for line in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ()):
        yield f"upload of {line['Key'].removeprefix(prefix)}", b"not to be seen, but there"


def in_redis(server: RedisServer, erased: Iterable[UserKey]) -> Iterator[tuple[str, bytes]]:
    """Every file of a redis-server, once its append-only file has been written anew.

    A tombstone's own key, which says the name, stands there among everything else: it is left out.
    """
    with contextlib.closing(redis.Redis(port=server.port)) as client:
        while client.info("persistence")["aof_rewrite_in_progress"]:  # type: ignore[index]
            time.sleep(0.01)
    for name, data in in_folder(server.folder):
        for key in erased:
            data = data.replace(f"tombstones/{key}".encode(), b"")
        yield name, data
