"""A listener folds what the server folds, and answers a question the same in any company."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.tiny_model import tiny_folder
from titanmem.fold import Encoder, fold
from titanmem.folder import load_decoder
from titanmem.recall import Listener
from titanmem.tokenizer import ChatTokenizer
from titanmem.training_report import write_report

FACTS = ["My dog's name is Rex7.", "What is the name of my dog?", "Your 9 times table."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tiny_folder(tmp_path_factory.mktemp("recall") / "model")


def listener(folder) -> Listener:
    return Listener(load_decoder(folder), ChatTokenizer(folder))


def test_it_folds_as_the_encoder_and_fold_do(folder):
    first = listener(folder)
    written = sum(first.say(fact).tokens_written for fact in FACTS)
    decoder, spec = first.decoder, first.spec
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    encoder, momentum, count = Encoder(decoder, spec), 0.0, 0
    for fact in FACTS:
        parts, _ = first.tokenizer.render([{"role": "user", "content": fact}])
        done = fold(slab, 0, encoder.encode(np.zeros(0, np.int32), parts[0].tokens), momentum, spec)
        momentum, count = done.momentum, count + done.tokens_written
    assert written == count > 3
    assert torch.equal(first.slab_SHD, slab)
    assert first.momentum == momentum
    before = first.slab_SHD.clone()
    first.rest()
    assert not torch.equal(first.slab_SHD, before)


@pytest.mark.parametrize("mode", ["mac", "mag", "mal"])
def test_a_question_has_one_answer_in_any_company(folder, mode):
    asked = listener(folder)
    for fact in FACTS:
        asked.say(fact)
    questions = [*FACTS, "Rex1 Rex2 Rex3 is my dog, and what is the name of it?"]
    together = asked.ask(questions, most=5, mode=mode)
    assert [asked.ask([question], most=5, mode=mode)[0] for question in questions] == together
    assert listener(folder).ask(questions, most=5, mode=mode) != together, "an empty memory answers otherwise"


def test_a_report_has_every_figure_and_a_picture(tmp_path):
    history = [
        {"spent_s": 60.0 * n, "language": 5 / n, "found": 1 - 1 / n, "written_found": math.tanh(n)}
        for n in range(1, 20)
    ]
    history[9]["heldout_recall"] = 0.5
    write_report(tmp_path, {"seed": 3}, history)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["config"] == {"seed": "3"}
    assert record["history"] == history
    assert (tmp_path / "training.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    write_report(tmp_path / "..", {}, history[:1])
    assert not (tmp_path / ".." / "training.png").exists()
