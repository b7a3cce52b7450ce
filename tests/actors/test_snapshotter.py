"""The snapshot job without Ray: parts, retries, the schedule, and that nothing half-made counts."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ShardNotOpen
from actors.options import KeeperOptions
from actors.snapshotter import PART_TRIES_MAX, SnapshotOptions, Snapshotter
from storage.errors import SnapshotError
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import list_snapshots
from tests.actors.fake_keeper import FakeKeeper


class Handle:
    """A shard's handle over a keeper; raises what `failures` holds first."""

    def __init__(self, folder: Path, name: str) -> None:
        model = folder / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        self.keeper = FakeKeeper(
            KeeperOptions(
                model=str(model), store_url="", journal_dir=str(folder / "journal"), shard=name, epoch=1
            )
        )
        self.keeper.updates[UserKey("local", f"user-of-{name}")] = {"u": [1]}
        self.failures: list[Exception] = []
        self.calls = 0

    @property
    def snapshot_part(self) -> Any:
        return self

    def remote(self, *args: Any) -> Any:
        self.calls += 1
        return self._answer(*args)

    async def _answer(self, *args: Any) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        return await self.keeper.snapshot_part(*args)


class Clock:
    """Time that passes when somebody sleeps; ends the sleeper after `sleeps_max` naps."""

    def __init__(self, sleeps_max: int = 100) -> None:
        self.now = datetime(2026, 11, 22, 22, 15, tzinfo=UTC)
        self.slept: list[float] = []
        self.sleeps_max = sleeps_max

    async def sleep(self, seconds: float) -> None:
        if len(self.slept) >= self.sleeps_max:
            await asyncio.Event().wait()
        self.slept.append(seconds)
        self.now += timedelta(seconds=seconds)
        await asyncio.sleep(0)


class Place:
    def __init__(self, folder: Path) -> None:
        self.target = f"file://{folder}/snapshots"
        self.handles = {name: Handle(folder, name) for name in ("shard-0", "shard-1")}

    def snapshotter(self, clock: Clock, interval_s: float = 0.0) -> Snapshotter:
        options = SnapshotOptions(
            target=self.target, interval_s=interval_s, shards=tuple(self.handles), namespace="unused"
        )
        return Snapshotter(options, self.handles.__getitem__, now=lambda: clock.now, sleep=clock.sleep)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_every_shard_gives_a_part_and_the_first_one_the_model(place: Place) -> None:
    made = await place.snapshotter(Clock()).create()
    assert [(part["shard"], part["model_files"]) for part in made["parts"]] == [
        ("shard-0", 1),
        ("shard-1", 0),
    ]
    assert made["users"] == 2
    assert made["base"] == "0" * 32
    assert [manifest.id for manifest in list_snapshots(open_objects(place.target))] == [made["id"]]


async def test_a_shard_that_is_started_again_is_asked_again(place: Place) -> None:
    clock = Clock()
    place.handles["shard-1"].failures = [ShardNotOpen("shard-1", "starting")] * 2
    assert (await place.snapshotter(clock).create())["users"] == 2
    assert len(clock.slept) == 2


async def test_without_one_part_there_is_no_snapshot(place: Place) -> None:
    place.handles["shard-1"].failures = [ShardNotOpen("shard-1", "starting")] * PART_TRIES_MAX
    with pytest.raises(SnapshotError, match=f"shard-1 gave no part in {PART_TRIES_MAX} tries"):
        await place.snapshotter(Clock()).create()
    assert list_snapshots(open_objects(place.target)) == []


async def test_a_target_that_names_no_store_is_refused(place: Place) -> None:
    with pytest.raises(SnapshotError, match="target:"):
        await place.snapshotter(Clock()).create("ftp://somewhere")


async def test_two_requests_make_two_snapshots_one_after_the_other(place: Place) -> None:
    snapshotter = place.snapshotter(Clock())
    first, second = await asyncio.gather(snapshotter.create(), snapshotter.create())
    assert first["id"] != second["id"]


async def until(ended: Any, within_s: float = 10.0) -> None:
    for _ in range(int(within_s / 0.01)):
        if ended():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


async def test_the_schedule_counts_from_the_newest_snapshot_not_from_the_start(place: Place) -> None:
    clock = Clock(sleeps_max=0)
    await place.snapshotter(clock).create()
    clock.now += timedelta(hours=5)
    clock.sleeps_max = 1
    scheduled = place.snapshotter(clock, interval_s=86_400)
    await until(lambda: len(list_snapshots(open_objects(place.target))) == 2)
    assert clock.slept[0] == pytest.approx(19 * 3600)
    assert scheduled._task is not None
    scheduled._task.cancel()


async def test_a_scheduled_one_that_fails_is_tried_again_and_old_ones_go(place: Place) -> None:
    clock = Clock(sleeps_max=120)
    place.handles["shard-0"].failures = [SnapshotError("disk full")]
    scheduled = place.snapshotter(clock, interval_s=86_400)
    await until(lambda: len(clock.slept) == 42, within_s=60)
    assert scheduled._task is not None
    scheduled._task.cancel()
    assert clock.slept[1] == 600, "after the failure"
    kept = [manifest.created_at for manifest in list_snapshots(open_objects(place.target))]
    assert 7 <= len(kept) <= 7 + 4 + 3, "40 days: 7 daily, 4 weekly and the months"


async def test_the_age_of_the_newest_one(place: Place) -> None:
    clock = Clock()
    snapshotter = place.snapshotter(clock)
    assert b"\ntitan:snapshot_age_seconds" not in await snapshotter.metrics()
    await snapshotter.create()
    clock.now += timedelta(seconds=90)
    assert b"\ntitan:snapshot_age_seconds 90\n" in await snapshotter.metrics()
