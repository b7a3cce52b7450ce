"""The store of memories: versions under a fencing epoch, over any `Objects`.

users/<tenant>/<user>/HEAD                                  which versions there are; swapped conditionally
users/<tenant>/<user>/v000000000012-e00000003.titanmem      one version, never changed
journal/<tenant>/<user>/…                                   segments that no version holds yet (`segments.py`)
tombstones/<tenant>/<user>                                  the user was erased
cluster/store                                               which store this is (`identity.py`)
cluster/epoch, cluster/shardmap, cluster/owners/<shard>     records of the cluster
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

from storage.clock import SteadyClock, utc_now
from storage.errors import (
    BadMemoryFile,
    ChecksumMismatch,
    Fenced,
    Forgotten,
    InvalidName,
    NoSuchMemory,
    StoreError,
    StoreUnavailable,
    StoreUnfit,
    Truncated,
    VersionConflict,
)
from storage.head import Head, VersionInfo, hash_of, number_and_epoch, user_folder
from storage.health import Health, Watched, health_of
from storage.names import UserKey, check_name
from storage.objects import Objects, open_objects
from storage.records import SWAP_ATTEMPTS_MAX, RecordStore
from storage.segments import SegmentStore, segments_folder
from storage.titanmem import Memory, decode, encode
from storage.tombstones import Tombstones, is_from_before

DELETE_ROUNDS_MAX = 5

_log = logging.getLogger(__name__)


class MemoryStore(RecordStore):
    """Versions of memories, and the cluster's records. May be used from any thread; `objects` does the I/O.

    Every method may raise `StoreUnavailable`, and `StoreUnfit` for a record that is damaged.
    """

    def __init__(
        self, objects: Objects, *, clock: Callable[[], datetime] = utc_now, health: Health | None = None
    ) -> None:
        """`health` is where `objects` notes its calls; without it nobody does."""
        super().__init__(objects)
        self.health = health or Health(objects.url)
        self.tombstones = Tombstones(self)
        self.now = SteadyClock(clock)
        """UTC, for whatever is written here: what follows an erasure is dated after it."""
        self.segments = SegmentStore(objects, self.tombstones, clock=self.now)

    def put(self, memory: Memory, *, epoch: int, data: bytes | None = None) -> VersionInfo:
        """Stores `memory` as the newest version of its user, written under `epoch`; durable when it returns.

        `data` is the memory's file under that epoch, for a caller who has it already.
        The same memory again is fine. Raises `Fenced` when a newer epoch has written, `VersionConflict` when
        the stored version is as new or newer, `Forgotten` when the user was erased (`clear_tombstone` first),
        and `BadMemoryFile` when the memory breaks a rule of its format.
        """
        key = memory.key
        if data is None:
            data = encode(memory if memory.epoch == epoch else replace(memory, epoch=epoch))
        new = VersionInfo(
            version=memory.memory_version,
            epoch=epoch,
            bytes=len(data),
            created_at=memory.created_at,
            hash=hash_of(data),
            last_chunk_id=memory.last_chunk_id,
        )
        head, tag = self._admit(key, epoch)
        if head.ends_with(new):
            return new
        head.add(key, new)
        blob = user_folder(key) + new.file
        self.objects.put(blob, data)
        try:
            # An earlier try of this very put may come in between: then there is nothing to add.
            head = self._swap(
                key, epoch, lambda head: head if head.ends_with(new) else head.add(key, new), (head, tag)
            )
        except (Fenced, VersionConflict, Forgotten):
            if not self._is_listed(key, new):
                self._delete_quietly(blob)
            raise
        for file in head.dropped:
            self._delete_quietly(user_folder(key) + file)
        return new

    def get(
        self,
        key: UserKey,
        version: int | None = None,
        *,
        expect_base: str | None = None,
        expect_shape: tuple[tuple[int, ...], ...] | None = None,
    ) -> Memory:
        """One version (the newest), with every rule checked. Raises `NoSuchMemory`, `BadMemoryFile`."""
        data, info = self._read(key, version)
        name = f"{self.url}: {user_folder(key)}{info.file}"
        memory = decode(data, expect_base=expect_base, expect_shape=expect_shape, name=name)
        self._check_hash(data, info, name)
        return memory

    def newest_valid(
        self,
        key: UserKey,
        *,
        expect_base: str | None = None,
        expect_shape: tuple[tuple[int, ...], ...] | None = None,
    ) -> tuple[Memory, list[BadMemoryFile]]:
        """The newest version that can be read, and what is wrong with newer ones.

        Raises `NoSuchMemory` when there is none at all, the newest one's error when all are bad.
        """
        problems: list[BadMemoryFile] = []
        for info in self.versions(key):
            try:
                memory = self.get(key, info.version, expect_base=expect_base, expect_shape=expect_shape)
                return memory, problems
            except BadMemoryFile as error:
                _log.error("version %s of %s is bad: %s", info.version, key, error)
                problems.append(error)
        if problems:
            raise problems[0]
        raise NoSuchMemory(f"{key}: nothing is stored", key=str(key))

    def get_bytes(self, key: UserKey, version: int | None = None) -> bytes:
        """One version's file, as it was written. Raises `NoSuchMemory`, `ChecksumMismatch`, `Truncated`."""
        data, info = self._read(key, version)
        self._check_hash(data, info, f"{self.url}: {user_folder(key)}{info.file}")
        return data

    def versions(self, key: UserKey) -> list[VersionInfo]:
        """The stored versions, newest first; empty when there are none."""
        return list(self._head(key)[0].versions)

    def epoch_of(self, key: UserKey) -> int:
        """The newest epoch that has written this user; 0 when none has."""
        return self._head(key)[0].epoch

    def claim(self, key: UserKey, *, epoch: int, begin: bool = False) -> None:
        """Shuts out writers of older epochs before our first write. Raises `Fenced` when we are older.

        Where there is no HEAD, nothing carries the epoch, and an older owner may still store a first version: with
        `begin` a HEAD without versions is made. That is for an owner who is about to write: who is only looked up
        leaves no trace. Raises `Forgotten` then while a tombstone is in force.
        """
        head, tag = self._head(key)
        head.check_epoch(key, epoch)
        if (tag is not None or begin) and head.epoch < epoch:
            absent = tag is None
            self._swap(
                key, epoch,
                lambda head: replace(head, epoch=epoch, begun=head.begun or (absent and not head.versions)),
            )  # fmt: skip

    def sweep(self, key: UserKey, *, epoch: int) -> list[str]:
        """Removes the user's version files that no HEAD will list any more, such as a crash leaves; their names.

        That is a file of an older epoch than HEAD's, since none of that epoch can swap HEAD again, and not newer than
        what HEAD lists: one beyond it may be all that is left of a HEAD that was made anew. Raises `Fenced`.
        """
        head, _ = self._head(key)
        head.check_epoch(key, epoch)
        if head.newest is None:
            return []
        listed = {info.file for info in head.versions}
        removed: list[str] = []
        for name in self._files(key):
            file = name.rpartition("/")[2]
            written = None if file in listed else number_and_epoch(file)
            if written is not None and written[0] <= head.newest.version and written[1] < head.epoch:
                self.objects.delete(name)
                removed.append(name)
        return removed

    def pin(self, key: UserKey, version: int, *, epoch: int, pinned: bool = True) -> VersionInfo:
        """Keeps a version until it is released. Raises `NoSuchMemory`, `Fenced`."""
        self._head(key)[0].find(key, version)
        head = self._swap(key, epoch, lambda head: head.with_pin(key, version, pinned, epoch))
        return head.find(key, version)

    def rebuild_head(self, key: UserKey, *, epoch: int) -> list[VersionInfo]:
        """Makes a HEAD from those of the user's files that can be read, for when HEAD is damaged or gone.

        Pins are lost. A file that no HEAD had listed yet may be listed afterwards; one from before the user was erased
        is not, nor one that an older epoch wrote beside or after a newer one. Raises the error of a bad file when none
        can be read: HEAD is then empty, and a restore can take over. Raises `Fenced`.
        """
        found: list[VersionInfo] = []
        problems: list[BadMemoryFile] = []
        stone = self.tombstones.read(key)
        for name in self._files(key):
            stored = self.objects.get(name)
            if stored is None:
                continue
            try:
                memory = decode(stored[0], name=name)
            except BadMemoryFile as error:
                _log.error("%s: left out of the new HEAD: %s", key, error)
                problems.append(error)
                continue
            line = VersionInfo(
                version=memory.memory_version,
                epoch=memory.epoch,
                bytes=len(stored[0]),
                created_at=memory.created_at,
                hash=hash_of(stored[0]),
                last_chunk_id=memory.last_chunk_id,
            )
            if stone is not None and is_from_before(stone[0], memory.epoch, memory.created_at):
                continue
            if memory.key == key and name.endswith(line.file):
                found.append(line)
        best: list[VersionInfo] = []
        for line in sorted(found, key=lambda line: (line.epoch, line.version), reverse=True):
            if not best or line.version < best[-1].version:
                best.append(line)
        head = Head(epoch=max([epoch, *(line.epoch for line in best)]), versions=tuple(best))
        head.check_epoch(key, epoch)
        current = self.objects.get(user_folder(key) + "HEAD")
        tag = current[1] if current else None
        self.write_record(user_folder(key) + "HEAD", head.to_record(), if_tag=tag, if_absent=tag is None)
        if problems and not best:
            raise problems[-1]
        return best

    def has_lost_head(self, key: UserKey) -> bool:
        """Whether HEAD lists nothing although there are versions of a user who was not erased."""
        head = self._head(key)[0]
        lists = bool(head.versions) or head.begun
        return not lists and any(self._files(key)) and self.tombstone(key) is None

    def _files(self, key: UserKey) -> Iterator[str]:
        """Names of the user's versions, listed or not, oldest first."""
        names = (info.name for info in self.objects.list(user_folder(key)))
        return (name for name in names if name.endswith(".titanmem"))

    def users(self, tenant: str | None = None) -> Iterator[UserKey]:
        """All users with a stored version, in order of their names."""
        prefix = "users/" if tenant is None else f"users/{check_name('tenant', tenant)}/"
        for info in self.objects.list(prefix):
            parts = info.name.split("/")
            if len(parts) == 4 and parts[3] == "HEAD":
                with contextlib.suppress(InvalidName):
                    yield UserKey(parts[1], parts[2])

    def begin_erasure(self, key: UserKey, *, epoch: int | None = None) -> None:
        """Writes the tombstone and removes nothing yet: whoever meets the user from here on ends what was begun.

        Raises `Fenced` when `epoch` is given and a newer one has written.
        """
        try:
            head, _ = self._head(key)
        except StoreUnfit:
            head = Head(epoch=0, versions=())  # a damaged HEAD must not keep a user from being erased
        if epoch is not None:
            head.check_epoch(key, epoch)
        self.tombstones.raise_one(key, max(epoch or 0, head.epoch), self.now())

    def delete(self, key: UserKey, *, epoch: int | None = None) -> list[str]:
        """Erases the user and leaves a tombstone; the names of what was removed. Repeat it after a crash.

        Removed is also what no listing shows: half-written files, uploads, and older versions of objects that the store
        keeps. Raises `Fenced` when `epoch` is given and a newer one has written.
        """
        self.begin_erasure(key, epoch=epoch)
        removed: set[str] = set()
        for _ in range(DELETE_ROUNDS_MAX):
            folders = (user_folder(key), segments_folder(key))
            names = [info.name for folder in folders for info in self.objects.list(folder)]
            if not names:
                for folder in folders:
                    removed.update(self.objects.sweep(folder, older_than_s=0.0, replaced=True))
                self.tombstones.settle(key)
                return sorted(removed)
            for name in sorted(names, key=lambda name: not name.endswith("/HEAD")):
                self.objects.delete(name)
            removed.update(names)
        raise StoreUnavailable(f"{key}: somebody writes while the user is erased; try again", key=str(key))

    def tombstone(self, key: UserKey) -> dict[str, Any] | None:
        """The record of the user's erasure, None when there is none in force."""
        found = self.tombstones.read(key)
        return None if found is None or found[0]["cleared"] else found[0]

    def forgotten_at(self, key: UserKey) -> datetime | None:
        """When the user was last erased: nothing made before then may come back, tombstone cleared or not."""
        found = self.tombstones.read(key)
        return datetime.fromisoformat(found[0]["forgotten_at"]) if found else None

    def clear_tombstone(self, key: UserKey, epoch: int) -> None:
        """Lets an erased user begin anew; what was there before stays barred. Raises `Fenced`."""
        self.tombstones.clear(key, epoch)

    def _head(self, key: UserKey) -> tuple[Head, str | None]:
        name = user_folder(key) + "HEAD"
        found = self.read_record(name)
        if found is None:
            return Head(epoch=0, versions=()), None
        return Head.from_record(found[0], f"{self.url}: {name}"), found[1]

    def _admit(self, key: UserKey, epoch: int) -> tuple[Head, str | None]:
        """HEAD, when a writer of `epoch` may go on from it."""
        head, tag = self._head(key)
        head.check_epoch(key, epoch)
        if tag is None:
            self.tombstones.admit(key, epoch)
        return head, tag

    def _swap(
        self,
        key: UserKey,
        epoch: int,
        change: Callable[[Head], Head],
        admitted: tuple[Head, str | None] | None = None,
    ) -> Head:
        """Puts `change(HEAD)` in HEAD's place; looks again whenever somebody was faster."""
        for _ in range(SWAP_ATTEMPTS_MAX):
            head, tag = admitted or self._admit(key, epoch)
            admitted = None
            new = change(head)
            try:
                name = user_folder(key) + "HEAD"
                self.write_record(name, new.to_record(), if_tag=tag, if_absent=tag is None)
            except VersionConflict:
                continue
            for file in head.dropped:
                if file not in new.dropped:
                    self._delete_quietly(user_folder(key) + file)
            return new
        raise StoreUnavailable(f"{key}: too many writers at once; try again", key=str(key))

    def _is_listed(self, key: UserKey, info: VersionInfo) -> bool:
        return any(other.file == info.file for other in self._head(key)[0].versions)

    def _read(self, key: UserKey, version: int | None) -> tuple[bytes, VersionInfo]:
        """A version's bytes; a version that a concurrent write has just dropped is looked up anew."""
        info = None
        for _ in range(2):
            head, tag = self._head(key)
            if tag is None:
                raise NoSuchMemory(f"{key}: nothing is stored", key=str(key))
            info = head.find(key, version)
            found = self.objects.get(user_folder(key) + info.file)
            if found is not None:
                return found[0], info
        assert info is not None
        name = f"{self.url}: {user_folder(key)}{info.file}"
        raise Truncated(name, "a version that HEAD lists is there", f"{info.bytes} bytes", "no file")

    def _check_hash(self, data: bytes, info: VersionInfo, name: str) -> None:
        found = hash_of(data)
        if found != info.hash:
            raise ChecksumMismatch(name, "the file is the one that HEAD lists", info.hash, found)

    def _delete_quietly(self, name: str) -> None:
        """Deletes a file that nothing refers to; if that fails, the next write tries again (`dropped`)."""
        try:
            self.objects.delete(name)
        except StoreError as error:
            if not self.health.problem:  # else it has told of the outage, once
                _log.warning("%s is left behind for now: %s", name, error)


def open_store(url: str, *, watched: bool = False) -> MemoryStore:
    """The store that `url` names; contacts nothing. Raises `ValueError` for a URL that names none.

    `watched`: its calls are noted in its `health`, which all share who open that URL so in this process.
    """
    objects = open_objects(url)
    if not watched:
        return MemoryStore(objects)
    health = health_of(objects.url)
    return MemoryStore(Watched(objects, health), health=health)
