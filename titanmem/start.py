"""What a training run begins with: a model, what it is to learn from, and where its files are written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from titanmem.corpus import paragraphs, read_text, token_stream, train_tokenizer, words_of
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.errors import ModelFolderError
from titanmem.facts import FactMaker, Words
from titanmem.folder import load_base, load_decoder, save_decoder, save_memory
from titanmem.phrasebook import FOLDER, PhraseBook, capitalised, load
from titanmem.speech import ANSWER, UNKNOWN, Speech
from titanmem.teacher import Lessons, Teacher, sentences_of, start_embedding
from titanmem.tokenizer import ChatTokenizer, load_tokenizer
from titanmem.train_config import TrainConfig

logger = logging.getLogger(__name__)

PHRASE_SAMPLES = 40_000
"""Facts of the phrase book that lessons are about."""
TOKENIZER_SAMPLES = 40_000
"""Facts of the phrase book that a tokenizer is made of, beside the texts."""


@dataclass(slots=True)
class Start:
    """A model to train, and what it is trained on."""

    decoder: Decoder
    trained: nn.Module
    """What of it is trained and kept in checkpoints: all, or the memory alone."""
    speech: Speech
    book: np.ndarray
    """int32, the texts' tokens."""
    words: Words
    phrases: PhraseBook
    save: Callable[[], None]
    """Writes the model folder."""
    lessons: Lessons | None = None


def from_scratch(config: TrainConfig, decoder_config: DecoderConfig, words: Words | None = None) -> Start:
    """A model of our own, of start values or of those of `config.start`, whose config it then has.

    The tokenizer is kept in `out`, so that a resumed run has the same. Raises ModelFolderError for a start that is no
    model folder of ours.
    """
    texts = [read_text(path) for path in config.data]
    words, phrases = words or _words(texts), load(config.phrases or FOLDER)
    decoder = initialised(decoder_config) if config.start is None else _ours(config.start)
    path = config.out / "tokenizer.json"
    if config.resume and path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    elif config.start is not None:
        tokenizer = load_tokenizer(config.start)
    else:
        lines = (line for text in texts for line in paragraphs(text))
        samples = spoken_samples(words, phrases, TOKENIZER_SAMPLES)
        tokenizer = train_tokenizer(chain(lines, samples), decoder_config.vocab_size)
    config.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    start = Start(
        decoder=decoder,
        trained=decoder,
        speech=Speech.own(tokenizer),
        book=np.concatenate([token_stream(tokenizer, text) for text in texts]),
        words=words,
        phrases=phrases,
        save=lambda: save_decoder(decoder, config.out, tokenizer.to_str()),
    )
    if config.teacher is not None:
        start.lessons = _taught(config, config.teacher, start, tokenizer)
    return start


def beside(config: TrainConfig, folder: Path, words: Words | None = None) -> Start:
    """A memory of start values for another maker's checkpoint, whose weights stay as they are.

    Raises ModelFolderError for a folder that is none, or that this memory does not fit.
    """
    texts = [read_text(path) for path in config.data]
    layer = config.memory_layer or max(1, DecoderConfig.load(folder).num_hidden_layers // 2)
    decoder = load_base(folder, config.memory, layer).requires_grad_(False)
    decoder.memory.requires_grad_(True)
    tokenizer = ChatTokenizer(folder)
    lines = (line for text in texts for line in paragraphs(text))
    return Start(
        decoder=decoder,
        trained=decoder.memory,
        speech=Speech.of(tokenizer),
        book=np.concatenate([tokenizer.encode(line, inside=True) for line in lines]),
        words=words or _words(texts),
        phrases=load(config.phrases or FOLDER),
        save=lambda: save_memory(decoder.memory, layer, folder),
    )


def _words(texts: Sequence[str]) -> Words:
    """The words that fill facts. Raises ValueError for texts that have too few of them."""
    words = words_of(texts)
    if not words.names or not words.words:
        raise ValueError("train.data: too little text: a whole book has the names and words to make facts of")
    return words


def spoken_samples(words: Words, phrases: PhraseBook, count: int) -> Iterator[str]:
    """Statements, questions and answers, as material for a tokenizer."""
    maker = FactMaker(words, phrases, seed=1)
    for _ in range(count):
        fact = maker.make()
        yield capitalised(maker.random.choice(fact.statements).replace("{v}", fact.value))
        yield capitalised(maker.random.choice(fact.questions))
        yield f"{ANSWER} {fact.value}. {ANSWER}{UNKNOWN}"
    for said, reply in phrases.talk.pairs:
        yield from (said, reply)


def initialised(config: DecoderConfig) -> Decoder:
    """A decoder with start values: residual branches at zero, so that depth does not change the start."""
    decoder = Decoder(config)
    torch.nn.init.normal_(decoder.embed_tokens.weight)
    torch.nn.init.normal_(decoder.lm_head.weight, std=0.02)
    for layer in decoder.stack:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return decoder


def _ours(folder: Path) -> Decoder:
    """A model of our own, to be trained on."""
    if not DecoderConfig.load_alone(folder).remembers:
        raise ModelFolderError(f"{folder}: another maker's checkpoint; train a memory for it (--model)")
    return load_decoder(folder).train().requires_grad_(True)


def _taught(config: TrainConfig, folder: Path, start: Start, tokenizer: Tokenizer) -> Lessons:
    """The teacher's lessons, and token embeddings that start at what it says of words.

    What the teacher says is kept in `out`, for a run that is resumed.
    """
    decoder, kept = start.decoder, config.out / "lessons.npz"
    if not (config.resume and kept.is_file()):
        teacher, sentences = Teacher(folder), _sentences(config, start)
        logger.info("the teacher reads %d sentences", len(sentences))
        embedding = start_embedding(teacher, tokenizer, decoder.config.hidden_size).numpy()
        np.savez(kept, sentences=np.array(sentences), places=teacher.embedded(sentences), start=embedding)
    with np.load(kept) as file:
        sentences, places, embedding = file["sentences"].tolist(), file["places"], file["start"]
    lessons = Lessons(start.speech, sentences, places, decoder.config.memory.key_dim, config.seed)
    if config.start is None:
        _placed(decoder, embedding)
    else:
        lessons.turn_to(decoder)
    return lessons


@torch.no_grad()
def _placed(decoder: Decoder, embedding: np.ndarray) -> None:
    """Start values that hold what the teacher says of words."""
    decoder.embed_tokens.weight[: len(embedding)] = torch.from_numpy(embedding)
    # Keys begin as what the teacher says of the whole sentence; what stands just before comes later.
    decoder.memory.key_proj.weight.mul_(0.05)
    torch.nn.init.normal_(decoder.memory.around_proj.weight, std=0.02)


def _sentences(config: TrainConfig, start: Start) -> Sequence[str]:
    """What lessons are about: texts, and what the phrase book tells and asks."""
    read = (sentence for path in config.lessons or config.data for sentence in sentences_of(read_text(path)))
    said = spoken_samples(start.words, start.phrases, PHRASE_SAMPLES)
    return list(dict.fromkeys([*read, *(text for text in said if not text.startswith(ANSWER))]))
