"""Erased users and the backups: marks bar them from coming back, and take them out of what is kept."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.errors import StoreUnavailable, StoreUnfit
from storage.names import UserKey
from storage.objects import Objects, open_objects
from storage.retention import kept_until, prune, sweep
from storage.snapshot import erase_marked, list_snapshots, read_manifest, restore, restore_model, verify
from storage.snapshot_marks import holding, mark, marked_at, marks
from storage.snapshot_part import Row, open_part
from storage.store import MemoryStore
from storage.titanmem import encode
from tests.storage.samples import NOON, same
from tests.storage.test_snapshot import ID, USERS, memory_of, model, take

__all__ = ["model"]
LATER = NOON + timedelta(hours=1)
EVE = USERS[2]


@pytest.fixture
def folder(tmp_path: Path) -> Objects:
    return open_objects(f"file://{tmp_path}/backup")


@pytest.fixture
def empty(tmp_path: Path) -> MemoryStore:
    return MemoryStore(open_objects(f"file://{tmp_path}/restored"))


def bytes_of(target: Objects) -> bytes:
    """All objects, and of parts what is packed in them, too."""
    found = [(info.name, (target.get(info.name) or (b"",))[0]) for info in target.list()]
    rows = [
        f"{row.name} ".encode() + row.data
        for name, _ in found
        if name.endswith(".parquet")
        for row in _rows(target, name)
    ]
    return b"".join([*(data for _, data in found), *rows])


def _rows(target: Objects, name: str) -> list[Row]:
    with open_part(target, name) as reader:
        return list(reader.rows())


def test_a_mark_is_of_the_last_erasure(objects: Objects) -> None:
    assert marks(objects) == {}
    mark(objects, EVE, LATER)
    mark(objects, EVE, NOON)
    assert marked_at(objects, EVE) == LATER
    mark(objects, EVE, LATER + timedelta(hours=1))
    assert marks(objects) == {EVE: LATER + timedelta(hours=1)}
    assert marked_at(objects, UserKey("local", EVE.user)) is None
    objects.put(f"forgotten/{EVE}", b"damaged")
    with pytest.raises(StoreUnfit, match="forgotten/acme/u2"):
        marks(objects)


def test_a_mark_bars_what_was_before_it_and_not_what_came_after(folder: Objects, empty: MemoryStore) -> None:
    later = memory_of(USERS[1], created_at=LATER + timedelta(hours=1))
    take(folder, [memory_of(USERS[0]), later, memory_of(EVE)])
    for key in (USERS[1], EVE):
        mark(folder, key, LATER)
    report = restore(folder, ID, empty, epoch=4)
    assert (report["restored"], report["forgotten"]) == (2, [str(EVE)])
    assert same(empty.get(USERS[1]), memory_of(USERS[1], created_at=later.created_at, epoch=4))
    assert empty.forgotten_at(EVE) == LATER
    assert empty.tombstone(EVE) is None, "the user may begin anew"
    assert empty.put(memory_of(EVE, created_at=LATER + timedelta(hours=2)), epoch=5).version == 3


def test_snapshots_are_written_again_without_the_erased(
    target: Objects, empty: MemoryStore, model: Path
) -> None:
    memories = {key: memory_of(key) for key in USERS}
    before = take(target, memories.values(), model=model, shards=2)
    data = encode(memories[EVE])
    middle = data[len(data) // 2 :][:48]
    assert str(EVE).encode() in bytes_of(target)
    assert middle in bytes_of(target)
    assert [name for name, _ in holding(target, read_manifest(target, ID), EVE)] == [before[0].name]
    mark(target, EVE, LATER)
    assert erase_marked(target, now=LATER) == {ID: [str(EVE)]}
    assert erase_marked(target, now=LATER) == {}, "once"
    manifest = read_manifest(target, ID)
    assert holding(target, manifest, EVE) == []
    assert manifest.parts[1] == before[1], "where nobody was erased, nothing is written again"
    assert manifest.users == len(USERS) - 1
    names = {info.name for info in target.list()}
    assert before[0].name not in names
    target.delete(f"forgotten/{EVE}")
    assert str(EVE).encode() not in bytes_of(target)
    assert middle not in bytes_of(target)
    report = verify(target, ID)
    assert (report["ok"], report["users"], report["model_files"]) == (True, len(USERS) - 1, 4)
    assert restore(target, ID, empty, epoch=1)["restored"] == len(USERS) - 1
    assert all(same(empty.get(key), memories[key]) for key in empty.users())
    restore_model(target, ID, model.parent / "again")


@pytest.fixture
def target(objects: Objects) -> Objects:
    return objects


class Dying:
    """A target that ends the process, as it were, before the n-th change."""

    def __init__(self, objects: Objects, changes: int) -> None:
        self._objects, self.url, self.left = objects, objects.url, changes

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._objects, name)
        if name not in ("put", "put_file", "delete"):
            return method

        def changing(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise StoreUnavailable("killed")
            return method(*arguments, **named)

        return changing


def test_cut_off_anywhere_there_is_a_whole_snapshot_and_the_rest_is_swept(
    folder: Objects, tmp_path: Path
) -> None:
    changes = 0
    while True:
        target = open_objects(f"file://{tmp_path}/backup-{changes}")
        take(target, [memory_of(key) for key in USERS], shards=2)
        mark(target, EVE, LATER)
        try:
            erase_marked(Dying(target, changes), now=LATER)  # type: ignore[arg-type]
            break
        except StoreUnavailable:
            pass
        assert verify(target, ID)["ok"], changes
        erase_marked(target, now=LATER)
        sweep(target, now=NOON + timedelta(days=10_000), older_than_s=0.0)
        (manifest,) = list_snapshots(target)
        parts = {info.name for info in target.list() if info.name.endswith(".parquet")}
        assert parts == {part.name for part in manifest.parts}
        assert holding(target, manifest, EVE) == []
        changes += 1
    assert changes == 3, "one part, the manifest, the old part"


def test_a_damaged_snapshot_is_left_for_somebody_to_look_at(
    folder: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    (part,) = take(folder, [memory_of(key) for key in USERS])
    mark(folder, EVE, LATER)
    found = folder.get(part.name)
    assert found is not None
    folder.put(part.name, found[0][:-5])
    assert erase_marked(folder, now=LATER) == {}
    assert "not taken out for now" in caplog.text
    assert folder.get(part.name) is not None


def test_until_when_a_snapshot_is_kept_is_when_pruning_takes_it(folder: Objects) -> None:
    moments = [NOON - timedelta(days=days) for days in (0, 1, 3, 9, 30)]
    for moment in moments:
        take(folder, [memory_of(EVE)], snapshot_id=f"{moment:%Y%m%dT%H%M%SZ}-abcdef", created_at=moment)
    limits = {"daily": 3, "weekly": 2, "monthly": 1}
    until = kept_until(list_snapshots(folder), now=NOON, **limits)
    went, now = {}, NOON
    while set(went) != set(until):
        now += timedelta(days=1)
        snapshot_id = f"{now:%Y%m%dT%H%M%SZ}-fedcba"
        take(folder, [memory_of(EVE)], snapshot_id=snapshot_id, created_at=now)
        went |= {name: now for name in prune(folder, now=now, **limits) if name in until}
        assert now < NOON + timedelta(days=90)
    assert went == until
