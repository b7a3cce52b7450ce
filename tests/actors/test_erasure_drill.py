"""Erasures that are killed leave nothing once they are asked again; and the drill that says so can fail."""

from __future__ import annotations

import json

import pytest

from tests.actors.erasure_drill import FAULTS
from tests.beside import Done


def drill(*arguments: str) -> pytest.MarkDecorator:
    return pytest.mark.beside("benchmarks/erasure.py", *arguments)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@drill("--every", "7", "--seed", "3")
def test_killed_anywhere_and_asked_again_nothing_is_left(beside: Done) -> None:
    found = json.loads(beside.stdout)
    assert found["faults"] == []
    assert beside.returncode == 0
    assert found["kills"] >= 5
    assert found["needles_found_before"] > 0.7 * found["needles"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=drill("--every", "40", "--fault", name)) for name in sorted(FAULTS)]
)
def test_a_planted_fault_is_found(beside: Done, fault: str) -> None:
    assert beside.returncode == 1, fault
    assert json.loads(beside.stdout)["faults"]
