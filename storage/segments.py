"""Journal segments in the shared store: what a user goes on from when the journal's disk is gone.

journal/<tenant>/<user>/c0000000000000005-0000000000000008-e00000003.segments    chunks 5 to 8, written by epoch 3
journal/<tenant>/<user>/c0000000000000009-0000000000000009-e00000004.seal        from chunk 9 on, epoch 4 writes

An object is never changed. It holds all segments of one user that waited together, so that one user comes back by
one listing and a few reads, is forgotten by deleting one folder, and shares no object with anybody else.

A `.segments` object, version 1: the magic `TITANSEG`, CRC32 of the rest (uint32), length of the header (uint32), the
header (JSON, UTF-8), then of each segment context and tokens as int32. All numbers are little-endian. The header has
`version` (1), `owner` (`tenant/user`), `created_at` (UTC), `seen` (uint64 hashes that were written with the segments)
and `segments`, a list of `update_id`, `conversation`, `role`, `first_chunk`, `last_chunk`, `epoch`, `context` and
`tokens` (the lengths of the two).
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from storage.chain import Seal
from storage.errors import InvalidName, JournalCorrupt, shorten
from storage.header import write_time
from storage.memory import SEEN_MAX
from storage.names import UserKey
from storage.objects import Objects
from storage.segment import CONTEXT_TOKENS_MAX, SEGMENT_TOKENS_MAX, Segment
from storage.tombstones import Tombstones, is_from_before

SEGMENTS_MAX = 64
"""Segments in one object."""
OBJECT_BYTES_MAX = 8 << 20
_ROOT = "journal/"
_MAGIC = b"TITANSEG"
_NAME = re.compile(r"c(\d{16})-(\d{16})-e(\d{8})\.(segments|seal)")

assert SEGMENTS_MAX * 4 * (SEGMENT_TOKENS_MAX + CONTEXT_TOKENS_MAX) < OBJECT_BYTES_MAX - (1 << 20), (
    "a full object fits, header included"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One object of a user, as its name tells it."""

    first_chunk_id: int
    last_chunk_id: int
    epoch: int
    """Of the shard that wrote the object; a segment in it may be older."""
    kind: str = "segments"

    @property
    def file(self) -> str:
        return f"c{self.first_chunk_id:016d}-{self.last_chunk_id:016d}-e{self.epoch:08d}.{self.kind}"

    @property
    def seal(self) -> Seal | None:
        """What the object says by being there, when it is a seal."""
        return Seal(first_chunk_id=self.first_chunk_id, epoch=self.epoch) if self.kind == "seal" else None

    @classmethod
    def parse(cls, file: str) -> Piece | None:
        """The piece that `file` names, None when it names none."""
        found = _NAME.fullmatch(file)
        if found is None:
            return None
        first, last, epoch, kind = found.groups()
        return cls(first_chunk_id=int(first), last_chunk_id=int(last), epoch=int(epoch), kind=kind)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Packet:
    """What one `.segments` object holds."""

    key: UserKey
    created_at: datetime
    segments: tuple[Segment, ...]
    seen: tuple[int, ...] = ()
    """uint64: hashes that were written with the segments, newest last."""


def segments_folder(key: UserKey) -> str:
    """Prefix of all of a user's objects here."""
    return f"{_ROOT}{key.tenant}/{key.user}/"


class SegmentStore:
    """Segments of users in `objects`. Blocking, from any thread; every method may raise `StoreUnavailable`."""

    def __init__(
        self, objects: Objects, tombstones: Tombstones, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:  # fmt: skip
        self._objects, self._tombstones, self._clock = objects, tombstones, clock

    def put(self, key: UserKey, segments: Sequence[Segment], seen: Sequence[int], *, epoch: int) -> Piece:
        """Writes 1 to SEGMENTS_MAX segments of a user as one object, durably; again is fine."""
        piece = Piece(
            first_chunk_id=segments[0].first_chunk_id, last_chunk_id=segments[-1].last_chunk_id, epoch=epoch
        )
        packet = Packet(
            key=key, created_at=self._clock(), segments=tuple(segments), seen=tuple(seen[-SEEN_MAX:])
        )
        self._objects.put(segments_folder(key) + piece.file, encode_packet(packet))
        return piece

    def seal(self, key: UserKey, seal: Seal) -> Piece:
        """From now on nothing of an older epoch counts from the seal's chunk on, whenever it arrives."""
        first = seal.first_chunk_id
        piece = Piece(first_chunk_id=first, last_chunk_id=first, epoch=seal.epoch, kind="seal")
        self._objects.put(segments_folder(key) + piece.file, b"seal\n")
        return piece

    def pieces(self, key: UserKey) -> list[Piece]:
        """All objects of a user, in order of their chunks."""
        folder = segments_folder(key)
        found = (Piece.parse(info.name.removeprefix(folder)) for info in self._objects.list(folder))
        return [piece for piece in found if piece is not None]

    def read(self, key: UserKey, piece: Piece) -> Packet | None:
        """What an object holds; None when it is gone, or belongs to what the user was before an erasure.

        Raises `JournalCorrupt` naming the object when it is damaged.
        """
        name = segments_folder(key) + piece.file
        found = self._objects.get(name)
        if found is None:
            return None
        packet = decode_packet(found[0], f"{self._objects.url}: {name}")
        if packet.key != key:
            raise _corrupt(f"{self._objects.url}: {name}", f"it belongs to {packet.key}")
        stone = self._tombstones.read(key)
        if stone is not None and is_from_before(stone[0], piece.epoch, packet.created_at):
            self._objects.delete(name)  # it came too late to be erased with the rest
            return None
        return packet

    def delete(self, key: UserKey, piece: Piece) -> None:
        """Removes an object; fine if there is none."""
        self._objects.delete(segments_folder(key) + piece.file)

    def users(self) -> Iterator[UserKey]:
        """All users with segments, in order of their names."""
        last = None
        for info in self._objects.list(_ROOT):
            owner = info.name.removeprefix(_ROOT).rpartition("/")[0]
            if owner != last and info.name.endswith(".segments"):
                last = owner
                with contextlib.suppress(InvalidName):
                    yield UserKey.parse(owner)


def encode_packet(packet: Packet) -> bytes:
    """The bytes of a `.segments` object."""
    lines = [
        {
            "update_id": s.update_id, "conversation": s.conversation, "role": s.role, "first_chunk": s.first_chunk_id,
            "last_chunk": s.last_chunk_id, "epoch": s.epoch, "context": len(s.context), "tokens": len(s.tokens),
        }
        for s in packet.segments
    ]  # fmt: skip
    header = json.dumps(
        {
            "version": 1, "owner": str(packet.key), "created_at": write_time(packet.created_at),
            "seen": list(packet.seen), "segments": lines,
        },
        separators=(",", ":"),
    ).encode()  # fmt: skip
    arrays = (
        np.ascontiguousarray(a, "<i4").tobytes() for s in packet.segments for a in (s.context, s.tokens)
    )
    body = b"".join([len(header).to_bytes(4, "little"), header, *arrays])
    return _MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def decode_packet(data: bytes, name: str) -> Packet:
    """The packet of an object's bytes. Raises `JournalCorrupt` that names the object and what is wrong."""
    if len(data) > OBJECT_BYTES_MAX:
        raise _corrupt(name, f"{len(data)} bytes are more than {OBJECT_BYTES_MAX}")
    if data[:8] != _MAGIC:
        raise _corrupt(name, "it does not begin with TITANSEG")
    if zlib.crc32(data[12:]).to_bytes(4, "little") != data[8:12]:
        raise _corrupt(name, "its CRC32 does not fit")
    try:
        start = 16 + int.from_bytes(data[12:16], "little")
        header = json.loads(data[16:start])
        if header["version"] != 1:
            raise ValueError(f"version {header['version']}: expected 1")
        ids = np.frombuffer(data[start:], "<i4").astype(np.int32)
        packet = Packet(
            key=UserKey.parse(header["owner"]),
            created_at=datetime.fromisoformat(header["created_at"]),
            segments=tuple(_segments(header, ids)),
            seen=tuple(int(value) for value in header["seen"]),
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise _corrupt(name, shorten(f"{type(error).__name__}: {error}")) from error
    return packet


def _segments(header: dict[str, Any], ids: np.ndarray) -> Iterator[Segment]:
    key, end = UserKey.parse(header["owner"]), 0
    for line in header["segments"]:
        start, middle, end = end, end + line["context"], end + line["context"] + line["tokens"]
        yield Segment(
            key=key, update_id=line["update_id"], conversation=line["conversation"], role=line["role"],
            context=ids[start:middle], tokens=ids[middle:end], first_chunk_id=line["first_chunk"],
            last_chunk_id=line["last_chunk"], epoch=line["epoch"],
        )  # fmt: skip
    if end != len(ids):
        raise ValueError(f"{len(ids)} token ids: expected {end}")


def _corrupt(name: str, why: str) -> JournalCorrupt:
    return JournalCorrupt(
        f"{name}: these journal segments are damaged: {why}. Restore the object from the bucket's versions, or delete "
        "it: the user then goes on without what it held.",
        path=name,
    )
