"""The journal of a shard: tokens acknowledged to a user that no persisted θ_M holds yet.

SQLite in WAL mode with `synchronous=FULL`, written in groups by `JournalWriter`. Reads use a connection of
their own and see what is committed. A known (user, update id) is never appended twice; its outcome and the
hashes of what was seen stay after the segments are trimmed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from storage import journal_db
from storage.errors import JournalCorrupt, JournalError
from storage.journal_writer import JournalWriter
from storage.memory import SEEN_MAX
from storage.names import UserKey
from storage.segment import (
    CONTEXT_TOKENS_MAX,
    SEGMENT_TOKENS_MAX,
    Segment,
    row_to_segment,
    segment_to_row,
)

__all__ = ["CONTEXT_TOKENS_MAX", "SEGMENT_TOKENS_MAX", "Appended", "Journal", "Segment", "Update"]

JOURNAL_BYTES_MAX = 1 << 30
JOURNAL_BYTES_MIN = 1 << 20
ROW_OVERHEAD_BYTES = 512
OUTCOME_BYTES_MAX = 64 << 10
OUTCOMES_KEPT_S = 7 * 86_400.0
AGEING_INTERVAL_S = 3_600.0

assert JOURNAL_BYTES_MIN > 4 * (SEGMENT_TOKENS_MAX + CONTEXT_TOKENS_MAX), "a segment fits into any journal"

_TABLES = ("segments", "updates", "seen")
_COLUMNS = "owner, first_chunk, last_chunk, update_id, conversation, role, context, tokens, epoch, crc"
_INSERT = f"INSERT INTO segments ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Appended:
    """What became of an append: `outcome` is the stored one of a duplicate, None if it has none yet."""

    duplicate: bool
    outcome: dict[str, Any] | None = None


class Update(NamedTuple):
    """One update id as a journal knows it."""

    update_id: str
    outcome: str | None
    """JSON of what it did; None if it has none, or none yet."""
    at: float
    """Seconds since the epoch."""


class Journal:
    """One database file, one process. `clock` gives seconds since the epoch.

    Raises `JournalCorrupt` for a damaged file, `JournalError` for one that another process has open or that
    is no journal. Futures fail with `JournalFull` past `bytes_max`, with `JournalFailed` once the disk failed.
    """

    def __init__(
        self, path: Path | str, *, bytes_max: int = JOURNAL_BYTES_MAX, clock: Callable[[], float] = time.time
    ) -> None:
        if bytes_max < JOURNAL_BYTES_MIN:
            raise ValueError(f"bytes_max: {bytes_max}: expected at least {JOURNAL_BYTES_MIN}")
        self.path = Path(path)
        self._clock = clock
        self._lock_handle = journal_db.lock_file(self.path)
        try:
            self._db = journal_db.open_writer(self.path)
            self._reader = journal_db.connect(self.path, read_only=True)
        except BaseException:
            os.close(self._lock_handle)
            raise
        self._read_lock = threading.Lock()
        self._writer = JournalWriter(self.path, self._db, self._read_lock, bytes_max)
        self._aged_at = float("-inf")
        self._inode = _inode(self.path)

    def append(self, segment: Segment, seen: Sequence[int] = ()) -> Future[Appended]:
        """Writes the segment and the hashes (uint64) seen with it; done when both are on the disk.

        A segment's chunk ids must follow those that are pending for its user, or the future fails.
        """
        hashes = [_signed(h) for h in seen]

        def change(db: sqlite3.Connection) -> Appended:
            known = _outcome(db, segment)
            if known is not None:
                return Appended(duplicate=True, outcome=json.loads(known[0]) if known[0] else None)
            self._insert(db, segment)
            _remember(db, str(segment.key), hashes)
            return Appended(duplicate=False)

        return self._writer.submit(change, _size([segment], hashes))

    def append_all(self, segments: Sequence[Segment], seen: Sequence[int] = ()) -> Future[list[str]]:
        """Writes segments of one user that follow each other, and the hashes seen with them: all, or none when some of
        their update ids are known. Those that are; chunk ids as in `append`."""
        hashes = [_signed(h) for h in seen]

        def change(db: sqlite3.Connection) -> list[str]:
            known = [segment.update_id for segment in segments if _outcome(db, segment) is not None]
            if not known:
                for segment in segments:
                    self._insert(db, segment)
                _remember(db, str(segments[0].key), hashes)
            return known

        return self._writer.submit(change, _size(segments, hashes))

    def _insert(self, db: sqlite3.Connection, segment: Segment) -> None:
        self._check_order(db, segment)
        update = (str(segment.key), segment.update_id, self._clock())
        db.execute("INSERT INTO updates VALUES (?, ?, NULL, ?)", update)
        db.execute(_INSERT, segment_to_row(segment))

    def set_outcome(self, key: UserKey, update_id: str, outcome: dict[str, Any]) -> Future[None]:
        """Stores what an update did; a repeated append gets it back. Fails for an unknown update id."""
        text = json.dumps(outcome, allow_nan=False)
        if len(text) > OUTCOME_BYTES_MAX:
            raise ValueError(f"outcome: {len(text)} bytes: expected at most {OUTCOME_BYTES_MAX}")

        def change(db: sqlite3.Connection) -> None:
            where = (text, str(key), update_id)
            cursor = db.execute("UPDATE updates SET outcome = ? WHERE owner = ? AND update_id = ?", where)
            if not cursor.rowcount:
                raise JournalError(f"{self.path}: {key}: no update {update_id[:64]!r} is known")

        return self._writer.submit(change)

    def outcome(self, key: UserKey, update_id: str) -> dict[str, Any] | None:
        """The stored outcome of an update; None when there is none, or the update is not known."""
        where = (str(key), update_id)
        rows = self._query("SELECT outcome FROM updates WHERE owner = ? AND update_id = ?", where)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def updates(self, key: UserKey) -> list[Update]:
        """All that is known of a user's updates, whether their segments are still here or not."""
        sql = "SELECT update_id, outcome, at FROM updates WHERE owner = ? ORDER BY update_id"
        return [Update(*row) for row in self._query(sql, (str(key),))]

    def adopt(self, key: UserKey, updates: Sequence[Update]) -> Future[None]:
        """Makes updates known that another journal knows; after the segments that came with them are appended."""
        rows = [(str(key), update.update_id, update.outcome, update.at) for update in updates]
        sql = (
            "INSERT INTO updates VALUES (?, ?, ?, ?) ON CONFLICT (owner, update_id) "
            "DO UPDATE SET outcome = coalesce(outcome, excluded.outcome)"
        )

        def change(db: sqlite3.Connection) -> None:
            db.executemany(sql, rows)

        return self._writer.submit(change)

    def disown(self, key: UserKey, update_ids: Sequence[str]) -> Future[None]:
        """Drops updates, and their segments, that another owner went on without: a retry of one is new."""
        rows = [(str(key), update_id) for update_id in update_ids]

        def change(db: sqlite3.Connection) -> None:
            for table in ("segments", "updates"):
                db.executemany(f"DELETE FROM {table} WHERE owner = ? AND update_id = ?", rows)

        return self._writer.submit(change)

    def pending(self, key: UserKey, after_chunk_id: int = 0) -> list[Segment]:
        """The user's segments that end after a chunk, in order. Raises `JournalCorrupt` for a damaged row."""
        return self._segments("last_chunk > ?", (str(key), after_chunk_id))

    def unreplicated(self, key: UserKey, most: int = -1) -> list[Segment]:
        """The user's oldest segments that are not marked as held by the shared store, at most `most`, in order."""
        return self._segments("NOT replicated", (str(key),), most)

    def users_unreplicated(self) -> dict[UserKey, tuple[int, int]]:
        """Users with segments that are not marked as held by the shared store: how many, and the last one's chunk."""
        sql = "SELECT owner, count(*), max(last_chunk) FROM segments WHERE NOT replicated GROUP BY owner"
        return {UserKey.parse(owner): (count, last) for owner, count, last in self._query(sql)}

    def mark_replicated(self, segments: Sequence[Segment]) -> Future[None]:
        """Remembers that the shared store holds these segments."""
        rows = [(str(segment.key), segment.update_id) for segment in segments]

        def change(db: sqlite3.Connection) -> None:
            db.executemany("UPDATE segments SET replicated = 1 WHERE owner = ? AND update_id = ?", rows)

        return self._writer.submit(change)

    def replace(
        self, key: UserKey, segments: Sequence[Segment], *, held: Sequence[Segment], seen: Sequence[int] = (),
        after_chunk_id: int = 0,
    ) -> Future[None]:  # fmt: skip
        """Puts `segments` in place of all that the user has after a chunk; those of `held` are in the shared store.

        When one that was here is not among them, another owner has written since: then its update is not known any
        more, and of the hashes that were here only those in `seen` stay.
        """
        rows, hashes = [segment_to_row(segment) for segment in segments], [_signed(h) for h in seen]
        kept, marked = {segment.update_id for segment in segments}, {segment.update_id for segment in held}
        owner = str(key)

        def change(db: sqlite3.Connection) -> None:
            sql = "SELECT update_id FROM segments WHERE owner = ? AND last_chunk > ?"
            gone = [row for row in db.execute(sql, (owner, after_chunk_id)).fetchall() if row[0] not in kept]
            db.execute("DELETE FROM segments WHERE owner = ? AND last_chunk > ?", (owner, after_chunk_id))
            if gone:
                db.executemany(
                    "DELETE FROM updates WHERE owner = ? AND update_id = ?", [(owner, *g) for g in gone]
                )
                db.execute("DELETE FROM seen WHERE owner = ?", (owner,))
            known = [(owner, segment.update_id, self._clock()) for segment in segments]
            db.executemany("INSERT OR IGNORE INTO updates VALUES (?, ?, NULL, ?)", known)
            db.executemany(_INSERT, rows)
            done = [(owner, update_id) for update_id in marked]
            db.executemany("UPDATE segments SET replicated = 1 WHERE owner = ? AND update_id = ?", done)
            _remember(db, owner, hashes)

        # However full the journal is: what was acknowledged comes in.
        return self._writer.submit(change)

    def seen(self, key: UserKey) -> list[int]:
        """Hashes (uint64) of what was written for the user, newest last, at most `SEEN_MAX`."""
        rows = self._query("SELECT hash FROM seen WHERE owner = ? ORDER BY n", (str(key),))
        return [row[0] % 2**64 for row in rows][-SEEN_MAX:]

    def users_pending(self) -> list[UserKey]:
        """Users with segments, in order of their names."""
        return [
            UserKey.parse(row[0]) for row in self._query("SELECT DISTINCT owner FROM segments ORDER BY owner")
        ]

    def bytes(self) -> int:
        """Bytes in use: segments, outcomes and hashes of all users, and what waits to be written."""
        return self._writer.bytes()

    def trim(self, key: UserKey, last_chunk_id: int) -> Future[int]:
        """Drops the segments that a durable version holds; their number. Outcomes and hashes stay."""

        def change(db: sqlite3.Connection) -> int:
            where = (str(key), last_chunk_id)
            dropped = db.execute("DELETE FROM segments WHERE owner = ? AND last_chunk <= ?", where).rowcount
            self._age(db)
            return dropped

        return self._writer.submit(change)

    def users(self) -> list[UserKey]:
        """Users of whom there is any trace: segments, outcomes or hashes; in order of their names."""
        tables = " UNION ".join(f"SELECT owner FROM {table}" for table in _TABLES)
        return [UserKey.parse(row[0]) for row in self._query(f"{tables} ORDER BY owner")]

    def forget(self, *keys: UserKey) -> dict[str, int]:
        """Erases all that the journal has of users, beyond recovery; how many rows of each table. Blocks."""
        owners = [(str(key),) for key in keys]

        def change(db: sqlite3.Connection) -> dict[str, int]:
            return {
                table: db.executemany(f"DELETE FROM {table} WHERE owner = ?", owners).rowcount
                for table in _TABLES
            }

        return self._writer.submit(change, erase=True).result()

    def is_held(self) -> bool:
        """Whether the files of that name are those which this process has locked: then nobody has opened them since."""
        try:
            lock = os.stat(f"{self.path}.lock")
            return os.path.samestat(lock, os.fstat(self._lock_handle)) and _inode(self.path) == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Writes what was submitted, then closes the files. May be called twice."""
        if not self._writer.close():
            return
        with self._read_lock:
            self._reader.close()
        self._db.close()
        os.close(self._lock_handle)

    def _segments(self, condition: str, values: tuple[Any, ...], most: int = -1) -> list[Segment]:
        sql = f"SELECT {_COLUMNS} FROM segments WHERE owner = ? AND {condition} ORDER BY last_chunk LIMIT ?"
        try:
            return [row_to_segment(row) for row in self._query(sql, (*values, most))]
        except ValueError as error:
            raise JournalCorrupt(f"{self.path}: {error}", path=str(self.path)) from error

    def _query(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._read_lock:
                return self._reader.execute(sql, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise journal_db.translate(self.path, error) from error

    def _check_order(self, db: sqlite3.Connection, segment: Segment) -> None:
        sql = "SELECT max(last_chunk) FROM segments WHERE owner = ?"
        last = db.execute(sql, (str(segment.key),)).fetchone()[0]
        if last is not None and segment.first_chunk_id <= last:
            raise JournalError(
                f"{self.path}: {segment.key}: chunk {segment.first_chunk_id} does not follow chunk {last}",
                expected=last + 1,
                found=segment.first_chunk_id,
            )

    def _age(self, db: sqlite3.Connection) -> None:
        """Now and then drops outcomes older than any retry, and hashes of users without any other trace."""
        now = self._clock()
        if now - self._aged_at < AGEING_INTERVAL_S:
            return
        self._aged_at = now
        db.execute(
            "DELETE FROM updates WHERE at < ? AND NOT EXISTS (SELECT 1 FROM segments s "
            "WHERE s.owner = updates.owner AND s.update_id = updates.update_id)",
            (now - OUTCOMES_KEPT_S,),
        )
        db.execute("DELETE FROM seen WHERE owner NOT IN (SELECT owner FROM updates)")


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _signed(value: int) -> int:
    """A uint64 as SQLite's int64."""
    if not 0 <= value < 2**64:
        raise ValueError(f"seen: {value}: expected a hash from 0 to 2**64 - 1")
    return value - 2**64 if value >= 2**63 else value


def _size(segments: Sequence[Segment], hashes: list[int]) -> int:
    return sum(segment.bytes + ROW_OVERHEAD_BYTES for segment in segments) + 16 * len(hashes)


def _outcome(db: sqlite3.Connection, segment: Segment) -> tuple[str | None] | None:
    """The row of a known update: its outcome, None if it has none yet."""
    where = (str(segment.key), segment.update_id)
    return db.execute("SELECT outcome FROM updates WHERE owner = ? AND update_id = ?", where).fetchone()


def _remember(db: sqlite3.Connection, owner: object, hashes: list[int]) -> None:
    """Adds hashes as the newest; the oldest beyond `SEEN_MAX` go."""
    if not hashes:
        return
    db.executemany("INSERT OR REPLACE INTO seen (owner, hash) VALUES (?, ?)", [(owner, h) for h in hashes])
    sql = "SELECT n FROM seen WHERE owner = ? ORDER BY n DESC LIMIT 1 OFFSET ?"
    oldest = db.execute(sql, (owner, SEEN_MAX)).fetchone()
    if oldest:
        db.execute("DELETE FROM seen WHERE owner = ? AND n <= ?", (owner, oldest[0]))
