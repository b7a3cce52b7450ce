"""Training batches: rows of chat, facts told and asked for, and book text, with labels.

The rows of a batch are shared out to some users. A question asks for a fact that was told in another row of its user:
only the memory can answer. Facts are told again in other words, and corrected; the newest value is the right one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from titanmem.facts import Fact, FactMaker, Theme
from titanmem.phrasebook import capitalised
from titanmem.speech import UNKNOWN, Speech

BOOK, STATEMENT, ASKED, REPLY = 0, 1, 2, 3
"""What a token is part of."""
NOT_WRITTEN, WRITTEN, EITHER, UNLIKELY = 0, 1, 2, 3
"""Label of the write gate; EITHER is not trained, UNLIKELY is NOT_WRITTEN with little weight."""
DOCUMENT_TOKENS = 256
"""Tokens of a row that teaches to skim: enough book text on both sides of a fact."""
ASKED_AGAIN = 0.72
"""Share of questions that are about something that the user told, where there is anything."""
IN_VAIN = 8
"""Facts of a theme that a row has already, after which it takes any: a theme may have no more than a few."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """Arrays of B rows of T + 1 tokens; `tokens[:, 1:]` are the targets of `tokens[:, :-1]`."""

    tokens: np.ndarray
    """int32 [B, T + 1]."""
    gate: np.ndarray
    """int8 [B, T + 1]: NOT_WRITTEN, WRITTEN, EITHER or UNLIKELY."""
    part: np.ndarray
    """int8 [B, T + 1]: BOOK, STATEMENT, ASKED or REPLY."""
    identity: np.ndarray
    """int64 [B, T + 1]: which value token of which fact, the same where it is told and where it is recalled; 0 none."""
    recall: np.ndarray
    """bool [B, T + 1]: tokens that only the memory can know."""
    nothing: np.ndarray
    """bool [B, T + 1]: tokens before which the memory is asked for what it does not have."""
    group: np.ndarray
    """int32 [B]: rows with equal numbers share a memory."""
    spoken: int
    """Rows in front that the upper layers are to learn from; the others teach what to write and where to find it."""


@dataclass(slots=True)
class Piece:
    """Some tokens of a row with their labels."""

    tokens: list[int] = field(default_factory=list)
    gate: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    identity: list[int] = field(default_factory=list)
    recall: list[bool] = field(default_factory=list)
    nothing: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], part: int, gate: int = NOT_WRITTEN, nothing: bool = False) -> None:
        """Tokens of one label; `nothing` marks the first of them."""
        self.tokens += ids
        self.part += [part] * len(ids)
        self.gate += [gate] * len(ids)
        self.identity += [0] * len(ids)
        self.recall += [False] * len(ids)
        self.nothing += [nothing and index == 0 for index in range(len(ids))]

    def value(self, ids: Sequence[int], key: str, named: Sequence[int], told: bool) -> None:
        """The tokens of a fact's value, where it is told or recalled; `named` are those that give them identities.

        What a correction has replaced has the same identity: the newer wins by being written over the older, for which
        their keys must meet (`Weights.twins`).
        """
        self.add(ids, STATEMENT if told else REPLY, WRITTEN if told else NOT_WRITTEN)
        for index in range(len(ids)):
            name = f"{key}|{','.join(map(str, named[:index]))}"
            self.identity[index - len(ids)] = 1 + xxhash.xxh3_64_intdigest(name.encode()) // 2**2
            self.recall[index - len(ids)] = not told

    def extend(self, other: Piece) -> None:
        for name in self.__slots__:
            getattr(self, name).extend(getattr(other, name))


class BatchMaker:
    """Makes batches without end from book tokens and a seed."""

    def __init__(
        self,
        speech: Speech,
        book: np.ndarray,
        facts: FactMaker,
        *,
        tokens: int,
        spoken: int,
        silent: int,
        books: int,
    ) -> None:
        """`spoken`, `silent`, `books`: numbers of rows with replies to learn, without, and of book text alone."""
        self.speech, self.book, self.facts = speech, book, facts
        self.talk = facts.book.talk
        self.length, self.spoken, self.silent, self.books = tokens + 1, spoken, silent, books
        self.random = random.Random(facts.random.random())
        self.ids = speech.ids
        self.newline = self.ids("\n")

    def make(self) -> Batch:
        """One batch; its rows are shared out to one to four users."""
        users = self.random.choice((1, 1, 2, 4))
        count = self.spoken + self.silent
        group = [index % users for index in range(count)]
        rows: list[Piece] = [Piece() for _ in range(count)]
        for user in range(users):
            self._user([index for index in range(count) if group[index] == user], rows)
        rows += [self._book(self.length, whole=True) for _ in range(self.books)]
        # Book rows belong to the first user: what is written of them by mistake is in somebody's way.
        return self._batch(rows, group + [0] * self.books, self.length)

    def documents(self, count: int) -> Batch:
        """Book text, and in each row one fact that somebody has put between its paragraphs."""
        rows = []
        for index in range(count):
            row = self._book(DOCUMENT_TOKENS // 2)
            row.add(self.newline, BOOK)
            row.extend(self._tell(self.facts.make(), chat=False, row=index)[0])
            row.extend(self._book(DOCUMENT_TOKENS, whole=True))
            rows.append(row)
        return self._batch(rows, list(range(count)), DOCUMENT_TOKENS + 1)

    def _batch(self, rows: list[Piece], group: list[int], length: int) -> Batch:
        arrays = {
            name: np.array([getattr(row, name)[:length] for row in rows], dtype=dtype)
            for name, dtype in (
                ("tokens", np.int32),
                ("gate", np.int8),
                ("part", np.int8),
                ("identity", np.int64),
                ("recall", bool),
                ("nothing", bool),
            )
        }
        return Batch(**arrays, group=np.array(group, dtype=np.int32), spoken=self.spoken)

    def _user(self, indices: list[int], rows: list[Piece]) -> None:
        """The rows of one user: first what is told, in the order of rows, then the questions and the text around."""
        theme = self.facts.theme()
        known: dict[str, tuple[Fact, list[int]]] = {}
        """Each fact with its newest value and the ids that recall it."""
        told_in: dict[str, set[int]] = {}
        tells: dict[int, list[Piece]] = {}
        for index in indices:
            tells[index], here, in_vain = [], set(), 0
            most = self.length * self.random.uniform(0.25, 0.6)
            while sum(len(piece.tokens) for piece in tells[index]) < most:
                fact = self._next_fact(theme if in_vain < IN_VAIN else None, known, here)
                if fact is None:
                    in_vain += 1
                    continue
                # Half of the rows without replies are documents: a fact stands between paragraphs of a book.
                document = index >= self.spoken and index % 2 == 1
                piece, ids = self._tell(fact, chat=not document and self.random.random() < 0.7, row=index)
                if document:
                    piece = self._between(piece)
                if sum(len(piece.tokens) for piece in tells[index]) + len(piece.tokens) > 0.8 * self.length:
                    break
                tells[index].append(piece)
                here.add(fact.key)
                known[fact.key] = fact, ids
                told_in.setdefault(fact.key, set()).add(index)
        for index in indices:
            pieces, asked = list(tells[index]), set()
            last = Piece()
            while sum(len(piece.tokens) for piece in pieces) < self.length:
                # Rows that teach keys alone have little beside facts and questions.
                draw = self.random.random() * (1.0 if index < self.spoken else 3.0)
                if draw < 0.12:
                    last = self._book(40)
                elif draw < 0.2:
                    last = self._talk()
                else:
                    far = [key for key, places in told_in.items() if index not in places and key not in asked]
                    last = self._ask(theme, known, far, asked)
                pieces.append(last)
            before = pieces[:-1]  # the last one is cut off at the row's end, and is never a statement
            self.random.shuffle(before)
            for piece in [*before, pieces[-1]]:
                rows[index].extend(piece)

    def _between(self, told: Piece) -> Piece:
        """A statement with book text before it, and often behind it."""
        piece = self._book(self.random.choice((16, 40, 90)))
        piece.add(self.newline, BOOK)
        piece.extend(told)
        if self.random.random() < 0.7:
            piece.extend(self._book(self.random.choice((16, 40, 90))))
        return piece

    def _next_fact(
        self, theme: Theme | None, known: dict[str, tuple[Fact, list[int]]], here: set[str]
    ) -> Fact | None:
        """A new fact, an old one in other words, or a correction; none if the row has it already."""
        draw = self.random.random()
        if known and draw < 0.38:
            fact = known[self.random.choice(list(known))][0]
            if draw < 0.25:
                fact = self.facts.corrected(fact)
        else:
            fact = self.facts.make(theme)
            if fact.key in known:
                return None
        return None if fact.key in here else fact

    def _book(self, most: int, whole: bool = False) -> Piece:
        piece = Piece()
        count = most if whole else self.random.randint(min(12, most), most)
        start = self.random.randrange(max(1, len(self.book) - count))
        piece.add(self.book[start : start + count].tolist(), BOOK)
        if self.random.random() < 0.6:
            piece.add(self.newline, BOOK)
        return piece

    def _talk(self) -> Piece:
        piece = Piece()
        said, reply = self.random.choice(self.talk.pairs)
        speech = self.speech
        piece.add([*speech.user, *self.ids(speech.lead + said), *speech.ended], ASKED)
        piece.add([*speech.assistant, *self.ids(reply), *speech.replied], REPLY)
        return piece

    def _tell(self, fact: Fact, chat: bool, row: int) -> tuple[Piece, list[int]]:
        """A statement, in a chat turn or as a paragraph of a document, and the ids that recall its value."""
        pick, chance = self.random.choice, self.random.random
        lead = pick(self.talk.leads) if chance() < (0.3 if chat else 0.1) else ""
        filler = pick(self.talk.fillers) if chance() < (0.15 if chat else 0.05) else ""
        statement = fact.told(self.random)
        value = fact.value
        if not lead or lead[-1] in ".!?":
            statement = capitalised(statement)
            value = capitalised(value) if statement.startswith("{v}") else value
        text = " ".join(part for part in (filler, lead, statement) if part)
        if chance() < 0.2:
            text += " " + pick(self.talk.tails if chat else self.talk.fillers)
        speech = self.speech
        before, _, after = ((speech.lead if chat else "") + text).partition("{v}")
        space = " " if before.endswith(" ") else ""
        ids = self.ids(space + value)
        recalled = ids if space else [speech.spaced.get(ids[0], ids[0]), *ids[1:]]
        piece = Piece()
        piece.add(speech.user if chat else [], STATEMENT)
        piece.add(self.ids(before.rstrip(" ")), STATEMENT, UNLIKELY)
        piece.value(ids, fact.key, recalled, told=True)
        again = "{v}" in after
        piece.add(self.ids(after.replace("{v}", value)), STATEMENT, EITHER if again else UNLIKELY)
        if chat:
            piece.add(speech.ended, STATEMENT)
            if row < self.spoken or chance() < 0.3:
                piece.add([*speech.assistant, *self.ids(self.talk.acknowledged), *speech.replied], REPLY)
        else:
            piece.add(self.newline, BOOK)
        return piece, recalled

    def _ask(
        self, theme: Theme, known: dict[str, tuple[Fact, list[int]]], far: list[str], asked: set[str]
    ) -> Piece:
        """A question and its answer: the value if the user told it, else that nobody did."""
        pick, chance = self.random.choice, self.random.random
        if far and chance() < ASKED_AGAIN:
            fact, ids = known[pick(far)]
        else:
            fact, ids = self.facts.make(theme if chance() < 0.7 else None), []
            if fact.key in known:
                return Piece()
        asked.add(fact.key)
        question = pick(fact.questions)
        lead = pick(self.talk.asks) if chance() < 0.35 else ""
        question = (
            f"{lead} {question}" if lead and lead[-1] not in ".!?" else f"{lead} {capitalised(question)}"
        )
        if chance() < 0.15:
            question += " " + pick(self.talk.asktails)
        piece = Piece()
        speech = self.speech
        piece.add([*speech.user, *self.ids(speech.lead + question.strip()), *speech.ended], ASKED)
        piece.add([*speech.assistant, *self.ids(pick(speech.answers))], REPLY)
        if ids:
            piece.value(ids, fact.key, ids, told=False)
            piece.add(self.ids("."), REPLY, nothing=True)
        else:
            piece.add(self.ids(UNKNOWN), REPLY, nothing=True)
        piece.add(speech.replied, REPLY)
        return piece
