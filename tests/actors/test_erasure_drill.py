"""Erasures that are killed leave nothing once they are asked again; and the drill that says so can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.actors.erasure_drill import FAULTS

ROOT = Path(__file__).parent.parent.parent


def erasures(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The benchmark's exit status and its JSON; it forks, so it has a process of its own."""
    path = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "erasure.py"), "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert path.exists(), done.stderr[-4000:]
    return done.returncode, json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_anywhere_and_asked_again_nothing_is_left(tmp_path: Path) -> None:
    status, found = erasures(tmp_path, "--every", "7", "--seed", "3")
    assert found["faults"] == []
    assert status == 0
    assert found["kills"] >= 5
    assert found["needles_found_before"] > 0.7 * found["needles"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    status, found = erasures(tmp_path, "--every", "40", "--fault", fault)
    assert status == 1
    assert found["faults"]
