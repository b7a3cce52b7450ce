"""Two owners of one user who do not know of each other, on real stores: the newer one's writes are what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.keeper import MemoryKeeper, collect, open_keeper
from storage.errors import Fenced, StoreError, StoreUnavailable
from storage.head import Head
from tests.actors.test_keeper import ALICE, chat, crash, opened, piece, same, state

HEAD = "users/local/alice/HEAD"


@pytest.fixture(params=["file", "s3", "redis"])
def shared(request, options, tmp_path):
    """Options over each kind of store."""
    if request.param == "file":
        return options
    return replace(options, store_url=request.getfixturevalue(f"{request.param}_url"))


def elsewhere(options, epoch: int):
    """The next owner, on a disk of its own."""
    return replace(options, epoch=epoch, journal_dir=f"{options.journal_dir}-{epoch}")


async def abandon(keeper: MemoryKeeper) -> None:
    """As a process that is killed: nothing more is stored."""
    await crash(keeper)


async def test_an_old_owner_cannot_store_a_first_version(shared):
    old = await open_keeper(shared)
    for seed in (1, 2, 3):
        await old.ingest(piece(ALICE, seed))
    new = await open_keeper(elsewhere(shared, 2))
    await new.ingest(piece(ALICE, 4))
    told = await state(new, ALICE)
    with pytest.raises(Fenced):
        await old.flush()  # it was frozen, and comes back
    await abandon(old)
    await abandon(new)
    async with opened(replace(elsewhere(shared, 2), epoch=3)) as again:
        assert same(await state(again, ALICE), told), "what the new owner has acknowledged is all there"
        await again.flush()
        assert [v["epoch"] for v in await again.versions(ALICE)] == [3]


async def test_whose_first_version_comes_in_meanwhile_is_gone_on_from(options, model):
    """The old owner begins, and stores, between the new one's look at the store and its first write."""
    hi = chat(model, ALICE, ("user", "Hi."), memory="read_only", max_tokens=1)
    old = await open_keeper(options)
    await collect(old.chat(hi))
    async with opened(elsewhere(options, 2)) as new:
        await collect(new.chat(hi))
        await old.ingest(piece(ALICE, 1))
        told = await state(old, ALICE)
        await old.flush()
        with pytest.raises(StoreUnavailable, match="just come in"):
            await new.ingest(piece(ALICE, 2))
        assert same(await state(new, ALICE), told)
        assert not (await new.ingest(piece(ALICE, 2))).duplicate
        await old.ingest(piece(ALICE, 3))
        with pytest.raises(Fenced):
            await old.flush()
    await abandon(old)


async def test_who_is_looked_up_leaves_no_trace_and_who_is_erased_begins_anew(options, model):
    async with opened(options) as keeper:
        store = keeper.roster.vault.store
        await collect(keeper.chat(chat(model, ALICE, ("user", "Hi."), memory="read_only", max_tokens=1)))
        with pytest.raises(StoreError):
            await keeper.describe(ALICE)
        assert store.read_record(HEAD) is None
        await keeper.ingest(piece(ALICE, 1))
        record = store.read_record(HEAD)
        assert record is not None
        assert Head.from_record(record[0], HEAD) == Head(epoch=1, versions=(), begun=True)
        await keeper.forget(ALICE)
        assert store.read_record(HEAD) is None
        await keeper.ingest(piece(ALICE, 2))
        assert store.tombstone(ALICE) is None
        assert await keeper.flush() == 1
        told = await state(keeper, ALICE)
    async with opened(options, epoch=2) as keeper:
        assert same(await state(keeper, ALICE), told)


async def test_what_a_crash_left_of_versions_is_swept_after_the_next_one(options):
    keeper = await open_keeper(options)
    await keeper.ingest(piece(ALICE, 1))
    await keeper.flush()
    store = keeper.roster.vault.store
    listed = store.versions(ALICE)[0]
    orphan = f"users/local/alice/{replace(listed, epoch=0).file}"
    beyond = f"users/local/alice/{replace(listed, version=99, epoch=0).file}"
    ours = f"users/local/alice/{replace(listed, version=1, epoch=2).file}"
    for name in (orphan, beyond, ours):
        store.objects.put(name, b"half a memory")
    await keeper.ingest(piece(ALICE, 2))
    await abandon(keeper)
    async with opened(options, epoch=2) as keeper:
        await state(keeper, ALICE)
        assert await keeper.flush() == 1
        left = [info.name for info in store.objects.list("users/local/alice/")]
        files = [f"users/local/alice/{info.file}" for info in store.versions(ALICE)]
        assert sorted(left) == sorted([*files, beyond, ours, HEAD])
