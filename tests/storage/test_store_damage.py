"""A store whose files are damaged or whose disk fails: an older version or an error, never another memory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from storage.errors import BadMemoryFile, StoreUnavailable
from storage.head import user_folder
from storage.records import decode_record, encode_record
from storage.store import MemoryStore
from tests.storage.samples import ALICE, NOON, make_memory, same
from tests.storage.wounds import half_writing

FOLDER = user_folder(ALICE)


def file_of(version: int, epoch: int = 1) -> str:
    return f"{FOLDER}v{version:012d}-e{epoch:08d}.titanmem"


def bytes_of(store: MemoryStore, name: str) -> bytes:
    found = store.objects.get(name)
    assert found is not None
    return found[0]


def filled(store: MemoryStore, versions: int = 2) -> MemoryStore:
    for version in range(1, versions + 1):
        store.put(make_memory(version=version, last_chunk_id=10 * version), epoch=1)
    return store


def test_head_says_how_far_each_version_went(folder_store: MemoryStore) -> None:
    store = filled(folder_store)
    assert [info.last_chunk_id for info in store.versions(ALICE)] == [20, 10]
    good = store.versions(ALICE)
    store.objects.put(FOLDER + "HEAD", b"junk")
    assert store.rebuild_head(ALICE, epoch=1) == good


def test_heads_of_before_that_are_read(folder_store: MemoryStore) -> None:
    store = filled(folder_store)
    record = decode_record(bytes_of(store, FOLDER + "HEAD"), "HEAD")
    del record["last_chunks"]
    assert "last_chunk_id" not in json.dumps(record), "an older release passes over what it does not know"
    store.objects.put(FOLDER + "HEAD", encode_record(record))
    assert [(info.version, info.last_chunk_id) for info in store.versions(ALICE)] == [(2, 0), (1, 0)]


def test_a_head_that_is_gone_is_noticed(folder_store: MemoryStore) -> None:
    store = folder_store
    assert not store.has_lost_head(ALICE)
    filled(store)
    assert not store.has_lost_head(ALICE)
    store.objects.delete(FOLDER + "HEAD")
    assert store.has_lost_head(ALICE)
    assert [info.version for info in store.rebuild_head(ALICE, epoch=1)] == [2, 1]
    store.delete(ALICE)
    store.objects.put(file_of(2), b"a deletion that a crash cut off")
    assert not store.has_lost_head(ALICE)


def test_a_rebuilt_head_brings_nothing_erased_back(folder_store: MemoryStore) -> None:
    store = MemoryStore(folder_store.objects, clock=lambda: NOON + timedelta(days=1))
    filled(store)
    old = bytes_of(store, file_of(2))
    store.delete(ALICE)
    store.clear_tombstone(ALICE, epoch=1)
    store.put(make_memory(version=1, created_at=NOON + timedelta(days=2)), epoch=1)
    store.objects.put(file_of(2), old)
    store.objects.put(FOLDER + "HEAD", b"junk")
    assert [info.version for info in store.rebuild_head(ALICE, epoch=1)] == [1]
    assert store.get(ALICE).created_at == NOON + timedelta(days=2)


def test_a_rebuilt_head_lists_nothing_of_a_fenced_writer(folder_store: MemoryStore) -> None:
    """Epoch 1 was fenced at version 2: its version 3 has never been listed."""
    store = filled(folder_store, 3)
    store.objects.delete(FOLDER + "HEAD")
    late = bytes_of(store, file_of(3))
    store.objects.delete(file_of(3))
    store.rebuild_head(ALICE, epoch=2)
    store.put(make_memory(version=3, epoch=2), epoch=2)
    store.objects.put(file_of(3), late)
    store.objects.put(file_of(4), bytes_of(store, file_of(3)))
    store.objects.put(FOLDER + "HEAD", b"junk")
    assert [(line.version, line.epoch) for line in store.rebuild_head(ALICE, epoch=2)] == [
        (3, 2),
        (2, 1),
        (1, 1),
    ]


def test_nothing_readable_is_an_error_and_not_an_empty_memory(folder_store: MemoryStore) -> None:
    store = filled(folder_store, 1)
    store.objects.put(file_of(1), bytes_of(store, file_of(1))[:-1])
    store.objects.put(FOLDER + "HEAD", b"junk")
    with pytest.raises(BadMemoryFile):
        store.rebuild_head(ALICE, epoch=1)
    assert store.has_lost_head(ALICE), "and it stays one"


def fail_at_fsync(patch: pytest.MonkeyPatch, problem: OSError) -> None:
    def fail(handle: int) -> None:
        raise problem

    patch.setattr("storage.local.os.fsync", fail)


def fail_at_rename(patch: pytest.MonkeyPatch, problem: OSError) -> None:
    def fail(old: Path, new: Path) -> None:
        raise problem

    patch.setattr("storage.local.os.replace", fail)


def fail_at_write(patch: pytest.MonkeyPatch, problem: OSError) -> None:
    patch.setattr("storage.local.open", half_writing(problem), raising=False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("fail", [fail_at_write, fail_at_fsync, fail_at_rename])
def test_a_failed_write_leaves_what_was_there(
    folder_store: MemoryStore,
    fail: Callable[[pytest.MonkeyPatch, OSError], None],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = filled(folder_store)
    before, names = store.get(ALICE), sorted(info.name for info in store.objects.list())
    folder = Path(store.url.removeprefix("file://")) / FOLDER
    fail(monkeypatch, OSError(code, os.strerror(code)))
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=os.strerror(code)):
            store.put(make_memory(version=3), epoch=1)
    monkeypatch.undo()
    assert same(store.get(ALICE), before)
    assert sorted(info.name for info in store.objects.list()) == names
    assert len(os.listdir(folder)) == 3, "no temporary file stays: HEAD and two versions"
    store.put(make_memory(version=3), epoch=1)
    assert store.get(ALICE).memory_version == 3


@pytest.mark.parametrize("flush", range(1, 5))
def test_a_failed_flush_of_the_folder_costs_nothing(
    folder_store: MemoryStore, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename is done, and nobody knows whether the disk has it: an error, and the same again is fine."""
    store = filled(folder_store)
    count = 0

    def fail(folder: Path) -> None:
        nonlocal count
        count += 1
        if count == flush:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("storage.local.flush_folder", fail)
    try:
        store.put(make_memory(version=3), epoch=1)
        failed = False
    except StoreUnavailable:
        failed = True
    assert failed == (count >= flush)
    monkeypatch.undo()
    assert store.get(ALICE).memory_version in ((2, 3) if failed else (3,))
    store.put(make_memory(version=3), epoch=1)
    assert same(store.get(ALICE), make_memory(version=3))
