"""`titanmem snapshot restore` on a store that a cluster serves on: refused, or the cluster is shut out; never mixed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from actors.keeper import MemoryKeeper, open_keeper
from actors.options import KeeperOptions
from actors.ownership import Owner, claim, confirm
from cluster.shutout import check_shut_out, owners, shut_out
from storage.errors import Fenced
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import PartInfo, commit_manifest, new_snapshot_id
from storage.store import MemoryStore, open_store
from tests.actors.test_keeper import crash, piece, state
from tests.cluster.test_cli_snapshot import document, run
from tests.tiny_model import tiny_folder

ALICE, BOB = UserKey("local", "alice"), UserKey("local", "bob")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def options(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> KeeperOptions:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TITANMEM_SNAPSHOTS", f"file://{tmp_path}/snapshots")
    return KeeperOptions(
        model=str(model), store_url=f"file://{tmp_path}/store", journal_dir=f"{tmp_path}/journal", shard="shard-0",
        epoch=1, slots=4, spec_overrides={"surprise_threshold": 0.05}, idle_flush_s=3600.0,
        snapshots_url=f"file://{tmp_path}/snapshots", consolidate_after_s=0.0,
    )  # fmt: skip


def started(store: MemoryStore, cluster: str = "session_one") -> Owner:
    """A cluster's claim of its only shard, as a cold start makes it."""
    return claim(store, "shard-0", cluster=cluster, incarnation="i", take_over=True)


@asynccontextmanager
async def serving(options: KeeperOptions) -> AsyncIterator[MemoryKeeper]:
    owner = started(open_store(options.store_url))
    keeper = await open_keeper(replace(options, epoch=owner.epoch))
    try:
        yield keeper
    finally:
        await crash(keeper)


async def snapshot_of(keeper: MemoryKeeper) -> str:
    url, now = keeper.options.snapshots_url, datetime.now(UTC)
    snapshot_id = new_snapshot_id(now)
    part = await keeper.snapshot_part(snapshot_id, url, False)
    info = PartInfo.from_dict({name: value for name, value in part.items() if name != "base"})
    return commit_manifest(open_objects(url), snapshot_id, [info], created_at=now, base=part["base"]).id


async def test_a_cluster_that_serves_is_refused_or_shut_out_and_what_it_says_later_mixes_with_nothing(
    options: KeeperOptions,
) -> None:
    store = open_store(options.store_url)
    async with serving(options) as keeper:
        epoch = keeper.options.epoch
        await keeper.ingest(piece(ALICE, 1))
        snapshot_id = await snapshot_of(keeper)
        then = await state(keeper, ALICE)
        for seed in (2, 3):
            await keeper.ingest(piece(ALICE, seed))
            await keeper.ingest(piece(BOB, seed))

        refused = run("restore", snapshot_id, "--user", "carol", "--store", options.store_url)
        assert refused.exit_code == 1
        assert "shard-0 of cluster session_one has this store" in refused.stderr
        confirm(store, "shard-0", epoch)  # and the cluster serves on
        forced = document("restore", snapshot_id, "--user", "alice", "--store", options.store_url, "--force")
        assert forced["restored"] == 1

        with pytest.raises(Fenced):
            confirm(store, "shard-0", epoch)  # what every acknowledgement passes
        await keeper.ingest(piece(ALICE, 4))  # is never acknowledged
        with pytest.raises(Fenced):
            async with keeper.roster.turn(ALICE) as resident:
                await keeper.roster.store(resident)
    async with serving(options) as keeper:
        now = await state(keeper, ALICE)
        assert now[0].equal(then[0])
        assert now[1] == then[1]
        assert now[3:] == then[3:], "the snapshot's memory, and nothing of the journal from after it"
        await keeper.ingest(piece(ALICE, 5))
        await keeper.flush()
        assert (await state(keeper, BOB))[4] == 100, "whom nobody restored is as acknowledged"


async def test_an_empty_store_of_a_cluster_wants_to_be_called_empty(options: KeeperOptions) -> None:
    async with serving(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        snapshot_id = await snapshot_of(keeper)
    other = f"{options.store_url}-2"
    store = open_store(other)
    owner = started(store, "session_two")
    where = ("restore", snapshot_id, "--store", other)
    assert run(*where).exit_code == 1
    assert list(store.users()) == []
    confirm(store, "shard-0", owner.epoch)
    assert document(*where, "--into-empty")["restored"] == 1
    with pytest.raises(Fenced):
        confirm(store, "shard-0", owner.epoch)
    full = run(*where, "--into-empty")
    assert full.exit_code == 1
    assert "has a memory of local/alice already" in full.stderr
    assert document(*where, "--force")["restored"] == 1


async def test_what_can_not_be_restored_costs_no_cluster_its_shards(
    options: KeeperOptions, tmp_path: Path
) -> None:
    store = open_store(options.store_url)
    async with serving(options) as keeper:
        await keeper.ingest(piece(ALICE, 1))
        snapshot_id = await snapshot_of(keeper)
        for part in (tmp_path / "snapshots").rglob("*.parquet"):
            part.write_bytes(part.read_bytes()[:-1])
        assert run("restore", snapshot_id, "--store", options.store_url, "--force").exit_code == 1
        confirm(store, "shard-0", keeper.options.epoch)


def test_a_cluster_that_starts_during_a_restore_is_noticed(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    before = started(store)
    epoch = shut_out(store, above=40)
    assert epoch > max(before.epoch, 40)
    assert owners(store) == []
    check_shut_out(store, epoch)
    started(store, "session_two")
    with pytest.raises(Fenced, match="started on this store meanwhile"):
        check_shut_out(store, epoch)
