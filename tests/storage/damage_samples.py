"""One small good file of each kind that the project keeps, and how a program reads it back."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import BadMemoryFile
from storage.head import user_folder
from storage.journal import Journal
from storage.names import UserKey
from storage.objects import open_objects
from storage.segment import Segment
from storage.snapshot import commit_manifest, read_manifest, restore, write_part
from storage.store import MemoryStore
from storage.titanmem import decode, encode
from tests.storage.samples import ALICE, BASE, NOON, make_memory, make_segment

BOB = UserKey("acme", "bob")
SNAPSHOT = "20261122T120000Z-0a1b2c"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A file, how it is read, and what reading it right gives (anything that can be compared)."""

    name: str
    data: bytes
    expected: Any
    read: Callable[[bytes, Path], Any]
    """Of the file's bytes and a scratch folder. May raise what the product raises."""
    before: tuple[Any, ...] = ()
    """What was right before each of the last writes, oldest first, where a crash may leave just that behind."""


def memory_file(folder: Path) -> Sample:
    memory = make_memory(nonzero=12)
    return Sample(
        name=".titanmem",
        data=encode(memory),
        expected=encode(memory),
        read=lambda data, _: encode(decode(data)),
    )


def head_record(folder: Path) -> Sample:
    store = MemoryStore(open_objects(f"file://{folder}/store"))
    for version in (1, 2, 3):
        store.put(make_memory(nonzero=12, version=version), epoch=2)
    path = folder / "store" / user_folder(ALICE) / "HEAD"

    def read(data: bytes, _: Path) -> Any:
        path.write_bytes(data)
        return store.versions(ALICE), store.epoch_of(ALICE)

    good = path.read_bytes()
    return Sample(name="HEAD", data=good, expected=read(good, folder), read=read)


CHUNKS = range(1, 4)


def _fill(journal: Journal) -> Iterator[object]:
    """Yields after each group that is on the disk."""
    for key in (ALICE, BOB):
        for chunk in CHUNKS:
            yield journal.append(make_segment(chunk, key=key), [chunk, chunk + 2**63]).result()
            yield journal.set_outcome(key, f"update-{chunk}", {"tokens": chunk, "duplicate": False}).result()


def _plain(segment: Segment) -> tuple[Any, ...]:
    ids = (segment.context.tolist(), segment.tokens.tolist())
    return (str(segment.key), segment.update_id, segment.conversation, segment.role, *ids,
            segment.first_chunk_id, segment.last_chunk_id)  # fmt: skip


def _contents(path: Path) -> Any:
    """All that a journal answers, a repeated append included."""
    journal = Journal(path)
    try:
        users = journal.users_pending()
        segments = [_plain(segment) for key in users for segment in journal.pending(key)]
        keys = (ALICE, BOB)
        outcomes = [journal.outcome(key, f"update-{chunk}") for key in keys for chunk in CHUNKS]
        return users, segments, outcomes, [journal.seen(key) for key in keys]
    finally:
        journal.close()


def _copied(journal: Path, folder: Path) -> Path:
    """The journal as a process that is killed now would leave it."""
    folder.mkdir()
    for file in (journal, Path(f"{journal}-wal")):
        if file.exists():
            shutil.copy(file, folder)
    return folder / journal.name


def _journal_sample(folder: Path, name: str, which: str) -> Sample:
    """A journal as a killed process leaves it (`which` "-wal"), or as a closed one does ("")."""
    path, kept = folder / "shard.journal", folder / "kept"
    journal = Journal(path)
    groups = itertools.chain([None], _fill(journal))
    states = [_contents(_copied(path, folder / f"after-{number}")) for number, _ in enumerate(groups)]
    if which:
        _copied(path, kept)
        journal.close()
    else:
        journal.close()
        _copied(path, kept)

    def read(data: bytes, _: Path) -> Any:
        for file in folder.glob("shard.journal*"):
            file.unlink()
        for file in kept.iterdir():
            shutil.copy(file, folder)
        Path(f"{path}{which}").write_bytes(data)
        return _contents(path)

    good = (kept / f"shard.journal{which}").read_bytes()
    before = tuple(states[:-1]) if which else ()
    return Sample(name=name, data=good, expected=states[-1], read=read, before=before)


def journal_database(folder: Path) -> Sample:
    return _journal_sample(folder, "journal, closed", "")


def journal_log(folder: Path) -> Sample:
    return _journal_sample(folder, "journal's WAL, killed", "-wal")


def _snapshot(folder: Path) -> Any:
    target = open_objects(f"file://{folder}/target")
    memories = [encode(make_memory(nonzero=12, key=key)) for key in (ALICE, BOB)]
    part = write_part(target, SNAPSHOT, shard="s", epoch=1, model_dir=None, memories=memories)
    commit_manifest(target, SNAPSHOT, [part], created_at=NOON, base=BASE)
    return target, part


def manifest(folder: Path) -> Sample:
    target, _ = _snapshot(folder)
    name = f"{SNAPSHOT}/manifest.json"

    def read(data: bytes, _: Path) -> Any:
        target.put(name, data)
        return read_manifest(target, SNAPSHOT)

    good = (folder / "target" / name).read_bytes()
    return Sample(name="manifest", data=good, expected=read(good, folder), read=read)


def _part_sample(folder: Path, name: str, **which: Any) -> Sample:
    target, part = _snapshot(folder)
    path = folder / "target" / part.name

    def read(data: bytes, _: Path) -> Any:
        path.write_bytes(data)
        shutil.rmtree(folder / "restored", ignore_errors=True)
        store = MemoryStore(open_objects(f"file://{folder}/restored"))
        report = restore(target, SNAPSHOT, store, epoch=1, **which)
        if not report["ok"]:
            raise BadMemoryFile(path.name, "every row is whole", "no failure", report["failed"])
        return {str(key): store.get_bytes(key) for key in store.users()}

    good = path.read_bytes()
    return Sample(name=name, data=good, expected=read(good, folder), read=read)


def part(folder: Path) -> Sample:
    return _part_sample(folder, "part, all users")


def part_one_user(folder: Path) -> Sample:
    return _part_sample(folder, "part, one user", user=BOB)


SAMPLES: tuple[Callable[[Path], Sample], ...] = (
    memory_file, head_record, journal_database, journal_log, manifest, part, part_one_user,
)  # fmt: skip
