"""Damaged journals and failing disks: what was acknowledged is there, or the journal says that it is not whole."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage import journal_wal
from storage.errors import JournalCorrupt, JournalError, JournalFailed
from storage.journal import Journal
from tests.storage.samples import ALICE, make_segment

GROUPS = 5
FRAME_BYTES = 24 + 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shard-0.journal"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A journal of five groups, as a process that was killed leaves it: all of it is in the WAL."""
    living, left = tmp_path / "living.journal", tmp_path / "left.journal"
    journal = Journal(living)
    for chunk in range(1, GROUPS + 1):
        journal.append(make_segment(chunk), [chunk]).result()
    for suffix in ("", "-wal"):
        shutil.copy(f"{living}{suffix}", f"{left}{suffix}")
    journal.close()
    return left


def chunks(path: Path) -> list[int]:
    journal = Journal(path)
    try:
        return [segment.last_chunk_id for segment in journal.pending(ALICE)]
    finally:
        journal.close()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def group_ends(wal: Path) -> list[int]:
    """Numbers of the frames that end a group."""
    data = wal.read_bytes()
    frames = (len(data) - 32) // FRAME_BYTES
    return [n for n in range(frames) if any(data[32 + n * FRAME_BYTES + 4 : 32 + n * FRAME_BYTES + 8])]


def test_what_a_killed_process_left_is_read(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_wal, "FRAMES_READ", 2)
    with open(f"{killed}-wal", "ab") as wal:
        wal.write(b"\0" * 1000)  # a frame that was cut off
    assert chunks(killed) == [1, 2, 3, 4, 5]


def test_a_wal_damaged_before_its_last_group_is_refused(killed: Path) -> None:
    """SQLite would drop what is behind the damage, and say nothing."""
    wal, good = Path(f"{killed}-wal"), Path(f"{killed}-wal").read_bytes()
    ends = group_ends(wal)
    assert len(ends) == GROUPS
    for end in ends[:-1]:
        for offset in (0, 4, 9, 17, 24, FRAME_BYTES - 1):  # page number, end mark, salt, checksum, page
            wal.write_bytes(good)
            flip(wal, 32 + end * FRAME_BYTES + offset)
            with pytest.raises(JournalCorrupt, match=r"left\.journal-wal is damaged: frame \d+ of"):
                Journal(killed)
    wal.write_bytes(good)
    assert chunks(killed) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", [0, 3, 9, 18, 25])
def test_a_wal_with_a_damaged_header_is_refused(killed: Path, at: int) -> None:
    flip(Path(f"{killed}-wal"), at)
    with pytest.raises(JournalCorrupt, match="is damaged: the header"):
        Journal(killed)


def test_a_last_group_that_is_not_whole_is_left_out_and_logged(
    killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A power failure leaves one: it was acknowledged to nobody."""
    wal = Path(f"{killed}-wal")
    flip(wal, 32 + group_ends(wal)[-1] * FRAME_BYTES + 100)
    assert chunks(killed) == [1, 2, 3, 4]
    assert "the last group in left.journal-wal is not whole" in caplog.text


def test_frames_of_an_older_round_are_no_damage(path: Path, tmp_path: Path) -> None:
    """A WAL is written from its beginning again and again: what is behind the newest round is old."""
    journal = Journal(path)
    for chunk in range(1, 9):
        journal.append(make_segment(chunk)).result()
    journal._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    journal.append(make_segment(9)).result()
    copy = tmp_path / "copy.journal"
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    journal.close()
    assert len(group_ends(Path(f"{copy}-wal"))) > 1
    assert chunks(copy) == list(range(1, 10))


def test_a_journal_that_is_empty_or_gone_is_no_new_one(killed: Path, path: Path) -> None:
    killed.unlink()
    with pytest.raises(JournalCorrupt, match="the journal is gone, and left"):
        Journal(killed)
    path.write_bytes(b"")
    with pytest.raises(JournalCorrupt, match="the journal is empty, and never was"):
        Journal(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(JournalCorrupt, match="lost its tables"):
        Journal(path)


@pytest.mark.parametrize("word", [b"update-2", b"tokens"])
def test_every_value_of_an_update_is_checked_at_a_start(path: Path, word: bytes) -> None:
    journal = Journal(path)
    journal.append(make_segment(1, update_id="update-2"), [1]).result()
    journal.set_outcome(ALICE, "update-2", {"tokens": 2}).result()
    journal.close()
    good, at, places = path.read_bytes(), -1, 0
    while (at := good.find(word, at + 1)) >= 0:
        flip(path, at + len(word) - 1)
        with pytest.raises(JournalError):
            chunks(path)
        path.write_bytes(good)
        places += 1
    assert places >= 2, "each value stands in two places"
    assert chunks(path) == [1]


def test_text_that_is_no_text_is_damage(path: Path) -> None:
    """A flipped bit in the schema, for one: SQLite's own report of it can not be decoded."""
    journal = Journal(path)
    journal.append(make_segment(1)).result()
    journal.close()
    data = bytearray(path.read_bytes())
    at = data.index(b"updates_twice")
    data[at + 3] |= 0x80
    path.write_bytes(data)
    with pytest.raises(JournalError):
        chunks(path)


@pytest.mark.parametrize(("column", "kind"), [("update_id", "BLOB"), ("role", "BLOB"), ("tokens", "TEXT")])
def test_a_value_that_became_one_of_another_kind_is_damage(path: Path, column: str, kind: str) -> None:
    """In SQLite's record one bit tells text from bytes, and the CRC32 is over bytes."""
    journal = Journal(path)
    journal.append(make_segment(1)).result()
    journal.close()
    db = sqlite3.connect(path)
    db.execute(f"UPDATE segments SET {column} = CAST({column} AS {kind})")
    db.commit()
    db.close()
    with pytest.raises(JournalCorrupt, match="segment 1 of"):
        chunks(path)


def test_journals_of_before_the_second_place_are_taken(path: Path) -> None:
    journal = Journal(path)
    journal.append(make_segment(1)).result()
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("DROP INDEX updates_twice")
    db.close()
    assert chunks(path) == [1]


def test_a_journal_is_whole_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(old: Path, new: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("storage.journal_db.os.replace", fail)
    with pytest.raises(JournalError, match="No space left"):
        Journal(path)
    assert not path.exists()
    monkeypatch.undo()
    assert chunks(path) == []
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    assert path.stat().st_mode & 0o777 == 0o600


@contextmanager
def no_file_over(limit: int) -> Iterator[None]:
    """The disk takes no more: every write behind `limit` bytes of any file fails, as SQLite finds by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("more", [0, 1, 5000, 9000])
def test_what_a_failing_disk_did_not_take_is_not_acknowledged(path: Path, more: int) -> None:
    journal = Journal(path)
    journal.append(make_segment(1)).result()
    taken = [1]
    with no_file_over(os.path.getsize(f"{path}-wal") + more):
        for chunk in range(2, 8):
            error = journal.append(make_segment(chunk)).exception()
            if error is None:
                taken.append(chunk)
            else:
                assert isinstance(error, JournalError), error
                break
        else:
            pytest.fail("the disk was never full")
    assert [segment.last_chunk_id for segment in journal.pending(ALICE)] == taken, "only what is committed"
    journal.close()
    again = Journal(path)
    assert [segment.last_chunk_id for segment in again.pending(ALICE)] == taken
    again.append(make_segment(taken[-1] + 1)).result()
    again.close()
    assert chunks(path) == [*taken, taken[-1] + 1]


def test_a_journal_that_failed_takes_nothing_more(path: Path) -> None:
    journal = Journal(path)
    with no_file_over(0):
        first = journal.append(make_segment(1)).exception()
    assert isinstance(first, JournalFailed)
    with pytest.raises(JournalFailed, match="the disk has failed"):
        journal.append(make_segment(1)).result()
    journal.close()
    assert chunks(path) == []
