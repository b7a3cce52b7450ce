"""The journal: in order, exactly once, bounded, and empty of whoever was forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import JournalCorrupt, JournalError, JournalFull
from storage.journal import JOURNAL_BYTES_MIN, OUTCOMES_KEPT_S, Appended, Journal
from storage.memory import SEEN_MAX
from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX, Segment, row_to_segment, segment_to_row
from tests.storage.samples import ALICE, make_segment

BOB = UserKey("local", "bob")
NEW = Appended(duplicate=False)


def same(one: Segment, other: Segment) -> bool:
    return segment_to_row(one) == segment_to_row(other)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "shard-0.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    opened = Journal(path)
    yield opened
    opened.close()


def test_segments_come_back_in_order(journal: Journal) -> None:
    segments = [make_segment(chunk) for chunk in (1, 2, 3)]
    for segment in segments:
        assert journal.append(segment).result() == NEW
    journal.append(make_segment(1, key=BOB)).result()
    assert all(same(a, b) for a, b in zip(journal.pending(ALICE), segments, strict=True))
    assert [segment.last_chunk_id for segment in journal.pending(ALICE, 2)] == [3]
    assert journal.users_pending() == [ALICE, BOB]
    assert journal.pending(UserKey("local", "carol")) == []


def test_an_update_is_appended_once(journal: Journal) -> None:
    assert journal.append(make_segment(1), seen=[7]).result() == NEW
    assert journal.append(make_segment(2, update_id="update-1"), seen=[8]).result() == Appended(
        duplicate=True
    )
    journal.set_outcome(ALICE, "update-1", {"tokens": 20}).result()
    known = Appended(duplicate=True, outcome={"tokens": 20})
    assert journal.append(make_segment(2, update_id="update-1")).result() == known
    assert journal.outcome(ALICE, "update-1") == {"tokens": 20}
    assert journal.outcome(ALICE, "update-9") is None
    assert len(journal.pending(ALICE)) == 1
    assert journal.seen(ALICE) == [7]
    assert journal.append(make_segment(1, key=BOB)).result() == NEW, "ids are each user's own"


def test_segments_of_one_call_are_written_all_or_none(journal: Journal) -> None:
    one, two, three = (make_segment(chunk) for chunk in (1, 2, 3))
    assert journal.append_all([one, two], seen=[7, 8]).result() == []
    assert all(same(a, b) for a, b in zip(journal.pending(ALICE), [one, two], strict=True))
    assert journal.append_all([two, three], seen=[9]).result() == ["update-2"]
    with pytest.raises(JournalError, match="chunk 3 does not follow chunk 3"):
        journal.append_all([three, make_segment(3, update_id="update-4")], seen=[9]).result()
    assert [segment.update_id for segment in journal.pending(ALICE)] == ["update-1", "update-2"]
    assert journal.seen(ALICE) == [7, 8]
    assert not journal.append(three).result().duplicate, "nothing of it was known"


def test_the_same_update_twice_in_one_group(journal: Journal) -> None:
    futures = [journal.append(make_segment(1)) for _ in range(20)]
    assert sorted(future.result().duplicate for future in futures) == [False] + [True] * 19
    assert len(journal.pending(ALICE)) == 1


def test_outcomes_and_hashes_survive_trimming_and_a_restart(path: Path) -> None:
    journal = Journal(path)
    for chunk in (1, 2, 3):
        journal.append(make_segment(chunk), seen=[chunk, 2**64 - chunk]).result()
    journal.set_outcome(ALICE, "update-1", {"a": 1}).result()
    assert journal.trim(ALICE, 2).result() == 2
    assert journal.trim(ALICE, 2).result() == 0
    journal.close()
    journal.close()
    journal = Journal(path)
    assert [segment.last_chunk_id for segment in journal.pending(ALICE)] == [3]
    assert journal.append(make_segment(9, update_id="update-1")).result().outcome == {"a": 1}
    assert journal.seen(ALICE) == [1, 2**64 - 1, 2, 2**64 - 2, 3, 2**64 - 3]
    journal.close()


def test_hashes_are_bounded_and_newest_last(journal: Journal) -> None:
    journal.append(make_segment(1), seen=range(SEEN_MAX)).result()
    journal.append(make_segment(2), seen=[0, 5000]).result()
    seen = journal.seen(ALICE)
    assert len(seen) == SEEN_MAX
    assert seen[-2:] == [0, 5000], "a hash that is seen again becomes the newest"
    assert seen[0] == 2


@pytest.mark.parametrize("value", [-1, 2**64])
def test_hashes_are_uint64(journal: Journal, value: int) -> None:
    with pytest.raises(ValueError, match="seen"):
        journal.append(make_segment(1), seen=[value])


def test_chunks_must_follow_each_other(journal: Journal) -> None:
    journal.append(make_segment(5)).result()
    with pytest.raises(JournalError, match="chunk 5 does not follow chunk 5"):
        journal.append(make_segment(5, update_id="other")).result()
    assert journal.append(make_segment(6, update_id="other")).result() == NEW, "the refused one left no trace"


def test_a_failed_append_takes_nobody_with_it(journal: Journal) -> None:
    journal.append(make_segment(5)).result()
    futures = [journal.append(make_segment(chunk, update_id=f"x{chunk}")) for chunk in (6, 5, 7)]
    assert futures[0].result() == NEW
    assert isinstance(futures[1].exception(), JournalError)
    assert futures[2].result() == NEW


def test_an_outcome_needs_its_update(journal: Journal) -> None:
    with pytest.raises(JournalError, match="no update 'nothing' is known"):
        journal.set_outcome(ALICE, "nothing", {}).result()
    with pytest.raises(ValueError, match=r"outcome: .* bytes"):
        journal.set_outcome(ALICE, "nothing", {"a": "x" * 70_000})


def test_a_full_journal_says_so_and_empties(path: Path) -> None:
    journal = Journal(path, bytes_max=JOURNAL_BYTES_MIN)
    chunk = 0
    problem = None
    while problem is None:
        chunk += 1
        problem = journal.append(make_segment(chunk, tokens=4096)).exception()
    assert isinstance(problem, JournalFull)
    assert "Check the store" in str(problem)
    assert problem.bytes_max == JOURNAL_BYTES_MIN
    assert 50 < chunk < 70
    assert journal.bytes() <= JOURNAL_BYTES_MIN
    assert len(journal.pending(ALICE)) == chunk - 1
    journal.trim(ALICE, chunk // 2).result()
    assert journal.append(make_segment(chunk, tokens=4096)).result() == NEW
    journal.close()


def test_waiting_bytes_count_too(path: Path) -> None:
    """A queue that grows faster than the disk takes it must not grow without bound either."""
    journal = Journal(path, bytes_max=JOURNAL_BYTES_MIN)
    futures = [journal.append(make_segment(chunk, tokens=4096)) for chunk in range(1, 300)]
    full = [future for future in futures if isinstance(future.exception(), JournalFull)]
    assert len(full) > 200
    journal.close()


def test_limits_are_checked_before(path: Path) -> None:
    with pytest.raises(ValueError, match="bytes_max: 1000: expected at least"):
        Journal(path, bytes_max=1000)
    assert not path.exists()


def test_old_outcomes_age_away(path: Path) -> None:
    now = [1_000_000.0]
    journal = Journal(path, clock=lambda: now[0])
    journal.append(make_segment(1), seen=[1]).result()
    journal.append(make_segment(1, key=BOB), seen=[1]).result()
    journal.trim(ALICE, 1).result()
    now[0] += OUTCOMES_KEPT_S + 1
    journal.append(make_segment(2)).result()
    journal.trim(ALICE, 1).result()
    assert journal.append(make_segment(3, update_id="update-1")).result() == NEW
    assert journal.append(make_segment(2, key=BOB, update_id="update-1")).result().duplicate, "still pending"
    assert journal.seen(BOB) == [1]
    journal.close()


def files_of(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_forgetting_leaves_no_byte(path: Path) -> None:
    journal = Journal(path)
    keys = [UserKey("local", f"user-{number:02}") for number in range(12)]
    for chunk in range(1, 30):
        for number, key in enumerate(keys):
            size = 7 + 900 * (number % 3)
            journal.append(
                make_segment(100 * number + chunk, key=key, tokens=size), seen=[chunk * 77 + number]
            )
    for key in keys[:6]:
        journal.trim(key, 10**6).result()
    gone = keys[0], keys[5], keys[7], keys[11]
    kept = {key: journal.pending(key) for key in keys if key not in gone}
    lost = {
        key: [make_segment(100 * keys.index(key) + n, key=key, tokens=8) for n in range(1, 30)]
        for key in gone
    }
    for key in gone:
        assert str(key).encode() in files_of(path)
        journal.forget(key)
    left = files_of(path)
    for key, segments in lost.items():
        assert str(key).encode() not in left
        for segment in segments:
            assert segment.tokens[:6].tobytes() not in left
        assert journal.pending(key) == journal.seen(key) == []
        assert journal.outcome(key, "update-1") is None
    for key, segments in kept.items():
        assert all(same(a, b) for a, b in zip(journal.pending(key), segments, strict=True))
    assert journal.append(make_segment(1, key=keys[0])).result() == NEW
    journal.close()


def test_forgetting_while_others_write(journal: Journal) -> None:
    stop = threading.Event()

    def write(number: int) -> int:
        key, chunk = UserKey("local", f"writer-{number}"), 0
        while not stop.is_set():
            chunk += 1
            assert journal.append(make_segment(chunk, key=key)).result() == NEW
            assert len(journal.pending(key)) == chunk
        return chunk

    with ThreadPoolExecutor(3) as pool:
        written = [pool.submit(write, number) for number in range(3)]
        for _ in range(3):
            journal.append(make_segment(1)).result()
            assert journal.forget(ALICE)["segments"] == 1
        stop.set()
    assert [len(journal.pending(UserKey("local", f"writer-{n}"))) for n in range(3)] == [
        w.result() for w in written
    ]


def test_a_cancelled_append_is_not_made_and_breaks_nothing(journal: Journal) -> None:
    async def run() -> None:
        tasks = [
            asyncio.ensure_future(asyncio.wrap_future(journal.append(make_segment(chunk, key=BOB))))
            for chunk in range(1, 50)
        ]
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert journal.append(make_segment(1)).result() == NEW
    done = [segment.last_chunk_id for segment in journal.pending(BOB)]
    assert set(range(2, 50, 2)) <= set(done)
    assert done == sorted(set(done))


def test_a_closed_journal_refuses(path: Path) -> None:
    journal = Journal(path)
    waiting = [journal.append(make_segment(chunk)) for chunk in range(1, 30)]
    journal.close()
    assert all(future.result() == NEW for future in waiting), "what was submitted is written first"
    with pytest.raises(JournalError, match="is closed"):
        journal.append(make_segment(99)).result()
    for call in (journal.pending, journal.seen):
        with pytest.raises(JournalError):
            call(ALICE)


def test_one_process_at_a_time(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(JournalError, match=f"process {os.getpid()} has this journal open"):
        Journal(path)
    journal.close()
    Journal(path).close()


@given(st.binary(min_size=1, max_size=3), st.integers(0, 8))
@settings(max_examples=60)
def test_a_damaged_row_is_never_read(junk: bytes, column: int) -> None:
    row = list(segment_to_row(make_segment(3)))
    value = row[column]
    row[column] = value + junk if isinstance(value, bytes) else (
        value + 1 if isinstance(value, int) else f"{value}{junk[0]}"
    )  # fmt: skip
    with pytest.raises(ValueError, match="CRC32"):
        row_to_segment(tuple(row))


def test_damage_inside_a_row_is_found(path: Path) -> None:
    journal = Journal(path)
    journal.append(make_segment(1)).result()
    journal.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE segments SET tokens = zeroblob(80)")
    db.close()
    journal = Journal(path)
    with pytest.raises(JournalCorrupt, match=r"shard-0\.db: segment 1 of local/alice"):
        journal.pending(ALICE)
    journal.close()


@pytest.mark.parametrize("at", [0, 20, 100, 4096, 8200])
def test_a_damaged_file_is_named(path: Path, at: int) -> None:
    journal = Journal(path)
    for chunk in range(1, 40):
        journal.append(make_segment(chunk, tokens=500))
    journal.close()
    data = bytearray(path.read_bytes())
    data[at : at + 60] = os.urandom(60)
    path.write_bytes(data)

    def read() -> None:
        journal = Journal(path)
        try:
            assert all(same(s, make_segment(s.last_chunk_id, tokens=500)) for s in journal.pending(ALICE))
        finally:
            journal.close()

    with pytest.raises(JournalCorrupt, match=r"shard-0\.db") as caught:
        read()
    assert "Move it away" in str(caught.value) or "CRC32" in str(caught.value)


def test_files_that_are_no_journal(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"hello" * 1000)
    with pytest.raises(JournalCorrupt, match="Move it away"):
        Journal(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE cats (name)")
    db.close()
    with pytest.raises(JournalError, match="not a journal of titanmem"):
        Journal(path)
    path.unlink()
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(JournalError, match="expected 2, found 9"):
        Journal(path)


def test_a_folder_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalError, match="can not open the journal"):
        Journal(tmp_path / "file" / "shard.db")


def test_a_failed_disk_stops_the_journal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed flush nothing may be acknowledged that might not be on the disk."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR

    def fail(batch: object) -> None:
        raise error

    monkeypatch.setattr(journal._writer, "_commit", fail)
    with pytest.raises(JournalError, match="disk I/O error"):
        journal.append(make_segment(1)).result()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="the disk has failed"):
        journal.append(make_segment(2)).result()


def test_a_full_disk_is_a_full_journal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL

    def fail(batch: object) -> None:
        raise error

    monkeypatch.setattr(journal._writer, "_commit", fail)
    with pytest.raises(JournalFull, match="make room"):
        journal.append(make_segment(1)).result()
    monkeypatch.undo()
    assert journal.append(make_segment(1)).result() == NEW


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", np.zeros(SEGMENT_TOKENS_MAX + 1, np.int32)),
        ("tokens", np.zeros(3, np.int64)),
        ("tokens", [1, 2]),
        ("context", np.zeros(1025, np.int32)),
        ("role", "system"),
        ("update_id", ""),
        ("update_id", "x" * 257),
        ("conversation", "x" * 1025),
        ("first_chunk_id", 0),
        ("last_chunk_id", 0),
    ],
)
def test_a_segment_is_checked_when_it_is_made(field: str, value: object) -> None:
    good = make_segment(1)
    fields = {name: getattr(good, name) for name in Segment.__slots__}
    with pytest.raises(ValueError, match="chunk ids" if "chunk" in field else field):
        Segment(**{**fields, field: value})


WRITER = """
import sys
from storage.journal import Journal
from tests.storage.samples import make_segment
journal = Journal(sys.argv[1])
for first in range(1, 100_000, 5):
    futures = [journal.append(make_segment(n, tokens=300), seen=[n]) for n in range(first, first + 5)]
    for n, future in zip(range(first, first + 5), futures, strict=True):
        future.result()
        sys.stdout.write(f"{n}\\n")
        sys.stdout.flush()
    if first % 50 == 1:
        journal.trim(make_segment(1).key, first - 40)
"""


@pytest.mark.parametrize("kill_after", [3, 57, 160])
def test_what_was_acknowledged_survives_kill_9(path: Path, kill_after: int) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(kill_after)]
    process.kill()
    acknowledged += [int(line) for line in process.stdout.read().split("\n") if line.isdigit()]
    process.wait()
    process.stdout.close()
    journal = Journal(path)
    pending = journal.pending(ALICE)
    chunks = [segment.last_chunk_id for segment in pending]
    assert chunks == list(range(chunks[0], chunks[-1] + 1)), "no gap"
    assert chunks[-1] >= acknowledged[-1]
    assert chunks[0] <= max(1, acknowledged[-1] - 39)
    assert all(same(segment, make_segment(segment.last_chunk_id, tokens=300)) for segment in pending)
    assert journal.seen(ALICE)[-1] == chunks[-1]
    for number in acknowledged:
        assert journal.append(make_segment(number, tokens=300)).result().duplicate
    assert journal.append(make_segment(chunks[-1] + 1, tokens=300)).result() == NEW
    journal.close()


def test_the_store_holds_what_is_marked(journal: Journal) -> None:
    segments = [make_segment(chunk) for chunk in (1, 2, 3)]
    for segment in segments:
        journal.append(segment).result()
    journal.mark_replicated(segments[:2]).result()
    assert [s.last_chunk_id for s in journal.unreplicated(ALICE)] == [3]
    assert journal.users_unreplicated() == {ALICE: (1, 3)}
    assert [s.last_chunk_id for s in journal.unreplicated(ALICE, most=0)] == []
    journal.mark_replicated(segments[2:]).result()
    assert journal.users_unreplicated() == {}


def test_another_owners_segments_take_the_place_of_these(journal: Journal) -> None:
    for chunk in (1, 2, 3):
        journal.append(make_segment(chunk), seen=[chunk]).result()
    new = [make_segment(2), make_segment(3, update_id="new")]
    journal.replace(ALICE, new, held=new[1:], seen=[9], after_chunk_id=1).result()
    assert [s.update_id for s in journal.pending(ALICE)] == ["update-1", "update-2", "new"]
    assert [s.update_id for s in journal.unreplicated(ALICE)] == ["update-1", "update-2"]
    assert journal.seen(ALICE) == [9]
    assert journal.append(make_segment(4, update_id="new")).result().duplicate
    assert not journal.append(make_segment(4, update_id="update-3")).result().duplicate, (
        "it is not known any more"
    )


def test_a_journal_of_version_1_is_brought_up_to_date(path: Path) -> None:
    journal = Journal(path)
    journal.append(make_segment(1), seen=[7]).result()
    journal.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(
            "ALTER TABLE segments DROP COLUMN epoch; ALTER TABLE segments DROP COLUMN replicated; "
            "PRAGMA user_version = 1;"
        )
    journal = Journal(path)
    assert [(s.update_id, s.epoch) for s in journal.pending(ALICE)] == [("update-1", 0)]
    journal.append(replace(make_segment(2), epoch=5)).result()
    assert [s.epoch for s in journal.pending(ALICE)] == [0, 5]
    journal.close()
