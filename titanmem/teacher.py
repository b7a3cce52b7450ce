"""What sentences mean, learned from another maker's sentence encoder before anything else is learned (`--teacher`).

A model of a few million weights that reads some novels and a phrase book knows no synonyms but those. A sentence
encoder (a BERT folder of `sentence-transformers`, such as all-MiniLM-L6-v2) has read a billion pairs of sentences, and
puts what means the same in the same place. The small model learns its places (distillation, arXiv 1503.02531,
2002.10957): what the lookahead sees at each token of a sentence, and what is asked for behind it, both point where the
teacher's embedding of the sentence points, so that a question finds a statement in other words before any fact was
ever asked for.

Axes: N sentences, B rows, T tokens, D key width, E decoder width, V vocabulary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from titanmem.decoder import Decoder
from titanmem.precision import quick_products
from titanmem.speech import Speech

WORDS_MIN, WORDS_MAX = 4, 28
"""Words of a sentence that is worth a lesson."""
BATCH = 64
CHAT = 0.7
"""Share of sentences that stand in a chat turn and are asked for; the others are lines of a document."""
_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’]*\s+")
TURN_ROWS, TURN_TOKENS = 64, 256
"""Rows of sentences that say which way a model's places are turned."""


class Teacher:
    """A sentence encoder: mean-pooled BERT. Needs the extra `teacher` (transformers)."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder that is none, or where transformers is not installed."""
        try:
            from transformers import AutoModel, AutoTokenizer  # type: ignore[import-not-found]
        except ImportError as error:
            raise ValueError("train.teacher needs transformers: pip install titanmem[teacher]") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"train.teacher: {folder} is no sentence encoder: {error}") from error

    @torch.inference_mode()
    def embedded(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings at unit norm, float16 [N, teacher's width]."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for start in range(0, len(texts), BATCH):
            some = order[start : start + BATCH]
            batch = self.tokenizer(
                [texts[index] or " " for index in some],
                padding=True, truncation=True, max_length=64, return_tensors="pt",
            )  # fmt: skip
            with quick_products():
                hidden = self.model(**batch).last_hidden_state.float()
            seen = batch["attention_mask"][..., None].float()
            mean = F.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1).half().numpy()
            for index, row in zip(some, mean, strict=True):
                found[index] = row
        return np.stack(found)


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text that are long and short enough."""
    for line in text.split("\n"):
        for sentence in _SENTENCE.split(line):
            sentence = sentence.strip("\"'“”‘’ ")
            if WORDS_MIN <= len(sentence.split()) <= WORDS_MAX:
                yield sentence


def start_embedding(teacher: Teacher, tokenizer: Tokenizer, width: int) -> Tensor:
    """Start values [V, E] of token embeddings: where the teacher puts each token's text, and as much chance as keeps
    tokens of one meaning apart."""
    texts = [tokenizer.decode([index]).strip() for index in range(tokenizer.get_vocab_size())]
    embedded = torch.from_numpy(teacher.embedded(texts)).float()
    centred = embedded - embedded.mean(0)
    _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
    meaning = centred @ axes[:width].T / scale[:width].sqrt()
    meaning = F.pad(meaning, (0, width - meaning.shape[1]))
    return 0.85 * F.rms_norm(meaning, (width,)) + 0.5 * torch.randn(len(texts), width)


@dataclass(slots=True)
class Lesson:
    """Rows of sentences, int64 [B, T]: their tokens, and which sentence is seen and which is asked for, -1 none."""

    tokens: Tensor
    seen: Tensor
    asked: Tensor


class Lessons:
    """Sentences and where they belong: the teacher's embeddings on their principal axes, as many as a key has."""

    def __init__(
        self, speech: Speech, sentences: Sequence[str], embedded: np.ndarray, width: int, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.speech = speech
        self.tokens = [speech.ids(sentence) for sentence in sentences]
        self.answer, self.newline = speech.ids(speech.answers[0]), speech.ids("\n")
        rows = torch.from_numpy(embedded).float()
        mean = rows.mean(0)
        axes = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -width:]
        self.places = F.normalize((rows - mean) @ axes, dim=-1)
        """[N, D], unit norm."""

    @torch.no_grad()
    def turn_to(self, decoder: Decoder) -> None:
        """Turn all places so that they agree best with what a decoder has learned of other lessons.

        Which principal axis comes first, and which way it points, is chance: a model that is trained on would have to
        turn all it knows. The rotation is the orthogonal Procrustes solution (Schoenemann 1966).
        """
        lesson = self.make(TURN_ROWS, TURN_TOKENS)
        pairs = [(x[index >= 0], self.places[index[index >= 0]]) for x, index in _answered(decoder, lesson)]
        overlap_DD = torch.stack([places.T @ F.normalize(x, dim=-1) for x, places in pairs]).sum(0)
        left, _, right = torch.linalg.svd(overlap_DD)
        self.places = self.places @ left @ right

    def make(self, rows: int, length: int) -> Lesson:
        """Rows of `length` tokens, filled with sentences to the end."""
        filled = [self._row(length) for _ in range(rows)]
        return Lesson(*(torch.tensor(column) for column in zip(*filled, strict=True)))

    def _row(self, length: int) -> tuple[list[int], list[int], list[int]]:
        tokens: list[int] = []
        seen: list[int] = []
        asked: list[int] = []
        while len(tokens) < length:
            number = self.random.randrange(len(self.tokens))
            inside = self.tokens[number]
            before: list[int] = []
            after = self.newline
            if chat := self.random.random() < CHAT:
                speech = self.speech
                before, after = [*speech.user], [*speech.ended, *speech.assistant, *self.answer]
            piece = [*before, *inside, *after]
            if len(tokens) + len(piece) > length:
                number = -1  # it is cut off, and nobody can know what it would have said
            tokens += piece
            seen += [-1] * len(before) + [number] * len(inside) + [-1] * len(after)
            asked += [-1] * (len(piece) - 1) + [number if chat else -1]
        return tokens[:length], seen[:length], asked[:length]


def _answered(decoder: Decoder, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """What is seen and what is asked for at each token [B, T, D], and of which sentence [B, T], -1 none."""
    memory = decoder.memory
    with quick_products():
        _, hidden = decoder.lower_blocks(lesson.tokens)
        around = memory.lookahead(hidden).float()
    key = memory.around_proj(around)
    query = memory.queries(hidden.float(), decoder.zeros(len(lesson.tokens), decoder.config.memory.history))
    return [(key, lesson.seen), (query, lesson.asked)]


def lesson_loss(decoder: Decoder, lesson: Lesson, lessons: Lessons) -> Tensor:
    """Mean distance 1 - cosine of what is seen, and of what is asked for, to where the teacher has the sentence."""
    distances = [
        1 - F.cosine_similarity(x[index >= 0], lessons.places[index[index >= 0]], dim=-1).mean()
        for x, index in _answered(decoder, lesson)
    ]
    return torch.stack(distances).sum()
