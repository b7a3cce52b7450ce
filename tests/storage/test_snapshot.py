"""The cold backup: written, verified, damaged, restored; on folders and on a real S3 server."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from storage.chain import follow
from storage.errors import (
    BadMemoryFile,
    Fenced,
    Forgotten,
    NoSuchMemory,
    NoSuchSnapshot,
    SnapshotDamaged,
    SnapshotError,
    StoreNotEmpty,
    VersionConflict,
)
from storage.memory import Memory
from storage.names import UserKey
from storage.objects import Objects, open_objects
from storage.ranges import RangeFile
from storage.snapshot import (
    PartInfo,
    commit_manifest,
    find_at,
    list_snapshots,
    new_snapshot_id,
    read_manifest,
    restore,
    restore_model,
    verify,
    write_part,
)
from storage.snapshot_part import PartReader
from storage.store import MemoryStore
from storage.titanmem import encode
from tests.storage.samples import ALICE, BASE, NOON, make_memory, make_replay, make_segment, same

ID = "20261122T120000Z-0a1b2c"
USERS = [UserKey(tenant, f"u{number}") for tenant in ("acme", "local") for number in range(4)]


@pytest.fixture
def target(objects: Objects) -> Objects:
    return objects


@pytest.fixture
def folder(tmp_path: Path) -> Objects:
    return open_objects(f"file://{tmp_path}/backup")


@pytest.fixture
def empty(tmp_path: Path) -> MemoryStore:
    return MemoryStore(open_objects(f"file://{tmp_path}/restored"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as Hugging Face has it, with tensors of several kinds in a safetensors file."""
    folder = tmp_path / "model"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text('{"layers": 2}')
    (folder / "tokenizer" / "vocabulary.txt").write_bytes(b"a\nb\n")
    (folder / "empty").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_bytes(b"not a part of the model")
    tensors = {"embed": np.arange(600, dtype="<f4"), "none": np.zeros(0, "<f2"), "norm": np.ones(7, "<f2")}
    lines: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        dtype = {"<f4": "F32", "<f2": "F16"}[tensor.dtype.str]
        end = position + tensor.nbytes
        lines[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(lines).encode()
    body = b"".join(tensor.tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    return folder


def memory_of(key: UserKey, version: int = 3, **changes: Any) -> Memory:
    return make_memory(key=key, version=version, seed=zlib.crc32(str(key).encode()), **changes)


def take(
    target: Objects,
    memories: Iterable[Memory],
    *,
    snapshot_id: str = ID,
    model: Path | None = None,
    shards: int = 1,
    created_at: datetime = NOON,
) -> list[PartInfo]:
    """A finished snapshot of these memories, spread over the shards."""
    listed = list(memories)
    parts = [
        write_part(
            target,
            snapshot_id,
            shard=str(shard),
            epoch=1,
            model_dir=model if shard == 0 else None,
            memories=(encode(memory) for memory in listed[shard::shards]),
        )
        for shard in range(shards)
    ]
    commit_manifest(target, snapshot_id, parts, created_at=created_at, base=BASE)
    return parts


def test_a_snapshot_from_end_to_end(target: Objects, empty: MemoryStore, model: Path, tmp_path: Path) -> None:
    memories = [memory_of(key) for key in USERS]
    parts = take(target, memories, model=model, shards=2)
    assert [(part.users, part.model_files) for part in parts] == [(4, 4), (4, 0)]
    assert parts[0].name == f"{ID}/part-0-e00000001.parquet"
    assert [manifest.id for manifest in list_snapshots(target)] == [ID]

    seen: list[tuple[int, int]] = []
    report = verify(target, ID, probe=lambda memory: 0.5, progress=lambda *step: seen.append(step))
    assert report["ok"], report["problems"]
    assert (report["users"], report["model_files"], report["probes"], report["recall"]) == (8, 4, 8, 0.5)
    assert seen == [(n, 8) for n in range(1, 9)]

    report = restore(target, ID, empty, epoch=5)
    assert (report["ok"], report["restored"], report["failed"]) == (True, 8, [])
    assert list(empty.users()) == USERS
    for memory in memories:
        assert same(empty.get(memory.key), replace(memory, epoch=5))

    names = restore_model(target, ID, tmp_path / "again")
    assert sorted(names) == ["config.json", "empty", "model.safetensors", "tokenizer/vocabulary.txt"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_tensors_are_rows_that_any_parquet_reader_finds(folder: Objects, model: Path) -> None:
    (part,) = take(folder, [memory_of(ALICE)], model=model)
    with folder.open_read(part.name) as file:
        table = pq.read_table(file)
    rows = {row["name"]: row for row in table.to_pylist()}
    embed = rows["model.safetensors:embed"]
    assert embed["kind"] == "tensor"
    assert json.loads(embed["meta"])["shape"] == [600]
    np.testing.assert_array_equal(np.frombuffer(embed["data"], "<f4"), np.arange(600))
    assert rows["local/alice"]["memory_version"] == 3
    assert rows["local/alice"]["data"] == encode(memory_of(ALICE))


def test_without_a_manifest_there_is_no_snapshot(folder: Objects, empty: MemoryStore) -> None:
    part = write_part(folder, ID, shard="0", epoch=1, model_dir=None, memories=[encode(memory_of(ALICE))])
    assert list_snapshots(folder) == []
    for call in (lambda: restore(folder, ID, empty, epoch=1), lambda: verify(folder, ID)):
        with pytest.raises(NoSuchSnapshot, match="never finished"):
            call()
    commit_manifest(folder, ID, [part], created_at=NOON, base=BASE)
    with pytest.raises(VersionConflict):
        commit_manifest(folder, ID, [part], created_at=NOON, base=BASE)
    assert read_manifest(folder, ID).users == 1


def test_a_manifest_needs_its_parts(folder: Objects) -> None:
    part = write_part(folder, ID, shard="0", epoch=1, model_dir=None, memories=[])
    with pytest.raises(SnapshotError, match="0 parts"):
        commit_manifest(folder, ID, [], created_at=NOON, base=BASE)
    with pytest.raises(SnapshotError, match="each once"):
        commit_manifest(folder, ID, [part, part], created_at=NOON, base=BASE)
    with pytest.raises(SnapshotError, match="found nothing"):
        commit_manifest(folder, ID, [replace(part, name=f"{ID}/part-9.parquet")], created_at=NOON, base=BASE)
    with pytest.raises(SnapshotError, match=f"expected {part.bytes + 1} bytes"):
        commit_manifest(folder, ID, [replace(part, bytes=part.bytes + 1)], created_at=NOON, base=BASE)
    assert list_snapshots(folder) == []


@pytest.mark.parametrize("snapshot_id", ["", "../x", "20261122", "20261122T120000Z-0A1B2C", "x" * 10_000])
def test_ids_are_checked(folder: Objects, empty: MemoryStore, snapshot_id: str) -> None:
    for call in (lambda: verify(folder, snapshot_id), lambda: restore(folder, snapshot_id, empty, epoch=1)):
        with pytest.raises(NoSuchSnapshot) as caught:
            call()
        assert len(str(caught.value)) < 200


def test_shards_have_plain_names(folder: Objects) -> None:
    with pytest.raises(ValueError, match=r"shard: '\.\./x'"):
        write_part(folder, ID, shard="../x", epoch=1, model_dir=None, memories=[])


def test_new_ids_sort_by_time() -> None:
    first, second = new_snapshot_id(NOON), new_snapshot_id(NOON + timedelta(seconds=1))
    assert first < second
    assert first.startswith("20261122T120000Z-")


def test_a_bad_memory_does_not_go_into_a_backup(folder: Objects) -> None:
    for bad in (b"", b"junk", encode(memory_of(ALICE))[:-5]):
        with pytest.raises(BadMemoryFile):
            write_part(folder, ID, shard="0", epoch=1, model_dir=None, memories=[bad])
    with pytest.raises(SnapshotError, match="no such model folder"):
        write_part(folder, ID, shard="0", epoch=1, model_dir=Path("/nowhere"), memories=[])
    assert list(folder.list()) == []


def test_one_user_and_one_tenant(target: Objects, empty: MemoryStore) -> None:
    take(target, [memory_of(key) for key in USERS], shards=3)
    assert restore(target, ID, empty, epoch=1, user=USERS[5])["restored"] == 1
    assert list(empty.users()) == [USERS[5]]
    assert restore(target, ID, empty, epoch=1, tenant="acme")["restored"] == 4
    assert list(empty.users()) == [*USERS[:4], USERS[5]]
    with pytest.raises(NoSuchMemory, match="no memory of acme/nobody"):
        restore(target, ID, empty, epoch=1, user=UserKey("acme", "nobody"))


class Counting:
    """A store that counts the bytes read through `open_read`."""

    def __init__(self, objects: Objects) -> None:
        self._objects, self.url = objects, objects.url
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def open_read(self, name: str) -> BinaryIO:
        def read_range(start: int, length: int) -> bytes:
            self.bytes += length
            return self._objects.get_range(name, start, length)

        size = next(info.bytes for info in self._objects.list(name))
        return cast(BinaryIO, RangeFile(size, read_range))


def test_one_user_is_read_without_the_rest(
    folder: Objects, empty: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the footer, the keys of the groups where the user may be, and one group are read."""
    monkeypatch.setattr("storage.snapshot_part.GROUP_BYTES", 50_000)
    memories = [make_memory(key=UserKey("local", f"user-{n:03}"), seed=n) for n in range(60)]
    memories = [replace(m, replay=make_replay(300, 8, 640, seed=n)) for n, m in enumerate(memories)]
    (part,) = take(folder, memories)
    counting = Counting(folder)
    report = restore(cast(Objects, counting), ID, empty, epoch=1, user=memories[30].key)
    assert report["restored"] == 1
    assert same(empty.get(memories[30].key), memories[30])
    assert part.bytes > 400_000
    assert counting.bytes < 200_000, "two looks at the footer take 64 KiB each"


def test_a_store_with_users_is_not_filled_by_accident(folder: Objects, empty: MemoryStore) -> None:
    take(folder, [memory_of(key) for key in USERS])
    empty.put(memory_of(ALICE), epoch=1)
    with pytest.raises(StoreNotEmpty, match="local/alice is one"):
        restore(folder, ID, empty, epoch=2)
    assert list(empty.users()) == [ALICE]
    assert restore(folder, ID, empty, epoch=2, tenant="acme")["restored"] == 4
    with pytest.raises(StoreNotEmpty):
        restore(folder, ID, empty, epoch=2, tenant="acme")
    assert restore(folder, ID, empty, epoch=2, force=True)["restored"] == 8


def test_what_is_restored_becomes_the_newest_version(folder: Objects, empty: MemoryStore) -> None:
    take(folder, [memory_of(ALICE, 3)])
    for version in (7, 8, 9):
        empty.put(memory_of(ALICE, version, tokens_seen=99), epoch=4)
    restore(folder, ID, empty, epoch=5, user=ALICE)
    assert [info.version for info in empty.versions(ALICE)] == [10, 9, 8, 7]
    assert same(empty.get(ALICE), memory_of(ALICE, 10, epoch=5))
    with pytest.raises(Fenced):
        restore(folder, ID, empty, epoch=4, user=ALICE)


def test_a_user_in_two_parts_is_restored_at_the_newest(folder: Objects, empty: MemoryStore) -> None:
    """The user moved to another shard while the snapshot was taken."""
    old, new = memory_of(ALICE, 3), replace(memory_of(ALICE, 4), epoch=2)
    for order in ([old, new], [new, old]):
        snapshot_id = new_snapshot_id(NOON)
        take(folder, order, shards=2, snapshot_id=snapshot_id)
        assert restore(folder, snapshot_id, empty, epoch=9, force=True)["restored"] == 1
        assert empty.get(ALICE).last_chunk_id == new.last_chunk_id
        assert empty.get(ALICE).memory_version >= 4
        assert len(empty.versions(ALICE)) == 1
        empty.delete(ALICE)
        empty.objects.delete("tombstones/local/alice")


def test_the_erased_stay_erased(folder: Objects, tmp_path: Path) -> None:
    store = MemoryStore(open_objects(f"file://{tmp_path}/restored"), clock=lambda: NOON + timedelta(hours=1))
    later = memory_of(USERS[1], created_at=NOON + timedelta(hours=2))
    take(folder, [memory_of(USERS[0]), later, memory_of(USERS[2])])
    for key in USERS[:2]:
        store.delete(key)
    report = restore(folder, ID, store, epoch=1)
    assert (report["ok"], report["forgotten"]) == (True, [str(USERS[0]), str(USERS[1])])
    with pytest.raises(Forgotten, match="stays erased"):
        restore(folder, ID, store, epoch=1, user=USERS[0])
    for key in USERS[:2]:
        store.clear_tombstone(key, 1)
    report = restore(folder, ID, store, epoch=1, force=True)
    assert report["forgotten"] == [str(USERS[0])], "cleared, but made before the erasure"
    assert list(store.users()) == USERS[1:3]


def test_a_damaged_head_is_taken_over(folder: Objects, empty: MemoryStore) -> None:
    take(folder, [memory_of(ALICE, 3)])
    empty.put(memory_of(ALICE, 7), epoch=1)
    empty.objects.put("users/local/alice/HEAD", b"junk")
    assert restore(folder, ID, empty, epoch=2, user=ALICE)["restored"] == 1
    assert [info.version for info in empty.versions(ALICE)] == [8, 7]


def rewrite(target: Objects, part: PartInfo, change: Any) -> None:
    """Changes rows of a part and makes the manifest fit again: what only a row's own checksum can find."""
    with target.open_read(part.name) as file:
        table = pq.read_table(file)
    rows = table.to_pylist()
    for row in rows:
        change(row)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
    data = sink.getvalue().to_pybytes()
    target.put(part.name, data)
    target.delete(f"{ID}/manifest.json")
    whole = replace(part, bytes=len(data), hash=xxhash.xxh3_128_hexdigest(data))
    commit_manifest(target, ID, [whole], created_at=NOON, base=BASE)


def test_a_damaged_row_is_reported_and_the_rest_restored(folder: Objects, empty: MemoryStore) -> None:
    (part,) = take(folder, [memory_of(key) for key in USERS])

    def change(row: dict[str, Any]) -> None:
        if row["name"] == str(USERS[2]):
            row["data"] = row["data"][:-1] + b"x"

    rewrite(folder, part, change)
    report = restore(folder, ID, empty, epoch=1)
    assert (report["ok"], report["restored"], report["failed_count"]) == (False, 7, 1)
    assert "acme/u2: its CRC32" in report["failed"][0]
    assert USERS[2] not in list(empty.users())


def test_a_row_that_holds_somebody_elses_memory(folder: Objects, empty: MemoryStore) -> None:
    (part,) = take(folder, [memory_of(key) for key in USERS])
    rewrite(folder, part, lambda row: row.update(name="acme/other") if row["name"] == "acme/u1" else None)
    report = restore(folder, ID, empty, epoch=1)
    assert (report["restored"], report["failed_count"]) == (7, 1)
    assert "row acme/other holds the memory of acme/u1" in report["failed"][0]


def test_verify_finds_every_flipped_byte(folder: Objects, model: Path) -> None:
    (part,) = take(folder, [memory_of(ALICE)], model=model)
    found = folder.get(part.name)
    assert found is not None
    random = np.random.default_rng(3)
    for at in [0, len(found[0]) - 1, *random.integers(0, len(found[0]), 25).tolist()]:
        wounded = bytearray(found[0])
        wounded[at] ^= 1 << int(random.integers(8))
        folder.put(part.name, bytes(wounded))
        report = verify(folder, ID)
        assert not report["ok"], at
        assert part.name in report["problems"][0]
    folder.put(part.name, found[0])
    assert verify(folder, ID)["ok"]


def test_flipped_bytes_never_restore_a_wrong_memory(folder: Objects, tmp_path: Path) -> None:
    memories = {key: memory_of(key) for key in USERS[:3]}
    (part,) = take(folder, memories.values())
    found = folder.get(part.name)
    assert found is not None
    random = np.random.default_rng(4)
    for number in range(30):
        wounded = bytearray(found[0])
        wounded[int(random.integers(len(wounded)))] ^= 1 << int(random.integers(8))
        folder.put(part.name, bytes(wounded))
        store = MemoryStore(open_objects(f"file://{tmp_path}/restored-{number}"))
        with contextlib.suppress(SnapshotDamaged):
            restore(folder, ID, store, epoch=1)
        for key in store.users():
            assert same(store.get(key), memories[key])


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data + b"x", lambda data: b""])
def test_a_part_of_another_size_stops_a_restore_before_it_begins(
    folder: Objects, empty: MemoryStore, change: Any
) -> None:
    parts = take(folder, [memory_of(key) for key in USERS], shards=2)
    found = folder.get(parts[1].name)
    assert found is not None
    folder.put(parts[1].name, change(found[0]))
    with pytest.raises(SnapshotDamaged, match="nothing was restored"):
        restore(folder, ID, empty, epoch=1)
    assert list(empty.users()) == []
    assert not verify(folder, ID)["ok"]


def test_a_missing_part(folder: Objects, empty: MemoryStore) -> None:
    parts = take(folder, [memory_of(key) for key in USERS], shards=2)
    folder.delete(parts[0].name)
    report = verify(folder, ID)
    assert (report["ok"], report["users"]) == (False, 4)
    assert "part is missing" in report["problems"][0]
    with pytest.raises(SnapshotDamaged, match="found nothing"):
        restore(folder, ID, empty, epoch=1)


def test_another_parquet_file_is_no_part(folder: Objects) -> None:
    (part,) = take(folder, [memory_of(ALICE)])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    folder.put(part.name, sink.getvalue().to_pybytes())
    with (
        folder.open_read(part.name) as file,
        pytest.raises(SnapshotDamaged, match="another Parquet file"),
    ):
        PartReader(file, part.name)


def test_a_damaged_manifest(folder: Objects, caplog: pytest.LogCaptureFixture) -> None:
    take(folder, [memory_of(ALICE)])
    found = folder.get(f"{ID}/manifest.json")
    assert found is not None
    for bad in (b"", b"{}", found[0].replace(b'"users": 1', b'"users": 2'), found[0][:-9]):
        folder.put(f"{ID}/manifest.json", bad)
        with pytest.raises(SnapshotDamaged, match=r"manifest\.json"):
            verify(folder, ID)
        assert list_snapshots(folder) == []
    assert "left out of the list" in caplog.text


def test_the_newest_snapshot_at_a_time(folder: Objects) -> None:
    for hours in (0, 24, 48):
        moment = NOON + timedelta(hours=hours)
        take(folder, [memory_of(ALICE)], snapshot_id=new_snapshot_id(moment), created_at=moment)
    assert find_at(folder, NOON + timedelta(hours=30)).created_at == NOON + timedelta(hours=24)
    assert find_at(folder, NOON).created_at == NOON
    assert find_at(folder, datetime.now(UTC) + timedelta(days=36500)).created_at == NOON + timedelta(hours=48)
    with pytest.raises(NoSuchSnapshot, match="no snapshot from before"):
        find_at(folder, NOON - timedelta(seconds=1))
    assert [m.created_at.day for m in list_snapshots(folder)] == [24, 23, 22]


def test_a_model_goes_only_into_an_empty_folder(folder: Objects, model: Path, tmp_path: Path) -> None:
    take(folder, [memory_of(ALICE)], model=model)
    with pytest.raises(SnapshotError, match="empty folder"):
        restore_model(folder, ID, model)
    (tmp_path / "made").mkdir()
    restore_model(folder, ID, tmp_path / "made")
    assert (tmp_path / "made/config.json").read_text() == '{"layers": 2}'
    other = new_snapshot_id(NOON)
    take(folder, [memory_of(ALICE)], snapshot_id=other)
    with pytest.raises(SnapshotError, match="without the model"):
        restore_model(folder, other, tmp_path / "other")


def test_a_damaged_model_is_not_restored_in_part(folder: Objects, model: Path, tmp_path: Path) -> None:
    (part,) = take(folder, [], model=model)

    def swap(row: dict[str, Any]) -> None:
        if row["name"] == "model.safetensors:norm":
            meta = json.loads(row["meta"])
            row["meta"] = json.dumps({**meta, "sha256": "0" * 64})

    rewrite(folder, part, swap)
    with pytest.raises(SnapshotDamaged, match="SHA-256"):
        restore_model(folder, ID, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    problems = verify(folder, ID)["problems"]
    assert "SHA-256" in problems[0]
    assert "expected 4 model files, found 3" in problems[1]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", ".hidden"])
def test_a_forged_file_name_does_not_lead_out(
    folder: Objects, model: Path, tmp_path: Path, name: str
) -> None:
    (part,) = take(folder, [], model=model)

    def forge(row: dict[str, Any]) -> None:
        row["meta"] = json.dumps({**json.loads(row["meta"]), "file": name})

    rewrite(folder, part, forge)
    with pytest.raises((SnapshotDamaged, ValueError)):
        restore_model(folder, ID, tmp_path / "deep" / "again")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"x" * 20,
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 2) + b"{}x",
    ],
)
def test_a_file_that_only_looks_like_safetensors(folder: Objects, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "odd.safetensors").write_bytes(data)
    take(folder, [], model=tmp_path / "odd")
    restore_model(folder, ID, tmp_path / "again")
    assert (tmp_path / "again" / "odd.safetensors").read_bytes() == data


def test_left_over_segments_neither_hinder_a_restore_nor_continue_it(
    folder: Objects, empty: MemoryStore
) -> None:
    memory = memory_of(USERS[0])
    take(folder, [memory])
    left = replace(make_segment(memory.last_chunk_id + 1, key=memory.key), epoch=3)
    piece = empty.segments.put(memory.key, [left], [], epoch=3)
    assert restore(folder, ID, empty, epoch=5)["restored"] == 1
    back, packet = empty.get(memory.key), empty.segments.read(memory.key, piece)
    assert packet is not None
    assert follow(packet.segments, after_chunk_id=memory.last_chunk_id, epoch=3), "it would fit"
    assert follow(packet.segments, after_chunk_id=back.last_chunk_id, epoch=back.epoch) == []
