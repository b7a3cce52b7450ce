"""Segments in the shared store: each mode's loss bound, and that no older owner changes what a newer one reads."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.figures import Figures
from actors.options import KeeperOptions
from actors.replicator import Replicator
from storage.errors import JournalCorrupt, NotReplicated, StoreUnavailable
from storage.journal import Journal
from storage.names import UserKey
from storage.segment import Segment
from storage.segments import segments_folder
from storage.store import open_store

ALICE = UserKey("local", "alice")
SOON_S = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it holds; TimeoutError when that takes too long."""
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 (the replicator tells nobody when it is done)
            await asyncio.sleep(0.01)


class Node:
    """A shard's journal on a disk of its own, and its replicator, under one epoch."""

    def __init__(self, folder: Path, url: str, durability: str, epoch: int, **changes: Any) -> None:
        self.folder, self.epoch = folder, epoch
        options = KeeperOptions(
            model="unused", store_url=url, journal_dir=str(folder), shard="shard-0", epoch=epoch,
            durability=durability, **{"replicate_interval_s": 0.2, "sync_timeout_s": SOON_S, **changes},
        )  # fmt: skip
        self.store = open_store(url)
        self.journal = Journal(options.journal)
        self.figures = Figures("shard-0")
        self.options = options
        self.replicator = Replicator(self.journal, self.store.segments, options, self.figures)
        self.replicator.start()

    async def come_in(self, after: int = 0, epoch: int = 0) -> list[str]:
        """Names of the updates that continue the newest version."""
        await self.replicator.bring_back(ALICE, after_chunk_id=after, epoch=epoch)
        return [segment.update_id for segment in self.journal.pending(ALICE, after)]

    async def tell(self, chunk: int, name: str = "", seen: tuple[int, ...] = ()) -> None:
        """One update, acknowledged when this returns."""
        segment = Segment(
            key=ALICE, update_id=name or f"u{chunk}", conversation="c", role="user",
            context=np.arange(3, dtype=np.int32), tokens=np.array([chunk, 7], np.int32), first_chunk_id=chunk,
            last_chunk_id=chunk, epoch=self.epoch,
        )  # fmt: skip
        if not (await asyncio.wrap_future(self.journal.append(segment, seen))).duplicate:
            self.replicator.add(segment, seen)
        await self.replicator.durable(ALICE)

    async def caught_up(self) -> None:
        await until(lambda: not self.replicator.backlog() and not self.replicator.lag_s())

    async def die(self, *, disk: bool) -> None:
        """Nothing more is written; with `disk`, the journal is gone, too."""
        await self.replicator.close()
        self.journal.close()
        if disk:
            shutil.rmtree(self.folder)

    def content(self, file: str) -> bytes:
        """The bytes of one of the user's objects."""
        found = self.store.objects.get(segments_folder(ALICE) + file)
        assert found is not None
        return found[0]

    def files(self) -> list[str]:
        return [piece.file for piece in self.store.segments.pieces(ALICE)]


Open = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path, url: str) -> Open:
    @asynccontextmanager
    async def enter(durability: str, epoch: int, disk: str = "a", **changes: Any) -> AsyncIterator[Node]:
        node = Node(tmp_path / disk, url, durability, epoch, **changes)
        try:
            yield node
        finally:
            await node.die(disk=False)

    return enter


@pytest.fixture(params=["file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder; the loss bounds below ask for all kinds of stores."""
    return (
        f"file://{tmp_path}/store"
        if request.param == "file"
        else request.getfixturevalue(f"{request.param}_url")
    )


def break_store(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(node.store.segments, "put", put)
    monkeypatch.setattr(node.replicator, "_options", replace(node.options, sync_timeout_s=0.2))


@pytest.mark.parametrize("url", ["file", "redis", "s3"], indirect=True)
@pytest.mark.parametrize("durability", ["local", "replicated", "sync"])
async def test_what_the_loss_of_node_and_disk_costs(
    opened: Open, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(durability, 1) as node:
        for chunk in (1, 2, 3):
            await node.tell(chunk, seen=(chunk,))
        await node.caught_up()
        break_store(node, monkeypatch)
        if durability == "sync":
            with pytest.raises(NotReplicated, match="Idempotency-Key"):
                await node.tell(4)
        else:
            await node.tell(4)
        await node.die(disk=True)
    async with opened(durability, 2, "b") as node:
        kept = [] if durability == "local" else ["u1", "u2", "u3"]
        assert await node.come_in() == kept
        assert node.journal.seen(ALICE) == [1, 2, 3][: len(kept)]
        assert node.replicator.backlog() == 0, "what came from the store need not go there again"


@pytest.mark.parametrize("durability", ["local", "replicated", "sync"])
async def test_the_loss_of_the_process_costs_nothing(opened: Open, durability: str) -> None:
    async with opened(durability, 1, replicate_interval_s=3600.0) as node:
        for chunk in (1, 2, 3):
            await node.tell(chunk)
    async with opened(durability, 2) as node:
        assert await node.come_in() == ["u1", "u2", "u3"]


async def test_a_start_replicates_what_the_last_one_left_whoever_asks(opened: Open) -> None:
    async with opened("replicated", 1, replicate_interval_s=3600.0) as node:
        await node.tell(1, seen=(5,))
        assert node.files() == []
    async with opened("replicated", 2) as node:
        await node.caught_up()
        assert len(node.files()) == 1
        await node.die(disk=True)
    async with opened("replicated", 3, "b") as node:
        assert await node.come_in() == ["u1"]
        assert node.journal.seen(ALICE) == [5]


async def test_the_longer_of_journal_and_store_counts_and_each_segment_once(
    opened: Open, tmp_path: Path
) -> None:
    async with opened("sync", 1) as node:
        await node.tell(1)
        await node.tell(2)
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    async with opened("sync", 2) as node:
        assert await node.come_in() == ["u1", "u2"]
        await node.tell(3)
    async with opened("local", 3) as node:
        await node.come_in()
        await node.tell(4)
        assert await node.come_in() == ["u1", "u2", "u3", "u4"], "the journal is longer"
    async with opened("sync", 4, "old") as node:
        assert await node.come_in() == ["u1", "u2", "u3"], "the store is longer"
        await node.tell(4, "u3")
        assert await node.come_in() == ["u1", "u2", "u3"], "a known update is not written again"


async def test_an_older_owner_that_wakes_changes_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened("replicated", 1) as old:
        await old.tell(1)
        await old.caught_up()
        with monkeypatch.context() as patch:
            break_store(old, patch)
            await old.tell(2, "lost-2")
            await old.tell(3, "lost-3")
            async with opened("sync", 2, "b") as new:
                assert await new.come_in() == ["u1"]
        await old.caught_up()
        assert any("e00000001" in file and "0002-" in file for file in old.files()), (
            "it has woken, and has written"
        )
        async with opened("sync", 3, "c") as newer:
            assert await newer.come_in() == ["u1"], "not even while nobody has written since"
            await newer.tell(2, "new-2")
        async with opened("sync", 4, "d") as newest:
            assert await newest.come_in() == ["u1", "new-2"]


async def test_a_node_that_comes_back_with_an_old_disk_yields_to_who_went_on(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened("replicated", 1) as node:
        await node.tell(1, seen=(1,))
        await node.caught_up()
        break_store(node, monkeypatch)
        await node.tell(2, "lost-2", seen=(2,))
    async with opened("sync", 2, "b") as other:
        await other.come_in()
        await other.tell(2, "new-2", seen=(22,))
        await other.tell(3, "new-3", seen=(33,))
    async with opened("sync", 3) as node:
        assert await node.come_in() == ["u1", "new-2", "new-3"]
        assert node.journal.seen(ALICE) == [1, 22, 33]
        await node.tell(4, "lost-2")
        assert (await node.come_in())[-1] == "lost-2", "what was lost may be told again"


async def test_a_version_of_a_newer_epoch_voids_what_older_ones_left(opened: Open) -> None:
    async with opened("sync", 1) as node:
        for chunk in (1, 2, 3):
            await node.tell(chunk)
    async with opened("sync", 5, "b") as node:
        assert await node.come_in(after=2, epoch=4) == [], "a backup was restored under epoch 4"
    async with opened("sync", 6) as node:
        assert await node.come_in(after=2, epoch=4) == [], "nor does the journal bring it back"


async def test_left_over_segments_of_a_memory_that_is_gone_are_not_read(opened: Open) -> None:
    async with opened("sync", 1) as node:
        for chunk in (5, 6):
            await node.tell(chunk)
        await node.die(disk=True)
    async with opened("sync", 2, "b") as node:
        assert await node.come_in() == []
        await node.tell(1)
        assert await node.come_in() == ["u1"]


async def test_objects_go_when_versions_hold_them_also_those_of_older_epochs(opened: Open) -> None:
    async with opened("sync", 1) as node:
        await node.tell(1)
        await node.tell(2)
    async with opened("sync", 2, "b") as node:
        await node.come_in()
        await node.tell(3)
        assert len(node.files()) == 4, "three segments and a seal"
        await node.replicator.trim(ALICE, 2)
        assert [int(file[1:17]) for file in node.files()] == [3, 3]
        await node.replicator.trim(ALICE, 3)
        assert node.files() == []


async def test_forgetting_leaves_nothing_behind_nor_on_its_way(opened: Open) -> None:
    async with opened("sync", 1) as node:
        await node.tell(1)
        (file,) = node.files()
        late = node.content(file)
        await node.replicator.forget(ALICE)
        node.journal.forget(ALICE)
        removed = node.store.delete(ALICE, epoch=1)
        assert removed == [segments_folder(ALICE) + file]
        node.store.objects.put(removed[0], late)
        assert await node.come_in() == [], "what arrives after the tombstone is not read, and goes"
        assert node.files() == []
        await node.tell(1, "anew")
        await node.die(disk=True)
    async with opened("sync", 2, "b") as node:
        assert await node.come_in() == ["anew"], "an erased user may begin anew"


async def test_a_store_that_is_away_costs_replicated_users_nothing_but_an_alert(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened("replicated", 1, replicate_interval_s=0.1) as node:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "actors.replicator"):
            break_store(node, patch)
            for chunk in (1, 2):
                await node.tell(chunk)
            await until(lambda: bool(caplog.records))
            assert "segments of 1 users are not in the store" in caplog.text
            assert "the store is away" in caplog.text
            assert node.replicator.backlog() == 2
            assert node.replicator.lag_s() > 0.1
            assert b'titan:store_errors_total{op="segments"' in node.figures.text()
        await node.caught_up()
        await node.die(disk=True)
    async with opened("replicated", 2, "b") as node:
        assert await node.come_in() == ["u1", "u2"]


async def test_sync_asks_again_and_a_retry_waits_for_the_same_update(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened("sync", 1) as node:
        with monkeypatch.context() as patch:
            break_store(node, patch)
            for _ in range(2):
                with pytest.raises(NotReplicated):
                    await node.tell(1)
        await node.caught_up()
        await node.tell(1)
        assert len(node.journal.pending(ALICE)) == 1
        assert len(node.files()) == 1


async def test_many_segments_go_as_a_few_objects(opened: Open) -> None:
    async with opened("replicated", 1, replicate_interval_s=3600.0) as node:
        for chunk in range(1, 71):
            await node.tell(chunk, seen=(chunk,))
    async with opened("sync", 2) as node:
        await node.caught_up()
        assert [(int(f[1:17]), int(f[18:34])) for f in node.files()] == [(1, 64), (65, 70)]
        await node.die(disk=True)
    async with opened("sync", 3, "b") as node:
        assert await node.come_in() == [f"u{chunk}" for chunk in range(1, 71)]
        assert node.journal.seen(ALICE) == list(range(1, 71))


async def test_a_damaged_object_that_is_needed_is_an_error_that_names_it(opened: Open) -> None:
    async with opened("sync", 1) as node:
        await node.tell(1)
        name = segments_folder(ALICE) + node.files()[0]
        data = bytearray(node.content(node.files()[0]))
        data[-1] ^= 1
        node.store.objects.put(name, bytes(data))
        assert await node.come_in() == ["u1"], "the journal has it"
        await node.die(disk=True)
    async with opened("sync", 2, "b") as node:
        with pytest.raises(JournalCorrupt, match=rf"{name}.*CRC32"):
            await node.come_in()
