"""The disk of the machine that all shards share: the product's journal, its writer's thread and files, in virtual time.

SQLite, the lock file and the writer's grouping are real; files lie in RAM where the system has such a folder, and are
not flushed, since here processes die and the machine does not. What is put in place of something: the writer's thread
is a fiber, its queue and futures park fibers, and a commit takes time before and after it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from actors import handover, replicator
from storage import journal_db, journal_writer
from storage.journal import Journal
from storage.segment import Segment
from tests.simulator.world import Fiber, World

COMMIT_S = (0.0002, 0.004)


class DiskQueue:
    """`queue.SimpleQueue` for one reader, a fiber."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._reader: Fiber | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.process.loop.call_soon(reader.resume)

    def get(self) -> Any:
        while not self._items:
            self._reader = World.current.fiber
            assert self._reader is not None, "the writer's thread is a fiber"
            self._reader.park()
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


class DiskThread:
    """`threading.Thread`, as the journal's writer uses it."""

    def __init__(self, target: Callable[[], None], name: str = "", daemon: bool = True) -> None:
        self._target, self._ended = target, DiskFuture()

    def start(self) -> None:
        process = World.current.process
        assert process is not None, "a thread belongs to a process"
        process.loop.call_soon(Fiber(process, self._run).resume)

    def join(self) -> None:
        self._ended.result()

    def _run(self) -> None:
        self._target()
        self._ended.set_result(None)


class DiskFuture(Future):
    """`concurrent.futures.Future` whose waiting parks the fiber that waits."""

    def result(self, timeout: float | None = None) -> Any:
        self._wait()
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait()
        return super().exception(0)

    def _wait(self) -> None:
        fiber = World.current.fiber
        if not self.done():
            assert fiber is not None, "only blocking code waits"
            self.add_done_callback(lambda _: fiber.process.loop.call_soon(fiber.resume))
            fiber.park()


class DiskPool:
    """`concurrent.futures.ThreadPoolExecutor`, as the replicator uses it."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any, **named: Any) -> DiskFuture:
        future, process = DiskFuture(), World.current.process
        assert process is not None, "a pool belongs to a process"
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = work(*args, **named)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        process.loop.call_soon(Fiber(process, run).resume)
        return future

    def shutdown(self, **_: object) -> None:
        pass


def _wait(futures: Sequence[DiskFuture]) -> None:
    """`concurrent.futures.wait`."""
    for future in futures:
        future.exception()


class Disk(sqlite3.Connection):
    """A connection whose commits take time, in which a process may die or freeze: before, or after it is durable."""

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql == "PRAGMA synchronous = FULL":
            return super().execute("PRAGMA synchronous = OFF")
        world = World.current
        if sql == "BEGIN IMMEDIATE":
            world.sleep(world.pause(*COMMIT_S))
        cursor = super().execute(sql, *args)
        if sql == "COMMIT":
            world.sleep(world.pause(*COMMIT_S))
        return cursor


class ProcessJournal(Journal):
    """A journal that is let go of when its process is killed, and that knows since when an update is durable."""

    def __init__(self, path: Path | str) -> None:
        process = World.current.process
        assert process is not None, "a journal belongs to a process"
        super().__init__(path, clock=process.wall)
        self._closed = False
        self.durable_at: dict[str, float] = {}
        process.on_death.append(self._let_go)

    def append_all(self, segments: Sequence[Segment], seen: Sequence[int] = ()) -> Future[list[str]]:
        future = super().append_all(segments, seen)
        now = World.current

        def note(done: Future[list[str]]) -> None:
            if done.exception() is None:
                there = done.result() or [segment.update_id for segment in segments]
                self.durable_at.update(dict.fromkeys(there, now.now))

        future.add_done_callback(note)
        return future

    def close(self) -> None:
        super().close()
        self._closed = True

    def _let_go(self) -> None:
        if not self._closed:
            self._reader.close()
            self._db.close()
            os.close(self._lock_handle)


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    factory = sqlite3.Connection if read_only else Disk
    db = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False, factory=factory)
    if read_only:
        db.execute("PRAGMA query_only = ON")
    return db


@contextlib.contextmanager
def simulated_disk(world: World) -> Iterator[None]:
    """While this lasts, journals are written by fibers, and a hand-over waits in virtual time."""
    threads = SimpleNamespace(Thread=DiskThread, Lock=threading.Lock)
    queues = SimpleNamespace(SimpleQueue=DiskQueue, Empty=queue.Empty)
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
    with (
        patch.object(journal_writer, "threading", threads),
        patch.object(journal_writer, "queue", queues),
        patch.object(journal_writer, "Future", DiskFuture),
        patch.object(journal_db, "connect", _connect),
        patch.object(handover, "time", clock),
        patch.object(replicator, "ThreadPoolExecutor", DiskPool),
        patch.object(replicator, "wait", _wait),
        patch.object(replicator, "random", world.rng),
    ):
        yield
