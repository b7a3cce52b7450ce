"""A part is written while users are served: each user once, at a version that there was, and nobody waits for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from actors.keeper import MemoryKeeper, open_keeper
from actors.options import KeeperOptions
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import PartInfo, commit_manifest, new_snapshot_id
from storage.snapshot_part import open_part
from storage.titanmem import decode
from tests.actors.crash_life import digest, digest_of
from tests.actors.test_keeper import crash, piece

USERS = [UserKey("local", f"u{n}") for n in range(6)]
PIECES = 12


@asynccontextmanager
async def opened(options: KeeperOptions, **changes) -> AsyncIterator[MemoryKeeper]:
    keeper = await open_keeper(replace(options, consolidate_after_s=0.0, **changes))
    try:
        yield keeper
    finally:
        await keeper.close()


def call_of(number: int, n: int):
    return piece(USERS[number], 100 * number + n, 30)


async def test_every_user_is_in_it_once_at_a_version_that_there_was(
    options: KeeperOptions, tmp_path: Path
) -> None:
    """More users than slots, and two of them being told something all the time."""
    order = random.Random(7)
    url, ids, acknowledged = f"file://{tmp_path}/snapshots", [], [0] * len(USERS)
    async with opened(options, slots=3, persist_tokens=60) as keeper:

        async def tell(number: int) -> None:
            for n in range(1, PIECES + 1):
                await keeper.ingest(call_of(number, n))
                acknowledged[number] = n
                await asyncio.sleep(order.uniform(0, 0.02))

        async def back_up() -> None:
            for _ in range(3):
                before = list(acknowledged)
                now = datetime.now(UTC)
                snapshot_id = new_snapshot_id(now)
                part = await keeper.snapshot_part(snapshot_id, url, False)
                info = PartInfo.from_dict({name: value for name, value in part.items() if name != "base"})
                commit_manifest(open_objects(url), snapshot_id, [info], created_at=now, base=part["base"])
                ids.append((info.name, before))

        async def lane(numbers: range) -> None:  # with three slots and two lanes there is always one to evict
            for number in numbers:
                await tell(number)

        await asyncio.gather(back_up(), lane(range(0, 6, 2)), lane(range(1, 6, 2)))
    wanted = {}
    other = f"file://{tmp_path}/undisturbed", f"{tmp_path}/undisturbed-journal"
    async with opened(options, slots=6, store_url=other[0], journal_dir=other[1]) as keeper:
        for number, key in enumerate(USERS):
            for n in range(1, PIECES + 1):
                await keeper.ingest(call_of(number, n))
                wanted[key, n] = await digest_of(keeper, key)
    for name, before in ids:
        with open_part(open_objects(url), name) as reader:
            rows = [decode(row.data, name=row.name) for row in reader.rows()]
        assert len({memory.key for memory in rows}) == len(rows), "each user once"
        held = {memory.key: memory.memory_version for memory in rows}
        for number, key in enumerate(USERS):
            assert held.get(key, 0) >= before[number], "all that was acknowledged when it was asked for"
        for memory in rows:
            assert digest(memory) == wanted[memory.key, memory.memory_version], memory.key


async def test_who_asks_again_gets_the_part_that_is_there(options: KeeperOptions, tmp_path: Path) -> None:
    url, snapshot_id = f"file://{tmp_path}/snapshots", new_snapshot_id(datetime.now(UTC))
    async with opened(options) as keeper:
        await keeper.ingest(call_of(0, 1))
        first, again = await asyncio.gather(
            keeper.snapshot_part(snapshot_id, url, False), keeper.snapshot_part(snapshot_id, url, False)
        )
        assert first == again
        await keeper.ingest(call_of(0, 2))
        assert await keeper.snapshot_part(snapshot_id, url, False) == first
    async with opened(options, epoch=2) as keeper:
        assert await keeper.snapshot_part(snapshot_id, url, False) == first, "nor does a restart make it anew"
        for path in (tmp_path / "snapshots").rglob("*.parquet"):
            path.write_bytes(path.read_bytes()[:-1])
        anew = await keeper.snapshot_part(snapshot_id, url, False)
        assert anew["name"] != first["name"], (
            "a part that is not whole is made again, under the new epoch's name"
        )


async def test_users_whose_newest_tokens_are_in_the_stores_segments_only_are_in_it(
    options: KeeperOptions, tmp_path: Path
) -> None:
    """The node was lost with its journal; nobody has asked for the user since."""
    url, snapshot_id = f"file://{tmp_path}/snapshots", new_snapshot_id(datetime.now(UTC))
    keeper = await open_keeper(replace(options, durability="sync"))
    await keeper.ingest(call_of(0, 1))
    await crash(keeper)
    async with opened(options, epoch=2, durability="sync", journal_dir=f"{tmp_path}/another") as keeper:
        assert (await keeper.snapshot_part(snapshot_id, url, False))["users"] == 1


async def test_a_shard_whose_slots_are_all_served_is_waited_for(
    options: KeeperOptions, tmp_path: Path
) -> None:
    url, snapshot_id = f"file://{tmp_path}/snapshots", new_snapshot_id(datetime.now(UTC))
    keeper = await open_keeper(options)
    await keeper.ingest(call_of(0, 1))
    await crash(keeper)
    async with opened(options, epoch=2, slots=1) as keeper:
        async with keeper.roster.turn(USERS[1]):
            making = asyncio.create_task(keeper.snapshot_part(snapshot_id, url, False))
            await asyncio.sleep(0.3)
            assert not making.done()
        async with asyncio.timeout(20):
            assert (await making)["users"] == 1


@pytest.mark.parametrize("erased", [False, True])
async def test_who_was_being_erased_when_the_shard_died_is_not_in_it(
    options: KeeperOptions, tmp_path: Path, erased: bool
) -> None:
    url, snapshot_id = f"file://{tmp_path}/snapshots", new_snapshot_id(datetime.now(UTC))
    keeper = await open_keeper(options)
    await keeper.ingest(call_of(0, 1))
    await keeper.flush()
    if erased:
        keeper.roster.vault.store.begin_erasure(USERS[0], epoch=1)
    await crash(keeper)
    async with opened(options, epoch=2) as keeper:
        assert (await keeper.snapshot_part(snapshot_id, url, False))["users"] == (0 if erased else 1)
        assert bool(list((tmp_path / "store").rglob("*.titanmem"))) is not erased
