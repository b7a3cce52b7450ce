"""What makes parts a snapshot: `<snapshot id>/manifest.json`, written last and only once.

No manifest, no snapshot: what an interrupted job leaves behind is nothing that a restore would take. Beside each part
that went up whole lies a note of what it is (`part-<shard>.json`) until then, so that a job that is resumed need not
write it again. A part's name has its shard's epoch: one that was cut off and comes late replaces nobody's part.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from storage.errors import NoSuchSnapshot, SnapshotDamaged, SnapshotError, StoreUnfit, shorten
from storage.header import write_time
from storage.objects import Objects
from storage.records import decode_record, encode_record
from storage.scratch import scratch_folder
from storage.snapshot_model import add_model
from storage.snapshot_part import PartWriter

MANIFEST_VERSION = 1
BEGUN = "begun.json"
"""In a snapshot's folder while a job makes it: since when, and of which shards."""
_ID = re.compile(r"\d{8}T\d{6}Z-[a-z0-9]{6}")
_SHARD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartInfo:
    """One part as the manifest lists it."""

    name: str
    shard: str
    epoch: int
    bytes: int
    hash: str
    """xxh3-128 of the file."""
    rows: int
    users: int
    model_files: int
    bases: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PartInfo:
        return cls(**{**fields, "bases": tuple(fields["bases"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A finished snapshot."""

    id: str
    created_at: datetime
    base: str
    parts: tuple[PartInfo, ...]
    extra: dict[str, Any]

    @property
    def users(self) -> int:
        return sum(part.users for part in self.parts)

    @property
    def finished_at(self) -> datetime:
        """No memory in it is from later than this."""
        return datetime.fromisoformat(self.extra.get("finished_at", write_time(self.created_at)))

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """For listings: plain values, with the sums."""
        fields = asdict(self)
        return {**fields, "created_at": write_time(self.created_at), "users": self.users, "bytes": self.bytes}


def new_snapshot_id(now: datetime) -> str:
    """A new id, which sorts by time."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def check_snapshot_id(snapshot_id: str) -> str:
    """The id itself when it is one, else raises `NoSuchSnapshot`."""
    if not _ID.fullmatch(snapshot_id):
        shown = shorten(snapshot_id, 64)
        raise NoSuchSnapshot(f"{shown!r}: expected an id like 20261122T221500Z-0a1b2c; list the snapshots")
    return snapshot_id


def write_part(
    target: Objects,
    snapshot_id: str,
    *,
    shard: str,
    epoch: int,
    model_dir: Path | None,
    memories: Iterable[bytes],
    scratch: Path | None = None,
) -> PartInfo:
    """Makes the part of one shard in the folder `scratch`, and uploads it. `memories` are `.titanmem` files.

    A part that an interrupted job has made already is given back as it is. Raises `BadMemoryFile` for a memory that is
    none: it would not be there when it is needed.
    """
    if not _SHARD.fullmatch(shard):
        raise ValueError(f"shard: {shorten(shard, 64)!r}: expected 1 to 64 letters, digits, _ or -")
    made = find_part(target, snapshot_id, shard)
    if made is not None:
        return made
    name = f"{snapshot_id}/part-{shard}-e{epoch:08d}.parquet"
    with scratch_folder(scratch) as folder:
        path = folder / "part.parquet"
        with PartWriter(path) as writer:
            model_files = add_model(writer, model_dir) if model_dir is not None else 0
            for data in memories:
                writer.add_user(data)
        info = put_part(target, name, path, writer, shard=shard, epoch=epoch, model_files=model_files)
    target.put(_note(snapshot_id, shard), encode_record(info.to_dict()))
    return info


def put_part(
    target: Objects, name: str, path: Path, writer: PartWriter, *, shard: str, epoch: int, model_files: int
) -> PartInfo:
    """Uploads the file that `writer` has written to `path`."""
    with open(path, "rb") as file:
        digest = xxhash.xxh3_128()
        while block := file.read(1 << 20):
            digest.update(block)
    target.put_file(name, path)
    return PartInfo(
        name=name,
        shard=shard,
        epoch=epoch,
        bytes=path.stat().st_size,
        hash=digest.hexdigest(),
        rows=writer.rows,
        users=writer.users,
        model_files=model_files,
        bases=tuple(sorted(writer.bases)),
    )


def find_part(target: Objects, snapshot_id: str, shard: str) -> PartInfo | None:
    """The part of a shard that is in the target already, of a snapshot that has no manifest yet."""
    found = target.get(_note(check_snapshot_id(snapshot_id), shard))
    if found is None:
        return None
    try:
        info = PartInfo.from_dict(decode_record(found[0], _note(snapshot_id, shard)))
    except (StoreUnfit, TypeError, KeyError) as error:
        _log.warning("written again: %s", error)
        return None
    stored = {line.name: line.bytes for line in target.list(info.name)}
    return info if stored.get(info.name) == info.bytes else None


def _note(snapshot_id: str, shard: str) -> str:
    return f"{snapshot_id}/part-{shard}.json"


def commit_manifest(
    target: Objects,
    snapshot_id: str,
    parts: Sequence[PartInfo],
    *,
    created_at: datetime,
    base: str,
    extra: dict[str, Any] | None = None,
) -> Manifest:
    """Makes the parts a snapshot. Raises `SnapshotError` if one is missing, `VersionConflict` a second time.

    `base` is the model that serves; `extra` goes into the manifest as it is.
    """
    check_snapshot_id(snapshot_id)
    stored = {info.name: info.bytes for info in target.list(f"{snapshot_id}/")}
    if not parts or len({part.name for part in parts}) != len(parts):
        raise SnapshotError(f"{snapshot_id}: {len(parts)} parts: expected one or more, each once")
    for part in parts:
        if stored.get(part.name) != part.bytes:
            found = f"{stored[part.name]} bytes" if part.name in stored else "nothing"
            raise SnapshotError(f"{part.name}: expected {part.bytes} bytes in the target, found {found}")
    manifest = Manifest(
        id=snapshot_id,
        created_at=created_at.astimezone(UTC),
        base=base,
        parts=tuple(parts),
        extra=extra or {},
    )
    put_manifest(target, manifest)
    for part in parts:
        target.delete(_note(snapshot_id, part.shard))
    return manifest


def put_manifest(target: Objects, manifest: Manifest, *, if_tag: str | None = None) -> None:
    """Writes a manifest: the first one, or in place of the one with `if_tag`. Raises `VersionConflict`."""
    record = {"format": "titanmem-snapshot", "version": MANIFEST_VERSION, **manifest.to_dict()}
    name = f"{manifest.id}/manifest.json"
    target.put(name, encode_record(record), if_tag=if_tag, if_absent=if_tag is None)


def read_manifest(target: Objects, snapshot_id: str) -> Manifest:
    """Raises `NoSuchSnapshot` when there is no manifest, `SnapshotDamaged` when it can not be read."""
    name = f"{check_snapshot_id(snapshot_id)}/manifest.json"
    found = target.get(name)
    if found is None:
        raise NoSuchSnapshot(
            f"{target.url}: no snapshot {snapshot_id}, or it was never finished", id=snapshot_id
        )
    try:
        fields = decode_record(found[0], name)
        if fields["format"] != "titanmem-snapshot" or fields["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {fields['version']}: expected {MANIFEST_VERSION}")
        return Manifest(
            id=fields["id"],
            created_at=datetime.fromisoformat(fields["created_at"]),
            base=fields["base"],
            parts=tuple(PartInfo.from_dict(part) for part in fields["parts"]),
            extra=fields["extra"],
        )
    except (StoreUnfit, ValueError, TypeError, KeyError) as error:
        raise SnapshotDamaged(f"{target.url}: {name}: {error}", id=snapshot_id) from error


def list_snapshots(target: Objects) -> list[Manifest]:
    """The finished snapshots, newest first. A damaged manifest is left out, and logged."""
    found: list[Manifest] = []
    for info in target.list():
        folder, _, file = info.name.partition("/")
        if file == "manifest.json" and _ID.fullmatch(folder):
            try:
                found.append(read_manifest(target, folder))
            except (SnapshotDamaged, NoSuchSnapshot) as error:
                _log.warning("left out of the list: %s", error)
    return sorted(found, key=lambda manifest: (manifest.created_at, manifest.id), reverse=True)


def find_at(target: Objects, moment: datetime) -> Manifest:
    """The newest snapshot that was whole at or before `moment`: nothing in it is younger. Raises `NoSuchSnapshot`."""
    for manifest in list_snapshots(target):
        if manifest.finished_at <= moment:
            return manifest
    raise NoSuchSnapshot(f"{target.url}: no snapshot from before {write_time(moment)}")
