"""Which cold backups stay, and what an interrupted job leaves."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import StoreUnavailable
from storage.local import LocalObjects
from storage.snapshot import choose_kept, list_snapshots, new_snapshot_id, prune, sweep
from tests.storage.samples import NOON, make_memory
from tests.storage.test_snapshot import take

DAY = timedelta(days=1)


def daily(days: int) -> list[tuple[str, datetime]]:
    """One snapshot a day, back from Sunday, 22 November 2026; each is called by its date."""
    return [(f"{NOON - n * DAY:%Y-%m-%d}", NOON - n * DAY) for n in range(days)]


def test_a_year_of_days() -> None:
    kept = choose_kept(daily(800), daily=7, weekly=4, monthly=12)
    days = {f"2026-11-{day}" for day in (22, 21, 20, 19, 18, 17, 16)}
    sundays = {"2026-11-22", "2026-11-15", "2026-11-08", "2026-11-01"}
    months = {
        "2026-11-22",
        "2026-10-31",
        "2026-09-30",
        "2026-08-31",
        "2026-07-31",
        "2026-06-30",
        "2026-05-31",
    }
    months |= {"2026-04-30", "2026-03-31", "2026-02-28", "2026-01-31", "2025-12-31"}
    assert kept == days | sundays | months


def test_the_newest_of_a_day_stands_for_it() -> None:
    hours = [(f"{n}", NOON + timedelta(hours=n)) for n in range(6)]
    assert choose_kept(hours, daily=7, weekly=4, monthly=12) == {"5"}


def test_gaps_do_not_count() -> None:
    sparse = [(f"{n}", NOON - n * 40 * DAY) for n in range(5)]
    assert choose_kept(sparse, daily=3, weekly=0, monthly=0) == {"0", "1", "2"}


def test_nothing_asked_for_keeps_the_newest() -> None:
    assert choose_kept(daily(5), daily=0, weekly=0, monthly=0) == {"2026-11-22"}
    assert choose_kept([], daily=7, weekly=4, monthly=12) == set()


@given(
    st.lists(st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1)), max_size=60),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 15),
)
def test_limits_hold_and_pruning_twice_changes_nothing(
    moments: list[datetime], days: int, weeks: int, months: int
) -> None:
    snapshots = [(str(number), moment.replace(tzinfo=UTC)) for number, moment in enumerate(moments)]
    limits = {"daily": days, "weekly": weeks, "monthly": months}
    kept = choose_kept(snapshots, **limits)
    assert len(kept) <= max(1, days + weeks + months)
    assert choose_kept([pair for pair in snapshots if pair[0] in kept], **limits) == kept
    if snapshots:
        newest = max(moment for _, moment in snapshots)
        assert newest in {moment for name, moment in snapshots if name in kept}


@pytest.fixture
def folder(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "backup")


def fill(folder: LocalObjects, days: int) -> list[str]:
    ids = []
    for number in range(days):
        moment = NOON - number * DAY
        ids.append(new_snapshot_id(moment))
        take(folder, [make_memory(nonzero=1)], snapshot_id=ids[-1], created_at=moment)
    return ids


def test_pruning_deletes_manifests_and_parts(folder: LocalObjects) -> None:
    ids = fill(folder, 5)
    folder.put("users/local/alice/HEAD", b"somebody else's")
    assert sorted(prune(folder, daily=2, weekly=1, monthly=1, now=NOON)) == sorted(ids[2:])
    assert [manifest.id for manifest in list_snapshots(folder)] == ids[:2]
    assert sum(info.name.endswith(".parquet") for info in folder.list()) == 2
    assert folder.get("users/local/alice/HEAD") is not None
    assert prune(folder, daily=2, weekly=1, monthly=1, now=NOON) == []


def test_snapshots_from_the_future_are_left_alone(folder: LocalObjects) -> None:
    ids = fill(folder, 3)
    assert prune(folder, daily=1, weekly=0, monthly=0, now=NOON - DAY) == [ids[2]]
    assert [manifest.id for manifest in list_snapshots(folder)] == ids[:2]


def test_an_interrupted_pruning_leaves_no_half_snapshot(folder: LocalObjects, tmp_path: Path) -> None:
    ids = fill(folder, 2)

    class Interrupted(LocalObjects):
        def delete(self, name: str) -> None:
            if name.endswith(".parquet"):
                raise StoreUnavailable("the power is gone")
            super().delete(name)

    with pytest.raises(StoreUnavailable):
        prune(Interrupted(folder.root), daily=1, weekly=0, monthly=0, now=NOON)
    assert [manifest.id for manifest in list_snapshots(folder)] == ids[:1]
    assert sum(info.name.endswith(".parquet") for info in folder.list()) == 2
    age(folder, 2 * DAY)
    prune(folder, daily=1, weekly=0, monthly=0, now=datetime.now(UTC))
    assert sum(info.name.endswith(".parquet") for info in folder.list()) == 1


def age(folder: LocalObjects, by: timedelta) -> None:
    then = (datetime.now(UTC) - by).timestamp()
    for info in folder.list():
        os.utime(folder.root / info.name, (then, then))


def test_what_an_interrupted_job_left_is_swept_in_time(folder: LocalObjects) -> None:
    (finished,) = fill(folder, 1)
    started = new_snapshot_id(NOON)
    for left in ("part-0-e00000001.parquet", "part-0.json", "begun.json"):
        folder.put(f"{started}/{left}", b"half")
    folder.put(f"{finished}/part-0-e00000099.parquet", b"of a shard that came late")
    folder.put("notes.txt", b"not ours")
    now = datetime.now(UTC)
    assert sweep(folder, now=now) == [], "it may still be running"
    age(folder, 2 * DAY)
    assert sorted(sweep(folder, now=now)) == sorted(
        [
            f"{finished}/part-0-e00000099.parquet",
            f"{started}/begun.json",
            f"{started}/part-0-e00000001.parquet",
            f"{started}/part-0.json",
        ]
    )
    assert [manifest.id for manifest in list_snapshots(folder)] == [finished]
    assert folder.get("notes.txt") is not None


def test_negative_limits_are_refused(folder: LocalObjects) -> None:
    with pytest.raises(ValueError, match="weekly: -1: expected 0 or more"):
        prune(folder, weekly=-1, now=NOON)
