"""Seeded lives of the real ownership, journal and store code; the order of all that happens hangs on the seed alone."""

from __future__ import annotations

import subprocess

import pytest

from tests.simulator.life import live
from tests.simulator.variants import VARIANTS

SEEDS_OF_A_VARIANT = 600


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_whatever_fails_what_was_acknowledged_stays(player: subprocess.Popen[str]) -> None:
    """A failing seed is printed, with what it breached; conftest.py says how many are played."""
    said, _ = player.communicate()
    assert player.returncode == 0, said[-4000:]
    assert " 0 failed" in said


def test_a_seed_gives_the_same_life_again() -> None:
    assert live(11) == live(11)
    assert live(11) != live(12)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_broken_variant_is_caught(name: str) -> None:
    with VARIANTS[name]():
        assert any(live(seed).breaches for seed in range(SEEDS_OF_A_VARIANT)), f"{name} was not seen"
