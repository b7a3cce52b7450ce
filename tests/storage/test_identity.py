"""A store that looks new beside journals that know another one: what an unmounted disk is at a start."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from storage.errors import StoreUnfit, WrongStore
from storage.identity import MARKER, RECORD, check_store, recognise
from storage.store import MemoryStore, open_store


def test_store_and_journals_know_each_other_from_the_first_start(store: MemoryStore, tmp_path: Path) -> None:
    journals = tmp_path / "journal"
    assert check_store(store, journals) is None
    assert not journals.exists()
    assert store.read_record(RECORD) is None, "looking changes nothing"
    id_ = recognise(store, journals)
    assert recognise(open_store_again(store), journals) == check_store(store, journals) == id_
    assert json.loads((journals / MARKER).read_text()) == {"id": id_, "url": store.url}
    assert recognise(store, tmp_path / "another node's") == id_
    assert [path.name for path in journals.iterdir()] == [MARKER], "nothing temporary stays"


def open_store_again(store: MemoryStore) -> MemoryStore:
    return MemoryStore(store.objects)


@pytest.mark.parametrize("mount_point", [False, True], ids=["folder gone", "bare mount point"])
def test_a_store_that_is_not_mounted_is_not_a_new_one(tmp_path: Path, mount_point: bool) -> None:
    url, journals = f"file://{tmp_path}/store", tmp_path / "journal"
    id_ = recognise(open_store(url), journals)
    (tmp_path / "store").rename(tmp_path / "unmounted")
    if mount_point:
        (tmp_path / "store").mkdir()
    for look in (check_store, recognise):
        with pytest.raises(WrongStore, match=f"{url}: this store is empty or new, .* belong to store {id_}"):
            look(open_store(url), journals)
    assert not list((tmp_path / "store").glob("*")), "nothing was written below the mount point"
    if mount_point:
        (tmp_path / "store").rmdir()
    (tmp_path / "unmounted").rename(tmp_path / "store")
    assert recognise(open_store(url), journals) == id_


def test_another_store_is_taken_once_the_journals_are_moved_away(tmp_path: Path) -> None:
    journals = tmp_path / "journal"
    first = recognise(open_store(f"file://{tmp_path}/store"), journals)
    other = open_store(f"file://{tmp_path}/other")
    second = recognise(other, tmp_path / "elsewhere")
    with pytest.raises(
        WrongStore, match=f"this is store {second}, and the journals .* store {first}.*move the journals"
    ):
        recognise(other, journals)
    journals.rename(tmp_path / "journal-before")
    assert recognise(other, journals) == second != first


def test_a_store_may_move(tmp_path: Path) -> None:
    journals = tmp_path / "journal"
    id_ = recognise(open_store(f"file://{tmp_path}/store"), journals)
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = open_store(f"file://{tmp_path}/moved")
    assert recognise(moved, journals) == id_
    assert json.loads((journals / MARKER).read_text())["url"] == moved.url


def test_shards_that_start_together_agree(store: MemoryStore, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(recognise(store, tmp_path / "journal")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_shard_that_is_faster_in_between_is_no_other_store(store: MemoryStore, tmp_path: Path) -> None:
    journals, ids = tmp_path / "journal", []

    class Late(MemoryStore):
        """Another shard recognises the store between any two looks of this one."""

        def read_record(self, name: str) -> tuple[dict[str, Any], str] | None:
            found = super().read_record(name)
            ids.append(recognise(store, journals))
            return found

    assert recognise(Late(store.objects), journals) == ids[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x"}', "\x00"])
def test_a_damaged_marker_is_named(folder_store: MemoryStore, tmp_path: Path, text: str) -> None:
    recognise(folder_store, tmp_path / "journal")
    (tmp_path / "journal" / MARKER).write_text(text)
    with pytest.raises(WrongStore, match=r"store\.json: damaged"):
        recognise(folder_store, tmp_path / "journal")


def test_a_damaged_record_is_no_new_store(folder_store: MemoryStore, tmp_path: Path) -> None:
    recognise(folder_store, tmp_path / "journal")
    folder_store.objects.put(RECORD, b"{}")
    with pytest.raises(StoreUnfit, match=RECORD):
        recognise(folder_store, tmp_path / "journal")
