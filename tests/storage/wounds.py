"""Damage, done to a file on purpose, and what came of reading it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import TitanmemError
from tests.storage.damage_samples import Sample


@dataclass
class Tally:
    """What became of the wounded files of one kind."""

    refused: Counter[str] = field(default_factory=Counter)
    """By the name of the error's class."""
    right: int = 0
    shorter: int = 0
    """Read as it was before the last write, or of a cut file before any of the last."""
    wrong: list[str] = field(default_factory=list)
    """Each wrong read: the wound, and what was read or raised."""

    @property
    def total(self) -> int:
        return sum(self.refused.values()) + self.right + self.shorter + len(self.wrong)


def flips_of(data: bytes, count: int, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """`count` files with one random bit flipped each."""
    for _ in range(count):
        at, bit = dice.randrange(len(data)), dice.randrange(8)
        wounded = bytearray(data)
        wounded[at] ^= 1 << bit
        yield f"bit {bit} of byte {at} flipped", bytes(wounded)


def cuts_of(data: bytes, most: int, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """The file cut at every byte; of a large one, at `most` offsets."""
    offsets = range(len(data)) if len(data) <= most else sorted(dice.sample(range(len(data)), most))
    for length in offsets:
        yield f"cut to {length} of {len(data)} bytes", data[:length]


def suffer(sample: Sample, wounds: Iterator[tuple[str, bytes]], folder: Path) -> Tally:
    """Reads each wounded file of `sample` below `folder`."""
    tally = Tally()
    for wound, data in wounds:
        try:
            found = sample.read(data, folder)
        except TitanmemError as error:
            tally.refused[type(error).__name__] += 1
        except Exception as error:
            tally.wrong.append(f"{wound}: {type(error).__name__}: {error}")
        else:
            if found == sample.expected:
                tally.right += 1
            elif found in (sample.before if "cut" in wound else sample.before[-1:]):
                tally.shorter += 1
            else:
                tally.wrong.append(f"{wound}: read {str(found)[:200]}")
    return tally


def half_writing(problem: OSError) -> Callable[[Path, str], Any]:
    """An `open` whose new files take half of what is written and then fail: a disk that fills up."""

    def half(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115 (it is closed at the end of `with`)
        if "x" not in mode:
            return file
        write = file.write

        class Half:
            def __enter__(self) -> Half:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                write(data[: len(data) // 2])
                raise problem

        return Half()

    return half
