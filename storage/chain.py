"""Which segments continue a memory: one line of them, whatever copies and epochs there are.

Chunk ids of a user rise without a gap for as long as one owner follows another. Two owners that did not see each
other's segments (one was cut off with what it had not replicated) may have used the same ids; then the newer epoch's
segments count, and the older one's end before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from storage.segment import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """An owner of `epoch` has begun at `first_chunk_id`: from there on, segments of older epochs are void."""

    first_chunk_id: int
    epoch: int


def follow(
    segments: Iterable[Segment], *, after_chunk_id: int = 0, epoch: int = 0, seals: Iterable[Seal] = ()
) -> list[Segment]:
    """The segments that continue a memory that ends with a chunk and was stored under `epoch`; in order, each once.

    A stored version voids what an older epoch has after it: its owner had all that there was. Segments without an
    epoch are from before that was recorded, and are not voided by a version.
    """
    # The version is a seal, too.
    sealed = [*seals]
    version = Seal(first_chunk_id=after_chunk_id + 1, epoch=epoch)
    chain: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.epoch, s.last_chunk_id), reverse=True):
        over = [version, *sealed] if segment.epoch else sealed
        void = any(
            seal.epoch > segment.epoch and seal.first_chunk_id <= segment.last_chunk_id for seal in over
        )
        taken = bool(chain) and segment.last_chunk_id >= chain[-1].first_chunk_id
        if segment.last_chunk_id > after_chunk_id and not void and not taken:
            chain.append(segment)
    return chain[::-1]
