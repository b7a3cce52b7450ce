"""The phrase book: in how many words a fact can be told and asked for (`phrases/*.txt`).

    @ favorite color | about: me, relation, person | value: color, word
    = {S's} favorite color is {v}.
    = {v} is the color that {S} [love|loves] most.
    ~ {S} [no longer care|no longer cares] for {old}; it is {v} now.
    ? Which color [do|does] {S} like best?

`@` begins an attribute, `=` is a statement with one value `{v}`, `~` a statement that corrects an earlier one (it may
name the value it replaces, `{old}`), `?` a question. `{S}`, `{S's}`, `{O}` are the subject (I, my; Anna, Anna's; me),
`[x|y]` is x after "I" and y otherwise, `{k}` a thing that belongs to the key. `values*.txt` list what stands for values
and keys (`kind: item, item`), `talk.txt` the chat around facts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "phrases"
SUBJECTS = ("me", "relation", "person", "world")
_CHOICE = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")
_NUMBERED = ("d3", "d4", "d5", "d7")
MADE = ("word", "name", "fullname", "phrase", "number", "year", "time", "date", "money", "phone", *_NUMBERED)
"""Kinds of values that the program makes; all others are lists of `values.txt`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a fact is about."""

    nominative: str
    possessive: str
    objective: str
    first_person: bool = False

    @property
    def key(self) -> str:
        return self.objective


ME = Subject("I", "my", "me", first_person=True)


def another(words: str) -> Subject:
    """A subject of the third person: `my sister`, `Anna`."""
    return Subject(words, words + ("'" if words.endswith("s") else "'s"), words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """One thing that can be known about a subject."""

    name: str
    about: tuple[str, ...]
    kinds: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """Kinds of list that `{k}` is taken from; empty if there is no `{k}`."""
    statements: list[str] = field(default_factory=list)
    corrections: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """Chat that holds no fact."""

    pairs: Sequence[tuple[str, str]]
    leads: Sequence[str]
    tails: Sequence[str]
    asks: Sequence[str]
    asktails: Sequence[str]
    fillers: Sequence[str]
    acknowledged: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PhraseBook:
    """Everything that facts and chat are made of."""

    attributes: Sequence[Attribute]
    values: Mapping[str, Sequence[str]]
    talk: Talk


def worded(pattern: str, subject: Subject, key: str = "") -> str:
    """The sentence of a pattern, `{v}` left in it, its first letter capital unless `{v}` is there."""
    text = _CHOICE.sub(lambda match: match.group(1 if subject.first_person else 2), pattern)
    for slot, words in (
        ("{S's}", subject.possessive),
        ("{S}", subject.nominative),
        ("{O}", subject.objective),
        ("{k}", key),
    ):
        text = text.replace(slot, words)
    return text


def capitalised(sentence: str) -> str:
    """The sentence with a capital first letter."""
    return sentence[:1].upper() + sentence[1:]


def load(folder: Path = FOLDER) -> PhraseBook:
    """All files of a folder. Raises ValueError naming file and line for what is no phrase book."""
    values: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("values*.txt")):
        for number, line in _lines(path):
            kind, found, items = line.partition(":")
            if not found:
                raise ValueError(f"{path}:{number}: expected `kind: item, item`")
            values[kind.strip()] += [item.strip() for item in items.split(",") if item.strip()]
    attributes: dict[str, Attribute] = {}
    for path in sorted(folder.glob("*.txt")):
        if path.name != "talk.txt" and not path.name.startswith("values"):
            for attribute in _attributes(path, values):
                first = attributes.setdefault(attribute.name, attribute)
                if first is not attribute:  # an attribute may go on in another file
                    if (first.about, first.keys) != (attribute.about, attribute.keys):
                        raise ValueError(f"{path}: attribute {attribute.name!r} is about others elsewhere")
                    for known, more in (
                        (first.statements, attribute.statements),
                        (first.corrections, attribute.corrections),
                        (first.questions, attribute.questions),
                    ):
                        known.extend(text for text in more if text not in known)
    return PhraseBook(
        attributes=list(attributes.values()), values=dict(values), talk=_talk(folder / "talk.txt")
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that say something."""
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip() and line[0] != "#"]


def _attributes(path: Path, values: Mapping[str, object]) -> list[Attribute]:
    found: list[Attribute] = []
    for number, line in _lines(path):
        mark, text = line[0], line[1:].strip()
        where = f"{path}:{number}"
        if mark == "@":
            found.append(_header(where, text, values))
            continue
        if mark not in "=~?" or not found:
            raise ValueError(f"{where}: expected @, =, ~ or ?, found {line[:40]!r}")
        attribute = found[-1]
        if text.count("{v}") != (mark != "?"):
            raise ValueError(f"{where}: a statement holds {{v}} once and a question never: {text!r}")
        if text.count("{old}") > (mark == "~"):
            raise ValueError(f"{where}: {{old}} may stand once, in a correction: {text!r}")
        if ("{k}" in text) is not bool(attribute.keys):
            raise ValueError(f"{where}: {{k}} belongs to attributes with a key, and into all their lines")
        if attribute.about not in (("me",), ("world",)) and "{S" not in text and "{O}" not in text:
            raise ValueError(f"{where}: says nothing of its subject: {text!r}")
        rest = worded(text, ME, "k").replace("{v}", "").replace("{old}", "")
        if set(rest) & set("{}[]|"):
            raise ValueError(f"{where}: a bracket is left over: {rest!r}")
        {"=": attribute.statements, "~": attribute.corrections, "?": attribute.questions}[mark].append(text)
    for attribute in found:
        if not attribute.statements or not attribute.questions:
            raise ValueError(f"{path}: {attribute.name!r} lacks statements or questions")
    return found


def _header(where: str, text: str, values: Mapping[str, object]) -> Attribute:
    name, *fields = (part.strip() for part in text.split("|"))
    entries = {key.strip(): value for key, _, value in (part.partition(":") for part in fields)}
    lists = {
        key: tuple(item.strip() for item in value.split(",") if item.strip())
        for key, value in entries.items()
    }
    about, kinds, keys = lists.get("about", ()), lists.get("value", ()), lists.get("key", ())
    unknown = [k for k in (*kinds, *keys) if k not in values and k not in MADE]
    if not name or not about or not kinds or unknown or set(about) - set(SUBJECTS):
        raise ValueError(
            f"{where}: attribute {name!r}: about {about}, value {kinds}; unknown kinds {unknown}"
        )
    return Attribute(name=name, about=about, kinds=kinds, keys=keys)


def _talk(path: Path) -> Talk:
    pairs: list[tuple[str, str]] = []
    lists: dict[str, list[str]] = defaultdict(list)
    for number, line in _lines(path):
        if line.startswith(">"):
            said, found, reply = line[1:].partition("||")
            if not found:
                raise ValueError(f"{path}:{number}: expected `> text || reply`")
            pairs.append((said.strip(), reply.strip()))
            continue
        kind, found, text = line.partition(":")
        if not found or kind not in ("lead", "tail", "ask", "asktail", "ack", "filler"):
            raise ValueError(f"{path}:{number}: expected >, lead:, tail:, ask:, asktail:, ack: or filler:")
        lists[kind].append(text.strip())
    return Talk(
        pairs=pairs,
        leads=lists["lead"],
        tails=lists["tail"],
        asks=lists["ask"],
        asktails=lists["asktail"],
        fillers=lists["filler"],
        acknowledged=lists["ack"][0],
    )
