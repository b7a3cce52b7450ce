"""Puts whose answer was lost, or that arrive late: the user's next put goes through and what is listed can be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.options import KeeperOptions
from actors.replicator import Replicator
from actors.roster import Roster
from actors.slab import Resident
from actors.vault import Vault
from storage.errors import Fenced, StoreUnavailable
from storage.journal import Journal
from storage.names import UserKey
from storage.objects import Objects, open_objects
from storage.store import MemoryStore
from storage.titanmem import encode
from tests.simulator.chain import LAYOUT, SPEC, ChainSlab, ChainWriter, Null, history

ALICE = UserKey("local", "alice")


class Unsure:
    """`Objects` that once answer nothing to a write of HEAD, which happens, or happens when the next one comes."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self.happens = objects, ""
        self._late: tuple[str, bytes, str | None, bool] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        if not name.endswith("/HEAD"):
            return self._objects.put(name, data)
        happens, self.happens = self.happens, ""
        if happens == "at once":
            self._objects.put(name, data, if_tag=if_tag, if_absent=if_absent)
        elif happens == "late":
            self._late = (name, data, if_tag, if_absent)
        if happens:
            raise StoreUnavailable("no answer")
        if self._late is not None:
            late, self._late = self._late, None
            self._objects.put(late[0], late[1], if_tag=late[2], if_absent=late[3])
        return self._objects.put(name, data, if_tag=if_tag, if_absent=if_absent)


@asynccontextmanager
async def opened(store: MemoryStore, journal: Path, epoch: int) -> AsyncIterator[Roster]:
    slab, figures, written = ChainSlab(2), Null(), Journal(journal)
    options = KeeperOptions(
        model="", store_url="", journal_dir=str(journal.parent), shard="shard-0", epoch=epoch
    )  # fmt: skip
    replicator = Replicator(written, store.segments, options, figures)  # type: ignore[arg-type]
    roster = Roster(
        slab=slab, vault=Vault(store, LAYOUT, epoch, on_damage=pytest.fail), journal=written,
        encoder=SimpleNamespace(spec=SPEC, values_VD=None), figures=figures, persist_tokens=10**6,  # type: ignore[arg-type]
        replicator=replicator,
    )  # fmt: skip
    roster.watch = Null()  # type: ignore[assignment]
    roster.writer = ChainWriter(slab)  # type: ignore[assignment]
    try:
        yield roster
    finally:
        await roster.close()
        roster.journal.close()


async def tell(roster: Roster, resident: Resident, update_id: str) -> None:
    segment = roster.segment(
        resident, update_id=update_id, conversation="", role="document", context=np.zeros(0, np.int32),
        tokens=np.ones(3, np.int32),
    )  # fmt: skip
    assert await roster.append(resident, [segment])
    await roster.fold(resident, segment)


@pytest.mark.parametrize("happens", ["at once", "late"])
async def test_a_put_whose_answer_was_lost_is_repeated_as_it_was(tmp_path: Path, happens: str) -> None:
    objects = Unsure(open_objects(f"file://{tmp_path}/store"))
    store = MemoryStore(objects)  # type: ignore[arg-type]
    async with opened(store, tmp_path / "journal", epoch=1) as roster, roster.turn(ALICE) as resident:
        await tell(roster, resident, "one")
        objects.happens = happens
        with pytest.raises(StoreUnavailable):
            await roster.store(resident)
        assert resident.dirty
        await asyncio.sleep(0.001)  # another time, were the file made anew
        assert await roster.store(resident)
        assert not resident.dirty
        assert [info.version for info in store.versions(ALICE)] == [1]
        assert store.get(ALICE).memory_version == 1, "the file is the one that HEAD lists"


async def test_the_owner_before_stores_nothing_once_the_user_has_come_in_elsewhere(tmp_path: Path) -> None:
    """Else its version would hide what the journal of the newer owner holds. The simulator found it."""
    store = MemoryStore(open_objects(f"file://{tmp_path}/store"))
    async with opened(store, tmp_path / "before", epoch=1) as before, before.turn(ALICE) as old:
        await tell(before, old, "one")
        assert await before.store(old)
        async with opened(store, tmp_path / "after", epoch=2) as after, after.turn(ALICE) as resident:
            await tell(after, resident, "two")
            await tell(before, old, "lost")
            with pytest.raises(Fenced):
                await before.store(old)
    async with opened(store, tmp_path / "after", epoch=3) as again, again.turn(ALICE) as resident:
        assert history(again.slab.written_SHD[resident.slot].chain) == ["one", "two"]  # type: ignore[attr-defined]


async def test_the_owner_before_stores_no_first_version_either(tmp_path: Path) -> None:
    store = MemoryStore(open_objects(f"file://{tmp_path}/store"))
    async with opened(store, tmp_path / "before", epoch=1) as before, before.turn(ALICE) as old:
        await tell(before, old, "one")
        async with opened(store, tmp_path / "after", epoch=2) as after, after.turn(ALICE) as resident:
            await tell(after, resident, "two")
            with pytest.raises(Fenced):
                await before.store(old)
            assert await after.store(resident)
            assert not resident.dirty
            assert [(info.version, info.epoch) for info in store.versions(ALICE)] == [(1, 2)]


async def test_a_head_made_anew_with_a_version_of_our_number_is_gone_on_from(tmp_path: Path) -> None:
    """A file that the owner before could not list any more is listed when HEAD is lost: ours takes the next number."""
    objects = open_objects(f"file://{tmp_path}/store")
    store = MemoryStore(objects)
    async with opened(store, tmp_path / "before", epoch=1) as before, before.turn(ALICE) as old:
        await tell(before, old, "one")
        assert await before.store(old)
        async with opened(store, tmp_path / "after", epoch=2) as after, after.turn(ALICE) as resident:
            await tell(before, old, "lost")
            with pytest.raises(Fenced):
                await before.store(old)
            left = before.vault.image(old, before.slab)
            objects.put(f"users/local/alice/v{left.memory_version:012d}-e00000001.titanmem", encode(left))
            objects.put("users/local/alice/HEAD", b"junk")
            after.vault._on_damage = lambda kind: None
            await tell(after, resident, "two")
            assert await after.store(resident)
            assert not resident.dirty
            assert [(it.version, it.epoch) for it in store.versions(ALICE)] == [(3, 2), (2, 1), (1, 1)]
    async with opened(store, tmp_path / "after", epoch=3) as again, again.turn(ALICE) as resident:
        assert history(again.slab.written_SHD[resident.slot].chain) == ["one", "two"]  # type: ignore[attr-defined]
