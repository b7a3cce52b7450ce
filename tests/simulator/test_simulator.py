"""Seeded lives of the real ownership, journal and store code; the order of all that happens hangs on the seed alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulator.life import live
from tests.simulator.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 2000
"""About four minutes of two cores; `benchmarks/simulate.py` plays 10,000."""
SEEDS_OF_A_VARIANT = 600


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_fails_what_was_acknowledged_stays() -> None:
    """A failing seed is printed, with the command that plays it again."""
    command = [sys.executable, "benchmarks/simulate.py", "--seeds", str(SEEDS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_a_seed_gives_the_same_life_again() -> None:
    assert live(11) == live(11)
    assert live(11) != live(12)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_broken_variant_is_caught(name: str) -> None:
    with VARIANTS[name]():
        assert any(live(seed).breaches for seed in range(SEEDS_OF_A_VARIANT)), f"{name} was not seen"
