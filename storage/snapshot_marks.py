"""Marks of erased users beside the backups: a restore honours them in whatever store it fills.

`forgotten/<tenant>/<user>` in the target says up to when what snapshots hold of the user is not to come back. It is
what a tombstone is in a store; a store that is lost takes its tombstones with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime

from storage.errors import InvalidName, StoreUnfit
from storage.header import write_time
from storage.names import UserKey
from storage.objects import Objects
from storage.records import decode_record, encode_record
from storage.snapshot_manifest import Manifest
from storage.snapshot_part import UserRow, open_part
from storage.store import MemoryStore

_ROOT = "forgotten/"


def mark(target: Objects, key: UserKey, forgotten_at: datetime) -> None:
    """Bars what was made of a user up to a moment from coming back."""
    before = marked_at(target, key)
    if before is None or before < forgotten_at:
        record = {"tenant": key.tenant, "user": key.user, "forgotten_at": write_time(forgotten_at)}
        target.put(_name(key), encode_record(record))


def marked_at(target: Objects, key: UserKey) -> datetime | None:
    """When the user was erased, as far as the backups know. Raises `StoreUnfit` for a damaged mark."""
    name = _name(key)
    found = target.get(name)
    if found is None:
        return None
    try:
        return datetime.fromisoformat(decode_record(found[0], f"{target.url}: {name}")["forgotten_at"])
    except (KeyError, ValueError, TypeError) as error:
        raise StoreUnfit(f"{target.url}: {name}: this record is no mark: {error!r}", name=name) from error


def marks(target: Objects) -> dict[UserKey, datetime]:
    """All marks. Raises `StoreUnfit` for a damaged one: who is barred by it is not known."""
    found: dict[UserKey, datetime] = {}
    for info in target.list(_ROOT):
        with contextlib.suppress(InvalidName):
            key = UserKey.parse(info.name.removeprefix(_ROOT))
            moment = marked_at(target, key)
            if moment is not None:
                found[key] = moment
    return found


def copy_marks(store: MemoryStore, target: Objects, keys: Iterable[UserKey]) -> None:
    """Marks these users as the store's tombstones have it: an erasure that could not reach the target, or went before
    the target was one."""
    for key in keys:
        when = store.forgotten_at(key)
        if when is not None:
            mark(target, key, when)


def holding(target: Objects, manifest: Manifest, key: UserKey) -> list[tuple[str, UserRow]]:
    """Part and row of each memory that a snapshot holds of a user; only directories are read."""
    found: list[tuple[str, UserRow]] = []
    for part in manifest.parts:
        with open_part(target, part.name) as reader:
            found += [(part.name, row) for row in reader.users(key)]
    return found


def _name(key: UserKey) -> str:
    return f"{_ROOT}{key.tenant}/{key.user}"
