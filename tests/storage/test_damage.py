"""Every kind of file, wounded: refused by name or read right, never anything else. Long: `benchmarks/damage.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from tests.storage.damage_samples import SAMPLES, Sample, part_one_user
from tests.storage.wounds import Tally, cuts_of, flips_of, suffer

FLIPS = 60
CUTS = 60


@pytest.fixture(params=SAMPLES, ids=lambda make: make.__name__)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    make: Callable[[Path], Sample] = request.param
    return make(tmp_path)


def test_flipped_bits(sample: Sample, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    tally = suffer(sample, flips_of(sample.data, FLIPS, random.Random(seed)), tmp_path)
    assert not tally.wrong, f"seed {seed}"
    assert tally.total == FLIPS
    assert tally.refused, "a reader that refuses nothing checks nothing"


def test_cut_files(sample: Sample, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    tally = suffer(sample, cuts_of(sample.data, CUTS, random.Random(seed)), tmp_path)
    assert not tally.wrong, f"seed {seed}"
    assert sum(tally.refused.values()) + tally.shorter == tally.total == CUTS


def test_the_tally_sees_a_wrong_read(tmp_path: Path) -> None:
    """A reader that believes all it is given."""
    gullible = Sample(name="text", data=b"Rex", expected=b"Rex", read=lambda data, _: data)
    tally: Tally = suffer(gullible, flips_of(b"Rex", 8, random.Random(1)), tmp_path)
    assert len(tally.wrong) == 8


def test_a_column_that_says_it_is_of_another_type_does_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow takes statistics out of such a footer by ending the process; so nobody asks it for any."""
    sample = part_one_user(tmp_path)
    assert xxhash.xxh3_64_hexdigest(sample.data) == "db9f8fb5197d19bc", (
        "another file: find its bit with benchmarks/damage.py"
    )
    wounded = bytearray(sample.data)
    wounded[1949] ^= 1 << 2
    assert sample.read(bytes(wounded), tmp_path) == sample.expected, "what is read here is whole"
