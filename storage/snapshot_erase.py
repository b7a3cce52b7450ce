"""Taking erased users out of the snapshots that hold them, so that they need not wait for the retention.

A part that holds such a user is written again without, under a new name; then the manifest names that one instead, by a
conditional write; then the old part goes. Cut off in between, one of the two is in no manifest, and the sweep takes it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from storage.errors import SnapshotError, VersionConflict
from storage.header import write_time
from storage.names import UserKey
from storage.objects import Objects
from storage.scratch import scratch_folder
from storage.snapshot_manifest import Manifest, PartInfo, list_snapshots, put_manifest, put_part
from storage.snapshot_marks import marks
from storage.snapshot_part import PartWriter, open_part

CLOCKS_APART_MAX = timedelta(days=1)
"""Of who marks, who backs up and who erases."""

_log = logging.getLogger(__name__)


def erase_marked(target: Objects, *, now: datetime, scratch: Path | None = None) -> dict[str, list[str]]:
    """Takes out of every snapshot what a mark bars from coming back: snapshot → users. Parts are made in `scratch`.

    A snapshot that can not be read, or that somebody else changes meanwhile, is logged and left for the next time.
    """
    barred = marks(target)
    erased: dict[str, list[str]] = {}
    for manifest in list_snapshots(target) if barred else ():
        done = datetime.fromisoformat(manifest.extra.get("erased_at", write_time(manifest.created_at)))
        # A snapshot that was made or looked through after a mark holds nothing that the mark bars.
        fresh = {key: moment for key, moment in barred.items() if moment > done - CLOCKS_APART_MAX}
        try:
            users = _erase(target, manifest, fresh, now, scratch) if fresh else []
        except (SnapshotError, VersionConflict) as error:
            _log.error("%s: forgotten users are not taken out for now: %s", manifest.id, error)
            continue
        if users:
            erased[manifest.id] = users
    return erased


def _erase(
    target: Objects,
    manifest: Manifest,
    barred: Mapping[UserKey, datetime],
    now: datetime,
    scratch: Path | None,
) -> list[str]:
    found = target.get(f"{manifest.id}/manifest.json")
    held = {part.name: _held(target, part, barred) for part in manifest.parts}
    users = sorted(set().union(*held.values()))
    if not users or found is None:
        return []
    parts = [
        _without(target, manifest.id, part, held[part.name], scratch) if held[part.name] else part
        for part in manifest.parts
    ]
    newer = replace(manifest, parts=tuple(parts), extra={**manifest.extra, "erased_at": write_time(now)})
    put_manifest(target, newer, if_tag=found[1])
    for part in manifest.parts:
        if held[part.name]:
            target.delete(part.name)
    _log.info("%s: %d forgotten users were taken out", manifest.id, len(users))
    return users


def _held(target: Objects, part: PartInfo, barred: Mapping[UserKey, datetime]) -> set[str]:
    with open_part(target, part.name) as reader:
        return {
            str(row.key) for row in reader.users() if row.key in barred and row.created_at <= barred[row.key]
        }


def _without(
    target: Objects, snapshot_id: str, part: PartInfo, users: set[str], scratch: Path | None
) -> PartInfo:
    """The part again, without some users."""
    name = f"{snapshot_id}/part-{part.shard}-x{secrets.token_hex(4)}.parquet"
    with scratch_folder(scratch) as folder:
        path = folder / "part.parquet"
        with PartWriter(path) as writer, open_part(target, part.name) as reader:
            for row in reader.rows():
                if row.kind != "user":
                    writer.add_piece(row.kind, row.name, row.meta, row.data)
                elif row.name not in users:
                    writer.add_user(row.data)
        return put_part(
            target, name, path, writer, shard=part.shard, epoch=part.epoch, model_files=part.model_files
        )
