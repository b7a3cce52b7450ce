"""Pending segments follow their users, whenever the handover is cut off; on real journals."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.handover import Handover, hand_over
from actors.options import journal_path
from storage.errors import JournalCorrupt, JournalError
from storage.journal import Journal, Segment
from storage.names import UserKey

USERS = [UserKey("local", f"u{n}") for n in range(6)]


def segment(key: UserKey, n: int, epoch: int = 0) -> Segment:
    return Segment(
        key=key,
        update_id=f"{key.user}-{n}" + (f"-{epoch}" if epoch else ""),
        epoch=epoch,
        conversation="c",
        role="user",
        context=np.zeros(0, np.int32),
        tokens=np.array([n, n + 1], np.int32),
        first_chunk_id=n,
        last_chunk_id=n,
    )


@contextmanager
def journal(folder: Path, shard: str) -> Iterator[Journal]:
    opened = Journal(journal_path(folder, shard))
    try:
        yield opened
    finally:
        opened.close()


def fill(folder: Path, shard: str, users: list[UserKey], segments: int = 3) -> None:
    with journal(folder, shard) as opened:
        for key in users:
            for n in range(1, segments + 1):
                opened.append(segment(key, n), [n * 2**60]).result(10)
                opened.set_outcome(key, f"{key.user}-{n}", {"n": n}).result(10)


def contents(folder: Path, shard: str) -> dict[str, Any]:
    with journal(folder, shard) as opened:
        return {
            key.user: (
                [item.update_id for item in opened.pending(key)],
                opened.seen(key),
                [opened.outcome(key, item.update_id) for item in opened.pending(key)],
            )
            for key in opened.users_pending()
        }


def whole(key: UserKey) -> tuple[list[str], list[int], list[dict[str, int]]]:
    return (
        [f"{key.user}-{n}" for n in (1, 2, 3)],
        [n * 2**60 for n in (1, 2, 3)],
        [{"n": n} for n in (1, 2, 3)],
    )


def owner_among(shards: int) -> Callable[[UserKey], str]:
    return lambda key: f"shard-{int(key.user[1:]) % shards}"


def test_segments_hashes_and_outcomes_go_to_the_new_owner(tmp_path: Path) -> None:
    fill(tmp_path, "shard-0", USERS)
    assert hand_over(tmp_path, owner_among(2), Journal) == Handover(journals=1, users=3, segments=9)
    assert contents(tmp_path, "shard-0") == {key.user: whole(key) for key in USERS[::2]}
    assert contents(tmp_path, "shard-1") == {key.user: whole(key) for key in USERS[1::2]}
    assert hand_over(tmp_path, owner_among(2), Journal) == Handover(journals=2, users=0, segments=0)


def test_updates_whose_segments_are_trimmed_go_along(tmp_path: Path) -> None:
    fill(tmp_path, "shard-0", USERS)
    with journal(tmp_path, "shard-0") as opened:
        for key in USERS:
            opened.trim(key, 2 if key in USERS[:3] else 3).result(10)
    assert hand_over(tmp_path, owner_among(2), Journal) == Handover(journals=1, users=3, segments=1)
    for shard, users in (("shard-0", USERS[::2]), ("shard-1", USERS[1::2])):
        with journal(tmp_path, shard) as opened:
            assert opened.users() == users
            for key in users:
                assert [opened.outcome(key, f"{key.user}-{n}") for n in (1, 2, 3)] == [
                    {"n": 1},
                    {"n": 2},
                    {"n": 3},
                ]
                again = opened.append(segment(key, 1)).result(10)
                assert again.duplicate


def test_updates_of_void_segments_stay_behind(tmp_path: Path) -> None:
    for shard, epoch, chunks in (("shard-0", 1, (1, 2, 3)), ("shard-1", 2, (3, 4))):
        with journal(tmp_path, shard) as opened:
            for n in chunks:
                opened.append(segment(USERS[1], n, epoch), []).result(10)
    hand_over(tmp_path, owner_among(2), Journal)
    with journal(tmp_path, "shard-1") as opened:
        known = [update.update_id for update in opened.updates(USERS[1])]
    assert known == ["u1-1-1", "u1-2-1", "u1-3-2", "u1-4-2"]


def test_a_shard_that_no_longer_exists_gives_up_everything(tmp_path: Path) -> None:
    for shard in range(3):
        fill(tmp_path, f"shard-{shard}", USERS[shard::3])
    assert hand_over(tmp_path, owner_among(1), Journal).users == 4
    assert contents(tmp_path, "shard-0") == {key.user: whole(key) for key in USERS}
    assert contents(tmp_path, "shard-1") == contents(tmp_path, "shard-2") == {}


@pytest.mark.parametrize("old", ["shard-0", "shard-1"])
def test_of_two_journals_that_know_a_user_the_newer_epochs_segments_count(tmp_path: Path, old: str) -> None:
    """Another node owned the user for a while, and this node's journals are from before and after."""
    new = {"shard-0": "shard-1", "shard-1": "shard-0"}[old]
    for shard, epoch, chunks in ((old, 1, (1, 2, 3)), (new, 2, (3, 4))):
        with journal(tmp_path, shard) as opened:
            for n in chunks:
                opened.append(segment(USERS[1], n, epoch), [epoch * 10 + n]).result(10)
    hand_over(tmp_path, owner_among(2), Journal)
    with journal(tmp_path, "shard-1") as opened:
        found = [(item.first_chunk_id, item.epoch) for item in opened.pending(USERS[1])]
        assert opened.seen(USERS[1]) == [23, 24], "of the older journal nobody can tell which are void"
    assert found == [(1, 1), (2, 1), (3, 2), (4, 2)]
    with journal(tmp_path, "shard-0") as opened:
        assert opened.users_pending() == []


def test_no_journals_are_no_work(tmp_path: Path) -> None:
    assert hand_over(tmp_path / "none", owner_among(1), Journal) == Handover(journals=0, users=0, segments=0)


class Crash(BaseException):
    """Ends everything at once, as kill -9 does."""


def crashing(calls_left: list[int]) -> Callable[[Path], Any]:
    """Opens journals that are cut off before the n-th change."""

    class Crashing(Journal):
        def _tick(self) -> None:
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise Crash

        def append(self, *args: Any, **kwargs: Any) -> Any:
            self._tick()
            return super().append(*args, **kwargs)

        def adopt(self, *args: Any, **kwargs: Any) -> Any:
            self._tick()
            return super().adopt(*args, **kwargs)

        def forget(self, *keys: UserKey) -> dict[str, int]:
            self._tick()
            return super().forget(*keys)

    return Crashing


@pytest.mark.parametrize("back", [False, True], ids=["same-shards", "shards-changed-back"])
def test_a_crash_at_any_point_loses_and_repeats_nothing(tmp_path: Path, back: bool) -> None:
    changes = 0
    while True:
        folder = tmp_path / str(changes)
        fill(folder, "shard-0", USERS[:3])
        try:
            hand_over(folder, owner_among(2), crashing([changes]))
            break
        except Crash:
            pass
        shards = 1 if back else 2
        hand_over(folder, owner_among(shards), Journal)
        found = contents(folder, "shard-0") | contents(folder, "shard-1")
        assert found == {key.user: whole(key) for key in USERS[:3]}, f"crash after {changes} changes"
        if back:
            assert contents(folder, "shard-1") == {}
        changes += 1
    assert changes == 5, "three segments, their outcomes, one removal: each was a point to crash at"


def test_a_damaged_journal_stops_the_start_and_names_the_file(tmp_path: Path) -> None:
    fill(tmp_path, "shard-1", USERS[:1])
    journal_path(tmp_path, "shard-0").write_bytes(b"not a database" * 1000)
    with pytest.raises(JournalError, match=r"shard-0\.journal"):
        hand_over(tmp_path, owner_among(1), Journal)
    assert contents(tmp_path, "shard-1") == {"u0": whole(USERS[0])}
    assert issubclass(JournalCorrupt, JournalError)


def _hold(folder: str, ready: Any) -> None:
    with journal(Path(folder), "shard-0"):
        ready.set()
        time.sleep(60)


def test_waits_for_a_process_that_is_about_to_end_and_reports_one_that_stays(tmp_path: Path) -> None:
    fill(tmp_path, "shard-0", USERS[:2])
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready))
    holder.start()
    try:
        assert ready.wait(20)
        with pytest.raises(
            JournalError, match=f"process {holder.pid} still has this journal open after 0.2 s"
        ):
            hand_over(tmp_path, owner_among(2), Journal, wait_s=0.2)
        threading.Timer(0.3, holder.kill).start()
        assert hand_over(tmp_path, owner_among(2), Journal, wait_s=20.0).users == 1
    finally:
        holder.kill()
        holder.join(10)
