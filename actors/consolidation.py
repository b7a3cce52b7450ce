"""Consolidation of users who rest: worked out beside the slot, journalled, put in place; nobody waits for it.

The passes run on a copy of the slot, a few updates at a time, between other users' folds, and without the user's turn.
Only when all is done is the turn taken, for one commit of the journal and one copy: a segment of role `replay` says how
many passes, and what it does is a function of the memory that it follows, so a replay of the journal gives the same
bits. A user who speaks meanwhile is served at once, and the copy is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from actors.figures import Figures
from actors.guard import Action
from actors.roster import Roster
from actors.slab import Resident
from storage.errors import TitanmemError
from storage.names import UserKey
from titanmem.consolidation import PASSES

logger = logging.getLogger(__name__)

SLICE_UPDATES = 4
"""Updates between two looks at who else waits: a few milliseconds."""


@dataclass(slots=True)
class _Copy:
    """A slot as it was at one version, being consolidated."""

    resident: Resident
    version: int
    slab_1HD: torch.Tensor
    updates: int = 0


class Consolidator:
    """Consolidates the residents of one roster, one after another. Runs on the roster's event loop."""

    def __init__(self, roster: Roster, figures: Figures, idle_s: float) -> None:
        self.roster, self._figures, self.idle_s = roster, figures, idle_s
        self._settling: asyncio.Task[bool] | None = None

    async def run(self) -> None:
        """For ever: consolidate whoever is due. Ends at once when `idle_s` is 0."""
        while self.idle_s:
            await asyncio.sleep(min(1.0, max(0.05, self.idle_s / 4)))
            for resident in self.roster.slab.residents():
                if self.due(resident):
                    await self._try(resident)

    def due(self, resident: Resident) -> bool:
        """Whether the user rests and has written something since the last consolidation."""
        roster, key = self.roster, resident.key
        if roster.fenced is not None or roster.wanted(key) or roster.slab.peek(key) is not resident:
            return False
        news = resident.tokens_written > resident.consolidated and not resident.frozen
        return news and len(resident.reservoir) > 0 and roster.idle_s(resident) >= self.idle_s

    async def _try(self, resident: Resident) -> None:
        try:
            await self.consolidate(resident.key)
        except (TitanmemError, ValueError) as error:
            self._figures.consolidations.add("failed")
            logger.warning("%s is not consolidated for now: %s", resident.key, error)
            await asyncio.sleep(self.idle_s)  # a full journal or a bad memory is not better a moment later

    async def consolidate(self, key: UserKey, passes: int = PASSES) -> bool:
        """Consolidate one user, resting or not; False if there was nothing to replay or the user came in between, or
        if the guard has taken the memory back.

        Raises JournalError when the journal does not take it; then nothing has changed.
        """
        async with self.roster.turn(key, upkeep=True) as resident:
            # A replay over what nobody told would hide it from the probes, and no other replay would give its bits.
            found = await self.roster.check(resident, resting=True)
            reservoir = resident.reservoir
            taken_back = found is not None and found.action is not Action.WAIT
            if taken_back or resident.frozen or not len(reservoir):
                return False
            copy = _Copy(
                resident, resident.memory_version, await asyncio.to_thread(self.roster.slab.copy, resident)
            )
        steps = self.roster.writer.replay(copy.slab_1HD, reservoir, passes)
        while self._fits(copy) and (done := await self.roster.in_fold_pool(_advance, steps)):
            copy.updates = done
        # Cancelled or not, what is in the journal comes into the slot before anybody else has the turn.
        self._settling = asyncio.create_task(self._settle(copy, passes))
        settled = await asyncio.shield(self._settling)
        self._figures.consolidations.add("done" if settled else "abandoned")
        return settled

    def _fits(self, copy: _Copy) -> bool:
        """Whether the copy is still of use: the user does not speak, has not spoken, was not evicted or erased."""
        return not self.roster.wanted(copy.resident.key) and self._is_newest(copy)

    def _is_newest(self, copy: _Copy) -> bool:
        here = self.roster.slab.peek(copy.resident.key) is copy.resident
        return here and copy.resident.memory_version == copy.version

    async def _settle(self, copy: _Copy, passes: int) -> bool:
        """Journal the replay and put the copy in place, if it fits."""
        if not self._fits(copy):
            return False
        roster, resident = self.roster, copy.resident
        async with roster.turn(resident.key, upkeep=True):
            if not self._is_newest(copy):
                return False
            started = time.perf_counter()
            segment = roster.segment(
                resident, update_id=f"replay:{resident.journaled_chunk_id + 1}", conversation="", role="replay",
                context=np.zeros(0, np.int32), tokens=np.array([passes], np.int32),
            )  # fmt: skip
            if not await roster.append(resident, [segment]):
                return False
            await roster.settle(resident, segment, copy.slab_1HD, copy.updates)
            self._figures.consolidation_s.observe(time.perf_counter() - started)
        return True

    async def close(self) -> None:
        """Wait for what is being put in place; whoever calls has cancelled `run`."""
        if self._settling is not None:
            await asyncio.gather(self._settling, return_exceptions=True)


def _advance(steps: Iterator[int]) -> int:
    """The next few updates; the number of all so far, 0 when there are no more."""
    return max(islice(steps, SLICE_UPDATES), default=0)
