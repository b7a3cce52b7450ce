"""A segment: tokens that are journalled, and later folded into a memory, together."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from storage.names import UserKey

Role = Literal["user", "assistant", "document", "replay"]
ROLES: tuple[Role, ...] = ("user", "assistant", "document", "replay")
SEGMENT_TOKENS_MAX = 4096
CONTEXT_TOKENS_MAX = 1024
UPDATE_ID_CHARS_MAX = 256
CONVERSATION_CHARS_MAX = 1024

assert CONTEXT_TOKENS_MAX < SEGMENT_TOKENS_MAX, "a segment writes more than it repeats"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Segment:
    """One side of a turn or a piece of a document, with all that folding it needs beside θ_M."""

    key: UserKey
    update_id: str
    """Exactly-once name of the write."""
    conversation: str
    role: Role
    context: np.ndarray
    """int32 [at most CONTEXT_TOKENS_MAX]: what stood before, for attention only."""
    tokens: np.ndarray
    """int32 [at most SEGMENT_TOKENS_MAX]: what is offered to the memory; of role `replay` one number, its passes."""
    first_chunk_id: int
    last_chunk_id: int
    epoch: int = 0
    """The writer's fencing epoch; 0 when it was written before segments had one."""

    def __post_init__(self) -> None:
        for name, array, longest in (
            ("context", self.context, CONTEXT_TOKENS_MAX),
            ("tokens", self.tokens, SEGMENT_TOKENS_MAX),
        ):
            if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
                raise ValueError(f"{name}: {type(array).__name__}: expected a one-dimensional int32 array")
            if len(array) > longest:
                raise ValueError(f"{name}: {len(array)} ids: expected at most {longest}")
        if self.role not in ROLES:
            raise ValueError(f"role: {self.role!r}: expected one of {', '.join(ROLES)}")
        if not 0 < len(self.update_id) <= UPDATE_ID_CHARS_MAX:
            found = len(self.update_id)
            raise ValueError(f"update_id: {found} characters: expected 1 to {UPDATE_ID_CHARS_MAX}")
        if len(self.conversation) > CONVERSATION_CHARS_MAX:
            found = len(self.conversation)
            raise ValueError(f"conversation: {found} characters: expected at most {CONVERSATION_CHARS_MAX}")
        if not 1 <= self.first_chunk_id <= self.last_chunk_id < 2**53:
            found = f"{self.first_chunk_id} to {self.last_chunk_id}"
            raise ValueError(f"chunk ids: {found}: expected first <= last, from 1 on")
        if not 0 <= self.epoch < 10**8:
            raise ValueError(f"epoch: {self.epoch}: expected 0 to 99999999")

    @property
    def bytes(self) -> int:
        """Bytes of its payload in the journal."""
        names = len(self.update_id) + len(self.conversation)
        return 4 * (len(self.context) + len(self.tokens)) + 4 * names


def segment_to_row(segment: Segment) -> tuple[object, ...]:
    """The values of a row, its CRC32 last."""
    values = (
        str(segment.key),
        segment.first_chunk_id,
        segment.last_chunk_id,
        segment.update_id,
        segment.conversation,
        segment.role,
        np.ascontiguousarray(segment.context, "<i4").tobytes(),
        np.ascontiguousarray(segment.tokens, "<i4").tobytes(),
        segment.epoch,
    )
    return (*values, _crc(values))


_KINDS = [str, int, int, str, str, str, bytes, bytes, int, int]


def row_to_segment(row: tuple[object, ...]) -> Segment:
    """The segment of a row. Raises `ValueError` when the row has changed since it was written."""
    owner, first, last, update_id, conversation, role, context, tokens, epoch, crc = row
    # The CRC32 is over bytes, which one flipped bit of SQLite's can make a blob or a text of.
    if crc != _crc(row[:-1]) or [type(value) for value in row] != _KINDS:
        raise ValueError(f"segment {last} of {owner}: its CRC32 does not fit")
    return Segment(
        key=UserKey.parse(cast(str, owner)),
        update_id=cast(str, update_id),
        conversation=cast(str, conversation),
        role=cast(Role, role),
        context=np.frombuffer(cast(bytes, context), "<i4").astype(np.int32),
        tokens=np.frombuffer(cast(bytes, tokens), "<i4").astype(np.int32),
        first_chunk_id=cast(int, first),
        last_chunk_id=cast(int, last),
        epoch=cast(int, epoch),
    )


def _crc(values: tuple[object, ...]) -> int:
    """CRC32 over lengths and bytes of all values, so that nothing can move from one to the next.

    An epoch of 0 is left out: a row from before there were epochs keeps the checksum that it was written with.
    """
    crc = 0
    for value in values if values[-1] else values[:-1]:
        raw = value if isinstance(value, bytes) else str(value).encode()
        crc = zlib.crc32(raw, zlib.crc32(len(raw).to_bytes(8, "little"), crc))
    return crc
