"""Books as token ids, the tokenizer made from them, and the words that fill synthetic facts."""

from __future__ import annotations

import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from titanmem.facts import Words

SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
MIN_COUNT = 4
DIGITS = r" ?\d{1,3}"
"""What a number is cut into, from its front."""
WORD = re.compile(r"[^\W\d_]+")


def read_text(path: Path) -> str:
    """A plain or .xz text file as UTF-8."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text("utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text has ids and comes back unchanged; digits come in threes, so that a number is recalled in
    few steps."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def paragraphs(text: str) -> Iterator[str]:
    """Non-empty lines with their line ends."""
    return (line + "\n" for line in text.split("\n") if line.strip())


def token_stream(tokenizer: Tokenizer, text: str, batch: int = 512) -> np.ndarray:
    """All paragraphs of a text as one int32 array."""
    lines = list(paragraphs(text))
    parts = [
        np.asarray(encoding.ids, dtype=np.int32)
        for start in range(0, len(lines), batch)
        for encoding in tokenizer.encode_batch(lines[start : start + batch])
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def words_of(texts: Sequence[str], names: int = 2000, words: int = 6000) -> Words:
    """The commoner names and words of some texts: those of 3 to 10 letters, most frequent first.

    A name is a word that is nearly always written with a capital and does not stand only at sentence starts.
    """
    lower: Counter[str] = Counter()
    capital: Counter[str] = Counter()
    for text in texts:
        previous = "."
        for match in WORD.finditer(text):
            word = match.group()
            if not word.isascii():
                pass
            elif word.islower():
                lower[word] += 1
            elif word[0].isupper() and word[1:].islower() and previous not in ".!?\"'\n":
                capital[word] += 1
            end = text[match.end() : match.end() + 2].strip()
            previous = end[-1] if end else " "
    fits = [w for w, n in lower.most_common() if n >= MIN_COUNT and 3 <= len(w) <= 10]
    proper = [
        w for w, n in capital.most_common() if n >= MIN_COUNT and 3 <= len(w) <= 10 and lower[w.lower()] < n
    ]
    # The very commonest words ("the", "that") make no facts that anybody would tell.
    return Words(names=proper[:names], words=fits[300 : 300 + words])
