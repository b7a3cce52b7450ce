"""A user's `HEAD`: which versions there are, and the newest epoch that has written.

Whoever swaps HEAD by a conditional write has committed; a version that no HEAD lists was never there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import xxhash

from storage.errors import Fenced, NoSuchMemory, StoreError, StoreUnfit, VersionConflict
from storage.header import EPOCH_MAX, MEMORY_VERSION_MAX, write_time
from storage.names import UserKey

PREVIOUS_KEPT = 3
PINNED_MAX = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionInfo:
    """One stored version of a user."""

    version: int
    epoch: int
    bytes: int
    created_at: datetime
    pinned: bool = False
    hash: str = ""
    """xxh3-128 of the file."""
    last_chunk_id: int = 0
    """Last chunk that it holds: should it be lost, this says how far it went; 0 in HEADs of before that was kept."""

    @property
    def file(self) -> str:
        return f"v{self.version:012d}-e{self.epoch:08d}.titanmem"


assert MEMORY_VERSION_MAX < 10**12, "names sort like versions: twelve digits hold every one"
assert EPOCH_MAX < 10**8, "eight digits hold every epoch"


def number_and_epoch(file: str) -> tuple[int, int] | None:
    """Version and epoch of a file's name (`VersionInfo.file`), None for any other name."""
    found = re.fullmatch(r"v(\d{12})-e(\d{8})\.titanmem", file)
    return None if found is None else (int(found[1]), int(found[2]))


def hash_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def user_folder(key: UserKey) -> str:
    return f"users/{key.tenant}/{key.user}/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The versions of a user, newest first, and files that a crash may have left undeleted."""

    epoch: int
    versions: tuple[VersionInfo, ...]
    dropped: tuple[str, ...] = ()
    begun: bool = False
    """Made by an owner before the first version, to carry the epoch: that it lists nothing is no loss."""

    @property
    def newest(self) -> VersionInfo | None:
        return self.versions[0] if self.versions else None

    def ends_with(self, new: VersionInfo) -> bool:
        """Whether `new` is the newest version already, pinned or not."""
        return self.newest is not None and self.newest == replace(new, pinned=self.newest.pinned)

    def find(self, key: UserKey, version: int | None) -> VersionInfo:
        """The entry of `version`, or of the newest one. Raises `NoSuchMemory`."""
        for info in self.versions:
            if version is None or info.version == version:
                return info
        held = ", ".join(str(info.version) for info in self.versions) or "none"
        raise NoSuchMemory(f"{key}: version {version} is not stored; there are: {held}", key=str(key))

    def check_epoch(self, key: UserKey, epoch: int) -> None:
        """Raises `Fenced` when a newer owner has written."""
        if epoch < self.epoch:
            raise Fenced(
                f"{key}: epoch {epoch} is over: the store has seen {self.epoch}",
                key=str(key),
                epoch=epoch,
                seen=self.epoch,
            )

    def add(self, key: UserKey, new: VersionInfo) -> Head:
        """The HEAD with one more version: three previous ones stay, and the pinned ones.

        Raises `VersionConflict` unless it is newer than all others.
        """
        newest = self.newest
        if newest is not None and new.version <= newest.version:
            raise VersionConflict(
                f"{key}: version {new.version} is not newer: the store holds {newest.version}",
                key=str(key),
                expected=new.version,
                found=newest.version,
            )
        versions = (new, *self.versions)
        kept = tuple(info for n, info in enumerate(versions) if n <= PREVIOUS_KEPT or info.pinned)
        gone = tuple(info.file for info in versions if info not in kept)
        return Head(epoch=new.epoch, versions=kept, dropped=gone)

    def with_pin(self, key: UserKey, version: int, pinned: bool, epoch: int) -> Head:
        """The HEAD with one version pinned or released. Raises `NoSuchMemory`, `StoreError`."""
        chosen = self.find(key, version)
        versions = tuple(replace(info, pinned=pinned) if info is chosen else info for info in self.versions)
        if sum(info.pinned for info in versions) > PINNED_MAX:
            raise StoreError(f"{key}: {PINNED_MAX} versions are pinned already; release one first")
        return replace(self, epoch=epoch, versions=versions)

    def to_record(self) -> dict[str, Any]:
        lines = [
            {
                "version": info.version,
                "epoch": info.epoch,
                "bytes": info.bytes,
                "created_at": write_time(info.created_at),
                "pinned": info.pinned,
                "hash": info.hash,
            }
            for info in self.versions
        ]
        # Beside the lines, where a release that does not know of them passes over them.
        chunks = [info.last_chunk_id for info in self.versions]
        record = {
            "epoch": self.epoch,
            "versions": lines,
            "dropped": list(self.dropped),
            "last_chunks": chunks,
        }
        return {**record, "begun": True} if self.begun else record

    @classmethod
    def from_record(cls, record: dict[str, Any], name: str) -> Head:
        """Raises `StoreUnfit` when the record is no HEAD."""
        try:
            lines = record["versions"]
            chunks = record.get("last_chunks", [0] * len(lines))
            versions = tuple(
                VersionInfo(
                    **{
                        **line,
                        "created_at": datetime.fromisoformat(line["created_at"]),
                        "last_chunk_id": chunk,
                    }
                )
                for line, chunk in zip(lines, chunks, strict=True)
            )
            return cls(
                epoch=int(record["epoch"]), versions=versions, dropped=tuple(record["dropped"]),
                begun=bool(record.get("begun", False)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise StoreUnfit(f"{name}: this record is no HEAD of a user: {error!r}", name=name) from error
