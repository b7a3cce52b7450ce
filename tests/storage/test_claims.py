"""Who may store a user's first version, and what is swept of versions that nobody will ever list."""

from __future__ import annotations

import pytest

from storage.errors import Fenced, Forgotten, NoSuchMemory
from storage.store import MemoryStore
from tests.storage.samples import ALICE, make_memory
from tests.storage.test_store import BOB, FOLDER, interrupted, names, versions


def test_a_claim_before_the_first_version_shuts_out_older_owners(store: MemoryStore) -> None:
    store.claim(ALICE, epoch=2)
    assert store.epoch_of(ALICE) == 0, "who is not about to write leaves no trace"
    store.claim(ALICE, epoch=2, begin=True)
    store.claim(ALICE, epoch=2, begin=True)
    with pytest.raises(Fenced, match="epoch 1 is over: the store has seen 2"):
        store.put(make_memory(version=1), epoch=1)
    with pytest.raises(Fenced):
        store.claim(ALICE, epoch=1, begin=True)
    assert versions(store) == []
    assert names(store, FOLDER) == [FOLDER + "HEAD"]
    with pytest.raises(NoSuchMemory):
        store.get(ALICE)
    store.objects.put(FOLDER + "v000000000001-e00000001.titanmem", b"what a fenced writer leaves")
    assert not store.has_lost_head(ALICE), "nothing was lost: there was no version"
    store.claim(ALICE, epoch=3)
    store.put(make_memory(version=1), epoch=3)
    assert versions(store) == [1]
    assert store.epoch_of(ALICE) == 3


def test_a_claim_under_way_while_an_older_owner_stores_its_first_version(store: MemoryStore) -> None:
    writer = interrupted(store, lambda: store.claim(ALICE, epoch=2, begin=True))
    with pytest.raises(Fenced):
        writer.put(make_memory(version=1), epoch=1)
    assert names(store, FOLDER) == [FOLDER + "HEAD"]


def test_an_erased_user_is_not_begun_before_the_tombstone_is_cleared(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)
    store.delete(ALICE)
    with pytest.raises(Forgotten):
        store.claim(ALICE, epoch=2, begin=True)
    store.clear_tombstone(ALICE, 2)
    store.claim(ALICE, epoch=2, begin=True)
    with pytest.raises(Fenced):
        store.put(make_memory(version=1), epoch=1)


def test_the_sweeper_takes_what_no_head_will_list_and_nothing_else(store: MemoryStore) -> None:
    for version in (1, 2, 3, 4, 5):
        store.put(make_memory(version=version), epoch=2)
    store.pin(ALICE, 3, epoch=2)
    for left in ("v000000000004-e00000001", "v000000000009-e00000001", "v000000000005-e00000003", "note"):
        store.objects.put(f"{FOLDER}{left}.titanmem", b"left by a crash")
    assert store.sweep(ALICE, epoch=2) == [FOLDER + "v000000000004-e00000001.titanmem"]
    with pytest.raises(Fenced):
        store.sweep(ALICE, epoch=1)
    before = names(store, FOLDER)
    store.claim(ALICE, epoch=4)
    assert store.sweep(ALICE, epoch=4) == [FOLDER + "v000000000005-e00000003.titanmem"]
    assert set(before) - set(names(store, FOLDER)) == {FOLDER + "v000000000005-e00000003.titanmem"}
    assert [info.version for info in store.versions(ALICE) if store.get(ALICE, info.version)] == [5, 4, 3, 2]
    assert store.sweep(BOB, epoch=4) == []


def test_an_old_owner_that_sweeps_late_takes_nothing_of_a_newer_one(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)
    objects = store.objects
    original = objects.list

    def overtaken(prefix: str = ""):
        """Between the old owner's look at HEAD and its listing, two newer owners have stored."""
        objects.list = original  # type: ignore[method-assign]
        for epoch, version in ((2, 1), (3, 2)):
            store.claim(ALICE, epoch=epoch)
            store.put(make_memory(version=version + 1), epoch=epoch)
        return original(prefix)

    objects.list = overtaken  # type: ignore[method-assign]
    assert store.sweep(ALICE, epoch=1) == []
    assert [info.version for info in store.versions(ALICE) if store.get(ALICE, info.version)] == [3, 2, 1]
