"""Scratch folders go with their process, killed or not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from storage.scratch import SWEEP_AGE_S, scratch_folder


def _die_inside(parent: Path) -> None:
    with scratch_folder(parent) as folder:
        (folder / "memories").write_bytes(b"private")
        os.kill(os.getpid(), signal.SIGKILL)


def _age(folder: Path) -> None:
    stamp = folder.stat().st_mtime - 2 * SWEEP_AGE_S
    os.utime(folder, (stamp, stamp))


def test_it_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        (folder / "part").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_inside, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    with scratch_folder(tmp_path):
        assert left.exists(), "it is young: its process may be about to lock it"
    _age(left)
    with scratch_folder(tmp_path):
        assert not left.exists()


def test_one_that_is_in_use_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as first:
        _age(first)
        with scratch_folder(tmp_path) as second:
            assert first.exists()
            assert second != first


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "titanmem-snapshot-link").symlink_to(tmp_path / "precious")
    _age(tmp_path / "precious")
    with scratch_folder(tmp_path):
        assert (tmp_path / "precious").exists()
