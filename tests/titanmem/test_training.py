"""Training data says what it claims, the memory of a batch is the memory that serves, and a run learns and resumes."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kernels import ops
from tests.tiny_model import TEXT, tiny_config, tiny_decoder
from titanmem.corpus import read_text, token_stream, train_tokenizer, words_of
from titanmem.decoder_config import SERVED
from titanmem.facts import FAMILIES, FactMaker, Theme, Words, is_heldout
from titanmem.fold import Encoder, fold
from titanmem.folder import load_decoder
from titanmem.lookahead import Skim
from titanmem.muon import orthogonalized
from titanmem.needles import Needle, heldout_needles, hide, read_needles, write_needles
from titanmem.objective import Weights, memory_of, step_loss
from titanmem.phrasebook import FOLDER, load
from titanmem.schedule import learning_rate
from titanmem.skim_training import train_skim
from titanmem.speech import UNKNOWN, Speech
from titanmem.start import from_scratch, spoken_samples
from titanmem.stream import BOOK, EITHER, NOT_WRITTEN, REPLY, STATEMENT, WRITTEN, BatchMaker, Piece
from titanmem.train import Trainer
from titanmem.train_config import TrainConfig

WORDS = Words(
    names=[
        f"{a}{b}n" for a in ("Ma", "Te", "Lo", "Si", "Ku") for b in ("ra", "li", "do", "ve", "mo", "pa", "zi")
    ],
    words=[
        f"{a}{b}"
        for a in ("tin", "bro", "sal", "gre", "mol")
        for b in ("der", "ing", "ock", "ant", "ule", "ish")
    ],
)


BOOK_OF_PHRASES = load()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*TEXT, *spoken_samples(WORDS, BOOK_OF_PHRASES, 300)], 400)


@pytest.fixture
def batches(tokenizer) -> BatchMaker:
    book = token_stream(tokenizer, "\n".join(TEXT))
    facts = FactMaker(WORDS, BOOK_OF_PHRASES, 3)
    return BatchMaker(Speech.own(tokenizer), book, facts, tokens=160, spoken=3, silent=2, books=1)


def test_heldout_keys_and_words_are_kept_apart():
    train, held = (FactMaker(WORDS, BOOK_OF_PHRASES, 1, heldout=part) for part in (False, True))
    for maker, wanted in ((train, False), (held, True)):
        assert {is_heldout(w) for w in [*maker.words.names, *maker.words.words]} == {wanted}
        assert all(is_heldout(maker.value("name")) is wanted for _ in range(50))
        assert {is_heldout(item) for item in maker.values["city"]} == {wanted}
    keys = [{maker.make().key for _ in range(300)} for maker in (train, held)]
    assert not {key for key in keys[0] & keys[1] if not key.startswith(("me/", "/"))} - {"passkey"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fact_has_its_value_and_its_question(family):
    maker = FactMaker(WORDS, BOOK_OF_PHRASES, 5)
    for _ in range(50):
        fact = maker.make(Theme(family=family))
        assert fact.family == family or family == "chat"
        assert all("{v}" in text and "{S" not in text and "[" not in text for text in fact.statements)
        assert fact.questions
        assert all("{" not in text for text in fact.questions)
        other = maker.corrected(fact)
        assert (other.key, other.kind) == (fact.key, fact.kind)
        assert other.value != fact.value


def test_facts_of_a_theme_resemble_each_other():
    maker = FactMaker(WORDS, BOOK_OF_PHRASES, 2)
    few = Theme(attributes=BOOK_OF_PHRASES.attributes[:2])
    assert len({maker.make(few).key.split("/")[1] for _ in range(20)}) <= 2
    people = {maker.make(Theme(subjects=["sister", "Mara"])).key.split("/")[0] for _ in range(30)}
    assert people == {"my sister", "Mara"}
    assert len({maker.theme().family for _ in range(50)}) == 2


def test_a_theme_of_one_fact_does_not_end_in_a_search_for_another(tokenizer, monkeypatch):
    """Facts about me have one key an attribute; a user with no other theme must be told something else in the end."""
    facts = FactMaker(WORDS, BOOK_OF_PHRASES, 3)
    mine = next(a for a in BOOK_OF_PHRASES.attributes if a.about == ("me",) and not a.keys)
    monkeypatch.setattr(facts, "theme", lambda: Theme(attributes=[mine]))
    made = BatchMaker(
        Speech.own(tokenizer), np.zeros(500, np.int32), facts, tokens=160, spoken=3, silent=2, books=1
    )
    batch = made.make()
    assert len(set(batch.identity[batch.gate == WRITTEN].tolist())) > 10


@pytest.mark.parametrize("about", ["me", "relation", "person", "world"])
def test_a_book_of_ones_own_may_be_about_one_kind_of_subject(about, tmp_path):
    for name in ("values.txt", "talk.txt"):
        (tmp_path / name).write_text((FOLDER / name).read_text())
    subject = {"me": "My", "world": "The"}.get(about, "{S's}")
    lines = [
        f"@ a{n} | about: {about} | value: city\n= {subject} place {n} is {{v}}.\n? What is {subject} {n}?\n"
        for n in range(3)
    ]
    (tmp_path / "few.txt").write_text("".join(lines))
    maker = FactMaker(WORDS, load(tmp_path), 4)
    facts = [maker.make(maker.theme()) for _ in range(200)]
    assert sum(fact.kind == "city" for fact in facts) > 50


def test_a_correction_says_so_and_names_the_old_value():
    maker = FactMaker(WORDS, BOOK_OF_PHRASES, 5)
    said = []
    while len(said) < 40:
        fact = maker.make()
        if fact.corrections:
            said.append((new := maker.corrected(fact), new.told(maker.random)))
            assert fact.told(maker.random) in fact.statements, "a new fact corrects nothing"
    assert {text in new.statements for new, text in said} == {True, False}
    assert any(new.old in text for new, text in said if text not in new.statements)
    assert not any("{old}" in text for _, text in said)


def test_labels_mark_values_where_told_and_where_recalled(batches, tokenizer):
    told: dict[int, set[int]] = {}
    recalled = agreed = nothing = 0
    for _ in range(6):
        batch = batches.make()
        assert batch.tokens.shape == batch.gate.shape == (6, 161)
        assert set(batch.part[batch.gate == WRITTEN]) <= {STATEMENT}
        assert set(batch.gate[batch.part == REPLY]) <= {NOT_WRITTEN}, "the model does not write its own words"
        assert bool((batch.part[batch.recall] == REPLY).all())
        assert bool((batch.part[5] == BOOK).all())
        assert not bool((batch.recall & batch.nothing).any())
        nothing += int(batch.nothing.sum())
        written = batch.gate == WRITTEN
        for identity, token in zip(batch.identity[written], batch.tokens[written], strict=True):
            told.setdefault(identity, set()).add(token)
        for identity, token in zip(batch.identity[batch.recall], batch.tokens[batch.recall], strict=True):
            recalled += 1
            words = {tokenizer.id_to_token(int(t)).lstrip("Ġ").lower() for t in told.get(identity, ())}
            agreed += tokenizer.id_to_token(int(token)).lstrip("Ġ").lower() in words
    assert recalled > 60
    assert agreed == recalled, (
        "each token that is asked for was told, in this spelling or in that of a text's start"
    )
    assert nothing > 20
    said = " ".join(tokenizer.decode(row.tolist()) for _ in range(12) for row in batches.make().tokens)
    assert UNKNOWN.strip() in said, "some questions are about what nobody told"


def test_the_newest_value_is_the_one_that_is_asked_for(batches):
    """A fact that is told twice is recalled with the value of the later row."""
    corrected = 0
    for _ in range(30):
        batch = batches.make()
        first_of: dict[tuple[int, int], list[int]] = {}
        for row in range(5):
            written = (batch.gate[row] == WRITTEN).nonzero()[0]
            for place in written:
                first_of.setdefault((int(batch.group[row]), int(batch.identity[row, place])), []).append(
                    int(batch.tokens[row, place])
                )
        for row in range(5):
            for place in batch.recall[row].nonzero()[0]:
                told = first_of.get((int(batch.group[row]), int(batch.identity[row, place])), [])
                if len(set(told)) > 1:
                    # As told, or, where it began a text, as it stands behind a space.
                    newest = {told[-1], batches.speech.spaced.get(told[-1], told[-1])}
                    assert int(batch.tokens[row, place]) in newest
                    corrected += 1
    assert corrected > 3


def test_a_corrected_value_begins_where_the_old_one_did(batches):
    """One identity for the first token of either; what follows depends on it."""
    fact = batches.facts.make()

    def identities(ids: list[int], told: bool) -> list[int]:
        piece = Piece()
        piece.value(ids, fact.key, ids, told)
        return piece.identity

    old, new = identities([7, 8], True), identities([9, 8], True)
    assert old == identities([7, 8], False)
    assert [a == b for a, b in zip(old, new, strict=True)] == [True, False]


def test_the_memory_of_a_batch_is_the_memory_that_serves():
    """The closed form over all tokens at once and the slab's updates, token by token, answer the same."""
    decoder = tiny_decoder()
    spec = decoder.config.memory.overridden({"forget_bias": 32.0, "surprise_threshold": 0.05})
    encoder = Encoder(decoder, spec)
    tokens = np.random.default_rng(0).integers(4, 300, 16).astype(np.int32)
    written = encoder.encode(np.zeros(0, np.int32), tokens)
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    # Each in a chunk of its own, for one chunk would write a fifth of its tokens only.
    apart = replace(written, position_N=written.position_N * spec.chunk_size)
    done = fold(slab, 0, apart, 0.0, spec)
    assert done.tokens_written == len(written.position_N) > 3
    memory = decoder.memory
    # A segment of one window is two blocks of half a window, each seen with a quarter on either side.
    keys = [
        memory.keys(hidden, memory.lookahead(hidden))[0, core]
        for text, core in ((tokens[:12], slice(0, 8)), (tokens[4:], slice(4, 12)))
        for _, hidden in [decoder.lower_blocks(torch.from_numpy(text[None].astype(np.int64)))]
    ]
    key = torch.cat(keys)[None]
    _, hidden = decoder.lower_blocks(torch.from_numpy(tokens[None].astype(np.int64)))
    query = memory.queries(hidden, decoder.zeros(1, 4))
    place = written.position_N
    code_NH, error_ND = memory_of(
        decoder,
        decoder.memory.whitened(key[0, place]),
        written.target_ND,
        written.weight_N,
        torch.zeros(len(place)),
    )
    columns, values = decoder.memory.code(query[0])
    dense = torch.zeros(len(values), spec.code_width).scatter(1, columns, values)
    closed = dense @ code_NH.T @ error_ND
    served = ops.sparse_read(slab, torch.zeros(len(values), dtype=torch.int64), columns, values)
    assert (closed - served).abs().max() < 5e-3, "float16 steps of the slab"


def test_muon_steps_are_nearly_orthogonal():
    stack = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalized(stack))
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3


def test_the_learning_rate_warms_up_and_falls():
    assert learning_rate(0.0, 0, 40) == pytest.approx(1 / 40)
    assert learning_rate(0.1, 100, 40) == 1.0
    assert learning_rate(1.0, 10_000, 40) == pytest.approx(0.02)


def test_a_run_learns_is_saved_and_resumes(tmp_path):
    text = tmp_path / "text.txt"
    names = " ".join(f"said {n} to {m} ." for n in WORDS.names for m in WORDS.names[:6])
    text.write_text(
        "\n".join(
            [*TEXT, names, " ".join(list(WORDS.words) * 6) + " " + " ".join(f"w{n}" for n in range(9))] * 2
        )
    )
    config = TrainConfig(
        out=tmp_path / "model", data=(text,), minutes=0.05, spoken=3, silent=2, books=1, tokens=64, warmup_steps=3,
        report_steps=2, skim_steps=2, threads=1,
    )  # fmt: skip
    assert set(words_of([read_text(text)]).names) >= set(WORDS.names[1:6])
    torch.manual_seed(0)
    trainer = Trainer(config, from_scratch(config, tiny_config(), WORDS))
    losses = [trainer.advance()["language"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    trainer.save()
    assert load_decoder(tmp_path / "model").config == tiny_config()
    assert json.loads((tmp_path / "model" / "training.json").read_text())["config"]["seed"] == "0"
    again = TrainConfig(**{**vars_of(config), "resume": True})
    resumed = Trainer(again, from_scratch(again, tiny_config(), WORDS))
    assert resumed.step == 60
    for name, tensor in trainer.decoder.state_dict().items():
        assert torch.equal(tensor, resumed.decoder.state_dict()[name]), name
    onward = TrainConfig(**{**vars_of(config), "out": tmp_path / "onward", "start": tmp_path / "model"})
    start = from_scratch(onward, tiny_config(vocab_size=500), WORDS)
    assert start.decoder.config == tiny_config(), "the config is the start's"
    first, second = (Tokenizer.from_file(str(tmp_path / f / "tokenizer.json")) for f in ("model", "onward"))
    assert first.to_str() == second.to_str()
    kept = load_decoder(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start.decoder.state_dict().items())
    assert np.isfinite(Trainer(onward, start).advance()["loss"])


def vars_of(config: TrainConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in TrainConfig.__slots__}


@pytest.mark.parametrize("mode", SERVED["mode"])
def test_gradients_reach_keys_values_gate_and_layers(batches, mode):
    decoder = tiny_decoder().requires_grad_(True)
    result = step_loss(decoder, batches.make(), Weights(), torch.Generator().manual_seed(0), mode)
    result.loss.backward()
    for name in ("memory.key_proj.weight", "memory.query_proj.weight", "memory.w1", "memory.value_proj.weight",
                 "memory.gate_in.weight", "memory.lookahead.qkv_proj.weight",
                 "memory.around_proj.weight", "layers.0.mlp.up_proj.weight",
                 "layers.3.self_attn.q_proj.weight", "lm_head.weight",
                 "memory.mag_proj.weight" if mode == "mag" else "memory.out_proj.weight"):  # fmt: skip
        gradient = decoder.get_parameter(name).grad
        assert gradient is not None, name
        assert float(gradient.abs().max()) > 0, name


def test_twins_are_keys_of_one_fact_told_twice(batches):
    """That loss alone moves keys, and only where a fact was told twice."""
    weights = Weights(language=0, recall=0, memory=0, contrast=0, align=0, gate=0, share=0, twins=1)
    decoder, batch = tiny_decoder().requires_grad_(True), batches.make()
    for told_twice in (True, False):
        if not told_twice:  # no two of the values' tokens are of one fact
            told = batch.identity != 0
            batch.identity[told] = np.arange(1, told.sum() + 1)
        decoder.zero_grad()
        step_loss(decoder, batch, weights, torch.Generator().manual_seed(0)).loss.backward()
        moved = decoder.get_parameter("memory.key_proj.weight").grad
        assert (moved is not None and bool(moved.any())) is told_twice
        unmoved = decoder.get_parameter("memory.query_proj.weight").grad
        assert unmoved is None or not bool(unmoved.any())


def test_a_gate_that_lets_nothing_through_is_worse_than_one_that_lets_in_the_words_beside_a_value(batches):
    batch, losses = batches.make(), {}
    batch.gate[batch.gate == NOT_WRITTEN] = EITHER  # values, and the words of the same statements
    for bias in (-10.0, 10.0):
        for told in (1.0, 8.0):
            decoder = tiny_decoder()
            with torch.no_grad():
                decoder.memory.gate_out.bias.fill_(bias)
            result = step_loss(decoder, batch, Weights(told=told), torch.Generator().manual_seed(0))
            losses[bias, told] = result.figures["gate"]
    assert losses[-10.0, 8.0] == pytest.approx(8 * losses[-10.0, 1.0], rel=0.01)
    assert losses[10.0, 8.0] == pytest.approx(losses[10.0, 1.0], rel=0.01)


def test_losses_are_those_of_float32_but_for_rounding(batches, monkeypatch):
    decoder, batch, losses = tiny_decoder(), batches.make(), []
    for found in (False, True):
        monkeypatch.setattr("titanmem.precision.has_bfloat16_units", lambda found=found: found)
        losses.append(float(step_loss(decoder, batch, Weights(), torch.Generator().manual_seed(0)).loss))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_batch_that_tells_nothing_has_losses_too(batches):
    decoder, batch = tiny_decoder().requires_grad_(True), batches.make()
    with torch.no_grad():
        decoder.memory.gate_out.bias.fill_(-10.0)
    batch.gate[:] = NOT_WRITTEN
    batch.recall[:] = False
    result = step_loss(decoder, batch, Weights(), torch.Generator().manual_seed(0))
    result.loss.backward()
    assert len(result.written_features_NF) == 0
    assert all(np.isfinite(figure) for figure in result.figures.values())


def test_skimming_learns_what_is_to_be_written(tokenizer):
    torch.manual_seed(0)
    book = token_stream(
        tokenizer,
        "\n".join(f"{n} said that {m} came ; they went on ." for n in WORDS.names for m in WORDS.words),
    )
    facts = FactMaker(WORDS, BOOK_OF_PHRASES, 3)
    batches = BatchMaker(Speech.own(tokenizer), book, facts, tokens=256, spoken=1, silent=1, books=1)
    skim, seen = Skim(400), []
    train_skim(skim, lambda: batches.documents(12), 80, seen.append)
    assert seen[-1]["skim_step"] == 80
    assert seen[-1]["skimmed_over"] <= 0.01, "the threshold keeps nearly all values"
    assert seen[-1]["encoded"] < 0.5, "and passes over most of this book"


def test_needles_travel_and_hide(tmp_path):
    needles = heldout_needles(WORDS, BOOK_OF_PHRASES, 12, seed=1)
    write_needles(tmp_path / "n.jsonl", needles)
    assert read_needles(tmp_path / "n.jsonl") == needles
    assert len({needle.fact for needle in needles}) == 12
    assert Needle(fact="", question="", answer="Rex").found_in("It is REX.")
    parts = [np.full(3, -1 - i, np.int32) for i in range(4)]
    text = hide(np.arange(100, dtype=np.int32), parts, 500, 10, random.Random(0))
    assert len(text) == 500
    for part in parts:
        assert (text == part[0]).sum() == 3
    with pytest.raises(ValueError, match="too few"):
        hide(np.arange(100), parts, 20, 10, random.Random(0))
    (tmp_path / "bad.jsonl").write_text('{"fact": "x"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        read_needles(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no needles"):
        read_needles(tmp_path / "bad.jsonl")
