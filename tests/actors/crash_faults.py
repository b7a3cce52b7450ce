"""Faults to plant in a process that is to be killed: a harness that can not fail proves nothing."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actors.keeper import MemoryKeeper
from actors.messages import IngestCall, IngestOutcome
from actors.roster import Roster
from tests.actors.crash_points import put_in_place


def trims_early() -> None:
    """The journal lets go of what no stored version has yet."""
    store = Roster.store

    async def early(roster: Roster, resident: Any) -> bool:
        if resident.dirty:
            await asyncio.wrap_future(roster.journal.trim(resident.key, resident.last_chunk_id))
        return await store(roster, resident)

    put_in_place(Roster, store=early)


def ignores_update_ids() -> None:
    """An update that comes again is a new one."""
    ingest = MemoryKeeper.ingest

    async def anew(keeper: MemoryKeeper, call: IngestCall) -> IngestOutcome:
        return await ingest(keeper, replace(call, update_id=secrets.token_hex(8)))

    put_in_place(MemoryKeeper, ingest=anew)


FAULTS: dict[str, Callable[[], None]] = {
    "trims-early": trims_early,
    "ignores-update-ids": ignores_update_ids,
}
