"""A process before it is a shard, and when it becomes one; without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.errors import ShardNotOpen
from actors.options import KeeperOptions, ShardOptions
from actors.ownership import claim
from actors.process import ShardProcess
from storage.names import BUCKETS, UserKey
from storage.store import open_store

ALICE = UserKey("local", "alice")
KEEPER = "tests.actors.fake_keeper:open_keeper"


def options(folder: Path) -> ShardOptions:
    store = open_store(f"file://{folder}/store")
    owner = claim(store, "shard-0", cluster="test", incarnation="process-0", take_over=True)
    keeper = KeeperOptions(
        model="unused",
        store_url=store.url,
        journal_dir=str(folder / "journal"),
        shard="shard-0",
        epoch=owner.epoch,
    )
    return ShardOptions(keeper=keeper, buckets=frozenset(range(BUCKETS)), map_version=1, open_keeper=KEEPER)


async def test_a_spare_says_so_and_serves_nobody() -> None:
    process = ShardProcess()
    assert (await process.ping())["state"] == "spare"
    with pytest.raises(ShardNotOpen, match="spare"):
        await process.describe(ALICE, 1)
    assert not await process.cancel("r")
    await process.close()


async def test_it_becomes_one_shard_and_no_second_one(tmp_path: Path) -> None:
    process = ShardProcess()
    about = await process.become(options(tmp_path))
    assert (about["shard"], about["state"]) == ("shard-0", "ready")
    with pytest.raises(AssertionError, match="shard-0 already"):
        await process.become(options(tmp_path))


async def test_a_model_that_cannot_be_loaded_is_left_to_the_start_of_a_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = ShardProcess()
    await process.warm(KEEPER, str(tmp_path / "none"))
    assert "none" in caplog.text
    assert (await process.ping())["state"] == "spare"
