"""A folder for what is being made before it goes elsewhere; it does not outlive its process for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SWEEP_AGE_S = 60.0
"""Younger folders are left alone: theirs may be the moment between being made and being locked."""
_PREFIX = "titanmem-snapshot-"


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent` (None: where temporary files go), removed in the end. Raises `OSError`.

    Folders that killed processes left there go first: whole memories of users may lie in them. The lock of a folder
    says whether its process lives.
    """
    where = parent or Path(tempfile.gettempdir())
    sweep_scratch(where)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where) as name:
        handle = _open(Path(name))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(handle)


def sweep_scratch(parent: Path | None = None) -> None:
    """Removes the folders that killed processes left in `parent` (None: where temporary files go)."""
    for old in (parent or Path(tempfile.gettempdir())).glob(f"{_PREFIX}*"):
        _remove_if_left(old)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # in use, somebody else's, or already gone
        handle = _open(folder)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(handle).st_mtime > SWEEP_AGE_S:
                shutil.rmtree(folder)
        finally:
            os.close(handle)
