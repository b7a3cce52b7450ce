"""Processes that are killed at every step of journal, store, hand-over and snapshot lose nothing and double nothing."""

from __future__ import annotations

import json

import pytest

from tests.actors.crash_points import POINTS, half_of_the_change
from tests.beside import Done


def drill(*arguments: str) -> pytest.MarkDecorator:
    return pytest.mark.beside("benchmarks/crashes.py", *arguments)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@drill("--kills", "60", "--updates", "1600", "--seed", "0")
def test_a_kill_at_every_point_loses_nothing_and_doubles_nothing(beside: Done) -> None:
    found = json.loads(beside.stdout)
    assert found["faults"] == [], beside.stderr[-4000:]
    assert beside.returncode == 0
    assert set(found["kills_by_point"]) == set(POINTS)
    assert (found["lost"], found["doubled"], found["users_with_unequal_bits"]) == (0, 0, [])
    assert found["updates"] >= 1600
    assert found["in_flight_when_killed"] > 0
    assert found["answered_as_duplicates"] > 0


FAULTY = [("trims-early", "one was lost"), ("ignores-update-ids", "one was written twice")]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(
            seen, marks=drill("--kills", "60", "--updates", "600", "--seed", "1", "--fault", fault), id=fault
        )
        for fault, seen in FAULTY
    ],
)
def test_a_planted_fault_is_caught(beside: Done, seen: str) -> None:
    assert beside.returncode == 1, beside.stderr[-4000:]
    found = json.loads(beside.stdout)
    assert [fault for fault in found["faults"] if seen in fault], "this fault, and not some other end"
    assert "seed 1" in beside.stderr, "whoever sees it fail can run it again"


@pytest.mark.parametrize(
    ("before", "after", "half"),
    [(b"", b"abcd", b"ab"), (b"ab", b"abcdef", b"abcd"), (b"abcdefgh", b"abXYZWgh", b"abXYZfgh")],
)
def test_half_of_a_change(before: bytes, after: bytes, half: bytes) -> None:
    assert half_of_the_change(before, after) == half
