"""A journal that is full, or whose disk fails: what is told then is refused by name, what was told before is there.

A full journal is no failure: reads go on, and writes as soon as there is room. After a failed write or flush only a new
start knows what is on the disk, so the shard ends.
"""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from actors import shard as shard_module
from actors.keeper import MemoryKeeper
from actors.options import KeeperOptions
from storage.errors import JournalFailed, JournalFull
from tests.actors.shard_life import SAID, living, said, until
from tests.actors.test_keeper import ALICE, BOB, chat, piece, same, state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "FENCED_EXIT_S", 0.01)


def limited(keeper: MemoryKeeper) -> Iterator[None]:
    """`journal_bytes_max` is reached."""
    writer = keeper.roster.journal._writer
    most, writer._bytes_max = writer._bytes_max, 0
    yield
    writer._bytes_max = most


def full(keeper: MemoryKeeper) -> Iterator[None]:
    """The file may have no page more: what SQLite says of a disk without room."""
    db = keeper.roster.journal._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    yield
    db.execute("PRAGMA max_page_count = 1073741823")


@pytest.mark.parametrize(("fill", "says"), [(limited, "the store took no new versions"), (full, "make room")])
async def test_a_journal_that_is_full(
    options: KeeperOptions,
    model: Path,
    tmp_path: Path,
    fill: Callable[[MemoryKeeper], Iterator[None]],
    says: str,
) -> None:
    async with living(options) as life:
        shard, epoch = life.shard, life.epoch
        await shard.ingest(piece(ALICE, 1), epoch)
        await shard.ingest(piece(BOB, 9), epoch)
        before = await state(life.keeper, ALICE)
        with contextmanager(fill)(life.keeper):
            for _ in range(2):
                with pytest.raises(JournalFull, match=says):
                    await life.chat(chat(model, ALICE, ("user", "my dog's name is Rex7. " * 300)))
                with pytest.raises(JournalFull, match=says):
                    await shard.ingest(piece(ALICE, 2, 4000), epoch)
            asked = chat(model, ALICE, ("user", "What is it?"), update_id="q", memory="read_only")
            assert (await life.chat(asked)).completion_tokens
            assert (await shard.describe(ALICE, epoch))["user"] == "alice"
            assert (await shard.ping())["state"] == "ready", "it is no failure of the disk"
            assert same(await state(life.keeper, ALICE), before)
            await shard.flush()
        assert not (await shard.ingest(piece(ALICE, 2, 4000), epoch)).duplicate, "it had not been taken"
        await life.chat(chat(model, ALICE, SAID))
        await shard.forget(BOB, epoch)
        assert (await life.snapshot(tmp_path))["users"] == 1
        told = await state(life.keeper, ALICE)
    async with living(options) as again:
        assert same(await state(again.keeper, ALICE), told)


async def test_a_journal_that_fills_up_during_a_reply(options: KeeperOptions, model: Path) -> None:
    """The question is journalled, the answer is not: an error. The same again writes each once, and in the slot is what
    the journal has: a version that is stored then says of no chunk that it held it and did not."""
    async with living(options) as life:
        call = chat(model, ALICE, SAID)
        journal, appended = life.keeper.roster.journal, []
        await life.shard.ingest(piece(ALICE, 1), life.epoch)
        real = journal.append_all

        def append_all(segments: Any, seen: Any = ()) -> Any:
            (segment,) = segments
            appended.append(segment.update_id)
            with (
                contextmanager(limited)(life.keeper)
                if segment.update_id.endswith(":out:0")
                else nullcontext()
            ):
                return real(segments, seen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "append_all", append_all)
            with pytest.raises(JournalFull):
                await life.chat(call)
        assert appended == ["u1:in:0", "u1:out:0"]
        done = await life.chat(call)
        await life.shard.ingest(piece(ALICE, 2), life.epoch)
        told = await state(life.keeper, ALICE)
        assert told[4] == 50 + done.prompt_tokens + done.completion_tokens + 50
    async with living(options) as again:
        assert same(await state(again.keeper, ALICE), told)


@contextmanager
def no_more_bytes() -> Iterator[None]:
    """The kernel refuses every write to a file of this process, SQLite's too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_flush(keeper: MemoryKeeper) -> Iterator[None]:
    """The flush of a commit fails: what of it is on the disk nobody knows."""
    writer = keeper.roster.journal._writer
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    class Failing:
        def __init__(self, db: Any) -> None:
            self.db = db

        def execute(self, sql: str, *arguments: Any) -> Any:
            if sql == "COMMIT":
                raise error
            return self.db.execute(sql, *arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.db, name)

    real, writer._db = writer._db, Failing(writer._db)  # type: ignore[assignment]
    try:
        yield
    finally:
        writer._db = real


@pytest.mark.parametrize("step", ["write", "fsync"])
@pytest.mark.parametrize("asked", ["chat", "ingest"])
async def test_a_journal_whose_disk_fails_ends_its_shard_and_loses_nothing(
    options: KeeperOptions, model: Path, step: str, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with living(options) as life:
        shard, epoch = life.shard, life.epoch
        await shard.ingest(piece(ALICE, 1), epoch)
        told = await state(life.keeper, ALICE)
        caplog.clear()
        asks: dict[str, Callable[[], Any]] = {
            "chat": lambda: life.chat(chat(model, ALICE, SAID)),
            "ingest": lambda: shard.ingest(piece(ALICE, 2), epoch),
        }
        with no_more_bytes() if step == "write" else no_flush(life.keeper), pytest.raises(JournalFailed):
            await asks[asked]()
        assert (await shard.ping())["state"] == "stopped", "only a start knows what is on the disk"
        await until(lambda: life.left)
        assert [line for line in said(caplog) if line.startswith("shard-0 is stopped and ends")]
        assert len(said(caplog)) <= 2
    async with living(options) as again:
        assert same(await state(again.keeper, ALICE), told)
        assert not (await again.shard.ingest(piece(ALICE, 2), again.epoch)).duplicate


async def test_an_erasure_in_which_the_journals_disk_fails_comes_to_its_end_later(
    options: KeeperOptions,
) -> None:
    async with living(options) as life:
        await life.shard.ingest(piece(ALICE, 1), life.epoch)
        with no_flush(life.keeper), pytest.raises(JournalFailed):
            await life.shard.forget(ALICE, life.epoch)
        assert (await life.shard.ping())["state"] == "stopped"
        await until(lambda: life.left)
    async with living(options) as again:
        assert not (await again.shard.ingest(piece(ALICE, 1), again.epoch)).duplicate
        assert (await again.shard.describe(ALICE, again.epoch))["tokens_seen"] == len(piece(ALICE, 1).tokens)
