"""The writer of a journal: one thread that commits in groups.

It takes all changes that came in while it was busy, applies them in one transaction, flushes once, and only
then answers them: the more callers, the more share a flush, and a lone caller waits for nobody.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage import journal_db
from storage.errors import JournalError, JournalFailed, JournalFull

GROUP_MAX = 256

_log = logging.getLogger(__name__)

Change = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True, slots=True)
class _Work:
    """One change waiting for the writer. `erase` work is done alone and leaves no trace in the files."""

    change: Change
    future: Future[Any]
    bytes: int
    erase: bool


class JournalWriter:
    """Owns the writing connection. `read_lock` keeps readers out while traces are erased."""

    def __init__(self, path: Path, db: sqlite3.Connection, read_lock: threading.Lock, bytes_max: int) -> None:
        self._path, self._db, self._read_lock, self._bytes_max = path, db, read_lock, bytes_max
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._queued_bytes, self._closed = 0, False
        self._failure: str | None = None
        self._used_bytes = journal_db.used_bytes(db)
        self._thread = threading.Thread(target=self._run, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    def bytes(self) -> int:
        """Bytes of the file in use, and of changes that wait."""
        with self._lock:
            return self._used_bytes + self._queued_bytes

    def submit(self, change: Change, size: int = 0, erase: bool = False) -> Future[Any]:
        """Queues `change`; the future has its result once that is on the disk.

        Fails with `JournalFull` when `size` more bytes are too many, else with what `change` raises. A future
        that is cancelled before its change has begun leaves nothing behind; later it can not be cancelled.
        """
        future: Future[Any] = Future()
        with self._lock:
            problem = self._refusal(size)
            if problem is None:
                self._queued_bytes += size
                self._queue.put(_Work(change, future, size, erase))
        if problem is not None:
            future.set_exception(problem)
        return future

    def close(self) -> bool:
        """Writes what was submitted and ends the thread; False when that was done before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        return True

    def _refusal(self, size: int) -> JournalError | None:
        path, held = str(self._path), self._used_bytes + self._queued_bytes
        if self._closed:
            return JournalError(f"{path}: the journal is closed", path=path)
        if self._failure:
            return JournalFailed(f"{path}: the disk has failed: {self._failure}", path=path)
        if size and held + size > self._bytes_max:
            return JournalFull(
                f"{path}: the journal holds {held} of at most {self._bytes_max} bytes: the store took no "
                "new versions for a while. Check the store; the journal empties by itself once it answers.",
                path=path,
                bytes_max=self._bytes_max,
            )
        return None

    def _run(self) -> None:
        running = True
        while running:
            group = list(self._waiting())
            running = None not in group
            for batch in _batches([work for work in group if work is not None]):
                self._apply(batch)

    def _waiting(self) -> Iterator[_Work | None]:
        yield self._queue.get()
        with contextlib.suppress(queue.Empty):
            for _ in range(GROUP_MAX - 1):
                yield self._queue.get_nowait()

    def _apply(self, batch: list[_Work]) -> None:
        """One transaction; every future of the batch is answered, after the flush."""
        live = [work for work in batch if work.future.set_running_or_notify_cancel()]
        try:
            answers = self._commit(live)
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            problem = journal_db.translate(self._path, error)
            if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
                # After a failed flush nobody knows which pages are on the disk: stop; the start replays.
                self._failure = str(error)
                problem = JournalFailed(f"{self._path}: {error}", path=str(self._path))
            _log.error("the journal can not be written: %s", problem)
            answers = [(work, None, problem) for work in live]
        with self._lock:
            self._queued_bytes -= sum(work.bytes for work in batch)
            with contextlib.suppress(sqlite3.Error):
                self._used_bytes = journal_db.used_bytes(self._db)
        for work, value, problem in answers:
            if problem is None:
                work.future.set_result(value)
            else:
                work.future.set_exception(problem)

    def _commit(self, batch: list[_Work]) -> list[tuple[_Work, Any, Exception | None]]:
        """Applies all; a change that fails by itself is taken back alone."""
        answers: list[tuple[_Work, Any, Exception | None]] = []
        self._db.execute("BEGIN IMMEDIATE")
        for work in batch:
            self._db.execute("SAVEPOINT one")
            try:
                answers.append((work, work.change(self._db), None))
            except sqlite3.Error:
                raise
            except Exception as error:
                self._db.execute("ROLLBACK TO one")
                answers.append((work, None, error))
            self._db.execute("RELEASE one")
        self._db.execute("COMMIT")
        if any(work.erase for work in batch):
            self._erase_traces()
        return answers

    def _erase_traces(self) -> None:
        """Rewrites the file, so that no freed page keeps a byte of what was deleted, and empties the WAL."""
        with self._read_lock:
            self._db.execute("VACUUM")
            busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise sqlite3.OperationalError("another program reads the journal: its WAL can not be emptied")


def _batches(group: list[_Work]) -> Iterator[list[_Work]]:
    """The group cut so that erasing work stands alone."""
    batch: list[_Work] = []
    for work in group:
        if not work.erase:
            batch.append(work)
            continue
        if batch:
            yield batch
        yield [work]
        batch = []
    if batch:
        yield batch
