"""The store of memories: versions, fencing, pins, erasure; on folders and on a real S3 server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from storage.errors import (
    BadMemoryFile,
    ChecksumMismatch,
    Fenced,
    Forgotten,
    NoSuchMemory,
    StoreError,
    StoreUnavailable,
    StoreUnfit,
    Truncated,
    VersionConflict,
    WrongBase,
)
from storage.head import PINNED_MAX
from storage.health import Health, Watched
from storage.names import UserKey
from storage.objects import Objects, open_objects
from storage.records import RECORD_BYTES_MAX, decode_record, encode_record
from storage.store import MemoryStore, open_store
from storage.titanmem import encode
from tests.storage.samples import ALICE, BASE, NOON, make_memory, same

BOB = UserKey("local", "bob")
FOLDER = "users/local/alice/"


def names(store: MemoryStore, prefix: str = "") -> list[str]:
    return [info.name for info in store.objects.list(prefix)]


def versions(store: MemoryStore, key: UserKey = ALICE) -> list[int]:
    return [info.version for info in store.versions(key)]


def test_what_is_put_is_got(store: MemoryStore) -> None:
    memory = make_memory(version=12)
    info = store.put(memory, epoch=3)
    assert names(store, "users/") == [FOLDER + "HEAD", FOLDER + "v000000000012-e00000003.titanmem"]
    assert (info.version, info.epoch, info.created_at, info.pinned) == (12, 3, NOON, False)
    again = store.get(ALICE, expect_base=BASE, expect_shape=memory.theta_shape)
    assert same(again, replace(memory, epoch=3))
    assert store.get_bytes(ALICE) == encode(again)
    assert info.bytes == len(store.get_bytes(ALICE))
    assert store.versions(ALICE) == [info]
    assert store.epoch_of(ALICE) == 3


def test_three_previous_versions_stay(store: MemoryStore) -> None:
    for version in range(1, 8):
        store.put(make_memory(version=version), epoch=1)
    assert versions(store) == [7, 6, 5, 4]
    assert len(names(store, FOLDER)) == 5
    assert store.get(ALICE, 4).memory_version == 4
    with pytest.raises(NoSuchMemory, match="version 3 is not stored; there are: 7, 6, 5, 4"):
        store.get(ALICE, 3)


def test_an_older_epoch_is_fenced(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=9)
    with pytest.raises(Fenced, match="epoch 7 is over: the store has seen 9") as caught:
        store.put(make_memory(version=2), epoch=7)
    assert (caught.value.epoch, caught.value.seen) == (7, 9)
    with pytest.raises(Fenced):
        store.pin(ALICE, 1, epoch=7)
    with pytest.raises(Fenced):
        store.claim(ALICE, epoch=8)
    with pytest.raises(Fenced):
        store.delete(ALICE, epoch=8)
    assert versions(store) == [1]
    assert len(names(store, FOLDER)) == 2, "the fenced writer left nothing behind"


def test_a_version_only_ever_rises(store: MemoryStore) -> None:
    store.put(make_memory(version=5), epoch=1)
    for version in (5, 4):
        with pytest.raises(VersionConflict, match=f"version {version} is not newer: the store holds 5"):
            store.put(make_memory(version=version, seed=7), epoch=1)
    assert versions(store) == [5]
    assert same(store.get(ALICE), make_memory(version=5))


def test_the_same_again_is_fine(store: MemoryStore) -> None:
    first = store.put(make_memory(), epoch=1)
    assert store.put(make_memory(), epoch=1) == first
    store.pin(ALICE, 3, epoch=1)
    assert store.put(make_memory(), epoch=1).version == 3
    assert versions(store) == [3]


def test_claiming_shuts_out_the_writer_before(store: MemoryStore) -> None:
    """The new owner has written nothing yet; without the claim, the old one could still write."""
    store.claim(ALICE, epoch=5)
    store.put(make_memory(version=1), epoch=1)
    store.claim(ALICE, epoch=2)
    with pytest.raises(Fenced):
        store.put(make_memory(version=2), epoch=1)
    store.put(make_memory(version=2), epoch=2)


def test_pinned_versions_stay_until_they_are_released(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)
    assert store.pin(ALICE, 1, epoch=1).pinned
    for version in range(2, 8):
        store.put(make_memory(version=version), epoch=1)
    assert versions(store) == [7, 6, 5, 4, 1]
    assert same(store.get(ALICE, 1), make_memory(version=1))
    assert not store.pin(ALICE, 1, epoch=1, pinned=False).pinned
    store.put(make_memory(version=8), epoch=1)
    assert versions(store) == [8, 7, 6, 5]
    assert len(names(store, FOLDER)) == 5
    with pytest.raises(NoSuchMemory):
        store.pin(ALICE, 1, epoch=1)
    with pytest.raises(NoSuchMemory):
        store.pin(BOB, 1, epoch=1)


def test_pins_are_limited(folder_store: MemoryStore) -> None:
    for version in range(1, PINNED_MAX + 1):
        folder_store.put(make_memory(version=version), epoch=1)
        folder_store.pin(ALICE, version, epoch=1)
    folder_store.put(make_memory(version=99), epoch=1)
    with pytest.raises(StoreError, match="pinned already"):
        folder_store.pin(ALICE, 99, epoch=1)


def test_users_by_tenant(store: MemoryStore) -> None:
    keys = [UserKey("a", "x"), UserKey("a", "y"), UserKey("ab", "x"), UserKey("a-b", "x")]
    for key in keys:
        store.put(make_memory(key=key), epoch=1)
    assert sorted(store.users()) == sorted(keys)
    assert list(store.users("a")) == keys[:2]
    assert list(store.users("nobody")) == []


def test_nothing_is_stored(store: MemoryStore) -> None:
    for call in (store.get, store.get_bytes, store.newest_valid):
        with pytest.raises(NoSuchMemory, match="local/alice: nothing is stored"):
            call(ALICE)
    assert store.versions(ALICE) == []
    assert store.epoch_of(ALICE) == 0
    assert store.delete(ALICE) == []


def test_an_erased_user_leaves_only_a_tombstone(store: MemoryStore) -> None:
    for version in range(1, 6):
        store.put(make_memory(version=version), epoch=4)
    store.put(make_memory(key=BOB), epoch=4)
    before = names(store, FOLDER)
    assert store.delete(ALICE, epoch=4) == before
    assert names(store, FOLDER) == []
    assert list(store.users()) == [BOB]
    tombstone = store.tombstone(ALICE)
    assert tombstone is not None
    assert (tombstone["user"], tombstone["epoch"]) == ("alice", 4)
    assert store.delete(ALICE) == []
    assert store.tombstone(BOB) is None


def test_a_late_write_does_not_bring_an_erased_user_back(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=4)
    store.delete(ALICE)
    with pytest.raises(Forgotten, match="erased at"):
        store.put(make_memory(version=2), epoch=4)
    with pytest.raises(Fenced):
        store.put(make_memory(version=2), epoch=3)
    assert names(store, FOLDER) == []


def test_a_write_that_was_under_way_while_the_user_was_erased(store: MemoryStore) -> None:
    """The writer has read HEAD and uploaded its version; only then the user is erased."""
    store.put(make_memory(version=1), epoch=4)
    writer = interrupted(store, lambda: store.delete(ALICE))
    with pytest.raises(Forgotten):
        writer.put(make_memory(version=2), epoch=4)
    assert names(store, FOLDER) == []


def test_an_erased_user_may_begin_anew(store: MemoryStore) -> None:
    store.put(make_memory(version=7), epoch=4)
    store.delete(ALICE)
    with pytest.raises(Fenced):
        store.clear_tombstone(ALICE, 3)
    store.clear_tombstone(ALICE, 5)
    store.clear_tombstone(ALICE, 5)
    assert store.tombstone(ALICE) is None
    assert store.forgotten_at(ALICE) is not None
    with pytest.raises(Fenced):
        store.put(make_memory(version=1), epoch=4)
    store.put(make_memory(version=1), epoch=5)
    assert versions(store) == [1]
    store.delete(ALICE)
    assert store.tombstone(ALICE) is not None


def test_times_come_from_the_clock_that_was_passed(folder_store: MemoryStore) -> None:
    store = MemoryStore(folder_store.objects, clock=lambda: NOON + timedelta(days=1))
    assert store.forgotten_at(ALICE) is None
    store.delete(ALICE)
    assert store.forgotten_at(ALICE) == NOON + timedelta(days=1)


def damage(store: MemoryStore, name: str, change: Callable[[bytes], bytes]) -> None:
    found = store.objects.get(name)
    assert found is not None
    store.objects.put(name, change(found[0]))


def flip(data: bytes) -> bytes:
    return data[:900] + bytes([data[900] ^ 64]) + data[901:]


def test_the_previous_version_takes_over(store: MemoryStore) -> None:
    for version in (1, 2, 3):
        store.put(make_memory(version=version), epoch=1)
    damage(store, FOLDER + "v000000000003-e00000001.titanmem", flip)
    store.objects.delete(FOLDER + "v000000000002-e00000001.titanmem")
    with pytest.raises(ChecksumMismatch, match="v000000000003"):
        store.get(ALICE)
    with pytest.raises(ChecksumMismatch):
        store.get_bytes(ALICE)
    with pytest.raises(Truncated, match="no file"):
        store.get(ALICE, 2)
    memory, problems = store.newest_valid(ALICE)
    assert memory.memory_version == 1
    assert [type(problem) for problem in problems] == [ChecksumMismatch, Truncated]
    store.put(make_memory(version=4), epoch=1)
    assert store.newest_valid(ALICE)[1] == []


def test_when_no_version_is_good_the_newest_ones_error_says_why(folder_store: MemoryStore) -> None:
    folder_store.put(make_memory(version=1), epoch=1)
    with pytest.raises(WrongBase):
        folder_store.newest_valid(ALICE, expect_base="another")


def test_a_whole_file_that_is_another_one(folder_store: MemoryStore) -> None:
    folder_store.put(make_memory(version=1), epoch=1)
    other = encode(make_memory(version=1, key=BOB))
    damage(folder_store, FOLDER + "v000000000001-e00000001.titanmem", lambda data: other)
    with pytest.raises(ChecksumMismatch, match="the one that HEAD lists"):
        folder_store.get(ALICE)


@pytest.mark.parametrize(
    "change",
    [lambda data: b"", lambda data: data[:50], lambda data: data.replace(b'"epoch": 4', b'"epoch": 2'),
     lambda data: b"[1]", lambda data: b"\xff\xfe", lambda data: encode_record({"a": 1})],
)  # fmt: skip
def test_a_damaged_head_is_an_error_and_can_be_rebuilt(
    folder_store: MemoryStore, change: Callable[[bytes], bytes]
) -> None:
    store = folder_store
    for version in range(1, 6):
        store.put(make_memory(version=version), epoch=4)
    good = store.versions(ALICE)
    damage(store, FOLDER + "HEAD", change)
    damage(store, FOLDER + "v000000000003-e00000004.titanmem", flip)
    for call in (store.get, store.versions, lambda key: store.put(make_memory(version=9), epoch=4)):
        with pytest.raises(StoreUnfit, match=r"HEAD: .*record"):
            call(ALICE)
    with pytest.raises(Fenced):
        store.rebuild_head(ALICE, epoch=3)
    rebuilt = store.rebuild_head(ALICE, epoch=5)
    assert rebuilt == [info for info in good if info.version != 3]
    assert store.epoch_of(ALICE) == 5
    assert store.get(ALICE).memory_version == 5


def test_a_damaged_head_does_not_keep_a_user_from_being_erased(folder_store: MemoryStore) -> None:
    folder_store.put(make_memory(), epoch=1)
    damage(folder_store, FOLDER + "HEAD", lambda data: b"junk")
    assert len(folder_store.delete(ALICE)) == 2
    assert names(folder_store, FOLDER) == []


def test_nothing_bad_is_ever_stored(folder_store: MemoryStore) -> None:
    with pytest.raises(BadMemoryFile):
        folder_store.put(make_memory(base=""), epoch=1)
    assert names(folder_store) == []


class Interrupted:
    """A store in which something happens right before HEAD is first written."""

    def __init__(self, objects: Objects, happening: Callable[[], object]) -> None:
        self._objects, self._happening = objects, happening
        self.url = objects.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, name: str, data: bytes, **condition: Any) -> str:
        if name.endswith("/HEAD"):
            happening, self._happening = self._happening, lambda: None
            happening()
        return self._objects.put(name, data, **condition)


def interrupted(store: MemoryStore, happening: Callable[[], object]) -> MemoryStore:
    return MemoryStore(Interrupted(store.objects, happening))  # type: ignore[arg-type]


def test_a_new_owner_in_the_gap_fences_the_old_one(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)
    old = interrupted(store, lambda: store.put(make_memory(version=2, seed=5), epoch=2))
    with pytest.raises(Fenced):
        old.put(make_memory(version=2), epoch=1)
    assert [(info.version, info.epoch) for info in store.versions(ALICE)] == [(2, 2), (1, 1)]
    assert len(names(store, FOLDER)) == 3, "the loser's version is not left behind"


def test_a_pin_in_the_gap_is_not_lost(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)
    writer = interrupted(store, lambda: store.pin(ALICE, 1, epoch=1))
    writer.put(make_memory(version=2), epoch=1)
    assert [(info.version, info.pinned) for info in store.versions(ALICE)] == [(2, False), (1, True)]


def test_a_crash_before_head_leaves_the_version_before(store: MemoryStore) -> None:
    store.put(make_memory(version=1), epoch=1)

    def crash() -> None:
        raise StoreUnavailable("the power is gone")

    with pytest.raises(StoreUnavailable):
        interrupted(store, crash).put(make_memory(version=2), epoch=1)
    assert versions(store) == [1]
    store.put(make_memory(version=2, seed=9), epoch=1)
    assert same(store.get(ALICE), make_memory(version=2, seed=9))


def test_what_could_not_be_deleted_is_deleted_later(folder_store: MemoryStore, caplog: Any) -> None:
    class Sticky(Interrupted):
        def delete(self, name: str) -> None:
            raise StoreUnavailable("not now")

    sticky = MemoryStore(Sticky(folder_store.objects, lambda: None))  # type: ignore[arg-type]
    for version in range(1, 6):
        sticky.put(make_memory(version=version), epoch=1)
    assert "left behind for now" in caplog.text
    assert len(names(folder_store, FOLDER)) == 6
    folder_store.put(make_memory(version=6), epoch=1)
    assert len(names(folder_store, FOLDER)) == 5


def test_an_outage_has_its_own_line_in_the_log_and_no_other(folder_store: MemoryStore, caplog: Any) -> None:
    class Dying(Interrupted):
        def delete(self, name: str) -> None:
            raise StoreUnavailable("gone")

    health = Health(folder_store.url)
    store = MemoryStore(Watched(Dying(folder_store.objects, lambda: None), health), health=health)  # type: ignore[arg-type]
    for version in range(1, 6):
        store.put(make_memory(version=version), epoch=1)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [f"{store.url} fails"]


def test_epochs_are_never_given_twice(store: MemoryStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        epochs = list(pool.map(lambda _: store.next_epoch(), range(12)))
    assert sorted(epochs) == list(range(1, 13))


def test_many_writers_of_one_user_agree(folder_store: MemoryStore) -> None:
    """Eight writers with epochs of their own: what is listed can be read, and no later epoch is undone."""
    barrier = threading.Barrier(8)
    ended: list[str] = []

    def write(epoch: int) -> None:
        barrier.wait()
        try:
            for version in range(epoch, 60, 8):
                folder_store.put(make_memory(version=version, seed=epoch), epoch=epoch)
        except (Fenced, VersionConflict) as error:
            ended.append(type(error).__name__)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(1, 9)))
    listed = folder_store.versions(ALICE)
    assert [info.epoch for info in listed] == sorted((info.epoch for info in listed), reverse=True)
    for info in listed:
        assert folder_store.get(ALICE, info.version).epoch == info.epoch
    assert len(names(folder_store, FOLDER)) == len(listed) + 1
    assert ended


def test_records(store: MemoryStore) -> None:
    assert store.read_record("cluster/shardmap") is None
    tag = store.write_record("cluster/shardmap", {"version": 1}, if_absent=True)
    assert store.read_record("cluster/shardmap") == ({"version": 1}, tag)
    with pytest.raises(VersionConflict):
        store.write_record("cluster/shardmap", {"version": 1}, if_absent=True)
    newer = store.write_record("cluster/shardmap", {"version": 1}, if_tag=tag)
    assert newer != tag, "even the same content has another tag"
    with pytest.raises(VersionConflict):
        store.write_record("cluster/shardmap", {"version": 3}, if_tag=tag)


def test_a_flipped_bit_of_a_record_is_refused() -> None:
    data = encode_record({"epoch": 4, "actor": "shard-0"})
    for at in range(len(data)):
        for bit in range(7):
            wounded = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            with contextlib.suppress(StoreUnfit):
                assert decode_record(wounded, "x") == {"epoch": 4, "actor": "shard-0"}


def test_records_have_limits() -> None:
    with pytest.raises(ValueError, match="expected at most"):
        encode_record({"a": "x" * RECORD_BYTES_MAX})
    with pytest.raises(ValueError, match="not JSON serializable"):
        encode_record({"a": b"x"})


def test_a_url_opens_a_store(url: str) -> None:
    store = open_store(url)
    store.put(make_memory(), epoch=1)
    assert same(MemoryStore(open_objects(url)).get(ALICE), make_memory())
