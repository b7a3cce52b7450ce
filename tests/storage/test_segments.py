"""Segments as objects: version 1 pinned by its bytes, damage refused by name, alike on each kind of store."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from storage.chain import Seal
from storage.errors import JournalCorrupt
from storage.names import UserKey
from storage.segment import Segment, segment_to_row
from storage.segments import Packet, Piece, decode_packet, encode_packet, segments_folder
from storage.store import MemoryStore
from tests.storage.samples import ALICE, NOON, make_segment

BOB = UserKey("local", "bob")
HEADER = (
    b'{"version":1,"owner":"local/alice","created_at":"2026-11-22T12:00:00.123456Z","seen":[1,18446744073709551615],'
    b'"segments":[{"update_id":"u","conversation":"c","role":"user","first_chunk":5,"last_chunk":6,"epoch":3,'
    b'"context":1,"tokens":2}]}'
)


def one() -> Packet:
    segment = Segment(
        key=ALICE, update_id="u", conversation="c", role="user", context=np.array([7], np.int32),
        tokens=np.array([8, 9], np.int32), first_chunk_id=5, last_chunk_id=6, epoch=3,
    )  # fmt: skip
    return Packet(key=ALICE, created_at=NOON, segments=(segment,), seen=(1, 2**64 - 1))


def framed(header: bytes, ids: bytes = bytes([7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0])) -> bytes:
    body = len(header).to_bytes(4, "little") + header + ids
    return b"TITANSEG" + zlib.crc32(body).to_bytes(4, "little") + body


def test_version_1_is_these_bytes() -> None:
    assert encode_packet(one()) == framed(HEADER)
    back = decode_packet(framed(HEADER), "name")
    assert segment_to_row(back.segments[0]) == segment_to_row(one().segments[0])
    assert (back.key, back.created_at, back.seen) == (ALICE, NOON, (1, 2**64 - 1))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not begin with TITANSEG"),
        (framed(HEADER)[:-1], "CRC32"),
        (framed(HEADER)[:30] + b"?" + framed(HEADER)[31:], "CRC32"),
        (framed(HEADER.replace(b'"version":1', b'"version":2')), "version 2: expected 1"),
        (framed(HEADER, b""), "token ids"),
        (framed(HEADER, b"123"), "ValueError"),
        (framed(b"[]"), "TypeError"),
        (framed(b"{}"), "KeyError"),
        (framed(HEADER.replace(b'"first_chunk":5', b'"first_chunk":7')), "chunk ids"),
    ],
)
def test_damage_is_refused_by_name(data: bytes, why: str) -> None:
    with pytest.raises(JournalCorrupt, match=f"the-object: .*{why}"):
        decode_packet(data, "the-object")


def test_names_tell_chunks_and_epoch() -> None:
    piece = Piece(first_chunk_id=5, last_chunk_id=8, epoch=3)
    assert piece.file == "c0000000000000005-0000000000000008-e00000003.segments"
    assert Piece.parse(piece.file) == piece
    assert piece.seal is None
    assert Piece.parse("HEAD") is None


def test_written_listed_read_and_removed(store: MemoryStore) -> None:
    segments = [replace(make_segment(chunk), epoch=3) for chunk in (1, 2)]
    piece = store.segments.put(ALICE, segments, [4, 5], epoch=3)
    seal = store.segments.seal(ALICE, Seal(first_chunk_id=3, epoch=4))
    store.segments.put(BOB, [make_segment(1, key=BOB)], [], epoch=3)
    assert store.segments.pieces(ALICE) == [piece, seal]
    assert seal.seal == Seal(first_chunk_id=3, epoch=4)
    assert list(store.segments.users()) == [ALICE, BOB]
    assert list(store.users()) == [], "a user without a version is none to restore or list"
    packet = store.segments.read(ALICE, piece)
    assert packet is not None
    assert [segment_to_row(s) for s in packet.segments] == [segment_to_row(s) for s in segments]
    assert packet.seen == (4, 5)
    store.segments.delete(ALICE, piece)
    assert store.segments.read(ALICE, piece) is None
    store.delete(ALICE, epoch=4)
    assert store.segments.pieces(ALICE) == []
    assert list(store.segments.users()) == [BOB], "a neighbour's segments are in other objects"


def test_an_erased_users_late_segments_are_not_read(folder_store: MemoryStore) -> None:
    store = folder_store
    piece = store.segments.put(ALICE, [make_segment(1)], [], epoch=3)
    name = segments_folder(ALICE) + piece.file
    found = store.objects.get(name)
    assert found is not None
    store.delete(ALICE, epoch=3)
    store.objects.put(name, found[0])
    assert store.segments.read(ALICE, piece) is None
    assert store.segments.pieces(ALICE) == []
    assert store.segments.read(ALICE, store.segments.put(ALICE, [make_segment(1)], [], epoch=3)) is not None


def test_another_users_object_is_refused(folder_store: MemoryStore) -> None:
    piece = folder_store.segments.put(BOB, [make_segment(1, key=BOB)], [], epoch=3)
    found = folder_store.objects.get(segments_folder(BOB) + piece.file)
    assert found is not None
    folder_store.objects.put(segments_folder(ALICE) + piece.file, found[0])
    with pytest.raises(JournalCorrupt, match="belongs to local/bob"):
        folder_store.segments.read(ALICE, piece)
