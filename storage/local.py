"""Objects as files in a folder: `file:///path`.

A write goes to a temporary name in the same folder, is flushed to the disk, renamed, and the folder flushed;
a reader sees the old content or the new. Writers of one folder take turns under an flock, so that a
conditional write compares and renames in one step, whichever processes share the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import xxhash

from storage.disk import flush_folder
from storage.errors import StoreUnavailable, VersionConflict
from storage.objects import ObjectInfo, check_object_name, check_prefix, probe_conditions

LOCK_FILES = 64
_LOCKS, _COPIES = ".locks", ".copies"
_WRITE, _COPY = ".write-", ".copy-"
_COPY_STALE_S = 86_400.0
_LOCK_PAUSE_MAX_S = 0.004  # flock with a time limit has to ask; who asks seldom is overtaken again and again
_NO_OBJECT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _tag(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _remove_if_left(path: Path, older_than_s: float) -> bool:
    """Whether it was there, old enough, and no living writer's."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(file.fileno()).st_mtime < older_than_s:
                return False
            path.unlink()
            return True
    except (FileNotFoundError, BlockingIOError):
        return False


class LocalObjects:
    """`Objects` in the folder `root`, which is made at the first write.

    `lock_timeout_s`: how long a write waits for other writers of its folder before `StoreUnavailable`.
    """

    def __init__(self, root: Path, *, lock_timeout_s: float = 10.0) -> None:
        self.root = Path(root).absolute()
        self.url = f"file://{self.root}"
        self._lock_timeout_s = lock_timeout_s
        self._folder: tuple[int, int] | None = None
        """Device and inode of `root`, from when it was first seen."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        with self._reporting("read", name):
            try:
                data = self._path(name).read_bytes()
            except _NO_OBJECT:
                self._check_root()  # gone since we looked?
                return None
            return data, _tag(data)

    def put(self, name: str, data: bytes, *, if_tag: str | None = None, if_absent: bool = False) -> str:
        path = self._path(name)
        with self._reporting("write", name), self._locked(path.parent):
            if if_absent or if_tag is not None:
                self._check_precondition(name, if_tag)
            temporary = self._temporary(path, _WRITE)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._swap_in(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return _tag(data)

    def put_file(self, name: str, path: Path) -> None:
        target = self._path(name)
        with open(path, "rb") as source, self._reporting("write", name):
            # All copies in one folder: one that a crash leaves beside its target is swept by nobody who comes later.
            temporary = self._temporary(self.root / _COPIES / target.name, _COPY)
            try:
                with open(temporary, "xb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that its writer lives
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                with self._locked(target.parent):
                    self._make_folder(target.parent)
                    self._swap_in(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def get_range(self, name: str, start: int, length: int) -> bytes:
        with self.open_read(name) as file, self._reporting("read", name):
            file.seek(start)
            return file.read(length)

    def open_read(self, name: str) -> BinaryIO:
        with self._reporting("read", name), contextlib.suppress(*_NO_OBJECT):
            return open(self._path(name), "rb")
        raise FileNotFoundError(f"{self.url}: no object {name}")

    def delete(self, name: str) -> None:
        path = self._path(name)
        with self._reporting("delete", name):
            if not path.parent.is_dir():
                return
            with self._locked(path.parent):
                try:
                    path.unlink()
                except (FileNotFoundError, IsADirectoryError):
                    return
                flush_folder(path.parent)
                self._remove_empty(path.parent)

    def sweep(self, prefix: str = "", *, older_than_s: float, replaced: bool = False) -> list[str]:
        """As `Objects.sweep`: writes whose folder's lock nobody holds, and copies whose own lock nobody holds."""
        check_prefix(prefix)
        removed: list[str] = []
        with self._reporting("sweep", prefix):
            for folder, _, files in os.walk(self.root / prefix):
                left = [name for name in files if name.startswith((_WRITE, _COPY))]
                if not left:
                    continue
                with self._locked(Path(folder)):
                    removed += [name for name in left if _remove_if_left(Path(folder, name), older_than_s)]
                    self._remove_empty(Path(folder))
        return removed

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        with self._reporting("list", prefix):
            yield from self._walk(self.root / folder, f"{folder}/" if folder else "", prefix)

    def probe(self) -> None:
        probe_conditions(self)

    def _path(self, name: str) -> Path:
        return self.root / check_object_name(name)

    def _check_precondition(self, name: str, if_tag: str | None) -> None:
        current = self.get(name)
        found = current[1] if current else None
        if found != if_tag:
            raise VersionConflict(
                f"{self.url}: {name}: expected {if_tag or 'nothing'}, the store holds {found or 'nothing'}",
                name=name,
                expected=if_tag,
                found=found,
            )

    def _temporary(self, path: Path, kind: str) -> Path:
        """A free name beside `path`; sweeps what crashed writers left. `_WRITE` needs the folder's lock."""
        self._make_folder(path.parent)
        with os.scandir(path.parent) as entries:
            for entry in entries:
                is_copy = entry.name.startswith(_COPY)
                # A copy is written without the lock: its writer may give it up while we look.
                with contextlib.suppress(FileNotFoundError):
                    if is_copy and time.time() - entry.stat().st_mtime < _COPY_STALE_S:
                        continue
                    if is_copy or (kind == _WRITE and entry.name.startswith(_WRITE)):
                        os.unlink(entry.path)
        return path.parent / f"{kind}{secrets.token_hex(8)}"

    def _swap_in(self, temporary: Path, path: Path) -> None:
        os.replace(temporary, path)
        flush_folder(path.parent)
        self._check_root()  # the first write has made it: from now on it is known

    def _make_folder(self, folder: Path) -> None:
        """Makes `folder` durably: each new folder is flushed into the one that holds it."""
        while not folder.is_dir():
            new = folder
            while not new.parent.is_dir():
                new = new.parent
            # A parent that a deletion has just found empty may vanish here: then look again.
            with contextlib.suppress(FileNotFoundError):
                new.mkdir(exist_ok=True, mode=0o700)
                flush_folder(new.parent)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or somebody else was faster
            folder = folder.parent

    def _walk(self, folder: Path, begin: str, prefix: str) -> Iterator[ObjectInfo]:
        """Objects under `folder`, whose names begin with `begin`, ordered by whole names, as S3 does it."""
        try:
            with os.scandir(folder) as entries:
                found = [(e.name + "/" if e.is_dir() else e.name, e) for e in entries if e.name[0] != "."]
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return
        for local_name, entry in sorted(found, key=lambda pair: pair[0]):
            name = begin + local_name
            if local_name.endswith("/"):
                if name.startswith(prefix) or prefix.startswith(name):
                    yield from self._walk(Path(entry.path), name, prefix)
            elif name.startswith(prefix):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # deleted while we listed
                yield ObjectInfo(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Holds the lock of `folder` against threads and processes; gives up after `lock_timeout_s`."""
        number = xxhash.xxh3_64_intdigest(str(folder.relative_to(self.root)).encode()) % LOCK_FILES
        self._make_folder(self.root / _LOCKS)
        handle = os.open(self.root / _LOCKS / f"{number:02x}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline, pause_s = time.monotonic() + self._lock_timeout_s, 0.0005
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(
                            f"{self.url}: another process has held the lock {_LOCKS}/{number:02x} for over "
                            f"{self._lock_timeout_s} s. Find it with `fuser` and end it if it hangs."
                        ) from None
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LOCK_PAUSE_MAX_S)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _reporting(self, what: str, name: str) -> Iterator[None]:
        self._check_root()
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"{self.url}: can not {what} {name or 'the folder'}: {error.strerror or error}. "
                "Check that the folder exists, is writable and has room.",
                name=name,
                errno=error.errno,
            ) from error

    def _check_root(self) -> None:
        """Raises StoreUnavailable if `root` is not the folder that it was: an unmounted disk is no empty store, and
        what is written below its mount point is lost to sight when it comes back."""
        known = self._folder  # before the look: another thread may make the folder in between
        try:
            found = self.root.stat()
        except FileNotFoundError:
            if known is not None:
                raise StoreUnavailable(
                    f"{self.url}: the folder was here and is gone. Mount its disk again, or restart on another store."
                ) from None
            return
        except OSError as error:
            raise StoreUnavailable(f"{self.url}: {error.strerror or error}", errno=error.errno) from error
        if not stat.S_ISDIR(found.st_mode):
            raise StoreUnavailable(f"{self.url}: is a file, and must be a folder")
        folder = found.st_dev, found.st_ino
        if self._folder is None:
            self._folder = folder
        elif folder != self._folder:
            raise StoreUnavailable(
                f"{self.url}: is another folder than it was. Mount its disk again, or restart on another store."
            )
