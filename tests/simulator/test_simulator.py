"""Seeded lives of the real ownership, journal and store code; the order of all that happens hangs on the seed alone."""

from __future__ import annotations

import json

import pytest

from tests.beside import Done
from tests.simulator.life import live
from tests.simulator.variants import VARIANTS

SEEDS_OF_A_VARIANT = 600


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.beside("benchmarks/simulate.py", "--seeds", "2000", "--jobs", "1")
def test_whatever_fails_what_was_acknowledged_stays(beside: Done) -> None:
    """A failing seed is printed, with what it breached. Some eight minutes of one core."""
    assert beside.returncode == 0, beside.stdout[-4000:]
    found = json.loads(beside.stdout)
    assert (found["seeds"], found["failed"]) == (2000, [])


def test_a_seed_gives_the_same_life_again() -> None:
    assert live(11) == live(11)
    assert live(11) != live(12)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_broken_variant_is_caught(name: str) -> None:
    # A quarter of the lives wait for the store, and in the others this one changes nothing.
    durability = "sync" if name.startswith("sync") else ""
    with VARIANTS[name]():
        found = any(live(seed, durability).breaches for seed in range(SEEDS_OF_A_VARIANT))
    assert found, f"{name} was not seen"
