"""What a training run is to do (`titanmem train`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titanmem.spec import MemorySpec

DEFAULT_MEMORY = MemorySpec(code_active=128, reservoir=2048, read_floor=0.18)
"""That of the default model."""
BESIDE_MEMORY = MemorySpec(code_active=128, reservoir=2048, lookback=64)
"""That of another maker's checkpoint, whose layers do not gather a question at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run; every figure of it is reproducible from these values, the text and the number of steps."""

    out: Path
    """Model folder to write; checkpoints go to `out`/checkpoint.pt."""
    model: Path | None = None
    """Checkpoint folder of another maker to train a memory for, which is written into it; `out` is the same then."""
    memory: MemorySpec = BESIDE_MEMORY
    memory_layer: int = 0
    """Memory of such a checkpoint, and the first layer that sees it; 0 is half of the layers."""
    start: Path | None = None
    """Model folder of ours whose weights and tokenizer the run begins with, instead of start values."""
    data: tuple[Path, ...]
    """Text files, plain or .xz, that the model may see."""
    phrases: Path | None = None
    """Folder of a phrase book (`titanmem.phrasebook`); None is the one that ships."""
    teacher: Path | None = None
    """Folder of a sentence encoder to learn from what sentences mean (`titanmem.teacher`); None for no lessons."""
    lessons: tuple[Path, ...] = ()
    """Texts whose sentences the teacher's lessons are about, beside the phrase book; `data` if there are none."""
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
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("train.data is empty: name at least one text file")
        for name, paths in (("data", self.data), ("lessons", self.lessons)):
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"train.{name}: {path} is not a file")
        if self.model is not None and self.teacher is not None:
            raise ValueError("train.teacher: a checkpoint of another maker knows what sentences mean")
        if self.model is not None and self.start is not None:
            raise ValueError(
                "train.start: a memory for a checkpoint of another maker begins with start values"
            )
        if self.phrases is not None and not self.phrases.is_dir():
            raise ValueError(f"train.phrases: {self.phrases} is not a folder")
        if self.lessons and self.teacher is None:
            raise ValueError("train.lessons: there is no teacher to give them (train.teacher)")
        if not 0 < self.minutes <= 100_000:
            raise ValueError(f"train.minutes = {self.minutes}: must be above 0 and at most 100000")
