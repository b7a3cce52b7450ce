"""A shard's part of a cold backup: each of its users once, at the newest stored version, while it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from actors.errors import QueueFull
from actors.options import KeeperOptions
from actors.roster import Roster
from storage.errors import BadMemoryFile, JournalCorrupt, StoreUnfit
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot_manifest import write_part
from storage.snapshot_marks import copy_marks

BUSY_PAUSE_S = 0.05
BUSY_S_MAX = 600.0
"""Longest wait for a free slot, in a shard where every slot is being served."""

logger = logging.getLogger(__name__)


class Backup:
    """Writes parts for one roster; `owns` says whether a user is this shard's."""

    def __init__(self, roster: Roster, options: KeeperOptions, owns: Callable[[UserKey], bool]) -> None:
        self._roster, self._options, self._owns = roster, options, owns
        self._one = asyncio.Lock()

    async def part(
        self, snapshot_id: str, target_url: str, *, include_model: bool, pending: Iterable[UserKey]
    ) -> dict[str, Any]:
        """The part as `PartInfo` has it, and the model's `base`; the one that is there already when it is asked again.

        Nobody is stopped: a user's turn is held for as long as a version takes to be stored, as at any other time.
        `pending` come in first, so that what only the journal has is in a stored version. Raises StoreError when that
        cannot be stored, SnapshotError and what the target says.
        """
        async with self._one:  # who asks again does so because the answer was lost, not the work
            erased = await asyncio.to_thread(self._half_erased)
            for key in [*erased, *sorted(pending)]:
                await self._bring_in(key)
            await _patiently(self._roster.flush)
            return await asyncio.to_thread(self._write, snapshot_id, target_url, include_model)

    async def _bring_in(self, key: UserKey) -> None:
        """Into a slot and so, at the next flush, into the store. One who is damaged is logged: the others come in."""

        async def once() -> None:
            async with self._roster.turn(key, upkeep=True):
                pass

        try:
            await _patiently(once)
        except (BadMemoryFile, StoreUnfit, JournalCorrupt) as error:
            logger.error("%s can not come in: %s", key, error)

    def _half_erased(self) -> list[UserKey]:
        """Users whose erasure was cut off: it comes to its end when they come in."""
        stones = self._roster.vault.store.tombstones
        return [key for key in stones.users() if self._owns(key) and stones.is_erasing(key)]

    def _write(self, snapshot_id: str, target_url: str, include_model: bool) -> dict[str, Any]:
        vault, options = self._roster.vault, self._options
        target = open_objects(target_url)
        copy_marks(vault.store, target, filter(self._owns, vault.store.tombstones.users()))
        part = write_part(
            target, snapshot_id, shard=options.shard, epoch=options.epoch,
            model_dir=Path(options.model) if include_model else None,
            memories=filter(None, map(vault.resting, filter(self._owns, vault.store.users()))),
        )  # fmt: skip
        return {**part.to_dict(), "base": vault.layout.base}


async def _patiently(work: Callable[[], Awaitable[Any]]) -> None:
    """`work`, again while every slot is being served."""
    deadline = asyncio.get_running_loop().time() + BUSY_S_MAX
    while True:
        try:
            await work()
            return
        except QueueFull:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(BUSY_PAUSE_S)
