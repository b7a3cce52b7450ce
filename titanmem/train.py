"""Training of a memory: with the small decoder that it belongs to, from text files, or for another maker's checkpoint,
which stays as it is (`titanmem train`)."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from titanmem.decoder_config import DecoderConfig
from titanmem.facts import FactMaker
from titanmem.needles import heldout_needles
from titanmem.objective import Weights, step_loss
from titanmem.recall import Listener
from titanmem.schedule import Whitening, learning_rate, optimizers
from titanmem.skim_training import train_skim
from titanmem.start import Start, beside, from_scratch
from titanmem.stream import BatchMaker
from titanmem.teacher import lesson_loss
from titanmem.tokenizer import ChatTokenizer
from titanmem.train_config import DEFAULT_MEMORY, TrainConfig
from titanmem.training_report import write_report

logger = logging.getLogger(__name__)

SMALL = DecoderConfig(vocab_size=10_400, num_hidden_layers=6, memory_layer=4, memory=DEFAULT_MEMORY)
"""The default model: 13.1 million weights in float16, 2.1 million of which are W_2's random directions."""
SKIM_ROWS = 96
"""Rows of one batch for the skim."""
LESSONS_ONLY = 0.2
"""Share of the time that is spent on the teacher's lessons alone, before the rest begins; none where a model is trained
on (`TrainConfig.start`)."""
LESSON_ROWS, LESSON_ROWS_LATER = 16, 10
"""Rows of sentences in a step of the first part, and beside everything else."""
LESSON_WEIGHT = 4.0
MODES = {"mac": 0.5, "mag": 0.25, "mal": 0.25}
"""How often each mode is trained: they share all but what meets the memory in one layer."""
CHECK_STEPS = 200
"""Steps between two checkpoints."""


class Trainer:
    """One run: holds what a checkpoint holds."""

    def __init__(self, config: TrainConfig, start: Start) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.start, self.decoder = config, start, start.decoder
        self.optimizers = optimizers(self.decoder, config)
        self.whitening = Whitening(self.decoder.config.memory.d_nltm)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.spent_s = 0, 0.0
        self.history: list[dict[str, float]] = []
        if config.resume:
            self._load()
        # A resumed run draws new batches rather than the old ones again.
        seed = config.seed + 1_000_003 * self.step
        self.batches = BatchMaker(
            start.speech, start.book, FactMaker(start.words, start.phrases, seed),
            tokens=config.tokens, spoken=config.spoken, silent=config.silent, books=config.books,
        )  # fmt: skip
        self.modes = random.Random(seed)

    @property
    def checkpoint(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def _load(self) -> None:
        if not self.checkpoint.is_file():
            raise ValueError(f"train.resume: {self.checkpoint} does not exist")
        state = torch.load(self.checkpoint, weights_only=True)
        self.start.trained.load_state_dict(state["decoder"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.whitening.mean, self.whitening.second, self.whitening.seen = state["whitening"]
        self.step, self.spent_s, self.history = state["step"], state["spent_s"], state["history"]

    def save(self) -> None:
        """Write the checkpoint (atomically) and the model folder as it stands."""
        state = {
            "decoder": self.start.trained.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "whitening": (self.whitening.mean, self.whitening.second, self.whitening.seen),
            "step": self.step,
            "spent_s": self.spent_s,
            "history": self.history,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)
        self.start.save()
        config = {**asdict(self.config), "memory": asdict(self.decoder.config.memory)}
        write_report(self.config.out, config, self.history)

    def advance(self) -> dict[str, float]:
        """One step of the optimisers; its figures."""
        progress = self.spent_s / (60.0 * self.config.minutes)
        figures, losses, lessons = {}, [], self.start.lessons
        alone = lessons is not None and self.config.start is None and progress < LESSONS_ONLY
        rate = learning_rate(progress, self.step, self.config.warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate * (1.0 if alone else group["later"])
        if lessons is not None:
            rows = LESSON_ROWS if alone else LESSON_ROWS_LATER
            lesson = lesson_loss(self.decoder, lessons.make(rows, self.config.tokens), lessons)
            figures["lesson"] = float(lesson.detach())
            losses.append(LESSON_WEIGHT * lesson)
        if not alone:
            (mode,) = self.modes.choices(list(MODES), list(MODES.values()))
            weights = Weights(shape_below=lessons is None)
            result = step_loss(self.decoder, self.batches.make(), weights, self.generator, mode)
            figures |= result.figures
            losses.append(result.loss)
            self.whitening.add(result.written_features_NF)
        loss = torch.stack(losses).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        if math.isfinite(float(norm)):
            for optimizer in self.optimizers:
                optimizer.step()
        if not alone and (self.whitening.seen < 100 or self.step % 10 == 0):
            self.whitening.apply(self.decoder)
        self.step += 1
        return {"loss": float(loss.detach()), "gradient": float(norm), **figures}

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
        names = dict.fromkeys(name for figures in window for name in figures)
        mean = {name: float(np.nanmean([f[name] for f in window if name in f])) for name in names}
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
        needles = heldout_needles(self.start.words, self.start.phrases, count, seed=self.config.seed)
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
    torch.manual_seed(config.seed)
    if config.model is not None:
        start = beside(config, config.model)
    else:
        start = from_scratch(config, decoder_config or SMALL)
    logger.info("training %d parameters on %d tokens of text",
                sum(p.numel() for p in start.trained.parameters()), len(start.book))  # fmt: skip
    Trainer(config, start).run(progress)
    return config.out
