"""What a shard makes of damage: the same bits where version and journal still hold them, else an alarm, never less."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from storage.errors import BadMemoryFile, JournalError, StoreUnavailable
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import commit_manifest, restore
from storage.snapshot_manifest import PartInfo
from storage.store import MemoryStore
from tests.actors.test_keeper import ALICE, BOB, opened, piece, same, state
from tests.storage.samples import NOON

ID = "20261122T120000Z-0a1b2c"


def files(options, key: UserKey = ALICE) -> list[Path]:
    """The user's versions, oldest first."""
    return sorted(Path(options.store_url.removeprefix("file://")).glob(f"users/{key}/*.titanmem"))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


async def told(options, times: int, key: UserKey = ALICE) -> tuple:
    """A user told something so many times, and stored each time."""
    async with opened(options) as keeper:
        for seed in range(1, times + 1):
            await keeper.ingest(piece(key, seed))
            await keeper.flush()
        return await state(keeper, key)


async def counted(keeper, name: str) -> float:
    """The sum of a counter's series."""
    lines = (await keeper.metrics()).decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"titan:{name}_total{{"))


async def test_what_only_the_newest_two_held_is_lost_with_an_alarm(options, caplog):
    await told(options, 4)
    for path in files(options)[-2:]:
        damage(path)
    async with opened(options, epoch=2) as keeper:
        with caplog.at_level(logging.ERROR):
            after = await state(keeper, ALICE)
        # Version 2 holds 2 pieces; the journal was cut behind version 3 and holds the fourth.
        chunks = after[3] // 4
        assert await counted(keeper, "lost_chunks") == chunks
        assert f"chunks {2 * chunks + 1} to {3 * chunks} are lost" in caplog.text
        assert after[4] == 3 * 50, "what the journal holds is there"
    async with opened(options, epoch=3) as keeper:
        assert same(await state(keeper, ALICE), after)
        assert await counted(keeper, "lost_chunks") == 0, "said once"


async def test_a_lost_version_without_a_journal_is_an_alarm(options, tmp_path):
    before = await told(options, 2)
    damage(files(options)[-1])
    async with opened(options, epoch=2, journal_dir=f"{tmp_path}/another") as keeper:
        after = await state(keeper, ALICE)
        assert await counted(keeper, "lost_chunks") == before[3] - before[3] // 2
        assert after[3] == before[3], "no chunk id is given twice"


async def test_an_undone_rollback_is_an_alarm(options):
    async with opened(options) as keeper:
        for seed in (1, 2):
            await keeper.ingest(piece(ALICE, seed))
            await keeper.flush()
        await keeper.rollback(ALICE, None)
    damage(files(options)[-1])
    async with opened(options, epoch=2) as keeper:
        await state(keeper, ALICE)
        assert await counted(keeper, "lost_chunks") == 1


async def test_a_first_version_that_is_damaged_costs_nothing(options):
    before = await told(options, 1)
    damage(files(options)[0])
    async with opened(options, epoch=2) as keeper:
        after = await state(keeper, ALICE)
        assert torch.equal(after[0], before[0])
        assert after[3:] == before[3:]
        assert (await counted(keeper, "rollbacks"), await counted(keeper, "lost_chunks")) == (1, 0)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"junk"), lambda path: path.unlink()])
async def test_a_damaged_head_is_made_anew(options, change):
    before = await told(options, 2)
    change(files(options)[0].parent / "HEAD")
    async with opened(options, epoch=2) as keeper:
        assert same(await state(keeper, ALICE), before)
        assert (await counted(keeper, "rollbacks"), await counted(keeper, "lost_chunks")) == (1, 0)


async def test_a_head_that_is_damaged_under_a_resident(options):
    async with opened(options) as keeper:
        await told_more(keeper, 1)
        (files(options)[0].parent / "HEAD").write_bytes(b"junk")
        await told_more(keeper, 2)
        assert [line["version"] for line in await keeper.versions(ALICE)] == [2, 1]


@pytest.mark.parametrize("with_head", [True, False])
async def test_without_a_readable_version_nobody_begins_anew(options, tmp_path, with_head):
    await told(options, 1)
    damage(files(options)[0])
    if not with_head:
        (files(options)[0].parent / "HEAD").write_bytes(b"junk")
    async with opened(options, epoch=2, journal_dir=f"{tmp_path}/another") as keeper:
        for _ in range(2):
            with pytest.raises(BadMemoryFile):
                await keeper.ingest(piece(ALICE, 2))


async def test_one_users_damage_stops_no_backup(options, tmp_path):
    before = await told(options, 2)
    await told(options, 1, BOB)
    damage(files(options)[-1])
    damage(files(options, BOB)[-1])
    url = f"file://{tmp_path}/snapshots"
    async with opened(options, epoch=2, journal_dir=f"{tmp_path}/another") as keeper:
        plain = await keeper.snapshot_part(ID, url, False)
        assert await counted(keeper, "rollbacks") == 3
    part = PartInfo.from_dict({name: value for name, value in plain.items() if name != "base"})
    target = open_objects(url)
    commit_manifest(target, ID, [part], created_at=NOON, base=plain["base"])
    empty = MemoryStore(open_objects(f"file://{tmp_path}/empty"))
    assert restore(target, ID, empty, epoch=1)["restored"] == 1, "bob has no good version"
    assert empty.get(ALICE).last_chunk_id == before[3] // 2


async def test_a_write_of_unknown_outcome_is_not_tried_for_ever(options, monkeypatch):
    async with opened(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        await keeper.ingest(piece(BOB, 1))
        objects = keeper.roster.vault.store.objects._objects  # type: ignore[attr-defined]
        swap = objects._swap_in

        def lands_and_fails(temporary: Path, path: Path) -> None:
            swap(temporary, path)
            if path.name == "HEAD" and path.parent.name == "alice":
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(objects, "_swap_in", lands_and_fails)
        with pytest.raises(StoreUnavailable):
            await keeper.flush()
        assert files(options, BOB), "one who can not be stored keeps nobody else from it"
        monkeypatch.undo()
        assert await keeper.flush() == 1
        assert await keeper.flush() == 0


async def test_a_failed_trim_is_no_failed_store(options, monkeypatch):
    async with opened(options) as keeper:
        await told_more(keeper, 1)
        journal = keeper.roster.journal

        def fail(key, chunk):
            raise JournalError("disk I/O error")

        monkeypatch.setattr(journal, "trim", fail)
        await told_more(keeper, 2)
        monkeypatch.undo()
        assert len(journal.pending(ALICE)) == 2
        await told_more(keeper, 3)
        assert len(journal.pending(ALICE)) == 1
        before = await state(keeper, ALICE)
    async with opened(options, epoch=2) as keeper:
        assert torch.equal((await state(keeper, ALICE))[0], before[0])


async def told_more(keeper, seed: int) -> None:
    await keeper.ingest(piece(ALICE, seed))
    assert await keeper.flush() == 1
