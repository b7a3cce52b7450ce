"""Processes that are killed at every step of journal, store, hand-over and snapshot lose nothing and double nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.actors.crash_points import POINTS, half_of_the_change

ROOT = Path(__file__).parent.parent.parent


def crashes(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The benchmark's exit status, its JSON, and what it said meanwhile; it forks, so it has a process of its own."""
    path = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "crashes.py"), "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr[-4000:]
    return done.returncode, json.loads(path.read_text()), done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_every_point_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    status, found, said = crashes(tmp_path, "--kills", "60", "--updates", "1600", "--seed", "0")
    assert found["faults"] == [], said
    assert status == 0
    assert set(found["kills_by_point"]) == set(POINTS)
    assert (found["lost"], found["doubled"], found["users_with_unequal_bits"]) == (0, 0, [])
    assert found["updates"] >= 1600
    assert found["in_flight_when_killed"] > 0
    assert found["answered_as_duplicates"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "seen"), [("trims-early", "one was lost"), ("ignores-update-ids", "one was written twice")]
)
def test_a_planted_fault_is_caught(tmp_path: Path, fault: str, seen: str) -> None:
    status, found, said = crashes(
        tmp_path, "--kills", "60", "--updates", "600", "--seed", "1", "--fault", fault
    )
    assert status == 1, said
    assert [fault for fault in found["faults"] if seen in fault], "this fault, and not some other end"
    assert "seed 1" in said, "whoever sees it fail can run it again"


@pytest.mark.parametrize(
    ("before", "after", "half"),
    [(b"", b"abcd", b"ab"), (b"ab", b"abcdef", b"abcd"), (b"abcdefgh", b"abXYZWgh", b"abXYZfgh")],
)
def test_half_of_a_change(before: bytes, after: bytes, half: bytes) -> None:
    assert half_of_the_change(before, after) == half
