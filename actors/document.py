"""Pieces of a document into one memory: journalled together, folded one after the other, each under its own name.

A call brings several pieces, since what a call and a commit cost is as much for one as for ten. Each is a segment and
an update: a piece that was written before is left out, wherever the document was cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np

from actors.errors import MemoryFrozen
from actors.messages import NOTHING, IngestCall, IngestOutcome
from actors.roster import Roster
from actors.seen import document_id, update_hash
from actors.slab import Resident
from storage.segment import Segment
from titanmem.tracing import continued


async def write_pieces(roster: Roster, resident: Resident, call: IngestCall) -> IngestOutcome:
    """Write what is not written yet; the caller has the user's turn. What was, says what it did the first time.

    Raises MemoryFrozen, JournalFull, StoreError, and what a fold raises: what is journalled by then is written.
    """
    pieces, done = call.pieces(), NOTHING
    while pieces:
        for update_id in [
            name for name in pieces if not len(pieces[name]) or update_hash(name) in resident.seen
        ]:
            done = done.plus(_repeated(roster, resident, update_id, pieces.pop(update_id)))
        if not pieces:
            break
        if resident.frozen:
            raise MemoryFrozen(str(call.key))
        segments = _segments(roster, resident, call.conversation, pieces)
        with continued({}, "journal"):
            appended = await roster.append(resident, segments, [update_hash(name) for name in pieces])
        if appended:
            return done.plus(await _folded(roster, resident, segments))
        # The journal knows some of them, which are in `seen` by now.
    return done


def _segments(
    roster: Roster, resident: Resident, conversation: str, pieces: Mapping[str, np.ndarray]
) -> list[Segment]:
    """Each piece goes on where the one before ends; the first one where this document has ended, if it was the last."""
    segments: list[Segment] = []
    context = resident.tail if resident.tail_of == document_id(conversation) else np.zeros(0, np.int32)
    for update_id, tokens in pieces.items():
        segment = roster.segment(
            resident, update_id=update_id, conversation=conversation, role="document", context=context,
            tokens=tokens, before=segments[-1] if segments else None,
        )  # fmt: skip
        segments.append(segment)
        context = np.concatenate([segment.context, segment.tokens])
    return segments


async def _folded(roster: Roster, resident: Resident, segments: list[Segment]) -> IngestOutcome:
    done, noted = NOTHING, []
    for segment in segments:
        fold = await roster.fold(resident, segment)
        outcome = IngestOutcome(
            tokens=len(segment.tokens), chunks=fold.chunks, tokens_written=fold.tokens_written,
            memory_version=resident.memory_version,
        )  # fmt: skip
        noted.append(roster.journal.set_outcome(resident.key, segment.update_id, outcome.record()))
        done = done.plus(outcome)
    await asyncio.gather(*map(asyncio.wrap_future, noted))
    return done


def _repeated(roster: Roster, resident: Resident, update_id: str, tokens: np.ndarray) -> IngestOutcome:
    """What an update did that is written already; its count of written tokens may have gone with its journal."""
    known = roster.journal.outcome(resident.key, update_id)
    if known is not None:
        return IngestOutcome(**known, duplicates=1)
    chunks = -(-len(tokens) // roster.spec.chunk_size)
    return IngestOutcome(
        tokens=len(tokens), chunks=chunks, tokens_written=0, memory_version=resident.memory_version,
        duplicates=int(bool(len(tokens))),
    )  # fmt: skip
