"""Training batches: rows of book text, chat, facts told and facts asked for, with labels.

The rows of a batch fall into groups; a group is one user. A question asks for a fact that was told in another row
of its group, or so far back in its own that attention cannot see it: only the memory can answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from titanmem.facts import Fact, FactMaker
from titanmem.phrases import ACKNOWLEDGED, ASK_LEADS, TAILS, UNKNOWN

BOOK, STATEMENT, ASKED, REPLY = 0, 1, 2, 3
"""What a token is part of."""
NOT_WRITTEN, WRITTEN, EITHER = 0, 1, 2
"""Label of the write gate; EITHER is not trained."""
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("How are you?", "I am well, thank you."),
    ("Who are you?", "I am an assistant with a memory."),
    ("Goodbye.", "Goodbye!"),
)
POSITIONS_MAX = 16
"""Value tokens of one fact that keep distinct identities."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Arrays of B rows of T + 1 tokens; `tokens[:, 1:]` are the targets of `tokens[:, :-1]`."""

    tokens: np.ndarray
    """int32 [B, T + 1]."""
    gate: np.ndarray
    """int8 [B, T + 1]: NOT_WRITTEN, WRITTEN or EITHER."""
    part: np.ndarray
    """int8 [B, T + 1]: BOOK, STATEMENT, ASKED or REPLY."""
    identity: np.ndarray
    """int32 [B, T + 1]: which value token of which fact, the same where it is told and where it is recalled; 0 none."""
    recall: np.ndarray
    """bool [B, T + 1]: tokens that only the memory can know."""
    group: np.ndarray
    """int32 [B]: rows with equal numbers share a memory."""


@dataclass(slots=True)
class _Row:
    tokens: list[int] = field(default_factory=list)
    gate: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    identity: list[int] = field(default_factory=list)
    recall: list[bool] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def add(
        self, ids: Sequence[int], part: int, gate: int = NOT_WRITTEN, fact: int = 0, recall: bool = False
    ) -> None:
        self.tokens += ids
        self.part += [part] * len(ids)
        self.gate += [gate] * len(ids)
        self.recall += [recall] * len(ids)
        self.identity += [
            fact * POSITIONS_MAX + min(i, POSITIONS_MAX - 1) if fact else 0 for i in range(len(ids))
        ]


class BatchMaker:
    """Makes batches without end from book tokens and a seed."""

    def __init__(
        self, tokenizer: Tokenizer, book: np.ndarray, facts: FactMaker, *, rows: int, tokens: int, window: int
    ):
        self.tokenizer, self.book, self.facts = tokenizer, book, facts
        self.rows, self.length, self.window = rows, tokens + 1, window
        self.random = random.Random(facts.random.random())
        self.user = self._special("<|user|>")
        self.assistant = self._special("<|assistant|>")
        self.end = self._special("<|end|>")
        self.newline = self.ids("\n")

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return index

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def make(self) -> Batch:
        """One batch; its rows are shared out to one to four users."""
        users = self.random.choice((1, 1, 2, 4))
        group = np.arange(self.rows) % users
        rows: list[_Row] = []
        for user in range(users):
            rows += self._user(int((group == user).sum()))
        order = np.sort(group)
        arrays = {
            name: np.array([getattr(row, name)[: self.length] for row in rows], dtype=dtype)
            for name, dtype in (
                ("tokens", np.int32),
                ("gate", np.int8),
                ("part", np.int8),
                ("identity", np.int32),
                ("recall", bool),
            )
        }
        return Batch(**arrays, group=order.astype(np.int32))

    def _user(self, count: int) -> list[_Row]:
        """The rows of one user: first who tells what where, then the text around it."""
        told: dict[str, tuple[int, Fact]] = {}
        rows = [_Row() for _ in range(count)]
        where: dict[str, tuple[int, int]] = {}
        density = self.random.choice((0.4, 0.6, 0.8))
        for index in self.random.sample(range(count), count):
            row = rows[index]
            while len(row.tokens) < self.length:
                draw = self.random.random()
                if (row.tokens and draw < 1 - density) or (not row.tokens and draw < 0.4):
                    self._book(row)
                elif self.random.random() < 0.06:
                    self._small_talk(row)
                elif self.random.random() < 0.45:
                    fact = self.facts.make()
                    if fact.key not in told:
                        identity = self.random.randrange(1, 2**27)
                        told[fact.key] = identity, fact
                        where[fact.key] = index, len(row.tokens)
                        self._tell(row, fact, identity)
                else:
                    self._ask(row, index, told, where)
        return rows

    def _book(self, row: _Row) -> None:
        count = self.random.randint(12, 70)
        start = self.random.randrange(len(self.book) - count)
        row.add(self.book[start : start + count].tolist(), BOOK)
        if self.random.random() < 0.6:
            row.add(self.newline, BOOK)

    def _small_talk(self, row: _Row) -> None:
        said, reply = self.random.choice(SMALL_TALK)
        row.add([self.user, *self.ids(said), self.end], ASKED)
        row.add([self.assistant, *self.ids(reply), self.end], REPLY)

    def _tell(self, row: _Row, fact: Fact, identity: int) -> None:
        """A statement, in a chat turn or as a paragraph of a document; its value and the mark after it are written."""
        chat = self.random.random() < 0.55
        if chat:
            row.add([self.user], STATEMENT)
        before, *after = fact.statement.split("{v}")
        row.add(self.ids(before.rstrip(" ")), STATEMENT)
        space = " " if before.endswith(" ") else ""
        row.add(self.ids(space + fact.value + after[0][:1]), STATEMENT, WRITTEN, identity)
        rest = fact.value.join([after[0][1:], *after[1:]])
        if chat:
            row.add(self.ids(rest + self.random.choice(TAILS)), STATEMENT, EITHER if rest else NOT_WRITTEN)
            row.add([self.end], STATEMENT)
            row.add([self.assistant, *self.ids(ACKNOWLEDGED), self.end], REPLY)
        else:
            row.add(self.ids(rest), STATEMENT, EITHER)
            row.add(self.newline, BOOK)

    def _ask(
        self, row: _Row, index: int, told: dict[str, tuple[int, Fact]], where: dict[str, tuple[int, int]]
    ) -> None:
        """A question and its answer: the value if the user told it, else that nobody did."""
        far = [
            key
            for key, (told_in, place) in where.items()
            if key not in row.asked and (told_in != index or len(row.tokens) - place > 2 * self.window)
        ]
        if far and self.random.random() < 0.88:
            identity, fact = told[self.random.choice(far)]
        else:
            identity, fact = 0, self.facts.make()
            if fact.key in told:
                return
        row.asked.add(fact.key)
        question = self.random.choice(ASK_LEADS) + self.random.choice(fact.questions)
        row.add([self.user, *self.ids(question), self.end], ASKED)
        row.add([self.assistant, *self.ids(fact.answer)], REPLY)
        if identity:
            row.add(self.ids(f" {fact.value}."), REPLY, NOT_WRITTEN, identity, recall=True)
        else:
            row.add(self.ids(UNKNOWN), REPLY)
        row.add([self.end], REPLY)
