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
from storage.errors import NoSuchSnapshot, SnapshotError
from storage.names import UserKey
from storage.objects import open_objects
from storage.snapshot import find_at, list_snapshots
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


async def interrupted(place: Place, clock: Clock) -> str:
    """A snapshot of which only shard-0's part was made; its id."""
    place.handles["shard-1"].failures = [SnapshotError("the disk is full")]
    with pytest.raises(SnapshotError, match="full"):
        await place.snapshotter(clock).create()
    await asyncio.sleep(0.2)
    objects = open_objects(place.target)
    (begun,) = (info.name for info in objects.list() if info.name.endswith("/begun.json"))
    assert list_snapshots(objects) == []
    return begun.partition("/")[0]


async def scheduled_once(place: Place, clock: Clock) -> list[Any]:
    """What the schedule has made when it sleeps for the next one."""
    clock.sleeps_max = len(clock.slept)
    snapshotter = place.snapshotter(clock, interval_s=86_400)
    objects = open_objects(place.target)
    await until(lambda: list_snapshots(objects) and not any("begun" in info.name for info in objects.list()))
    assert snapshotter._task is not None
    snapshotter._task.cancel()
    return list_snapshots(objects)


async def test_an_interrupted_snapshot_is_gone_on_with_at_once(place: Place) -> None:
    clock = Clock()
    begun = await interrupted(place, clock)
    made = place.handles["shard-0"].keeper.updates
    made[UserKey("local", "who-came-later")] = {"u": [1]}
    clock.now += timedelta(minutes=5)
    (found,) = await scheduled_once(place, clock)
    assert found.id == begun
    assert found.users == 2, "the part of shard-0 was there, and was not made again"
    assert found.finished_at - found.created_at == timedelta(minutes=5)
    names = [info.name for info in open_objects(place.target).list()]
    assert sorted(name.rpartition(".")[2] for name in names) == ["json", "parquet", "parquet"], names


@pytest.mark.parametrize("why", ["too old", "other shards"])
async def test_what_can_not_be_gone_on_with_is_begun_anew(place: Place, tmp_path: Path, why: str) -> None:
    clock = Clock(sleeps_max=1)
    begun = await interrupted(place, clock)
    if why == "too old":
        clock.now += timedelta(hours=7)
    else:
        place.handles["shard-2"] = Handle(tmp_path, "shard-2")
    snapshotter = place.snapshotter(clock, interval_s=86_400)
    await until(lambda: list_snapshots(open_objects(place.target)))
    assert snapshotter._task is not None
    snapshotter._task.cancel()
    (found,) = list_snapshots(open_objects(place.target))
    assert found.id != begun
    assert len(found.parts) == len(place.handles)


async def test_a_snapshot_that_somebody_asks_for_is_of_now(place: Place) -> None:
    clock = Clock()
    begun = await interrupted(place, clock)
    place.handles["shard-0"].keeper.updates[UserKey("local", "who-came-later")] = {"u": [1]}
    made = await place.snapshotter(clock).create()
    assert made["id"] != begun
    assert made["users"] == 3


async def test_a_point_in_time_is_not_before_what_the_snapshot_holds(place: Place) -> None:
    clock = Clock()
    begun = await interrupted(place, clock)
    started = clock.now
    clock.now += timedelta(hours=1)
    await scheduled_once(place, clock)
    objects = open_objects(place.target)
    assert find_at(objects, started + timedelta(hours=1)).id == begun
    with pytest.raises(NoSuchSnapshot):
        find_at(objects, started + timedelta(minutes=59))
