"""Points to die at: steps of the product that a process wraps in itself, from outside, and a SIGKILL at one of them.

A `Killer` belongs to a process that is to die: it changes modules of the product for good. `POINTS` names every step.
A step that says `mid` or `torn` leaves half of what was being written.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

import actors.snapshotter
import storage.local
from actors.roster import Roster
from storage.journal import Journal
from storage.journal_writer import JournalWriter
from storage.local import LocalObjects
from storage.snapshot_part import PartWriter
from storage.store import MemoryStore

ANYWHERE = "anywhere"
"""Killed from outside, at any moment whatever: between two steps of SQLite, too."""

_PUT = ("before_write", "mid_write", "before_fsync", "before_rename", "renamed", "flushed")

POINTS: tuple[str, ...] = (
    ANYWHERE,
    *(f"open.{step}" for step in ("before_schema", "schema")),
    *(f"journal.{step}" for step in ("begun", "before_commit", "torn_commit", "committed", "answered")),
    *(f"ingest.{step}" for step in ("before_fold", "folded", "before_outcome", "outcome", "returned")),
    *(f"replay.{step}" for step in ("before_fold", "folded")),
    *(f"version.{step}" for step in _PUT),
    *(f"head.{step}" for step in _PUT),
    *(f"store.{step}" for step in ("before_trim", "trimmed", "before_drop", "dropped")),
    *(f"handover.{step}" for step in ("begun", "before_commit", "committed", "before_outcome", "before_forget")),
    *(f"handover.{step}" for step in ("before_vacuum", "vacuumed", "forgotten", "done")),
    *(f"snapshot.{step}" for step in ("user_added", *_PUT, "before_manifest", "made")),
    *(f"note.{step}" for step in ("before_write", "mid_write", "renamed")),
    *(f"manifest.{step}" for step in _PUT),
    *(f"prune.{step}" for step in ("manifest_gone", "part_gone")),
)  # fmt: skip

_ENDINGS = {
    ".titanmem": "version", "/HEAD": "head", "/manifest.json": "manifest", ".parquet": "snapshot", ".json": "note",
}  # fmt: skip
"""What is being written. Notes are those of a snapshot that is being made: `begun.json`, and one beside each part."""

_phase: ContextVar[str] = ContextVar("phase", default="ingest")


def die() -> None:
    """Nothing is flushed, closed or answered any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # whichever thread this is, it goes no further


def put_in_place(owner: Any, **functions: Callable[..., Any]) -> None:
    """In the place of what `owner` has, for as long as this process lives."""
    for name, function in functions.items():
        setattr(owner, name, function)


class Killer:
    """Ends this process at the `nth` time that it comes to `point`, once it counts; with no point it lives on."""

    def __init__(self, point: str = "", nth: int = 1, *, counts: bool = True) -> None:
        assert not point or point in POINTS, f"{point}: no such point"
        self.point, self._left, self.counts = point, nth, counts
        self._lock = threading.Lock()
        self._here = threading.local()
        self.handing_over = False

    def due(self, name: str) -> bool:
        """Whether this is the moment; for points that leave something half done."""
        if not name or name != self.point or not self.counts:
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0

    def at(self, name: str) -> None:
        """This process is at a point now."""
        if self.due(name):
            die()

    def arm(self) -> None:
        """Wrap all steps."""
        self._arm_journal()
        self._arm_updates()
        self._arm_files()
        self._arm_snapshots()

    def _wrap(self, owner: Any, name: str, before: str = "", after: str = "", when: Any = None) -> None:
        """`owner.name` with a point before and after it, in those calls for which `when(*arguments)` holds."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts = when is None or when(*arguments)
            if counts:
                self.at(before)
            result = original(*arguments, **named)
            if counts:
                self.at(after)
            return result

        put_in_place(owner, **{name: wrapped})

    # -- the journal ------------------------------------------------------------------------------------------

    def _arm_journal(self) -> None:
        killer = self

        class Tapped(sqlite3.Connection):
            """A connection of the journal, with points around what its writer says."""

            def __init__(self, path: Any, **named: Any) -> None:
                super().__init__(path, **named)
                self.path = Path(path)
                if killer.point == "journal.torn_commit":
                    self.execute("PRAGMA wal_autocheckpoint = 0")  # a torn commit has reached the WAL only

            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                during = "handover" if killer.handing_over else "journal"
                if sql == "COMMIT":
                    killer.at(f"{during}.before_commit")
                    if killer.due(f"{during}.torn_commit"):
                        tear(self)
                if sql == "VACUUM":
                    killer.at("handover.before_vacuum")
                cursor = super().execute(sql, *values)
                after = {"BEGIN IMMEDIATE": "begun", "COMMIT": "committed", "VACUUM": "vacuumed"}.get(sql)
                if after:
                    killer.at(f"{during}.{after}")
                return cursor

            def executescript(self, script: str) -> sqlite3.Cursor:
                killer.at("open.before_schema")
                cursor = super().executescript(script)
                killer.at("open.schema")
                return cursor

        def tear(db: Tapped) -> None:
            wal = Path(f"{db.path}-wal")
            before = wal.read_bytes()
            sqlite3.Connection.execute(db, "COMMIT")
            wal.write_bytes(half_of_the_change(before, wal.read_bytes()))
            die()

        put_in_place(sqlite3, connect=functools.partial(sqlite3.connect, factory=Tapped))
        self._wrap(JournalWriter, "_apply", after="journal.answered", when=lambda *_: not self.handing_over)
        self._wrap(Journal, "adopt", before="handover.before_outcome")
        self._wrap(Journal, "forget", before="handover.before_forget", after="handover.forgotten")
        self._wrap(Journal, "trim", before="store.before_trim")

    # -- updates, activation, stored versions -----------------------------------------------------------------

    def _arm_updates(self) -> None:
        fold, activate, store = Roster.fold, Roster._activate, Roster.store
        set_outcome = Journal.set_outcome

        async def tapped_fold(roster: Any, resident: Any, segment: Any) -> Any:
            self.at(f"{_phase.get()}.before_fold")
            done = await fold(roster, resident, segment)
            self.at(f"{_phase.get()}.folded")
            return done

        async def tapped_activate(roster: Any, key: Any) -> Any:
            before = _phase.set("replay")
            try:
                return await activate(roster, key)
            finally:
                _phase.reset(before)

        async def tapped_store(roster: Any, resident: Any) -> bool:
            trims = resident.dirty and resident.stored_chunk_id > 0
            stored = await store(roster, resident)
            if trims:
                self.at("store.trimmed")
            return stored

        def tapped_set_outcome(journal: Any, *arguments: Any) -> Any:
            self.at("ingest.before_outcome")
            future = set_outcome(journal, *arguments)
            if self.point == "ingest.outcome":
                future.result()
                self.at("ingest.outcome")
            return future

        put_in_place(Roster, fold=tapped_fold, _activate=tapped_activate, store=tapped_store)
        put_in_place(Journal, set_outcome=tapped_set_outcome)
        self._wrap(MemoryStore, "_delete_quietly", before="store.before_drop", after="store.dropped")

    # -- files of the store -----------------------------------------------------------------------------------

    def _arm_files(self) -> None:
        self._named(LocalObjects, "put")
        self._named(LocalObjects, "put_file")
        killer, fsync, replace = self, os.fsync, os.replace

        class Halving(io.BufferedWriter):
            """A file that may end in the middle of a write."""

            def write(self, data: Any) -> int:
                if killer._due_here("mid_write"):
                    super().write(data[: len(data) // 2])
                    self.flush()
                    die()
                return super().write(data)

        def tapped_open(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if mode != "xb":
                return open(path, mode, *arguments, **named)
            file = Halving(io.FileIO(path, "xb"))
            self._at_here("before_write")
            return file

        def tapped_fsync(handle: int) -> None:
            if not stat.S_ISDIR(os.fstat(handle).st_mode):
                self._at_here("before_fsync")
            fsync(handle)

        def tapped_replace(source: Any, target: Any) -> None:
            self._at_here("before_rename")
            replace(source, target)
            self._at_here("renamed")

        put_in_place(storage.local, open=tapped_open)
        put_in_place(os, fsync=tapped_fsync, replace=tapped_replace)
        swap_in = LocalObjects._swap_in

        def tapped_swap_in(objects: Any, temporary: Path, path: Path) -> None:
            swap_in(objects, temporary, path)
            self._at_here("flushed")

        put_in_place(LocalObjects, _swap_in=tapped_swap_in)

    def _named(self, owner: Any, name: str) -> None:
        """Remember for the time of a call which kind of object is being written."""
        original = getattr(owner, name)

        def wrapped(objects: Any, target: str, *arguments: Any, **named: Any) -> Any:
            self._here.kind = next((kind for end, kind in _ENDINGS.items() if target.endswith(end)), "other")
            try:
                return original(objects, target, *arguments, **named)
            finally:
                self._here.kind = ""

        put_in_place(owner, **{name: wrapped})

    def _at_here(self, step: str) -> None:
        self.at(f"{getattr(self._here, 'kind', '')}.{step}")

    def _due_here(self, step: str) -> bool:
        return self.due(f"{getattr(self._here, 'kind', '')}.{step}")

    # -- snapshots --------------------------------------------------------------------------------------------

    def _arm_snapshots(self) -> None:
        self._wrap(PartWriter, "add_user", after="snapshot.user_added")
        module = actors.snapshotter
        self._wrap(module, "commit_manifest", before="snapshot.before_manifest", after="snapshot.made")
        self._wrap(
            LocalObjects, "delete", after="prune.manifest_gone",
            when=lambda _, name: name.endswith("/manifest.json"),
        )  # fmt: skip
        self._wrap(
            LocalObjects, "delete", after="prune.part_gone", when=lambda _, name: name.endswith(".parquet")
        )
        if self.point == "snapshot.mid_write":
            # A part is copied in blocks of a MiB, more than a part of these tests has: cut to what has a middle.
            copy = shutil.copyfileobj
            put_in_place(shutil, copyfileobj=lambda source, target, _=0: copy(source, target, 4096))

    @contextlib.contextmanager
    def handover(self) -> Any:
        """While it lasts, what the journals do is a hand-over."""
        self.handing_over = True
        yield
        self.handing_over = False
        self.at("handover.done")


def half_of_the_change(before: bytes, after: bytes) -> bytes:
    """The file of `after` as it was when half of what differs from `before` had been written."""
    common = min(len(before), len(after))
    pair = [np.frombuffer(data, np.uint8, common) for data in (before, after)]
    differs = np.flatnonzero(pair[0] != pair[1])
    first = int(differs[0]) if len(differs) else common
    cut = first + (len(after) - first) // 2
    return after[:cut] + before[cut:]
