"""Needles for the haystack: facts to hide in a long text and questions to ask afterwards."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from titanmem.facts import FactMaker, Words
from titanmem.phrasebook import PhraseBook, capitalised


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    """One fact as it is told, the question for it, and what must stand in the answer."""

    fact: str
    question: str
    answer: str
    family: str = "own"
    """Kind of fact, for figures by kind."""

    def found_in(self, reply: str) -> bool:
        """Whether a reply holds the answer, case aside."""
        return self.answer.casefold() in reply.casefold()


def heldout_needles(words: Words, book: PhraseBook, count: int, seed: int) -> list[Needle]:
    """Needles whose values, names and combinations of keys training never used, each with a key of its own."""
    maker = FactMaker(words, book, seed, heldout=True)
    found: dict[str, Needle] = {}
    while len(found) < count:
        fact = maker.make()
        if fact.key in found:
            continue
        found[fact.key] = Needle(
            fact=capitalised(maker.random.choice(fact.statements).replace("{v}", fact.value)),
            question=capitalised(maker.random.choice(fact.questions)),
            answer=fact.value,
            family=fact.family,
        )
    return list(found.values())


def write_needles(path: Path, needles: Sequence[Needle]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(needle)) + "\n" for needle in needles), "utf-8")


def read_needles(path: Path) -> list[Needle]:
    """Needles of a JSON-lines file; a line that is none is a ValueError naming file and line."""
    needles = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            needle = Needle(**{name: fields[name] for name in Needle.__slots__ if name in fields})
            if not all(isinstance(getattr(needle, name), str) for name in Needle.__slots__):
                raise TypeError("fields must be text")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a needle {{fact, question, answer}}: {error}") from error
        needles.append(needle)
    if not needles:
        raise ValueError(f"{path}: no needles in it")
    return needles


def hide(
    haystack: np.ndarray, needles: Sequence[np.ndarray], length: int, depths: int, rng: random.Random
) -> np.ndarray:
    """`length` tokens, int32: a random stretch of the haystack (round its end, if it is shorter) with each needle
    put in at one of `depths` evenly spaced places, shifted a little at random."""
    body = length - sum(map(len, needles))
    if body < 2 * depths:
        raise ValueError(f"{length} tokens are too few for {len(needles)} needles at {depths} depths")
    start = rng.randrange(len(haystack))
    text = np.take(haystack, range(start, start + body), mode="wrap")
    step = body / depths
    places = sorted(
        (int((number % depths + rng.random() * 0.8) * step), number) for number in range(len(needles))
    )
    parts, last = [], 0
    for place, number in places:
        parts += [text[last:place], needles[number]]
        last = place
    return np.concatenate([*parts, text[last:]]).astype(np.int32)
