"""Training data says what it claims, the memory of a batch is the memory that serves, and a run learns and resumes."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kernels import ops
from tests.tiny_model import TEXT, tiny_config, tiny_decoder
from titanmem.corpus import read_text, token_stream, train_tokenizer, words_of
from titanmem.facts import FAMILIES, FactMaker, Words, is_heldout
from titanmem.fold import Encoder, fold
from titanmem.folder import load_decoder
from titanmem.muon import orthogonalized
from titanmem.needles import Needle, heldout_needles, hide, read_needles, write_needles
from titanmem.objective import Weights, memory_of, step_loss
from titanmem.phrases import UNKNOWN
from titanmem.stream import NOT_WRITTEN, REPLY, STATEMENT, WRITTEN, BatchMaker
from titanmem.train import TrainConfig, Trainer, learning_rate

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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    maker = FactMaker(WORDS, 0)
    return train_tokenizer([*TEXT, *(maker.make().statement for _ in range(300))], 400)


@pytest.fixture
def batches(tokenizer) -> BatchMaker:
    book = token_stream(tokenizer, "\n".join(TEXT))
    return BatchMaker(tokenizer, book, FactMaker(WORDS, 3), rows=4, tokens=160, window=16)


def test_heldout_keys_and_words_are_kept_apart():
    train, held = FactMaker(WORDS, 1), FactMaker(WORDS, 1, heldout=True)
    for maker, wanted in ((train, False), (held, True)):
        assert {is_heldout(w) for w in [*maker.words.names, *maker.words.words]} == {wanted}
        assert all(is_heldout(maker.value("name")) is wanted for _ in range(50))
    keys = [{maker.make("chat").key for _ in range(300)} for maker in (train, held)]
    assert not keys[0] & keys[1] - {k for k in keys[0] if k.startswith(("You", "Your"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fact_has_its_value_and_its_question(family):
    maker = FactMaker(WORDS, 5)
    for _ in range(50):
        fact = maker.make(family)
        assert "{v}" in fact.statement
        assert fact.value
        assert fact.questions[0].endswith("?") or "?" in fact.questions[0]
        assert fact.answer.endswith((" is", " in", " at", " to", " the", " day"))


def test_labels_mark_values_where_told_and_where_recalled(batches, tokenizer):
    told: dict[int, int] = {}
    recalled = 0
    for _ in range(6):
        batch = batches.make()
        assert batch.tokens.shape == batch.gate.shape == (4, 161)
        assert set(batch.part[batch.gate == WRITTEN]) <= {STATEMENT}
        assert set(batch.gate[batch.part == REPLY]) <= {NOT_WRITTEN}, "the model does not write its own words"
        assert bool((batch.part[batch.recall] == REPLY).all())
        told |= dict(
            zip(batch.identity[batch.gate == WRITTEN], batch.tokens[batch.gate == WRITTEN], strict=True)
        )
        for identity, token in zip(batch.identity[batch.recall], batch.tokens[batch.recall], strict=True):
            if identity in told:  # the row may end before the statement does
                assert told[identity] == token
                recalled += 1
    assert recalled > 20
    said = " ".join(tokenizer.decode(row.tolist()) for _ in range(12) for row in batches.make().tokens)
    assert UNKNOWN.strip() in said, "some questions are about what nobody told"


def test_the_memory_of_a_batch_is_the_memory_that_serves():
    """The closed form over all tokens at once and the slab's updates, token by token, answer the same."""
    decoder = tiny_decoder()
    spec = decoder.config.memory.overridden({"forget_bias": 32.0, "surprise_threshold": 0.05})
    encoder = Encoder(decoder, spec)
    tokens = np.random.default_rng(0).integers(4, 300, 16).astype(np.int32)
    written = encoder.encode(np.zeros(0, np.int32), tokens)
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    done = fold(slab, 0, written, 0.0, spec)
    assert done.tokens_written == len(written.position_N) > 3
    key, query = decoder.memory.keys_queries(
        decoder.lower_blocks(torch.from_numpy(tokens[None].astype(np.int64)))[1], decoder.zeros(1, 4)
    )
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
        out=tmp_path / "model", data=(text,), minutes=0.05, rows=4, tokens=64, warmup_steps=3, report_steps=2,
        threads=1, compiled=False,
    )  # fmt: skip
    assert set(words_of([read_text(text)]).names) >= set(WORDS.names[1:6])
    trainer = Trainer(config, tiny_config(), words=WORDS)
    losses = [trainer.advance()["language"] for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    trainer.save()
    assert load_decoder(tmp_path / "model").config == tiny_config()
    assert json.loads((tmp_path / "model" / "training.json").read_text())["config"]["seed"] == "0"
    resumed = Trainer(TrainConfig(**{**vars_of(config), "resume": True}), tiny_config(), words=WORDS)
    assert resumed.step == 30
    for name, tensor in trainer.decoder.state_dict().items():
        assert torch.equal(tensor, resumed.decoder.state_dict()[name]), name


def vars_of(config: TrainConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in TrainConfig.__slots__}


def test_gradients_reach_keys_values_gate_and_layers(batches):
    decoder = tiny_decoder().requires_grad_(True)
    result = step_loss(decoder, batches.make(), Weights(), torch.Generator().manual_seed(0))
    result.loss.backward()
    for name in ("memory.key_proj.weight", "memory.query_proj.weight", "memory.w1", "memory.value_proj.weight",
                 "memory.gate_in.weight", "memory.out_proj.weight", "layers.0.mlp.up_proj.weight",
                 "layers.3.self_attn.q_proj.weight", "lm_head.weight"):  # fmt: skip
        gradient = decoder.get_parameter(name).grad
        assert gradient is not None, name
        assert float(gradient.abs().max()) > 0, name


def test_needles_travel_and_hide(tmp_path):
    needles = heldout_needles(WORDS, 12, seed=1)
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
