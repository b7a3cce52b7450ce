"""What is said of a store that fails: one line when it begins, one when it is over, and the reason meanwhile."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from storage.errors import StoreUnavailable, VersionConflict
from storage.health import QUIET_S, STALE_S, Health, Watched, health_of
from storage.local import LocalObjects
from storage.store import open_store

AWAY = StoreUnavailable("can not read a: it is away")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock, caplog: pytest.LogCaptureFixture) -> Health:
    caplog.set_level(logging.INFO, "storage.health")
    return Health("s3://bucket/store", clock=clock)


def test_an_outage_has_two_lines_however_many_calls_meet_it(
    health: Health, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    health.answered("read")
    threads = [threading.Thread(target=health.failed, args=("read", AWAY, clock())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert health.problem == "can not read a: it is away"
    clock.now_s += 60
    health.failed("read", AWAY, clock())
    assert health.away_s() == 60
    assert health.summary() == "the store s3://bucket/store: reads fail, for 60 s; the log says why"
    clock.now_s += QUIET_S
    health.answered("read")
    health.answered("read")
    assert (health.problem, health.summary(), health.away_s()) == ("", "", 0.0)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "ERROR",
            "s3://bucket/store fails; until it answers, what is told stays in the journal: can not read a: it is away",
        ),
        ("WARNING", "s3://bucket/store answers again, after 63 s"),
    ]


def test_a_store_that_takes_every_other_call_has_one_outage(
    health: Health, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        health.failed("read", AWAY, clock())
        clock.now_s += QUIET_S / 2
        health.answered("read")
    assert health.problem
    assert len(caplog.records) == 1


def test_reads_do_not_hide_that_writes_fail(health: Health, clock: Clock) -> None:
    health.failed("write", AWAY, clock())
    clock.now_s += 2 * QUIET_S
    health.answered("read")
    assert health.problem
    health.answered("write")
    assert not health.problem
    health.failed("write", AWAY, clock())
    clock.now_s += STALE_S + 1
    health.answered("read")
    assert not health.problem, "nobody has tried to write for a minute: it is not known any more"


def test_a_call_that_waited_through_an_outage_begins_no_new_one(
    health: Health, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    began_s = clock()
    clock.now_s += 1
    health.failed("read", AWAY, began_s)
    clock.now_s += QUIET_S
    health.answered("read")
    health.failed("write", AWAY, began_s)
    assert not health.problem
    assert len(caplog.records) == 2
    health.failed("write", AWAY, clock())
    assert health.problem


def test_what_a_store_refuses_is_an_answer(tmp_path: Path, health: Health, clock: Clock) -> None:
    objects = Watched(LocalObjects(tmp_path / "store"), health)
    objects.put("a", b"1", if_absent=True)
    (tmp_path / "store").rename(tmp_path / "away")
    for use in (
        lambda: objects.get("a"),
        lambda: objects.get_range("a", 0, 1),
        lambda: objects.open_read("a"),
        lambda: list(objects.list()),
    ):
        health.problem = ""
        with pytest.raises(StoreUnavailable):
            use()
        assert "was here and is gone" in health.problem
    (tmp_path / "away").rename(tmp_path / "store")
    clock.now_s += QUIET_S
    with pytest.raises(FileNotFoundError):
        objects.open_read("b")
    assert not health.problem
    for use in (
        lambda: objects.delete("a"),
        lambda: objects.put("a", b""),
        lambda: objects.put_file("a", tmp_path),
    ):
        (tmp_path / "store").rename(tmp_path / "away")
        with pytest.raises((StoreUnavailable, OSError)):
            use()
        (tmp_path / "away").rename(tmp_path / "store")
    assert health.problem
    clock.now_s += QUIET_S
    assert objects.get("a") is not None, "a read, and it is the writes that failed"
    assert health.problem
    with pytest.raises(VersionConflict):
        objects.put("a", b"2", if_absent=True)
    assert not health.problem


def test_all_who_open_a_store_in_a_process_learn_of_it_together(tmp_path: Path) -> None:
    one, two = (
        open_store(f"file://{tmp_path}/store", watched=True),
        open_store(f"file://{tmp_path}/store", watched=True),
    )
    assert one.health is two.health is health_of(one.url)
    assert open_store(f"file://{tmp_path}/other", watched=True).health is not one.health
    one.next_epoch()
    (tmp_path / "store").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable):
        one.next_epoch()
    assert "was here and is gone" in two.health.problem
    assert not open_store(one.url).health.problem, "a command, that says itself what it meets"
