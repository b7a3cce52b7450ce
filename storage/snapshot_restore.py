"""Restoring a cold backup into a store: all users, one tenant, or one user."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from storage.errors import (
    BadMemoryFile,
    Forgotten,
    NoSuchMemory,
    SnapshotDamaged,
    SnapshotError,
    StoreNotEmpty,
    StoreUnfit,
)
from storage.head import VersionInfo
from storage.names import UserKey
from storage.objects import Objects
from storage.snapshot_manifest import Manifest, PartInfo, read_manifest
from storage.snapshot_marks import marked_at, marks
from storage.snapshot_model import assemble
from storage.snapshot_part import GROUP_BYTES, Row, UserRow, open_part
from storage.snapshot_threads import in_threads
from storage.snapshot_verify import PROBLEMS_SHOWN_MAX, Progress, check_file
from storage.store import MemoryStore
from storage.titanmem import TITANMEM_BYTES_MAX, decode, relabel

USER_GROUP_BYTES_MAX = GROUP_BYTES + TITANMEM_BYTES_MAX + (1 << 20)
"""A row group is closed once it has GROUP_BYTES: the largest memory may come on top, and the other columns."""


def restore(
    target: Objects,
    snapshot_id: str,
    store: MemoryStore,
    *,
    epoch: int,
    user: UserKey | None = None,
    tenant: str | None = None,
    into_empty: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Puts memories of a snapshot into `store` as their users' newest versions, written under `epoch`.

    All of them, one tenant's, or one user's. Nothing is written before all parts are known to be there. A
    user who was erased after the memory was made stays erased: by a tombstone of the store, or by a mark beside the
    snapshots, which becomes one. A row that is damaged is reported in `failed`,
    and the rest is restored; `ok` says whether all went well. Raises `StoreNotEmpty` when the store has users
    already (`into_empty`; not for a single user, nor with `force`), `NoSuchMemory` and `Forgotten` for a
    single user.
    """
    manifest = read_manifest(target, snapshot_id)
    check_parts(target, manifest)
    if into_empty and not force and user is None:
        _check_empty(store, tenant)
    chosen = _choose(target, manifest, user, tenant)
    if user is not None and not chosen:
        for part in manifest.parts:
            check_file(target, part)  # a damaged directory of a part would hide the user as well
        raise NoSuchMemory(f"{snapshot_id}: this snapshot has no memory of {user}", key=str(user))
    for key, moment in _barred(target, user).items():
        store.tombstones.bar(key, epoch, moment)
    known = {user} if user is not None else {*store.users(tenant), *store.tombstones.users()}
    report = _Restored(total=len(chosen))
    for part in manifest.parts:
        wanted: dict[int, list[UserRow]] = {}
        for owner, row in chosen.values():
            if owner == part.name:
                wanted.setdefault(row.group, []).append(row)
        if wanted:
            _restore_part(target, part, wanted, store, epoch, known, report, progress)
    if user is not None and report.forgotten:
        raise Forgotten(
            f"{user}: erased at {store.forgotten_at(user)}, after this memory was made: it stays erased",
            key=str(user),
        )
    return {
        "id": snapshot_id,
        "ok": not report.failed,
        "restored": report.restored,
        "forgotten": report.forgotten,
        "failed": report.failed[:PROBLEMS_SHOWN_MAX],
        "failed_count": len(report.failed),
        "bytes": report.bytes,
        "base": manifest.base,
        "epoch": epoch,
    }


@dataclass
class _Restored:
    total: int
    restored: int = 0
    bytes: int = 0
    forgotten: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.restored + len(self.forgotten) + len(self.failed)


def check_parts(target: Objects, manifest: Manifest) -> None:
    """Raises `SnapshotDamaged` unless every part is there, with its size."""
    stored = {info.name: info.bytes for info in target.list(f"{manifest.id}/")}
    for part in manifest.parts:
        if stored.get(part.name) != part.bytes:
            found = f"{stored[part.name]} bytes" if part.name in stored else "nothing"
            raise SnapshotDamaged(
                f"{part.name}: expected {part.bytes} bytes, found {found}; nothing was restored",
                part=part.name,
            )


def _check_empty(store: MemoryStore, tenant: str | None) -> None:
    for key in store.users(tenant):
        raise StoreNotEmpty(
            f"{store.url}: the store has users already ({key} is one): expected an empty one. Restore one "
            "user, or force it: then each restored memory becomes its user's newest version.",
            key=str(key),
        )


def _barred(target: Objects, user: UserKey | None) -> dict[UserKey, datetime]:
    """Who was erased, as the marks beside the snapshots have it."""
    if user is None:
        return marks(target)
    moment = marked_at(target, user)
    return {user: moment} if moment else {}


def _choose(
    target: Objects, manifest: Manifest, user: UserKey | None, tenant: str | None
) -> dict[UserKey, tuple[str, UserRow]]:
    """Part and row of each wanted user; of a user who moved while the snapshot was taken, the newest."""
    chosen: dict[UserKey, tuple[str, UserRow]] = {}
    for part in manifest.parts:
        with open_part(target, part.name) as reader:
            rows = list(reader.users(user))
            if user is None and len(rows) != part.users:
                raise SnapshotDamaged(
                    f"{part.name}: expected {part.users} users, found {len(rows)}; nothing was restored",
                    part=part.name,
                )
            for row in rows:
                if tenant is not None and row.key.tenant != tenant:
                    continue
                best = chosen.get(row.key)
                if best is None or (best[1].epoch, best[1].memory_version) < (row.epoch, row.memory_version):
                    chosen[row.key] = (part.name, row)
    return chosen


def _restore_part(
    target: Objects,
    part: PartInfo,
    wanted: dict[int, list[UserRow]],
    store: MemoryStore,
    epoch: int,
    known: Container[UserKey],
    report: _Restored,
    progress: Progress | None,
) -> None:
    """The wanted rows of a part, by row group, several users at once."""

    def rows() -> Iterator[tuple[UserRow, Row | str]]:
        for number, wanted_rows in sorted(wanted.items()):
            try:
                group = reader.load(number, USER_GROUP_BYTES_MAX)
            except SnapshotDamaged as error:
                yield from ((row, f"{row.key}: {error}") for row in wanted_rows)
                continue
            for row in wanted_rows:
                try:
                    yield row, group.row(row.row)
                except SnapshotDamaged as error:
                    yield row, str(error)

    def put(item: tuple[UserRow, Row | str]) -> tuple[UserKey, str | int | None]:
        """Bytes that were stored; what is wrong with a row; None for a user who was erased."""
        at, row = item
        if isinstance(row, str):
            return at.key, row
        try:
            return at.key, _restore_user(row, at.key, part, store, epoch, is_known=at.key in known)
        except (SnapshotDamaged, BadMemoryFile) as error:
            return at.key, str(error)

    with open_part(target, part.name) as reader:
        for key, done in in_threads(put, rows()):
            if isinstance(done, str):
                report.failed.append(done)
            elif done is None:
                report.forgotten.append(str(key))
            else:
                report.restored += 1
                report.bytes += done
            if progress:
                progress(report.done, report.total)


def _restore_user(
    row: Row, key: UserKey, part: PartInfo, store: MemoryStore, epoch: int, *, is_known: bool
) -> int | None:
    """Bytes stored; None when the user was erased after the memory was made. `is_known`: the store may have something
    of the user, else it is not asked."""
    name = f"{part.name}: {row.name}"
    memory = decode(row.data, name=name)
    if memory.key != key:
        raise SnapshotDamaged(f"{part.name}: row {row.name} holds the memory of {memory.key}")
    version = memory.memory_version
    if is_known:
        stone = store.tombstones.read(key)
        if stone is not None and (
            memory.created_at <= datetime.fromisoformat(stone[0]["forgotten_at"]) or not stone[0]["cleared"]
        ):
            return None
        version = max(version, _newest(store, key, epoch) + 1)
    data = relabel(row.data, memory_version=version, epoch=epoch, name=name)
    return store.put(replace(memory, memory_version=version, epoch=epoch), epoch=epoch, data=data).bytes


def _newest(store: MemoryStore, key: UserKey, epoch: int) -> int:
    """The user's newest version in the store, 0 if there is none."""
    versions: list[VersionInfo] = []
    try:
        versions = store.versions(key)
    except StoreUnfit:
        with contextlib.suppress(BadMemoryFile):  # what is restored takes over from a damaged HEAD
            versions = store.rebuild_head(key, epoch=epoch)
    return versions[0].version if versions else 0


def restore_model(target: Objects, snapshot_id: str, folder: Path) -> list[str]:
    """Writes the model of a snapshot into a new `folder`, all of it or nothing; the names of its files.

    Raises `SnapshotError` when the folder has something in it or the snapshot carries no model.
    """
    manifest = read_manifest(target, snapshot_id)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotError(f"{folder}: expected a new or empty folder", folder=str(folder))
    with_model = [part for part in manifest.parts if part.model_files]
    if not with_model:
        raise SnapshotError(f"{snapshot_id}: this snapshot was taken without the model", id=snapshot_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with open_part(target, with_model[0].name) as reader:
            names = assemble(reader.model_rows(), None, temporary)
        if len(names) != with_model[0].model_files:
            raise SnapshotDamaged(f"{with_model[0].name}: the model's files are not all there")
        temporary.chmod(0o755)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return names
