"""How a user comes in: the newest valid version into a slot, then what journal or store hold beyond it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from actors.seen import remember, update_hash, void_updates
from actors.slab import Resident
from actors.vault import Found, erase_rest

if TYPE_CHECKING:
    from actors.roster import Roster

logger = logging.getLogger(__name__)


async def come_in(roster: Roster, resident: Resident, found: Found) -> None:
    """Makes the resident's slot what was told, and its counters with it. The caller holds the user's turn.

    Raises what is wrong with the user's versions when the journal cannot stand in for them, JournalCorrupt, StoreError.
    """
    key, vault, journal = resident.key, roster.vault, roster.journal
    if found.erasing:
        await roster.in_store_pool(erase_rest, journal, vault, key)
        found = Found()
    if found.memory is not None:
        vault.restore(found.memory, resident, roster.slab)
        await roster.in_fold_pool(roster.watch.mark, resident)
        if void := void_updates(found.memory, resident, journal.pending(key)):
            logger.warning("%s: %d segments of before another owner are void", key, len(void))
            await asyncio.wrap_future(journal.disown(key, void))
    await roster.replicator.bring_back(
        key, after_chunk_id=resident.last_chunk_id, epoch=found.memory.epoch if found.memory else 0
    )
    pending = journal.pending(key, resident.last_chunk_id)
    # Without segments beyond the version there is nothing that it does not know, and what a journal still has
    # of an earlier time would push newer hashes out.
    remember(resident, journal.seen(key) if pending else ())
    if found.problem is not None and (not pending or pending[0].first_chunk_id > 1):
        raise found.problem
    resident.claimed = found.listed_version > 0
    if pending:
        await roster.begin(resident)
    for segment in pending:
        roster.watch.report_gap(resident, segment.first_chunk_id - 1)
        resident.journaled_chunk_id = segment.last_chunk_id
        remember(resident, [update_hash(segment.update_id)])
        await roster.fold(resident, segment)
    roster.watch.report_gap(resident, found.listed_chunk_id)
    resident.last_chunk_id = resident.journaled_chunk_id = max(resident.last_chunk_id, found.listed_chunk_id)
    listed = found.listed_version
    # A damaged newest version keeps its number: what was rebuilt beside it becomes a newer one.
    resident.memory_version = max(
        resident.memory_version, listed + 1 if resident.stored_version < listed else 0
    )
