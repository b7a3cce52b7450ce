"""Erasing a user: slot, journal, store, and a mark at the backups; in an order that any crash may cut.

    1. the tombstone, `erasing`: from here on the user is erased, whatever becomes of this process
    2. slot, what is on its way to the store, journal
    3. versions and segments, half-written files, what the store keeps of what was replaced; the tombstone is settled
    4. the mark at the backups, so that a restore into a store that never saw the tombstone honours it, too

Cut after 1, whoever meets the tombstone next does 2 and 3: the user who comes back (`arrival.come_in`), or the same
request. Cut before 4, the next backup makes the mark (`storage.snapshot_marks.copy_marks`).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from actors.roster import Roster
from actors.unbroken import unbroken
from actors.vault import erase_rest
from storage.errors import StoreUnfit, TitanmemError
from storage.header import write_time
from storage.names import UserKey
from storage.objects import open_objects
from storage.retention import kept_until
from storage.scratch import sweep_scratch
from storage.snapshot_manifest import list_snapshots
from storage.snapshot_marks import holding, mark
from storage.store import MemoryStore

logger = logging.getLogger(__name__)


async def erase(roster: Roster, key: UserKey, snapshots_url: str) -> dict[str, Any]:
    """The receipt, once nothing is left of a user here but the tombstone. Nobody is brought in for it.

    What is being told to the user ends first; what is told afterwards begins a new memory. Raises Fenced when a newer
    owner has written, StoreError when something could not be removed: ask again, the rest goes then.
    """
    async with roster.alone(key):
        return await unbroken(_erase(roster, key, snapshots_url))


async def _erase(roster: Roster, key: UserKey, snapshots_url: str) -> dict[str, Any]:
    store, epoch = roster.vault.store, roster.vault.epoch
    stored = await asyncio.to_thread(_newest_version, store, key)
    await asyncio.to_thread(store.begin_erasure, key, epoch=epoch)
    resident = roster.slab.peek(key)
    if resident is not None:
        roster.drop(resident)
    roster.watch.frozen.discard(key)
    await roster.replicator.forget(key)
    rows, removed = await asyncio.to_thread(erase_rest, roster.journal, roster.vault, key)
    await asyncio.to_thread(sweep_scratch)
    when = await asyncio.to_thread(store.forgotten_at, key) or datetime.now(UTC)
    return {
        "tenant": key.tenant, "user": key.user, "memory_version": resident.memory_version if resident else stored,
        "slot": resident is not None, "journal_entries": rows["segments"], "journal_rows": rows, "removed": removed,
        "tombstone": True, "forgotten_at": write_time(when),
        **await asyncio.to_thread(_at_the_backups, snapshots_url, key, when),
    }  # fmt: skip


def _newest_version(store: MemoryStore, key: UserKey) -> int:
    with suppress(StoreUnfit):  # a damaged HEAD must not keep a user from being erased
        return max((info.version for info in store.versions(key)), default=0)
    return 0


def _at_the_backups(url: str, key: UserKey, when: datetime) -> dict[str, Any]:
    """Marks the user at the backups; which of them still hold the memory, and until when.

    Backups that cannot be reached do not undo an erasure: the receipt says so.
    """
    if not url:
        return {"snapshots": [], "snapshots_marked": False}
    try:
        target = open_objects(url)
        mark(target, key, when)
        manifests = list_snapshots(target)
        until = kept_until(manifests, now=when)
        lines = [
            {
                "id": found.id,
                "created_at": write_time(found.created_at),
                "kept_until": write_time(until[found.id]),
            }
            for found in manifests
            if holding(target, found, key)
        ]
        return {"snapshots": lines, "snapshots_marked": True}
    except (TitanmemError, OSError) as error:
        logger.error("%s is erased, and could not be marked at the backups for now: %s", key, error)
        return {"snapshots": [], "snapshots_marked": False, "snapshots_error": str(error)}
