"""Files that unpack to far more than they are: refused before the memory for it is taken."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from storage import archive, snapshot_restore
from storage.archive import Member
from storage.errors import BadMemoryFile, ChecksumMismatch, NotATitanmem, ShapeMismatch
from storage.objects import open_objects
from storage.snapshot import commit_manifest, restore, write_part
from storage.store import MemoryStore
from storage.titanmem import decode, encode
from tests.storage.samples import ALICE, BASE, NOON, make_memory
from tests.storage.test_format_damage import DATA, forge, parts_of

BOMB_BYTES = 10_000_000
PEAK_BYTES_MAX = 2_000_000


def refused(data: bytes) -> BadMemoryFile:
    """The error, once it is known that little memory was taken to find it."""
    tracemalloc.start()
    try:
        with pytest.raises(BadMemoryFile) as caught:
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES_MAX
        return caught.value
    finally:
        tracemalloc.stop()


def test_a_bomb_in_a_bomb() -> None:
    inner = archive.pack([Member("x", bytes(BOMB_BYTES))])
    outer = forge(change_members=lambda members: members.update(seen=archive.pack([Member("y", inner)])))
    assert isinstance(refused(outer), (NotATitanmem, ShapeMismatch))


@pytest.mark.parametrize("name", ["nonzero_idx", "theta_val", "tail", "seen"])
def test_each_member_is_bounded_by_its_shape(name: str) -> None:
    forged = forge(change_members=lambda members: members.update({name: bytes(BOMB_BYTES)}))
    assert len(forged) < BOMB_BYTES // 100
    assert isinstance(refused(forged), ShapeMismatch)


def test_a_header_that_is_a_bomb() -> None:
    header = Member("header", b" " * BOMB_BYTES)
    refused(archive.pack([header, *(Member(f"{n}.npy", m) for n, m in parts_of(DATA)[1].items())]))


def test_members_that_share_their_bytes() -> None:
    """One packed member, listed many times: what makes the densest bombs."""
    raw = bytearray(DATA)
    with zipfile.ZipFile(io.BytesIO(DATA)) as opened:
        first, second = opened.infolist()[1].header_offset, opened.infolist()[2].header_offset
    at = raw.rindex(second.to_bytes(4, "little"))
    raw[at : at + 4] = first.to_bytes(4, "little")
    assert isinstance(refused(bytes(raw)), ChecksumMismatch)


def test_a_part_that_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = open_objects(f"file://{tmp_path}/target")
    snapshot = "20261122T120000Z-0a1b2c"
    part = write_part(target, snapshot, shard="s", epoch=1, model_dir=None, memories=[encode(make_memory())])
    commit_manifest(target, snapshot, [part], created_at=NOON, base=BASE)
    store = MemoryStore(open_objects(f"file://{tmp_path}/store"))
    monkeypatch.setattr(snapshot_restore, "USER_GROUP_BYTES_MAX", 1000)
    before = pa.total_allocated_bytes()
    report = restore(target, snapshot, store, epoch=1)
    assert "expected at most 1000" in report["failed"][0]
    assert pa.total_allocated_bytes() - before < PEAK_BYTES_MAX
    monkeypatch.undo()
    assert restore(target, snapshot, store, epoch=1)["restored"] == 1
    assert store.get(ALICE).memory_version
