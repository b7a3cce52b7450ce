"""Train the small default model from text files: tokenizer, decoder and memory together (`titanmem train`)."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from titanmem.corpus import paragraphs, read_text, token_stream, train_tokenizer, words_of
from titanmem.decoder import Decoder
from titanmem.decoder_config import DecoderConfig
from titanmem.facts import FactMaker, Words
from titanmem.folder import save_decoder
from titanmem.muon import Muon
from titanmem.needles import heldout_needles
from titanmem.objective import Compiled, Weights, step_loss
from titanmem.phrasebook import PhraseBook, capitalised, load
from titanmem.recall import Listener
from titanmem.skim_training import train_skim
from titanmem.spec import MemorySpec
from titanmem.stream import ANSWER, UNKNOWN, BatchMaker
from titanmem.tokenizer import ChatTokenizer
from titanmem.training_report import write_report

logger = logging.getLogger(__name__)

MATRICES = ("layers.", "memory.lookahead.")
"""Where Muon takes the two-dimensional parameters."""
SMALL = DecoderConfig(memory=MemorySpec(code_active=64))
"""The default model: 6.5 million weights, 17 MB in float16."""
SKIM_ROWS = 96
"""Rows of one batch for the skim."""
CHECK_STEPS = 200
"""Steps between two checkpoints."""
MODES = {"mac": 0.5, "mag": 0.25, "mal": 0.25}
"""How often each mode is trained: they share all but what meets the memory in one layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run; every figure of it is reproducible from these values, the text and the number of steps."""

    out: Path
    """Model folder to write; checkpoints go to `out`/checkpoint.pt."""
    data: tuple[Path, ...]
    """Text files, plain or .xz, that the model may see."""
    minutes: float = 90.0
    """Time to train, minutes of wall clock."""
    spoken: int = 6
    silent: int = 14
    books: int = 2
    """Rows of a batch: chat with replies to learn, facts and questions for the memory alone, and book text."""
    tokens: int = 256
    """Tokens a row; a multiple of the window, or one window at most."""
    matrix_lr: float = 0.02
    """Learning rate of the matrices, by Muon."""
    other_lr: float = 2e-3
    """Learning rate of everything else, by AdamW; embeddings take ten times as much."""
    warmup_steps: int = 40
    skim_steps: int = 500
    """Batches of the last part, which learns what to skim over, beyond `minutes`."""
    report_steps: int = 25
    seed: int = 0
    threads: int = 2
    compiled: bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("train.data is empty: name at least one text file")
        for path in self.data:
            if not path.is_file():
                raise ValueError(f"train.data: {path} is not a file")
        if not 0 < self.minutes <= 100_000:
            raise ValueError(f"train.minutes = {self.minutes}: must be above 0 and at most 100000")


@dataclass(slots=True)
class Material:
    """What a run trains on."""

    tokenizer: Tokenizer
    book: np.ndarray
    words: Words
    phrases: PhraseBook


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


def prepare(config: TrainConfig, vocab_size: int, words: Words | None = None) -> Material:
    """Read the texts, make the tokenizer (kept in `out`, so that a resumed run has the same) and the word lists."""
    texts = [read_text(path) for path in config.data]
    words, phrases = words or words_of(texts), load()
    path = config.out / "tokenizer.json"
    if config.resume and path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        lines = (line for text in texts for line in paragraphs(text))
        tokenizer = train_tokenizer(chain(lines, spoken_samples(words, phrases, 40_000)), vocab_size)
        config.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(path))
    book = np.concatenate([token_stream(tokenizer, text) for text in texts])
    return Material(tokenizer=tokenizer, book=book, words=words, phrases=phrases)


def initialised(config: DecoderConfig) -> Decoder:
    """A decoder with start values: residual branches at zero, so that depth does not change the start."""
    decoder = Decoder(config)
    torch.nn.init.normal_(decoder.embed_tokens.weight)
    torch.nn.init.normal_(decoder.lm_head.weight, std=0.02)
    for layer in decoder.stack:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return decoder


def optimizers(decoder: Decoder, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and memory, AdamW for embeddings, head, norms and gates."""
    named = dict(decoder.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith(MATRICES)]
    taken = {id(p) for p in matrices}
    scale = {"embed_tokens.weight": 10.0, "lm_head.weight": 2.0}
    groups = [
        {"params": [p], "lr": config.other_lr * scale.get(name, 1.0)}
        for name, p in named.items()
        if id(p) not in taken
    ]
    muon = Muon(matrices, lr=config.matrix_lr)
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


class Whitening:
    """Running mean and covariance of the features of written keys."""

    def __init__(self, features: int) -> None:
        self.mean = torch.zeros(features)
        self.second = torch.eye(features)
        self.seen = 0

    def add(self, features_NF: torch.Tensor) -> None:
        """Take in one batch; young runs forget faster."""
        if len(features_NF) == 0:
            return
        self.seen += 1
        rate = max(0.02, 1.0 / self.seen)
        self.mean.lerp_(features_NF.mean(0), rate)
        self.second.lerp_(features_NF.T @ features_NF / len(features_NF), rate)

    def apply(self, decoder: Decoder) -> None:
        decoder.memory.whiten(self.mean, self.second - self.mean[:, None] * self.mean[None])


def learning_rate(progress: float, step: int, warmup_steps: int) -> float:
    """Share of the base rate: warm up, hold for a fifth of the run, then fall linearly to 2 %."""
    return min(1.0, (step + 1) / warmup_steps) * (1.0 - 0.98 * max(0.0, (progress - 0.2) / 0.8))


class Trainer:
    """One run: holds what a checkpoint holds."""

    def __init__(
        self, config: TrainConfig, decoder_config: DecoderConfig, words: Words | None = None
    ) -> None:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config = config
        self.material = prepare(config, decoder_config.vocab_size, words)
        self.decoder = initialised(decoder_config)
        self.optimizers = optimizers(self.decoder, config)
        self.whitening = Whitening(decoder_config.memory.d_nltm)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.spent_s = 0, 0.0
        self.history: list[dict[str, float]] = []
        if config.resume:
            self._load()
        # A resumed run draws new batches rather than the old ones again.
        seed = config.seed + 1_000_003 * self.step
        facts = FactMaker(self.material.words, self.material.phrases, seed)
        self.batches = BatchMaker(
            self.material.tokenizer, self.material.book, facts,
            tokens=config.tokens, spoken=config.spoken, silent=config.silent, books=config.books,
        )  # fmt: skip
        self.modes = random.Random(seed)
        self.calls = Compiled.twins(self.decoder) if config.compiled else Compiled.plain(self.decoder)

    @property
    def checkpoint(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def _load(self) -> None:
        if not self.checkpoint.is_file():
            raise ValueError(f"train.resume: {self.checkpoint} does not exist")
        state = torch.load(self.checkpoint, weights_only=True)
        self.decoder.load_state_dict(state["decoder"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.whitening.mean, self.whitening.second, self.whitening.seen = state["whitening"]
        self.step, self.spent_s, self.history = state["step"], state["spent_s"], state["history"]

    def save(self) -> None:
        """Write the checkpoint (atomically) and the model folder as it stands."""
        state = {
            "decoder": self.decoder.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "whitening": (self.whitening.mean, self.whitening.second, self.whitening.seen),
            "step": self.step,
            "spent_s": self.spent_s,
            "history": self.history,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)
        save_decoder(self.decoder, self.config.out, self.material.tokenizer.to_str())
        write_report(self.config.out, asdict(self.config), self.history)

    def advance(self) -> dict[str, float]:
        """One step of the optimisers; its figures."""
        progress = self.spent_s / (60.0 * self.config.minutes)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate(progress, self.step, self.config.warmup_steps)
        batch = self.batches.make()
        (mode,) = self.modes.choices(list(MODES), list(MODES.values()))
        result = step_loss(self.decoder, batch, Weights(), self.generator, mode, self.calls)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        if math.isfinite(float(norm)):
            for optimizer in self.optimizers:
                optimizer.step()
        self.whitening.add(result.written_features_NF)
        if self.step < 100 or self.step % 10 == 0:
            self.whitening.apply(self.decoder)
        self.step += 1
        return {"loss": float(result.loss.detach()), "gradient": float(norm), **result.figures}

    def run(self, progress: Callable[[dict[str, float]], None]) -> None:
        """Train until the time is up; `progress` gets the mean figures every `report_steps`."""
        last, window = time.monotonic(), []
        try:
            while self.spent_s < 60.0 * self.config.minutes:
                window.append(self.advance())
                now = time.monotonic()
                self.spent_s, last = self.spent_s + now - last, now
                checking = self.step % CHECK_STEPS == 0
                if checking:
                    self.save()
                if checking or self.step % self.config.report_steps == 0:
                    self.history.append(self._summed(window, checking))
                    window = []
                    progress(self.history[-1])
            # Skimming is learned last: it needs no model, only what is to be written.
            texts = partial(self.batches.documents, SKIM_ROWS)
            train_skim(self.decoder.memory.skim, texts, self.config.skim_steps, progress)
        finally:  # a run that is stopped keeps what it has learned
            self.save()

    def _summed(self, window: list[dict[str, float]], checking: bool) -> dict[str, float]:
        """Mean figures of some steps, and now and then what is recalled of facts that training never has."""
        rows = self.config.spoken + self.config.silent + self.config.books
        mean = {name: float(np.nanmean([figures[name] for figures in window])) for name in window[0]}
        mean |= {
            "step": self.step,
            "spent_s": self.spent_s,
            "tokens": len(window) * rows * self.config.tokens,
        }
        if checking:
            mean["heldout_recall"] = self.heldout_recall()
        return mean

    def heldout_recall(self, count: int = 40) -> float:
        """Share of held-out facts, all told to one memory, that free replies contain."""
        needles = heldout_needles(self.material.words, self.material.phrases, count, seed=self.config.seed)
        with torch.no_grad():
            listener = Listener(self.decoder, ChatTokenizer(self.config.out))
            for needle in needles:
                listener.say(needle.fact)
            listener.rest()
            replies = listener.ask([needle.question for needle in needles])
        return sum(n.found_in(reply) for n, reply in zip(needles, replies, strict=True)) / count


def run(
    config: TrainConfig,
    progress: Callable[[dict[str, float]], None] = lambda figures: None,
    decoder_config: DecoderConfig | None = None,
) -> Path:
    """Train as `config` says and return the model folder."""
    trainer = Trainer(config, decoder_config or SMALL)
    logger.info("training %d parameters on %d tokens of text",
                sum(p.numel() for p in trainer.decoder.parameters()), len(trainer.material.book))  # fmt: skip
    trainer.run(progress)
    return config.out
