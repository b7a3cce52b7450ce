"""Who is forgotten is gone from every file: searched for byte by byte, on each kind of store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from actors.errors import MemoryFrozen
from actors.keeper import MemoryKeeper, open_keeper
from actors.messages import IngestCall
from actors.options import KeeperOptions
from storage.errors import NoSuchMemory, StoreUnavailable
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import PartInfo, commit_manifest, new_snapshot_id, restore
from storage.snapshot_marks import marked_at
from storage.store import open_store
from tests.actors.test_keeper import crash, piece, same, state
from tests.actors.traces import Traces, in_bucket, in_folder, in_redis

ZAPHOD = UserKey("local", "zaphod-beeblebrox")
NAMESAKE = UserKey("acme", "zaphod-beeblebrox")
TRILLIAN = UserKey("local", "trillian")

Places = Callable[[], Iterator[tuple[str, bytes]]]


@pytest.fixture(params=["file", "s3", "redis"])
def place(
    request: pytest.FixtureRequest, options: KeeperOptions, tmp_path: Path
) -> tuple[KeeperOptions, Places]:
    """A keeper's options over each kind of store, and all the bytes that store and journals have."""
    journals = tmp_path / "journal"
    backups = f"file://{tmp_path}/snapshots"
    if request.param == "file":
        url = f"file://{tmp_path}/store"

        def there() -> Iterator[tuple[str, bytes]]:
            yield from in_folder(tmp_path / "store")
    elif request.param == "s3":
        server = request.getfixturevalue("s3_server")
        url = request.getfixturevalue("s3_url")
        prefix = url.partition("titanmem/")[2].partition("?")[0]

        def there() -> Iterator[tuple[str, bytes]]:
            yield from in_bucket(server.endpoint, "titanmem", prefix)
    else:
        server = request.getfixturevalue("shared_redis")
        url = request.getfixturevalue("redis_url")

        def there() -> Iterator[tuple[str, bytes]]:
            yield from in_redis(server, (ZAPHOD, NAMESAKE))

    def everywhere() -> Iterator[tuple[str, bytes]]:
        yield from there()
        yield from ((f"journal {name}", data) for name, data in in_folder(journals))

    changed = replace(
        options,
        store_url=url,
        durability="replicated",
        replicate_interval_s=0.05,
        slots=4,
        snapshots_url=backups,
    )
    return changed, everywhere


@asynccontextmanager
async def opened(options: KeeperOptions, **changes) -> AsyncIterator[MemoryKeeper]:
    keeper = await open_keeper(replace(options, **changes))
    try:
        yield keeper
    finally:
        await keeper.close()


def told(key: UserKey, seed: int) -> IngestCall:
    return piece(key, seed, 60)


async def lived(keeper: MemoryKeeper, key: UserKey, first: int) -> Traces:
    """Stored versions, and tokens that only the journal and the store's segments have; what all that looks like."""
    traces = Traces(key=key)
    store = keeper.roster.vault.store
    for seed in range(first, first + 5):
        call = told(key, seed)
        await keeper.ingest(call)
        traces.told(call.tokens, f"piece {seed}")
        if seed < first + 3:
            await keeper.flush()
            traces.rests(store.get_bytes(key), f"version {seed}")
    await asyncio.sleep(0.3)
    assert not keeper.roster.replicator.backlog()
    return traces


async def test_nothing_is_left_but_the_tombstone(place: tuple[KeeperOptions, Places]) -> None:
    options, everywhere = place
    async with opened(options) as keeper:
        traces = await lived(keeper, ZAPHOD, 1)
        other, neighbour = await lived(keeper, NAMESAKE, 11), await lived(keeper, TRILLIAN, 21)
        before = [await state(keeper, key) for key in (NAMESAKE, TRILLIAN)]
        hits = traces.found(everywhere())
        assert len(hits) > 0.7 * len(traces.needles), "it was there, or not finding it says nothing"
        assert any("tokens" in label for label in hits)
        assert any("packed theta_val" in label for label in hits)
        assert any("packed replay" in label for label in hits)

        receipt = await keeper.forget(ZAPHOD)
        assert receipt["memory_version"] == 5
        assert receipt["slot"] is True
        assert receipt["journal_rows"]["segments"] == receipt["journal_entries"] > 0
        assert receipt["journal_rows"]["updates"] == 5
        assert sum(name.endswith(".titanmem") for name in receipt["removed"]) >= 3
        assert any(name.startswith(f"journal/{ZAPHOD}/") for name in receipt["removed"])
        assert receipt["tombstone"] is receipt["snapshots_marked"] is True

        assert traces.found(everywhere()) == {}
        for key, was in zip((NAMESAKE, TRILLIAN), before, strict=True):
            assert same(await state(keeper, key), was)
        assert other.found(everywhere())
        assert neighbour.found(everywhere())
    assert traces.found(everywhere()) == {}, "nor does an orderly end write anything"
    async with opened(options, epoch=2) as keeper:
        with pytest.raises(NoSuchMemory):
            await keeper.describe(ZAPHOD)
        for key, was in zip((NAMESAKE, TRILLIAN), before, strict=True):
            assert same(await state(keeper, key), was)


async def test_who_is_not_resident_frozen_damaged_or_unknown(options: KeeperOptions, tmp_path: Path) -> None:
    options = replace(options, slots=4)
    async with opened(options) as keeper:
        traces = await lived(keeper, ZAPHOD, 1)
        async with keeper.roster.turn(ZAPHOD) as resident:
            resident.frozen = True
            keeper.roster.watch.frozen.add(ZAPHOD)
        with pytest.raises(MemoryFrozen):
            await keeper.ingest(told(ZAPHOD, 9))
        assert (await keeper.forget(ZAPHOD))["slot"] is True
        assert ZAPHOD not in keeper.roster.watch.frozen
        assert traces.found(in_folder(tmp_path / "store")) == {}
        assert not (await keeper.ingest(told(ZAPHOD, 9))).duplicate, "thawed, and begun anew"
        await keeper.forget(ZAPHOD)
        traces = await lived(keeper, ZAPHOD, 31)
    for head in (tmp_path / "store").rglob("zaphod*/HEAD"):
        head.write_bytes(b"damaged")
    for file in (tmp_path / "store").rglob("*.titanmem"):
        file.write_bytes(file.read_bytes()[:-9])
    async with opened(options, epoch=2) as keeper:
        receipt = await keeper.forget(ZAPHOD)
        assert receipt["slot"] is False, "nobody is brought in to be erased"
        assert sum(name.endswith(".titanmem") for name in receipt["removed"]) >= 3
        assert (
            traces.found(in_folder(tmp_path)) == {}
            or set(traces.found(in_folder(tmp_path / "store"))) == set()
        )
        unknown = await keeper.forget(UserKey("local", "nobody"))
        assert (unknown["removed"], unknown["memory_version"], unknown["tombstone"]) == ([], 0, True)
        again = await keeper.forget(ZAPHOD)
        assert (again["removed"], again["journal_entries"]) == ([], 0), "asked again, there is nothing left"


async def test_no_slot_is_needed_to_be_erased(options: KeeperOptions) -> None:
    async with opened(options, slots=1) as keeper:
        await keeper.ingest(told(ZAPHOD, 1))
        await keeper.ingest(told(TRILLIAN, 2))
        async with keeper.roster.turn(TRILLIAN):
            async with asyncio.timeout(10):
                assert (await keeper.forget(ZAPHOD))["memory_version"] == 1


async def test_forgotten_in_the_middle_of_being_told(options: KeeperOptions, tmp_path: Path) -> None:
    """Each piece is before the erasure, and gone, or after it, and the new memory's; none is half in either."""
    async with opened(options, slots=4) as keeper:
        pieces = [told(ZAPHOD, seed) for seed in range(1, 21)]
        writing = [asyncio.create_task(keeper.ingest(call)) for call in pieces[:10]]
        await asyncio.sleep(0.02)
        forgetting = asyncio.create_task(keeper.forget(ZAPHOD))
        await asyncio.sleep(0)
        writing += [asyncio.create_task(keeper.ingest(call)) for call in pieces[10:]]
        outcomes = await asyncio.gather(*writing)
        await forgetting
        versions = [outcome.memory_version for outcome in outcomes]
        begun = versions.index(1, 1)
        assert versions == [*range(1, begun + 1), *range(1, len(pieces) - begun + 1)]
        await keeper.flush()
        after = await state(keeper, ZAPHOD)
        gone = Traces(key=UserKey("local", "not-looked-for"))
        for call in pieces[:begun]:
            gone.told(call.tokens, call.update_id)
        assert gone.found(in_folder(tmp_path)) == {}
    other = replace(options, store_url=f"file://{tmp_path}/other", journal_dir=f"{tmp_path}/other-journal")
    async with opened(other) as keeper:
        for call in pieces[begun:]:
            await keeper.ingest(call)
        assert same(await state(keeper, ZAPHOD), after), "the new memory knows nothing of the old one"


async def test_an_old_update_that_comes_late_begins_a_new_memory(options: KeeperOptions) -> None:
    """Which updates there were is erased, too: a client that goes on sending goes on telling."""
    async with opened(options) as keeper:
        await keeper.ingest(told(ZAPHOD, 1))
        assert (await keeper.ingest(told(ZAPHOD, 1))).duplicate
        await keeper.forget(ZAPHOD)
        late = await keeper.ingest(told(ZAPHOD, 1))
        assert (late.duplicate, late.memory_version) == (False, 1)


async def test_cut_off_after_the_tombstone_it_is_ended_by_whoever_comes(
    place: tuple[KeeperOptions, Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, everywhere = place
    keeper = await open_keeper(options)
    traces = await lived(keeper, ZAPHOD, 1)

    def dies(*_: object) -> None:
        raise StoreUnavailable("the process is killed here")

    with monkeypatch.context() as patch:
        patch.setattr("actors.erasure.erase_rest", dies)
        with pytest.raises(StoreUnavailable):
            await keeper.forget(ZAPHOD)
    await crash(keeper)
    assert traces.found(everywhere())
    async with opened(options, epoch=2) as keeper:
        fresh = told(ZAPHOD, 77)
        outcome = await keeper.ingest(fresh)
        assert outcome.memory_version == 1, "the erased memory does not come back"
        assert {label for label in traces.found(everywhere())} <= {"name"}
        await keeper.flush()
    async with opened(options, epoch=3) as keeper:
        assert (await state(keeper, ZAPHOD))[4] == len(fresh.tokens), "what was told since is kept"
        await keeper.forget(ZAPHOD)
        assert traces.found(everywhere()) == {}


async def snapshot_of(keeper: MemoryKeeper, url: str) -> str:
    target, now = open_objects(url), datetime.now(UTC)
    snapshot_id = new_snapshot_id(now)
    part = await keeper.snapshot_part(snapshot_id, url, False)
    info = PartInfo.from_dict({name: value for name, value in part.items() if name != "base"})
    commit_manifest(target, snapshot_id, [info], created_at=now, base=part["base"])
    return snapshot_id


async def test_backups_are_marked_and_the_receipt_names_those_that_hold_the_user(
    options: KeeperOptions, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/snapshots"
    async with opened(options, snapshots_url=url, slots=4) as keeper:
        await keeper.ingest(told(TRILLIAN, 1))
        without = await snapshot_of(keeper, url)
        await keeper.ingest(told(ZAPHOD, 2))
        held = await snapshot_of(keeper, url)
        receipt = await keeper.forget(ZAPHOD)
        assert [line["id"] for line in receipt["snapshots"]] == [held]
        assert receipt["snapshots"][0]["kept_until"] > receipt["snapshots"][0]["created_at"]
        assert without not in str(receipt)
    new = open_store(f"file://{tmp_path}/after-the-disaster")
    report = restore(open_objects(url), held, new, epoch=9)
    assert report["forgotten"] == [str(ZAPHOD)], "the store that had the tombstone is lost; the mark is not"
    assert list(new.users()) == [TRILLIAN]
    assert new.forgotten_at(ZAPHOD) is not None, "and it is known to the new store"


async def test_an_erasure_that_reached_no_backup_is_marked_by_the_next_one(
    options: KeeperOptions, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/snapshots"
    (tmp_path / "snapshots").write_text("a file where the folder should be")
    async with opened(options, snapshots_url=url) as keeper:
        await keeper.ingest(told(ZAPHOD, 1))
        receipt = await keeper.forget(ZAPHOD)
        assert receipt["snapshots_marked"] is False
        assert "snapshots" in receipt["snapshots_error"]
        (tmp_path / "snapshots").unlink()
        await snapshot_of(keeper, url)
        assert marked_at(open_objects(url), ZAPHOD) == keeper.roster.vault.store.forgotten_at(ZAPHOD)


async def test_no_line_of_the_log_holds_what_was_told(
    options: KeeperOptions, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with opened(options, durability="replicated", replicate_interval_s=0.05, slots=4) as keeper:
            call = told(ZAPHOD, 1)
            await keeper.ingest(call)
            await keeper.ingest(call)
            monkeypatch.setattr(
                keeper.roster.vault, "put_state", lambda *_: (_ for _ in ()).throw(StoreUnavailable("away"))
            )
            with pytest.raises(StoreUnavailable):
                await keeper.flush()
            monkeypatch.undo()
            await keeper.flush()
            await keeper.forget(ZAPHOD)
    ids = call.tokens.tolist()
    said = caplog.text
    for start in range(0, len(ids) - 4):
        run = ids[start : start + 4]
        assert not any(mark.join(map(str, run)) in said for mark in (", ", " ", ","))
        assert repr(np.asarray(run, "<i4").tobytes())[2:-1] not in said
