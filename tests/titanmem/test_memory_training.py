"""A memory alone is trained for a checkpoint that stays as it is: recall rises from nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.foreign_model import foreign_folder
from tests.titanmem.test_training import WORDS
from titanmem.corpus import read_text
from titanmem.errors import ModelFolderError
from titanmem.folder import load_decoder
from titanmem.phrasebook import FOLDER, load
from titanmem.schedule import optimizers
from titanmem.spec import MemorySpec
from titanmem.start import beside, from_scratch, spoken_samples
from titanmem.train import SMALL, Trainer
from titanmem.train_config import TrainConfig

BOOK = Path(__file__).parents[2] / "examples" / "decline-and-fall.txt.xz"
SPEC = MemorySpec(
    code_active=32, key_dim=64, value_dim=64, d_nltm=128, code_width=2048, window=128, chunk_size=128
)
PHRASES = """
@ color | about: me, relation | value: color
= {S's} favorite color is {v}.
? What is {S's} favorite color?
@ city | about: me, relation | value: city
= {S} [live|lives] in {v}.
? Where [do|does] {S} live?
@ pet | about: me, relation | value: animal
= {S's} pet is a {v}.
? What pet [do|does] {S} have?
@ fruit | about: me, relation | value: fruit
= {S} [eat|eats] {v} every day.
? Which fruit [do|does] {S} eat?
"""


@pytest.fixture(scope="module")
def text() -> str:
    return read_text(BOOK)


@pytest.fixture
def phrases(tmp_path: Path) -> Path:
    folder = tmp_path / "phrases"
    folder.mkdir()
    for name in ("values.txt", "talk.txt"):
        (folder / name).write_text((FOLDER / name).read_text())
    (folder / "few.txt").write_text(PHRASES)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, text: str, phrases: Path) -> Path:
    texts = [text[500_000:700_000], *spoken_samples(WORDS, load(phrases), 3000)]
    return foreign_folder(tmp_path / "llama", texts, vocab_size=2048, width=128, layers=3)


def config(checkpoint: Path, phrases: Path, text: str, minutes: float) -> TrainConfig:
    book = checkpoint.parent / "book.txt"
    book.write_text(text[:300_000])
    return TrainConfig(
        out=checkpoint, model=checkpoint, data=(book,), phrases=phrases, memory=SPEC, minutes=minutes, tokens=128,
        spoken=6, silent=10, books=2, skim_steps=60,
    )  # fmt: skip


def test_only_the_memory_moves_and_a_run_goes_on(checkpoint: Path, phrases: Path, text: str) -> None:
    asked = config(checkpoint, phrases, text, 0.05)
    trainer = Trainer(asked, beside(asked, checkpoint, WORDS))
    frozen = {
        name: p.clone() for name, p in trainer.decoder.named_parameters() if not name.startswith("memory.")
    }
    figures = [trainer.advance() for _ in range(3)]
    assert all(np.isfinite(list(row.values())).all() for row in figures)
    for name, before in frozen.items():
        assert torch.equal(trainer.decoder.get_parameter(name), before), name
    moved = trainer.decoder.memory.state_dict()
    trainer.save()
    again = TrainConfig(**{**{n: getattr(asked, n) for n in TrainConfig.__slots__}, "resume": True})
    resumed = Trainer(again, beside(again, checkpoint, WORDS))
    assert resumed.step == 3
    for name, tensor in resumed.decoder.memory.state_dict().items():
        assert torch.equal(tensor, moved[name]), name
    assert torch.equal(load_decoder(checkpoint).memory.key_proj.weight, moved["key_proj.weight"])


def test_another_makers_checkpoint_is_no_start(checkpoint: Path, phrases: Path, text: str) -> None:
    asked = config(checkpoint, phrases, text, 1.0)
    values = {n: getattr(asked, n) for n in TrainConfig.__slots__}
    with pytest.raises(ValueError, match=r"train\.start"):
        TrainConfig(**{**values, "start": checkpoint})
    onward = TrainConfig(**{**values, "model": None, "out": checkpoint.parent / "new", "start": checkpoint})
    with pytest.raises(ModelFolderError, match="another maker's checkpoint"):
        from_scratch(onward, SMALL, WORDS)


def test_frozen_weights_have_no_optimiser(checkpoint: Path, phrases: Path, text: str) -> None:
    asked = config(checkpoint, phrases, text, 1.0)
    start = beside(asked, checkpoint, WORDS)
    held = {
        id(p) for o in optimizers(start.decoder, asked) for group in o.param_groups for p in group["params"]
    }
    assert held == {id(p) for p in start.decoder.memory.parameters() if p.requires_grad}
