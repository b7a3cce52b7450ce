"""Named bytes with conditional writes: one contract, kept by folders and by a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.errors import InvalidName, StoreUnavailable, StoreUnfit, VersionConflict
from storage.local import LocalObjects
from storage.objects import Objects, open_objects, probe_conditions


def test_what_is_put_is_got(objects: Objects) -> None:
    assert objects.get("a/b") is None
    tag = objects.put("a/b", b"one")
    assert objects.get("a/b") == (b"one", tag)
    assert objects.put("a/b", b"two") != tag
    assert objects.get("a/b") == (b"two", objects.put("a/b", b"two"))
    assert objects.put("a/empty", b"") == (objects.get("a/empty") or ("", ""))[1]


def test_put_if_absent(objects: Objects) -> None:
    tag = objects.put("a", b"one", if_absent=True)
    with pytest.raises(VersionConflict, match="expected nothing") as caught:
        objects.put("a", b"two", if_absent=True)
    assert caught.value.found == tag
    assert objects.get("a") == (b"one", tag)


def test_put_if_tag(objects: Objects) -> None:
    first = objects.put("a", b"one")
    second = objects.put("a", b"two", if_tag=first)
    with pytest.raises(VersionConflict) as caught:
        objects.put("a", b"three", if_tag=first)
    assert (caught.value.expected, caught.value.found) == (first, second)
    objects.delete("a")
    with pytest.raises(VersionConflict, match="the store holds nothing"):
        objects.put("a", b"three", if_tag=second)
    assert objects.get("a") is None


def test_one_of_many_racing_writers_wins(objects: Objects) -> None:
    tag = objects.put("head", b"start")
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        barrier.wait()
        try:
            objects.put("head", f"writer {number}".encode(), if_tag=tag)
        except VersionConflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert (objects.get("head") or (b"", ""))[0] == f"writer {won.index(True)}".encode()


def test_ranges_and_files(objects: Objects, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    path = tmp_path / "upload"
    path.write_bytes(data)
    objects.put_file("x/file", path)
    assert objects.get_range("x/file", 1000, 50) == data[1000:1050]
    assert objects.get_range("x/file", 299_990, 50) == data[299_990:]
    with objects.open_read("x/file") as file:
        assert file.seekable()
        assert file.seek(-100, os.SEEK_END) == len(data) - 100
        assert file.read() == data[-100:]
        file.seek(0)
        assert file.read() == data
    for missing in ("x/nothing", "nothing/at/all"):
        with pytest.raises(FileNotFoundError):
            objects.open_read(missing)
        with pytest.raises(FileNotFoundError):
            objects.get_range(missing, 0, 1)


def test_delete_is_repeatable(objects: Objects) -> None:
    objects.put("a/b/c", b"x")
    objects.delete("a/b/c")
    objects.delete("a/b/c")
    objects.delete("never/there")
    assert objects.get("a/b/c") is None
    assert list(objects.list()) == []


def test_lists_are_in_the_order_of_whole_names(objects: Objects) -> None:
    names = ["a/x", "a-b/x", "a.b/x", "ab/x", "a/y/z", "a0", "B/x", "users/t/u/HEAD", "users/t2/u/HEAD"]
    for name in names:
        objects.put(name, name.encode())
    assert [info.name for info in objects.list()] == sorted(names)
    assert [info.name for info in objects.list("users/t/")] == ["users/t/u/HEAD"]
    assert [info.name for info in objects.list("users/t")] == ["users/t/u/HEAD", "users/t2/u/HEAD"]
    assert [info.name for info in objects.list("a/")] == ["a/x", "a/y/z"]
    assert list(objects.list("nothing/")) == []
    info = next(objects.list("a0"))
    assert info.bytes == 2
    assert abs((datetime.now(UTC) - info.modified).total_seconds()) < 3600


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", ".locks/00", "a/.hidden", ""])
def test_no_name_leads_out(objects: Objects, name: str) -> None:
    for call in (objects.get, objects.delete, objects.open_read, lambda n: objects.put(n, b"")):
        with pytest.raises(InvalidName):
            call(name)


def test_probe_is_content_and_leaves_nothing(objects: Objects) -> None:
    objects.probe()
    assert list(objects.list()) == []


class Careless(LocalObjects):
    """A store that ignores preconditions, as some S3 emulators do."""

    ignores: tuple[str, ...] = ("absent", "tag")

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        return super().put(
            name,
            data,
            if_tag=None if "tag" in self.ignores else if_tag,
            if_absent=if_absent and "absent" not in self.ignores,
        )


@pytest.mark.parametrize(
    ("ignores", "rule"),
    [(("absent", "tag"), "If-None-Match"), (("tag",), "If-Match"), (("absent",), "If-None-Match")],
)
def test_a_store_that_ignores_preconditions_is_refused(
    tmp_path: Path, ignores: tuple[str, ...], rule: str
) -> None:
    careless = Careless(tmp_path / "store")
    careless.ignores = ignores
    with pytest.raises(StoreUnfit, match=f"ignores {rule}") as caught:
        probe_conditions(careless)
    assert "two shards" in str(caught.value)
    assert list(careless.list()) == []


@pytest.mark.parametrize(
    "url",
    [
        "gopher://localhost",
        "redis://",
        "redis://user:secret@host/0",
        "redis://host/zero",
        "redis://host/0?color=blue",
        "/var/store",
        "",
        "file://",
        "file:///",
        "file://host/path",
        "s3://",
        "s3:///prefix",
        "s3://bucket?color=blue",
        "s3://key:secret@bucket/x",
    ],
)
def test_a_wrong_url_says_what_there_is(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"^store: .*expected .*(file:///folder|s3://bucket/prefix|redis://host:port/db)"
    ):
        open_objects(url)


def test_folders_come_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_objects("file://./var/store").put("a", b"x")
    assert (tmp_path / "var/store/a").read_bytes() == b"x"
    open_objects(f"file://{tmp_path}/with%20space").put("a", b"x")
    assert (tmp_path / "with space/a").read_bytes() == b"x"


# What only folders do


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    objects.put("a/b", b"x")
    with pytest.raises(VersionConflict):
        objects.put("a/b", b"y", if_absent=True)
    with pytest.raises(FileNotFoundError):
        objects.put_file("a/c", tmp_path / "nothing")
    assert os.listdir(tmp_path / "store/a") == ["b"]


def test_what_a_crashed_writer_left_is_swept(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    objects.put("a/b", b"x")
    (tmp_path / "store/a/.write-dead").write_bytes(b"half")
    (tmp_path / "store/a/.copy-alive").write_bytes(b"half")
    (tmp_path / "store/a/.copy-dead").write_bytes(b"half")
    os.utime(tmp_path / "store/a/.copy-dead", (1, 1))
    assert [info.name for info in objects.list()] == ["a/b"]
    objects.put("a/b", b"y")
    assert sorted(os.listdir(tmp_path / "store/a")) == [".copy-alive", "b"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = LocalObjects(tmp_path / "store")
    objects.put("a/b", b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("storage.local.os.fsync", fail)
    with pytest.raises(StoreUnavailable, match="No space left"):
        objects.put("a/b", b"new")
    monkeypatch.undo()
    assert (objects.get("a/b") or (b"", ""))[0] == b"old"
    assert os.listdir(tmp_path / "store/a") == ["b"]


def test_a_write_is_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = LocalObjects(tmp_path / "store")
    objects.put("a/b", b"old")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(handle: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def traced_replace(old: Path, new: Path) -> None:
        steps.append("rename")
        assert Path(old).parent == Path(new).parent
        replace(old, new)

    monkeypatch.setattr("storage.local.os.fsync", traced_fsync)
    monkeypatch.setattr("storage.disk.os.fsync", traced_fsync)
    monkeypatch.setattr("storage.local.os.replace", traced_replace)
    objects.put("a/b", b"new")
    assert steps == ["file", "rename", "folder"]


def test_a_lock_held_by_a_frozen_process_is_an_error_not_a_hang(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store", lock_timeout_s=0.05)
    objects.put("a/b", b"x")
    with objects._locked(tmp_path / "store/a"):
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match="has held the lock"):
            objects.put("a/b", b"y")
        assert time.monotonic() - start < 5
    objects.put("a/b", b"z")


def test_folders_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    objects = LocalObjects(tmp_path / "file")
    with pytest.raises(StoreUnavailable, match="is a file, and must be a folder"):
        objects.probe()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_vanished_is_no_empty_store(tmp_path: Path, again: bool) -> None:
    """What an unmounted disk looks like: the folder is gone, or the bare mount point is there instead."""
    objects = LocalObjects(tmp_path / "store")
    assert objects.get("a/b") is None
    assert list(objects.list()) == [], "before its first write a store is empty, not gone"
    objects.put("a/b", b"x")
    (tmp_path / "store").rename(tmp_path / "away")
    if again:
        (tmp_path / "store").mkdir()
    said = "is another folder than it was" if again else "was here and is gone"
    for use in (
        lambda: objects.get("a/b"),
        lambda: list(objects.list()),
        lambda: objects.put("a/b", b"y"),
        lambda: objects.open_read("a/b"),
        lambda: objects.delete("a/b"),
    ):
        with pytest.raises(StoreUnavailable, match=said):
            use()
    assert not (tmp_path / "store" / "a").exists(), "nothing was written below the mount point"
    if again:
        (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")
    assert (objects.get("a/b") or (b"", ""))[0] == b"x", "mounted again, it serves again"


def test_writing_and_deleting_side_by_side(tmp_path: Path) -> None:
    """Deleting removes empty folders; a writer next door must not trip over that."""
    objects = LocalObjects(tmp_path / "store")

    def work(number: int) -> None:
        for _ in range(40):
            objects.put(f"users/t/u{number}/HEAD", b"x")
            objects.delete(f"users/t/u{number}/HEAD")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(objects.list()) == []


def test_copies_into_one_folder_side_by_side(tmp_path: Path) -> None:
    """A copy is made outside the lock: others begin, end and are deleted around it."""
    objects = LocalObjects(tmp_path / "store")
    (tmp_path / "part").write_bytes(b"x" * 100)

    def work(number: int) -> None:
        for _ in range(60):
            objects.put_file(f"snapshot/part-{number}", tmp_path / "part")
            objects.delete(f"snapshot/part-{number}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert list(objects.list()) == []
    assert sorted(os.listdir(tmp_path / "store")) == [".copies", ".locks"]
    assert os.listdir(tmp_path / "store/.copies") == []


def test_a_copy_that_a_crash_left_is_swept_by_the_next_one_wherever_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part").write_bytes(b"x" * 100)
    objects = LocalObjects(tmp_path / "store")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfileobj", killed)
        patched.setattr(Path, "unlink", killed)  # who is killed tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            objects.put_file("monday/part", tmp_path / "part")
    left = [path for path in (tmp_path / "store").rglob(".copy-*")]
    assert len(left) == 1
    os.utime(left[0], (1, 1))
    objects.put_file("tuesday/part", tmp_path / "part")
    assert not left[0].exists()
    assert not (tmp_path / "store/monday").exists()


ADD = """
import sys
from pathlib import Path
from storage.errors import VersionConflict
from storage.local import LocalObjects
objects, done = LocalObjects(Path(sys.argv[1]), lock_timeout_s=60), 0
while done < 25:
    data, tag = objects.get("count")
    try:
        objects.put("count", b"%d" % (int(data) + 1), if_tag=tag)
        done += 1
    except VersionConflict:
        pass
"""


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Four processes add one to a number, by compare-and-set: no addition may get lost."""
    LocalObjects(tmp_path / "store").put("count", b"0")
    run = [sys.executable, "-c", ADD, str(tmp_path / "store")]
    processes = [subprocess.Popen(run, cwd=Path(__file__).parents[2]) for _ in range(4)]
    assert [process.wait(100) for process in processes] == [0] * 4
    assert (LocalObjects(tmp_path / "store").get("count") or (b"", ""))[0] == b"100"
