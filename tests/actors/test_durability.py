"""A whole shard whose node and disk are lost: the same bits come back, as far as each durability promises."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace

import pytest

from actors.keeper import MemoryKeeper, collect, open_keeper
from storage.errors import NotReplicated, StoreUnavailable
from tests.actors.test_keeper import ALICE, chat, crash, live, opened, piece, same, state

SOON_S = 60.0


async def lose(keeper: MemoryKeeper) -> None:
    """The process is killed and its disk is gone."""
    await crash(keeper)
    shutil.rmtree(keeper.options.journal_dir)


async def caught_up(keeper: MemoryKeeper) -> None:
    async with asyncio.timeout(SOON_S):
        while keeper.roster.replicator.backlog():  # noqa: ASYNC110 (the replicator tells nobody when it is done)
            await asyncio.sleep(0.01)


def broken(*_: object, **__: object) -> None:
    raise StoreUnavailable("the store is away")


@pytest.mark.parametrize("durability", ["local", "replicated", "sync"])
async def test_what_comes_back_after_the_loss_of_node_and_disk(options, model, monkeypatch, durability):
    chosen = replace(options, durability=durability, replicate_interval_s=0.2, sync_timeout_s=SOON_S)
    keeper = await open_keeper(chosen)
    await keeper.ingest(piece(ALICE, 0))
    await keeper.flush()
    stored = await state(keeper, ALICE)
    await live(keeper, model)
    told = await state(keeper, ALICE)
    if durability == "replicated":
        await caught_up(keeper)
        monkeypatch.setattr(keeper.roster.vault.store.segments, "put", broken)
        await keeper.ingest(piece(ALICE, 8))
    await lose(keeper)
    async with opened(chosen, epoch=2) as again:
        assert [user["user"] for user in await again.users()] == ["alice"]
        assert same(await state(again, ALICE), stored if durability == "local" else told)
        repeated = await again.ingest(piece(ALICE, 3, 7))
        assert repeated.duplicate is (durability != "local"), "what was not lost is not written again"


async def test_versions_take_the_place_of_segments(options, model):
    chosen = replace(options, durability="sync", sync_timeout_s=SOON_S)
    async with opened(chosen) as keeper:
        segments = keeper.roster.vault.store.segments
        for seed in (1, 2):
            await keeper.ingest(piece(ALICE, seed))
            await keeper.flush()
        before = {piece.first_chunk_id for piece in segments.pieces(ALICE)}
        assert min(before) > 1, "the first piece is in both versions"
        await keeper.ingest(piece(ALICE, 3))
        told = await state(keeper, ALICE)
        newest = max((keeper.roster.vault.store.versions(ALICE)), key=lambda info: info.version)
        assert newest.version == 2
    shutil.rmtree(options.journal_dir)
    async with opened(chosen, epoch=2) as keeper:
        assert same(await state(keeper, ALICE), told)
        receipt = await keeper.forget(ALICE)
        assert any(name.startswith("journal/local/alice/") for name in receipt["removed"])
        assert segments.pieces(ALICE) == []


async def test_sync_ends_with_a_named_error_and_a_retry_is_written_once(options, model, monkeypatch):
    async with opened(options, durability="sync", sync_timeout_s=0.3) as keeper:
        call = chat(model, ALICE, ("user", "my dog's name is Rex7."))
        with monkeypatch.context() as patch:
            patch.setattr(keeper.roster.vault.store.segments, "put", broken)
            with pytest.raises(NotReplicated, match=r"local/alice.*the store is away"):
                await collect(keeper.chat(call))
            with pytest.raises(NotReplicated):
                await keeper.ingest(piece(ALICE, 1))
        told = await state(keeper, ALICE)
        await caught_up(keeper)
        await collect(keeper.chat(call))
        assert (await keeper.ingest(piece(ALICE, 1))).duplicate
        assert same(await state(keeper, ALICE), told)
