"""Lessons say what a sentence means at each of its tokens and behind it, and are learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_model import TEXT, tiny_decoder
from titanmem.corpus import train_tokenizer
from titanmem.schedule import optimizers
from titanmem.speech import Speech
from titanmem.start import from_scratch
from titanmem.teacher import Lessons, Teacher, lesson_loss, sentences_of, start_embedding
from titanmem.train_config import TrainConfig

SENTENCES = ["The dog is called Rex.", "Your cat sleeps here.", "My name is Rex7.", "What is the time?"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([*TEXT, *SENTENCES], 400)


@pytest.fixture
def lessons(tokenizer) -> Lessons:
    embedded = np.random.default_rng(0).standard_normal((len(SENTENCES), 24)).astype(np.float16)
    return Lessons(Speech.own(tokenizer), SENTENCES, embedded, 3, seed=1)


def test_sentences_are_taken_as_they_end_and_neither_short_nor_endless():
    text = "It rained all day. Yes. “We went home early!” said\nhe who came late? " + "far " * 40 + "."
    assert list(sentences_of(text)) == ["It rained all day.", "We went home early!", "he who came late?"]


def test_rows_mark_whole_sentences_and_where_each_is_asked_for(lessons, tokenizer):
    lesson = lessons.make(6, 64)
    assert lesson.tokens.shape == lesson.seen.shape == lesson.asked.shape == (6, 64)
    asked = 0
    for tokens, seen, places in zip(lesson.tokens, lesson.seen, lesson.asked, strict=True):
        for number in set(seen.tolist()) - {-1}:
            text = tokenizer.decode(tokens[seen == number].tolist())
            assert text == SENTENCES[number] * (len(text) // len(SENTENCES[number])), text
        for place in (places >= 0).nonzero()[:, 0]:
            assert tokenizer.decode(tokens[place - 4 : place + 1].tolist()).endswith("It is")
            before = seen[:place][seen[:place] >= 0]
            assert before[-1] == places[place], "what is asked for is the sentence before"
            asked += 1
    assert asked > 5
    assert bool((lesson.seen[:, -1] == -1).any()), "a sentence that is cut off teaches nothing"


def test_lessons_are_learned_by_what_sees_and_by_what_asks(lessons, tmp_path):
    decoder = tiny_decoder().requires_grad_(True)
    lessons.places = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    text = tmp_path / "t.txt"
    text.touch()
    steps = optimizers(decoder, TrainConfig(out=tmp_path, data=(text,)))
    losses = []
    for _ in range(40):
        loss = lesson_loss(decoder, lessons.make(4, 64), lessons)
        for optimizer in steps:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in steps:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    # Other lessons put the same sentences elsewhere, by a rotation; turned, they are what has been learned.
    learned = lessons.places
    lessons.places = learned @ torch.linalg.qr(torch.randn(16, 16)).Q
    strange = lesson_loss(decoder, lessons.make(8, 64), lessons)
    lessons.turn_to(decoder)
    assert lesson_loss(decoder, lessons.make(8, 64), lessons) < 0.6 * strange
    assert torch.allclose(lessons.places @ lessons.places.T, learned @ learned.T, atol=1e-5)


class Echo(Teacher):
    """Says of a text which letters are in it."""

    def __init__(self) -> None:
        pass

    def embedded(self, texts):
        return np.array([[t.count(c) + 0.1 for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], np.float16)


def test_tokens_start_where_the_teacher_has_them(tokenizer):
    torch.manual_seed(0)
    start = start_embedding(Echo(), tokenizer, 32)
    assert start.shape == (tokenizer.get_vocab_size(), 32)
    assert bool(torch.isfinite(start).all())
    ids = {word: tokenizer.token_to_id("Ġ" + word) for word in ("dog", "times")}
    cosine = torch.nn.functional.cosine_similarity(start[ids["dog"]], start, dim=-1)
    near = cosine.argsort(descending=True)[:12].tolist()
    assert any(tokenizer.decode([index]).strip() in ("dog", "do", "og") for index in near[1:])


def test_what_the_teacher_said_is_kept_for_a_run_that_goes_on(tmp_path, monkeypatch):
    from tests.tiny_model import tiny_config
    from tests.titanmem.test_training import WORDS

    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    asked = []

    class Counted(Echo):
        def __init__(self, folder) -> None:
            asked.append(folder)

    monkeypatch.setattr("titanmem.start.Teacher", Counted)
    monkeypatch.setattr("titanmem.start.PHRASE_SAMPLES", 20)
    monkeypatch.setattr("titanmem.start.TOKENIZER_SAMPLES", 20)
    config = TrainConfig(out=tmp_path / "m", data=(text,), teacher=tmp_path / "bert")
    first = from_scratch(config, tiny_config(), WORDS)
    assert first.lessons is not None
    again = from_scratch(
        TrainConfig(out=tmp_path / "m", data=(text,), teacher=tmp_path / "bert", resume=True),
        tiny_config(),
        WORDS,
    )
    assert again.lessons is not None
    assert asked == [tmp_path / "bert"]
    assert torch.equal(first.lessons.places, again.lessons.places)
    known = 200
    assert torch.equal(
        first.decoder.embed_tokens.weight[:known], again.decoder.embed_tokens.weight[:known]
    ), "the tokens' places are those of the first run, chance and all"


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"train.teacher: {tmp_path}/none is no sentence encoder"):
        Teacher(tmp_path / "none")


def test_lessons_need_a_teacher_and_a_foreign_checkpoint_takes_none(tmp_path):
    text = tmp_path / "t.txt"
    text.touch()
    with pytest.raises(ValueError, match=r"train\.lessons: there is no teacher"):
        TrainConfig(out=tmp_path, data=(text,), lessons=(text,))
    with pytest.raises(ValueError, match=r"train\.lessons: .*none is not a file"):
        TrainConfig(out=tmp_path, data=(text,), lessons=(tmp_path / "none",), teacher=tmp_path)
    with pytest.raises(ValueError, match=r"train\.teacher"):
        TrainConfig(out=tmp_path, data=(text,), model=tmp_path, teacher=tmp_path)
