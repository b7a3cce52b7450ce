"""What a memory remembers as written already: hashes that rest in its file, so that they go where the user goes.

Each segment leaves one of its update id, each message one of the conversation up to it. The newest `SEEN_MAX` stay. A
journal knows update ids too, with their outcomes, but it belongs to one disk, and forgets them after a week.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from actors.slab import Resident
from storage.memory import SEEN_MAX, Memory
from storage.segment import Segment


def hash_of_name(name: str) -> int:
    """uint64 of a name."""
    return xxhash.xxh3_64_intdigest(name.encode())


def update_hash(update_id: str) -> int:
    """uint64 under which a written segment is remembered."""
    return hash_of_name("update:" + update_id)


def document_id(name: str) -> int:
    """48 bits of a document's name, see `Resident.tail_of`."""
    return hash_of_name(name) >> 16


def remember(resident: Resident, values: Iterable[int]) -> None:
    """Add hashes as the newest; the oldest beyond `SEEN_MAX` go."""
    for value in values:
        resident.seen[value] = None
        resident.seen.move_to_end(value)
    while len(resident.seen) > SEEN_MAX:
        resident.seen.popitem(last=False)


def void_updates(memory: Memory, resident: Resident, journalled: Iterable[Segment]) -> list[str]:
    """Ids of journalled updates that are not in `memory`, which the resident has just come in with, and never will be.

    They were written here before another owner took over without them, and stored. Were they still known, a retry would
    be told that it is written. None are named once the oldest hashes have gone: these might be among them.
    """
    if len(resident.seen) >= SEEN_MAX:
        return []
    return [
        segment.update_id
        for segment in journalled
        if segment.last_chunk_id <= memory.last_chunk_id
        and 0 < segment.epoch < memory.epoch
        and update_hash(segment.update_id) not in resident.seen
    ]
