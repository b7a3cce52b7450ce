"""Synthetic facts that users tell and ask for: what the memory is trained and measured on.

A fact is somebody's or something's attribute with a value, the ways to say it and the questions for it. Words for keys
and values are split once into a training and a held-out part by hash, and so are pairs of subject and attribute: an
evaluation never meets a value, a name or a pair that training used. The phrasings are the phrase book's; what
recall is worth on phrasings of nobody's book is measured on `benchmarks/needles/freeform.jsonl`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from titanmem.phrasebook import ME, Attribute, PhraseBook, Subject, another, worded

FAMILIES = ("chat", "person", "number", "word", "passkey")
WEIGHTS = (0.62, 0.16, 0.1, 0.1, 0.02)
ONSETS = tuple("bdfghjklmnprstvwz") + ("br", "dr", "gr", "kr", "st", "tr", "sh", "th", "ch")
NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou", "ie")
CODAS = ("", "", "n", "s", "r", "l", "x", "ck", "th", "m")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
ALIKE = (2, 5, 10)
"""Attributes that the facts of a user with few themes are of: with the fewest, facts differ in whom they are about."""
SECRETS = ("secret word", "password", "code name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One fact; each statement holds `{v}` where the value stands."""

    family: str
    key: str
    """Facts with equal keys contradict each other."""
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    kind: str
    """Kind of value, as `FactMaker.value` takes it."""
    value: str
    corrections: tuple[str, ...] = ()
    """Statements that replace an earlier value, which they may name as `{old}`."""
    old: str = ""
    """The value that this one has replaced; empty for a fact that is new."""

    def told(self, random: random.Random) -> str:
        """One way to tell it, `{v}` left in it; a corrected fact often says that it is one."""
        if self.old and self.corrections and random.random() < 0.6:
            return random.choice(self.corrections).replace("{old}", self.old)
        return random.choice(self.statements)


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Words that fill facts: `names` begin with a capital, `words` do not."""

    names: Sequence[str]
    words: Sequence[str]

    def part(self, heldout: bool) -> Words:
        """The training part, or the 15 % that training never uses."""
        return Words(names=part_of(self.names, heldout), words=part_of(self.words, heldout))


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """What the facts of one user have in common: facts that resemble each other are the hard ones to keep apart."""

    family: str | None = None
    attributes: Sequence[Attribute] = ()
    subjects: Sequence[str] = ()
    """Relations or names."""


def is_heldout(key: str) -> bool:
    """True for the 15 % of keys and words that only evaluation uses; a pure function of the text."""
    return zlib.crc32(b"titanmem:" + key.encode()) % 100 < 15


def part_of(items: Sequence[str], heldout: bool) -> list[str]:
    """The training or the held-out part of a list; the whole if that part would be empty."""
    return [item for item in items if is_heldout(item) is heldout] or list(items)


class FactMaker:
    """An endless source of facts from one part of the words."""

    def __init__(self, words: Words, book: PhraseBook, seed: int, heldout: bool = False) -> None:
        self.random = random.Random(seed)
        self.heldout = heldout
        self.book = book
        self.words = words.part(heldout)
        self.values = {kind: part_of(items, heldout) for kind, items in book.values.items()}
        self.abouts = {kind for attribute in book.attributes for kind in attribute.about}
        """Whom the book has facts about: a book of one's own may leave some out."""

    def theme(self) -> Theme:
        """What one user's facts are about: everything, a few attributes, a few subjects, or numbers."""
        draw = self.random.random()
        if draw < 0.3:
            # Neighbours in the phrase book are about things of one kind.
            alike = self.random.choice(ALIKE)
            start = self.random.randrange(max(1, len(self.book.attributes) - alike))
            return Theme(attributes=self.book.attributes[start : start + alike])
        if draw < 0.45 and self.abouts & {"relation", "person"}:
            people = self.random.sample(self.values["relation"], 2) + self.random.sample(self.words.names, 2)
            return Theme(subjects=people)
        return Theme(family="number") if draw < 0.57 else Theme()

    def make(self, theme: Theme | None = None) -> Fact:
        """A new fact of a theme."""
        theme = theme or Theme()
        family = theme.family or self.random.choices(FAMILIES, WEIGHTS)[0]
        if theme.attributes or theme.subjects or family in ("chat", "person"):
            return self._attribute(theme, person=family == "person" and "person" in self.abouts)
        return getattr(self, f"_{family}")()

    def corrected(self, fact: Fact) -> Fact:
        """The same fact with another value."""
        while (value := self.value(fact.kind)) == fact.value:
            pass
        return replace(fact, value=value, old=fact.value)

    def value(self, kind: str) -> str:
        """A value of this kind: one of the phrase book's lists, or one made up."""
        pick, number = self.random.choice, self.random.randint
        match kind:
            case "name":
                return self.invented() if self.random.random() < 0.35 else pick(self.words.names)
            case "word":
                return pick(self.words.words)
            case "fullname":
                return f"{self.value('name')} {self.value('name')}"
            case "phrase":
                return " ".join(pick(self.words.words) for _ in range(number(2, 4)))
            case "number":
                return str(number(2, 60))
            case "year":
                return str(number(1930, 2026))
            case "time":
                return f"{number(0, 23)}:{number(0, 59):02}"
            case "date":
                return f"{pick(MONTHS)} {number(1, 31)}"
            case "money":
                return f"{number(2, 900)} {pick(('dollars', 'euros', 'pounds'))}"
            case "phone":
                return f"{number(100, 999)}-{number(1000, 9999)}"
            case "d3" | "d4" | "d5" | "d7":
                digits = int(kind[1])
                return str(number(10 ** (digits - 1), 10**digits - 1))
        return pick(self.values[kind])

    def invented(self) -> str:
        """A name that no book has, so that values of any spelling are learned."""
        while True:
            count = self.random.choice((2, 2, 3))
            name = "".join(self.random.choice(ONSETS) + self.random.choice(NUCLEI) for _ in range(count))
            name = (name + self.random.choice(CODAS)).capitalize()
            if is_heldout(name) is self.heldout:
                return name

    def _attribute(self, theme: Theme, person: bool) -> Fact:
        """An attribute of the phrase book, about a subject that this part may have it about."""
        while True:
            attribute = self.random.choice(theme.attributes or self.book.attributes)
            about = [kind for kind in attribute.about if not person or kind == "person" or theme.attributes]
            if theme.subjects:
                about = [kind for kind in about if kind in ("relation", "person")]
            if not about:
                continue
            subject = self._subject(self.random.choice(about), theme)
            thing = self.value(self.random.choice(attribute.keys)) if attribute.keys else ""
            key = f"{subject.key}/{attribute.name}/{thing}"
            # Only I and nobody are too few to be split: there the values alone are new.
            split = subject.key not in ("me", "") or bool(thing)
            if split and is_heldout(key) is not self.heldout:
                continue
            kind = self.random.choice(attribute.kinds)
            return Fact(
                family="person" if subject.key[:1].isupper() else "chat",
                key=key,
                statements=tuple(worded(text, subject, thing) for text in attribute.statements),
                corrections=tuple(worded(text, subject, thing) for text in attribute.corrections),
                questions=tuple(worded(text, subject, thing) for text in attribute.questions),
                kind=kind,
                value=self.value(kind),
            )

    def _subject(self, about: str, theme: Theme) -> Subject:
        if about == "me":
            return ME
        if about == "world":
            return Subject("", "", "")
        people = [p for p in theme.subjects if p[:1].isupper() is (about == "person")]
        if about == "relation":
            return another("my " + self.random.choice(people or self.values["relation"]))
        return another(self.random.choice(people) if people else self.value("name"))

    def _number(self) -> Fact:
        return self._magic("number", self.random.choice(("d4", "d5", "d7")))

    def _word(self) -> Fact:
        if self.random.random() < 0.5:
            return self._magic("word", "word")
        key, what = self.value("word"), self.random.choice(SECRETS)
        return self._fixed(
            "word",
            f"{what} {key}",
            (f"The {what} for {key} is {{v}}.",),
            (f"What is the {what} for {key}?",),
            self.random.choice(("word", "name", "d4")),
        )

    def _magic(self, what: str, kind: str) -> Fact:
        """RULER's needles in a haystack (arXiv 2404.06654, appendix B)."""
        key = self.value("word")
        if self.random.random() < 0.4:
            key += "-" + self.value("word")
        question = f"What is the special magic {what} for {key}"
        return self._fixed(
            what,
            f"{what} {key}",
            (f"One of the special magic {what}s for {key} is: {{v}}.",),
            (f"{question}?", f"{question} mentioned in the provided text?"),
            kind,
        )

    def _passkey(self) -> Fact:
        return self._fixed(
            "passkey",
            "passkey",
            ("The pass key is {v}. Remember it. {v} is the pass key.",),
            ("What is the pass key?",),
            "d5",
        )

    def _fixed(
        self, family: str, key: str, statements: tuple[str, ...], questions: tuple[str, ...], kind: str
    ) -> Fact:
        return Fact(
            family=family,
            key=key,
            statements=statements,
            questions=questions,
            kind=kind,
            value=self.value(kind),
        )
