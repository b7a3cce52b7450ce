"""Synthetic facts that users tell and ask for: what the memory is trained and measured on.

A fact is a statement with a value in it, questions for that value, and the answer's words up to the value. Answers
do not repeat names that come from the question: a model this small does not copy unknown names. Words for
keys and values are split once into a training and a held-out part by hash, and so are combinations of keys; an
evaluation never meets a value, a name or a combination that training used.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from titanmem.phrases import CODAS, CODES, LEADS, NUCLEI, OBJECTS, ONSETS, RELATIONS, SINGLES, THINGS

FAMILIES = ("chat", "person", "number", "word", "passkey")
WEIGHTS = (0.6, 0.14, 0.14, 0.1, 0.02)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One fact; `statement` holds `{v}` once or more where the value stands."""

    family: str
    key: str
    """Facts with equal keys contradict each other."""
    statement: str
    questions: tuple[str, ...]
    answer: str
    """The answer's words before the value."""
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Words that fill facts: `names` begin with a capital, `words` do not."""

    names: Sequence[str]
    words: Sequence[str]

    def part(self, heldout: bool) -> Words:
        """The training part, or the 15 % that training never uses."""
        return Words(
            names=[name for name in self.names if is_heldout(name) is heldout],
            words=[word for word in self.words if is_heldout(word) is heldout],
        )


def is_heldout(key: str) -> bool:
    """True for the 15 % of keys and words that only evaluation uses; a pure function of the text."""
    return zlib.crc32(b"titanmem:" + key.encode()) % 100 < 15


class FactMaker:
    """An endless source of facts from one part of the words."""

    def __init__(self, words: Words, seed: int, heldout: bool = False) -> None:
        self.random = random.Random(seed)
        self.heldout = heldout
        self.words = words.part(heldout)

    def make(self, family: str | None = None) -> Fact:
        """A new fact, of the family named or of a random one."""
        family = family or self.random.choices(FAMILIES, WEIGHTS)[0]
        return getattr(self, f"_{family}")()

    def value(self, kind: str) -> str:
        """A value of this kind: `name`, `word`, or `dN`, a number of N digits."""
        pick = self.random.choice
        if kind == "name":
            return self._invented() if self.random.random() < 0.35 else pick(self.words.names)
        if kind == "word":
            return pick(self.words.words)
        digits = int(kind[1:])
        return str(self.random.randrange(10 ** (digits - 1), 10**digits))

    def _invented(self) -> str:
        """A name that no book has, so that values of any spelling are learned."""
        while True:
            count = self.random.choice((2, 2, 3))
            name = "".join(self.random.choice(ONSETS) + self.random.choice(NUCLEI) for _ in range(count))
            name = (name + self.random.choice(CODAS)).capitalize()
            if is_heldout(name) is self.heldout:
                return name

    def _pair(self, first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
        """A combination of keys from this part."""
        while True:
            pair = self.random.choice(first), self.random.choice(second)
            if is_heldout("/".join(pair)) is self.heldout:
                return pair

    def _one(self, keys: Sequence[str], salt: str) -> str:
        return self._pair(keys, (salt,))[0]

    def _chat(self) -> Fact:
        pick = self.random.choice
        form = self.random.choices(
            ("called", "likes", "mine", "code", "where", "lives", "single"),
            (0.2, 0.25, 0.12, 0.15, 0.1, 0.1, 0.08),
        )[0]
        return getattr(self, f"_chat_{form}")(pick)

    def _chat_called(self, pick) -> Fact:
        who = self._one(RELATIONS, "name")
        statement = pick((f"my {who}'s name is {{v}}.", f"my {who} is called {{v}}.", f"I have a {who} named {{v}}.",
                          f"the name of my {who} is {{v}}."))  # fmt: skip
        questions = (f"What is my {who}'s name?", f"What is the name of my {who}?", f"What is my {who} called?",
                     f"Do you remember my {who}'s name?")  # fmt: skip
        return self._fact(
            "chat", f"{who} name", statement, questions, f"Your {who}'s name is", self.value("name")
        )

    def _chat_likes(self, pick) -> Fact:
        who, thing = self._pair(RELATIONS, THINGS)
        statement = pick(
            (f"my {who}'s favorite {thing} is {{v}}.", f"the favorite {thing} of my {who} is {{v}}.")
        )
        questions = (f"What is my {who}'s favorite {thing}?", f"Which {thing} does my {who} like best?")
        value = self.value(pick(("word", "name")))
        return self._fact(
            "chat", f"{who} {thing}", statement, questions, f"Your {who}'s favorite {thing} is", value
        )

    def _chat_mine(self, pick) -> Fact:
        thing = self._one(THINGS, "mine")
        statement = pick((f"my favorite {thing} is {{v}}.", f"the {thing} I like best is {{v}}.",
                          f"my favorite {thing} has always been {{v}}."))  # fmt: skip
        questions = (
            f"What is my favorite {thing}?",
            f"Which {thing} do I like best?",
            f"Do you know my favorite {thing}?",
        )
        value = self.value(pick(("word", "name")))
        return self._fact("chat", f"my {thing}", statement, questions, f"Your favorite {thing} is", value)

    def _chat_code(self, pick) -> Fact:
        what = self._one(CODES, "code")
        statement = pick(
            (f"my {what} number is {{v}}.", f"the code for my {what} is {{v}}.", f"my {what} code is {{v}}.")
        )
        questions = (
            f"What is my {what} number?",
            f"What is the code for my {what}?",
            f"What is my {what} code?",
        )
        value = self.value(pick(("d3", "d4", "d5")))
        return self._fact("chat", f"{what} code", statement, questions, f"Your {what} code is", value)

    def _chat_where(self, pick) -> Fact:
        what = self._one(OBJECTS, "where")
        statement = pick(
            (
                f"I left my {what} in the {{v}}.",
                f"my {what} is in the {{v}}.",
                f"I put my {what} in the {{v}}.",
            )
        )
        questions = (f"Where is my {what}?", f"Where did I put my {what}?", f"Where did I leave my {what}?")
        return self._fact(
            "chat", f"{what} where", statement, questions, f"Your {what} is in the", self.value("word")
        )

    def _chat_lives(self, pick) -> Fact:
        who = self._one(RELATIONS, "lives")
        statement = pick(
            (f"my {who} lives in {{v}}.", f"my {who} moved to {{v}}.", f"the home of my {who} is in {{v}}.")
        )
        questions = (f"Where does my {who} live?", f"In which place does my {who} live?")
        return self._fact(
            "chat", f"{who} lives", statement, questions, f"Your {who} lives in", self.value("name")
        )

    def _chat_single(self, pick) -> Fact:
        statement, question, answer, kind = pick(SINGLES)
        return self._fact("chat", answer, statement, (question,), answer, self.value(kind))

    def _person(self) -> Fact:
        name, thing = (
            self.random.choice(self.words.names),
            self.random.choice(THINGS + ["number", "street", "job"]),
        )
        statement = self.random.choice((f"{name}'s {thing} is {{v}}.", f"The {thing} of {name} is {{v}}."))
        questions = (f"What is {name}'s {thing}?", f"What is the {thing} of {name}?")
        value = self.value("d4" if thing == "number" else self.random.choice(("name", "word")))
        return self._fact("person", f"{name} {thing}", statement, questions, f"The {thing} is", value)

    def _number(self) -> Fact:
        key = self.random.choice(self.words.words)
        if self.random.random() < 0.4:
            key += "-" + self.random.choice(self.words.words)
        kind = self.random.choice(("number", "number", "word"))
        statement = f"One of the special magic {kind}s for {key} is: {{v}}."
        questions = (f"What is the special magic {kind} for {key}?",
                     f"What is the special magic {kind} for {key} mentioned in the provided text?")  # fmt: skip
        value = self.value("word" if kind == "word" else self.random.choice(("d4", "d5", "d7")))
        return self._fact(
            "number", f"{kind} {key}", statement, questions, f"The special magic {kind} is", value
        )

    def _word(self) -> Fact:
        key = self.random.choice(self.words.words)
        what = self.random.choice(("secret word", "password", "code name"))
        statement = f"The {what} for {key} is {{v}}."
        value = self.value(self.random.choice(("word", "name", "d4")))
        return self._fact("word", f"{what} {key}", statement, (f"What is the {what} for {key}?",),
                          f"The {what} is", value)  # fmt: skip

    def _passkey(self) -> Fact:
        statement = "The pass key is {v}. Remember it. {v} is the pass key."
        return self._fact(
            "passkey", "passkey", statement, ("What is the pass key?",), "The pass key is", self.value("d5")
        )

    def _fact(
        self, family: str, key: str, statement: str, questions: tuple[str, ...], answer: str, value: str
    ) -> Fact:
        if family == "chat" and self.random.random() < 0.9:
            lead = self.random.choice(LEADS)
            if not lead or lead.endswith(("! ", ". ")):
                statement = lead + statement[0].upper() + statement[1:]
            else:
                statement = lead + statement
        elif family == "chat":
            statement = statement[0].upper() + statement[1:]
        return Fact(
            family=family, key=key, statement=statement, questions=questions, answer=answer, value=value
        )
