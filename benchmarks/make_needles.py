"""Make the needles of `benchmarks/needles/` that are made by rule: values, names and keys that training never used.

python benchmarks/make_needles.py TEXT… : give the texts that the model was trained on; their words are split once,
by hash, and only the part that training leaves out is used here.

`plain.jsonl`, what `titanmem bench needle` hides: RULER's numbers and words, pass keys, and facts of the phrase book of
which the question asks in the words of the statement ("Satan's ferry is called ward", "How is Satan's ferry called?").
`heldout.jsonl`: facts as training has them, most of which ask in other words, or in riddles.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from titanmem.corpus import read_text, words_of
from titanmem.facts import FactMaker, Theme, Words
from titanmem.needles import Needle, heldout_needles, write_needles
from titanmem.phrasebook import PhraseBook, capitalised, load

FOLDER = Path(__file__).parent / "needles"
HELDOUT = 2_200
PLAIN = {"number": 500, "word": 500, "chat": 500, "person": 300, "passkey": 150}
"""How many of each family; a run of the benchmark has no question twice, so one pass key at most."""
FUNCTION_WORDS = frozenset(
    """
    what which who whom whose is are was were am be been do does did the a an of for to in on at my me i you your it
    its that this s name called tell remember recall remind again please can could would how when where and or by
    with from as has have had there here so just not no
    """.split()  # noqa: SIM905
)


def stems(text: str) -> set[str]:
    """The words of a text that say what it is about, without their endings."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {word[:5] if len(word) > 5 else word.rstrip("s") for word in words if word not in FUNCTION_WORDS}


def plain_needles(words: Words, book: PhraseBook, seed: int) -> Iterator[Needle]:
    """As many of each family as `PLAIN` says, in random order."""
    maker, found, seen = FactMaker(words, book, seed, heldout=True), dict.fromkeys(PLAIN, 0), set[str]()
    needles = []
    while found != PLAIN:
        family = maker.random.choice([name for name in PLAIN if found[name] < PLAIN[name]])
        fact = maker.make(Theme() if family in ("chat", "person") else Theme(family=family))
        pairs = [
            (statement.replace("{v}", fact.value), question)
            for statement in fact.statements
            for question in fact.questions
            if stems(question) and stems(question) <= stems(statement.replace("{v}", ""))
        ]
        once = family != "passkey"
        if fact.family != family or not pairs or (once and fact.key in seen):
            continue
        statement, question = maker.random.choice(pairs)
        seen.add(fact.key)
        found[family] += 1
        needles.append(
            Needle(
                fact=capitalised(statement), question=capitalised(question), answer=fact.value, family=family
            )
        )
    random.Random(seed).shuffle(needles)
    yield from needles


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/make_needles.py TEXT…")
    words, book = words_of([read_text(Path(name)) for name in sys.argv[1:]]), load()
    write_needles(FOLDER / "heldout.jsonl", heldout_needles(words, book, HELDOUT, seed=7))
    write_needles(FOLDER / "plain.jsonl", list(plain_needles(words, book, seed=11)))
