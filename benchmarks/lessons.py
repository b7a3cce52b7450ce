"""Write the sentences that the default model's lessons are about, one a line (`titanmem train --lessons`).

python benchmarks/lessons.py OUT WORDNET BOOK… : WORDNET is the folder of WordNet's data files (Debian's package
wordnet-base has it as /usr/share/wordnet); of the books a part of the sentences is taken, mostly what people say.
"""

import random
import re
import sys
from pathlib import Path

from titanmem.corpus import read_text
from titanmem.teacher import sentences_of

SPOKEN, TOLD = 30_000, 12_000
"""Sentences of the books with and without somebody who speaks or is spoken to."""
PERSON = re.compile(r"\b(I|my|you|your|me|we|our)\b")
EXAMPLE = re.compile(r'"([^"]{15,160})"')


def counted(folder: Path) -> dict[str, int]:
    """How often WordNet's own texts use a word."""
    found: dict[str, int] = {}
    for line in (folder / "cntlist.rev").read_text("utf-8").splitlines():
        key, _, count = line.split()
        word = key.partition("%")[0]
        found[word] = found.get(word, 0) + int(count)
    return found


def glosses(folder: Path) -> list[str]:
    """The examples, and the meanings of words that are in use: `hiker, tramp: a foot traveler`."""
    used, found = counted(folder), []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            words = [re.sub(r"\(.*\)", "", fields[4 + 2 * i]) for i in range(int(fields[3], 16))]
            found += [example.strip().capitalize() for example in EXAMPLE.findall(gloss)]
            if any(used.get(word.lower()) for word in words):
                meaning = gloss.split('; "')[0].strip()[:160]
                found.append(f"{', '.join(words).replace('_', ' ')}: {meaning}")
    return found


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python benchmarks/lessons.py OUT WORDNET BOOK…")
    draw = random.Random(0)
    sentences = [s for name in sys.argv[3:] for s in sentences_of(read_text(Path(name)))]
    draw.shuffle(sentences)
    spoken = [s for s in sentences if PERSON.search(s)]
    told = [s for s in sentences if not PERSON.search(s)]
    lines = [*glosses(Path(sys.argv[2])), *spoken[:SPOKEN], *told[:TOLD]]
    draw.shuffle(lines)
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines):,} lines")
