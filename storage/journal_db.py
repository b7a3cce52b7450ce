"""The journal's database: schema, opening with all checks, and what each SQLite error means."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from storage.disk import flush_folder
from storage.errors import JournalCorrupt, JournalError, JournalFull
from storage.journal_wal import check_wal

SCHEMA_VERSION = 2
_APPLICATION_ID = 0x5454414E
WAL_BYTES_KEPT = 64 << 20
_MOVE_AWAY = (
    "Move it away, with its -wal, and start again: each user goes on from the newest version in the store. "
    "`sqlite3 FILE .recover` may save what can still be read."
)

_SCHEMA = f"""
CREATE TABLE segments (
    owner TEXT NOT NULL, first_chunk INTEGER NOT NULL, last_chunk INTEGER NOT NULL,
    update_id TEXT NOT NULL, conversation TEXT NOT NULL, role TEXT NOT NULL,
    context BLOB NOT NULL, tokens BLOB NOT NULL, epoch INTEGER NOT NULL DEFAULT 0, crc INTEGER NOT NULL,
    replicated INTEGER NOT NULL DEFAULT 0,
    UNIQUE (owner, last_chunk));
CREATE TABLE updates (
    owner TEXT NOT NULL, update_id TEXT NOT NULL, outcome TEXT, at REAL NOT NULL,
    PRIMARY KEY (owner, update_id)) WITHOUT ROWID;
CREATE TABLE seen (
    n INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, hash INTEGER NOT NULL,
    UNIQUE (owner, hash));
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
# So that each value of `updates` stands in two places, as the unique keys have it for the other tables (the rest of a
# segment has a CRC32): where they differ, the check of a start finds it.
_TWICE = "CREATE INDEX IF NOT EXISTS updates_twice ON updates (owner, update_id, outcome, at)"

_FROM_VERSION_1 = f"""
ALTER TABLE segments ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE segments ADD COLUMN replicated INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = {SCHEMA_VERSION};
"""


def translate(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> JournalError:
    """Our error for one of SQLite or for text that is none, naming the file and what to do."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    damaged = isinstance(error, UnicodeDecodeError)
    if damaged or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalCorrupt(
            f"{path}: the journal is damaged: {error}. {_MOVE_AWAY}",
            path=str(path),
        )
    if code == sqlite3.SQLITE_FULL:
        return JournalFull(f"{path}: the disk is full; make room for the journal", path=str(path))
    if code == sqlite3.SQLITE_CANTOPEN:
        return JournalError(f"{path}: can not open the journal: check the folder and its permissions")
    return JournalError(f"{path}: {error}", path=str(path))


def lock_file(path: Path) -> int:
    """Takes the journal for this process; the handle holds it. Raises `JournalError` when another has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(f"{path}: can not open the journal: {error.strerror}", path=str(path)) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise JournalError(
            f"{path}: process {holder} has this journal open, and only one may. End that process first.",
            path=str(path),
            holder=holder,
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection for one of the journal's threads; transactions are begun by hand."""
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA cell_size_check = ON")
    if read_only:
        db.execute("PRAGMA query_only = ON")
    return db


def open_writer(path: Path) -> sqlite3.Connection:
    """Opens the database, recovers it, checks it; makes it if there is none.

    Raises `JournalCorrupt` when it is damaged, `JournalError` when it is not a journal that we can read.
    """
    db = None
    try:
        check_wal(path, _MOVE_AWAY)
        if not path.exists():
            _create(path)
        if path.stat().st_size == 0:
            raise JournalCorrupt(f"{path}: the journal is empty, and never was. {_MOVE_AWAY}", path=str(path))
        db = connect(path)
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
        _check_content(path, db)
        db.execute(_TWICE)
        flush_folder(path.parent)
        return db
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, (sqlite3.Error, UnicodeDecodeError)):
            raise translate(path, error) from error
        if isinstance(error, OSError):
            raise JournalError(
                f"{path}: can not open the journal: {error.strerror}", path=str(path)
            ) from error
        raise


def _create(path: Path) -> None:
    """A new journal, whole before it has its name: one without tables is a damaged one."""
    new = Path(f"{path}.new")
    for left in (new, Path(f"{new}-journal")):
        left.unlink(missing_ok=True)
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(new, isolation_level=None)
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {_TWICE}; COMMIT;")
    finally:
        db.close()
    os.replace(new, path)
    flush_folder(path.parent)


def _check_content(path: Path, db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if found != "ok":
        raise JournalCorrupt(
            f"{path}: the journal is damaged: {found}. {_MOVE_AWAY}",
            path=str(path),
        )
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not tables:
        raise JournalCorrupt(f"{path}: the journal has lost its tables. {_MOVE_AWAY}", path=str(path))
    if application != _APPLICATION_ID:
        raise JournalError(f"{path}: this SQLite database is not a journal of titanmem", path=str(path))
    if version == 1:
        db.executescript(f"BEGIN IMMEDIATE; {_FROM_VERSION_1} COMMIT;")
    elif version != SCHEMA_VERSION:
        raise JournalError(
            f"{path}: version of the journal: expected {SCHEMA_VERSION}, found {version}. "
            "Start the release of titanmem that wrote it.",
            path=str(path),
        )


def used_bytes(db: sqlite3.Connection) -> int:
    """Bytes of pages in use."""
    pages = db.execute("PRAGMA page_count").fetchone()[0] - db.execute("PRAGMA freelist_count").fetchone()[0]
    return pages * db.execute("PRAGMA page_size").fetchone()[0]
