"""The seeds of the suite are played beside the other tests: minutes of arithmetic, for the core that waits anyhow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 2000
"""About eight minutes of one core; `benchmarks/simulate.py` plays 10,000."""
PLAYED_BY = "test_whatever_fails_what_was_acknowledged_stays"
_player = pytest.StashKey[subprocess.Popen[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins when the test that asks for the outcome is among those that will run."""
    if session.config.option.collectonly or all(item.name != PLAYED_BY for item in session.items):
        return
    command = ["nice", sys.executable, "benchmarks/simulate.py", "--seeds", str(SEEDS), "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    session.config.stash[_player] = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.fixture
def player(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """The process that plays the seeds."""
    with request.config.stash[_player] as process:
        yield process


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Not left behind when the session ends before the test."""
    process = session.config.stash.get(_player, None)
    if process is not None and process.poll() is None:
        process.kill()
        process.communicate()
