"""Watches over the recall of residents, and makes the memory that one is taken back to.

A memory is asked what its newest stored version answered (`titanmem/probes.py`) before the next one is stored and
before it is consolidated, so the newest stored version is always a good one. Where recall has fallen, that version and
the journal's tokens since then are folded again, beside the slot:

- They answer. Then the slot holds what nobody told, and they are put in its place: nothing is lost.
- They do not. Then the tokens did it. If a consolidation does not mend that, the stored version alone takes the place,
  and the tokens since then, acknowledged and in the conversation, are skipped.

Either way what comes out is stored as a new version that ends after the journal's last chunk (`Roster.supersede`). That
one conditional write is the whole rollback: before it a crash finds the old version and the journal, after it the new
version and nothing to replay. A journalled "back to version v" would need the store to keep v until it is trimmed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from actors import guard
from actors.figures import Figures
from actors.guard import Action
from actors.slab import ReadWriteLock, Resident, Slab
from actors.vault import Vault
from actors.writer import SlotWriter
from storage.journal import Journal
from storage.memory import Memory
from storage.names import UserKey
from titanmem import probes
from titanmem.fold import Encoder, Fold

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A fall of recall, and what follows from it."""

    action: Action
    memory: Memory | None = None
    """What takes the memory's place; None for WAIT."""
    said: str = ""
    """What is logged when it has."""


class Watch:
    """The guard's eyes and hands for one roster. Blocking, in the fold thread; the caller holds the user's turn."""

    def __init__(
        self, slab: Slab, vault: Vault, journal: Journal, encoder: Encoder, figures: Figures, *, consolidates: bool
    ) -> None:  # fmt: skip
        self._slab, self._vault, self._journal, self._encoder = slab, vault, journal, encoder
        self._figures, self._consolidates = figures, consolidates
        self.frozen: set[UserKey] = set()
        """Frozen users that were resident since this shard has started."""

    def mark(self, resident: Resident) -> None:
        """What is in the slot is the newest stored version: remember what it answers."""
        resident.probes = probes.drawn(
            self._slab.written_SHD, resident.slot, resident.reservoir, self._encoder.values_VD
        )
        resident.crowded = False
        (self.frozen.add if resident.frozen else self.frozen.discard)(resident.key)

    def is_damaged(self, resident: Resident) -> bool:
        """Whether the slot holds NaN or an infinity, which no fold writes: it could neither answer nor be stored."""
        with resident.lock.shared():
            # One number says it: a sum of finite float16 values is finite in float32.
            return not math.isfinite(float(self._slab.written_SHD[resident.slot].sum(dtype=torch.float32)))

    def note(self, resident: Resident, done: Fold) -> None:
        """Say what the bounds of a fold did."""
        for action in guard.on_fold(done):
            if action is Action.RAISE_THRESHOLD:
                logger.warning(
                    "%s: the threshold of surprise was raised: %d tokens were written and %d more were surprising",
                    resident.key, done.tokens_written, done.passed_over,
                )  # fmt: skip
            else:
                logger.warning(
                    "%s: more is forgotten: |θ_M| was %.0f %% of its bound",
                    resident.key,
                    100 * done.utilisation,
                )

    def report_gap(self, resident: Resident, reached: int) -> None:
        """Say it when chunks up to `reached` were acknowledged, and neither a version nor the journal has them."""
        lost = reached - resident.last_chunk_id
        if lost > 0:
            self._figures.lost_chunks.add("damage", lost)
            logger.error(
                "%s: chunks %d to %d are lost: no readable version holds them, nor does the journal any more; a "
                "snapshot may (`titanmem snapshot restore`)", resident.key, resident.last_chunk_id + 1, reached,
            )  # fmt: skip

    def look(self, resident: Resident, resting: bool) -> Finding | None:
        """Ask the probes; None if recall has not fallen. Changes nothing of the memory.

        A memory that is known to be crowded is not made again each time, except when its user is `resting`.
        Raises StoreError and JournalError.
        """
        if resident.probes is None or resident.frozen:
            return None
        asked = probes.still_asked(resident.probes, resident.reservoir, self._slab.spec)

        def right(slab: Slab, slot: int) -> int:
            return int(probes.answered(slab.written_SHD, slot, asked, self._encoder.values_VD).sum())

        count = right(self._slab, resident.slot)
        resident.recall = count / len(asked) if len(asked) else 1.0
        if not guard.has_fallen(len(asked), count):
            return None
        rested = not self._consolidates or resident.consolidated >= resident.tokens_written
        if resident.crowded and not rested and not resting:
            return Finding(action=Action.WAIT)
        return self._judged(resident, len(asked), right, rested=rested)

    def _judged(
        self, resident: Resident, asked: int, right: Callable[[Slab, int], int], *, rested: bool
    ) -> Finding:
        good = self._vault.newest(resident.key).memory
        assert good is not None, "there are probes, so there is a stored version"
        apart = Slab(self._slab.spec, 1, self._slab.written_SHD.device)
        again = self._again(resident, good, apart)
        by_tokens = guard.has_fallen(asked, right(apart, again.slot))
        action = guard.on_fall(by_tokens=by_tokens, rested=rested, falls=resident.falls)
        if action is Action.WAIT:
            resident.crowded = True
            logger.info("%s is crowded: recall %.2f; not stored for now", resident.key, resident.recall)
            return Finding(action=action)
        since = "skipped" if by_tokens else "folded again"
        said = (
            f"{resident.key}: {resident.recall:.0%} of {asked} probes were answered: taken back to version "
            f"{good.memory_version}, what was told since then is {since}"
        )
        if action is Action.FREEZE:
            said += "; frozen, until it is rolled back by hand"
        memory = good if by_tokens else self._vault.image(again, apart)
        return Finding(action=action, memory=memory, said=said)

    def _again(self, resident: Resident, good: Memory, apart: Slab) -> Resident:
        """The resident as version `good` and the journal make it, in slot 0 of a slab of its own."""
        again = replace(resident, slot=0, lock=ReadWriteLock())
        self._vault.restore(good, again, apart)
        writer = SlotWriter(apart, self._encoder, self._figures)
        for segment in self._journal.pending(resident.key, good.last_chunk_id):
            if segment.last_chunk_id <= resident.last_chunk_id:
                done = writer.fold(again, segment)
                again.momentum = done.momentum
                again.reservoir = again.reservoir if done.reservoir is None else done.reservoir
        # What it counts and has seen was never in the slot.
        return replace(resident, slot=0, lock=again.lock, momentum=again.momentum, reservoir=again.reservoir)
