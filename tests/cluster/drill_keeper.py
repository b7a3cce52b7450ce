"""The default keeper in a shard that is watched: journals in its node's own folder, and a list of what it confirms.

Each line of `confirmed` beside the store says: under which epoch, when the look at the ownership record was begun,
when it was over; seconds since 1970, on one machine. An answer leaves right after.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import actors.guard
from actors import keeper
from actors.handover import wait_until_free
from actors.keeper import MemoryKeeper
from actors.options import KeeperOptions
from actors.ownership import Gate

JOURNALS = "DRILL_JOURNALS"
"""Environment of a node: its folder of journals."""
FAULT = "DRILL_FAULT"
"""Environment of a node: `no_epoch_check` takes the look at the ownership record away, which must be caught."""
CONFIRMED = "confirmed"

_confirm = Gate.confirm
_here: list[tuple[KeeperOptions, int]] = []
"""The shard that this process is, and its list."""


async def _listed(gate: Gate) -> None:
    began = time.time()
    if os.environ.get(FAULT) != "no_epoch_check":
        await _confirm(gate)
    options, file = _here[0]
    os.write(file, f"{options.shard} {options.epoch} {began:.6f} {time.time():.6f}\n".encode())


async def open_keeper(options: KeeperOptions) -> MemoryKeeper:
    """What a shard is given for `actors.keeper:open_keeper`."""
    # Only here, in the shard's own process: tests import this module too. Not the shard's method: Ray copies those when
    # it makes the actor's class.
    Gate.confirm = _listed  # type: ignore[method-assign]
    # A random model's memories are soon crowded, and what the guard does about it depends on when it looks.
    actors.guard.has_fallen = lambda asked, answered: False
    here = replace(options, journal_dir=os.environ.get(JOURNALS, options.journal_dir))
    path = Path(urlsplit(options.store_url).path).parent / CONFIRMED
    _here[:] = [(options, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))]
    await asyncio.to_thread(wait_until_free, here.journal)
    return await keeper.open_keeper(here)
