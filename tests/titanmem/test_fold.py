"""Folding is a pure function of memory and segment, changes only what it selects, and stays in its bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny_model import tiny_decoder
from titanmem.bounds import forget_share
from titanmem.fold import Encoder, Written, _offer, fold
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    decoder = tiny_decoder()
    return Encoder(decoder, decoder.config.memory.overridden({"surprise_threshold": 0.05}))


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 300, count).astype(np.int32)


NOTHING = np.zeros(0, np.int32)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100])
def test_the_same_segment_gives_the_same_bits(encoder, tokens):
    spec, results = encoder.spec, []
    for _ in range(2):
        slab = torch.zeros(2, *spec.written_shape, dtype=torch.float16)
        momentum = 0.0
        for seed in range(3):
            done = fold(slab, 1, encoder.encode(ids(9, 7), ids(tokens, seed)), momentum, spec)
            momentum = done.momentum
        results.append((slab, momentum))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == float(np.float16(momentum))
    assert not bool(results[0][0][0].any()), "another slot is not touched"
    assert bool(results[0][0][1].any()) or tokens < 15


@pytest.mark.parametrize("bound", [0, 7, 4096])
def test_every_written_token_is_offered_to_the_reservoir(encoder, bound):
    spec = encoder.spec.overridden({"reservoir": bound})
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    written = encoder.encode(NOTHING, ids(100))
    done = fold(slab, 0, written, 0.0, spec, reservoir=Reservoir.empty(spec))
    assert done.reservoir is not None
    assert done.tokens_written > 15
    # What was written, in order; what was not surprising is not there, nor what a newer one replaces.
    rows = (written.columns_NK, written.values_NK, written.token_N, written.weight_N)
    everything = Reservoir.of(*(row.numpy() for row in rows))
    if bound == 4096:
        offered = {entry.tobytes() for entry in everything.columns_RK}
        assert {entry.tobytes() for entry in done.reservoir.columns_RK} <= offered
        assert 5 < len(done.reservoir) <= done.tokens_written
    else:
        assert len(done.reservoir) == bound
    assert torch.equal(encoder.values_VD[written.token_N], written.target_ND), (
        "a token says what its target was"
    )


def test_a_value_begins_where_nothing_was_written_before(encoder, monkeypatch):
    """What the gate clearly let through goes on with the value of the token before it, if that was let through too."""
    seen = []
    plain = Reservoir.offered

    def offered(self, *rows):
        seen.append(rows[-2:])
        return plain(self, *rows)

    monkeypatch.setattr(Reservoir, "offered", offered)
    written = encoder.encode(NOTHING, ids(100))
    count = len(written.position_N)
    assert count > 12
    written.position_N[:] = torch.arange(count)
    written.position_N[6:] += 5  # a gap: another value
    written.weight_N[:] = 0.9
    written.weight_N[3] = 0.4  # let through, not clearly
    _offer(Reservoir.empty(encoder.spec), written, torch.arange(count), encoder.spec)
    ((begins, named),) = seen
    assert begins.nonzero()[0].tolist() == [0, 4, 6]
    clear = set(written.token_N[written.weight_N >= 0.5].tolist())
    around = set(written.segment_T[: 20 + 64].tolist())
    assert set(named[15].tolist()) == around - clear, "named, and not told, before it and behind it"
    assert written.token_N[3].item() in named[15] or written.token_N[3].item() in clear
    assert len(named[3]) == 0, "it may be no value"


def test_what_is_not_surprising_is_not_offered(encoder):
    spec, written = encoder.spec.overridden({"top_k_ratio": 0.05}), encoder.encode(NOTHING, ids(40))
    assert spec.tokens_per_update == 3, "an update may keep a part of its tokens"
    faint = torch.arange(len(written.weight_N)) % 2 == 0
    written = replace(written, weight_N=torch.where(faint, 0.01, 0.9))
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    done = fold(slab, 0, written, 0.0, spec, reservoir=Reservoir.empty(spec))
    assert done.reservoir is not None
    assert 0 < done.tokens_written <= int((~faint).sum())
    assert bool((done.reservoir.gate_R == np.float16(0.9)).all())


def test_the_reservoir_changes_nothing_of_what_is_written(encoder):
    spec, written = encoder.spec, encoder.encode(NOTHING, ids(100))
    without, beside = (torch.zeros(1, *spec.written_shape, dtype=torch.float16) for _ in range(2))
    first = fold(without, 0, written, 0.0, spec)
    second = fold(beside, 0, written, 0.0, spec, reservoir=Reservoir.empty(spec))
    assert torch.equal(without, beside)
    assert first.reservoir is None
    assert second.tokens_written == first.tokens_written


def test_the_same_segments_leave_the_same_reservoir(encoder):
    spec = encoder.spec.overridden({"reservoir": 9})
    kept = []
    for _ in range(2):
        slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
        reservoir, momentum = Reservoir.empty(spec), 0.0
        for seed in range(3):
            done = fold(
                slab, 0, encoder.encode(ids(9, 7), ids(60, seed)), momentum, spec, reservoir=reservoir
            )
            assert done.reservoir is not None
            assert done.reservoir.token_R.tobytes() != reservoir.token_R.tobytes()
            reservoir, momentum = done.reservoir, done.momentum
        kept.append([getattr(reservoir, name).tobytes() for name in Reservoir.__slots__])
    assert kept[0] == kept[1]


def test_an_update_changes_only_what_it_selects(encoder):
    spec = encoder.spec
    slab = torch.randn(1, *spec.written_shape).half()
    before = slab.clone()
    written = encoder.encode(NOTHING, ids(1))
    done = fold(slab, 0, written, 0.0, spec)
    changed = (slab != before).any(-1)[0].nonzero()[:, 0]
    assert done.updates == 1
    assert set(changed.tolist()) <= set(written.columns_NK.flatten().tolist())
    assert len(changed) * spec.value_dim <= spec.top_k_ratio * spec.parameters


def test_no_update_is_larger_than_the_ratio(encoder):
    spec = encoder.spec
    sizes: list[int] = []
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    last = [slab.clone()]

    class Watch:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            sizes.append(int((slab != last[0]).sum()))
            last[0] = slab.clone()

    done = fold(slab, 0, encoder.encode(NOTHING, ids(200)), 0.0, spec, Watch)
    assert len(sizes) == done.updates > 13
    assert max(sizes) <= spec.top_k_ratio * spec.parameters


def test_what_is_known_is_not_surprising(encoder):
    spec = encoder.spec.overridden({"forget_bias": 32.0})
    slab = torch.zeros(1, *spec.written_shape, dtype=torch.float16)
    written = encoder.encode(NOTHING, ids(1))
    assert len(written.position_N) == 1
    written = Written(**{name: getattr(written, name) for name in Written.__slots__ if name != "weight_N"},
                      weight_N=torch.ones(len(written.weight_N)))  # fmt: skip
    first = fold(slab, 0, written, 0.0, spec)
    again = fold(slab, 0, written, first.momentum, spec)
    assert first.surprise > 0.5
    assert again.surprise < 0.05
    assert again.tokens_written == again.updates == 0


def test_context_matters_and_a_quarter_of_the_window_is_enough(encoder):
    long, tokens = ids(100, 1), ids(8, 2)
    near = encoder.encode(long[-4:], tokens)
    far = encoder.encode(long, tokens)
    alone = encoder.encode(NOTHING, tokens)
    assert torch.equal(near.weight_N, far.weight_N)
    assert torch.equal(near.columns_NK, far.columns_NK)
    assert not torch.equal(near.weight_N[:1], alone.weight_N[:1])


def test_a_block_is_a_function_of_the_text_around_it(encoder):
    """Blocks of 8 tokens with 4 on either side: what lies further away changes no bit, what lies nearer does."""
    text = ids(64, 3)

    def block(changed: int | None) -> list[bytes]:
        tokens = text.copy()
        if changed is not None:
            tokens[changed] = (tokens[changed] + 1) % 300
        written = encoder.encode(NOTHING, tokens)
        inside = (written.position_N >= 16) & (written.position_N < 24)
        return [
            row[inside].numpy().tobytes() for row in (written.columns_NK, written.values_NK, written.weight_N)
        ]

    whole = block(None)
    assert all(block(place) == whole for place in (0, 11, 28, 63))
    assert all(block(place) != whole for place in (12, 15, 24, 27))


def test_what_comes_after_a_token_is_part_of_its_key(encoder):
    first, second = (encoder.encode(NOTHING, np.concatenate([ids(6, 1), ids(4, seed)])) for seed in (2, 3))
    assert 0 in first.position_N
    assert not torch.equal(first.values_NK[:1], second.values_NK[:1])


def test_long_text_is_skimmed_and_a_turn_is_not():
    decoder = tiny_decoder()
    skim = decoder.memory.skim
    with torch.no_grad():
        for parameter in skim.parameters():
            parameter.zero_()
        skim.embed.weight[7, 0] = 1.0  # token 7 is what this skim looks for, itself and nothing around it
        skim.out.weight[0, 0] = 1.0
        skim.bias.fill_(-0.5)
    encoder = Encoder(decoder, decoder.config.memory.overridden({"surprise_threshold": 0.05}))
    text = np.where(ids(96, 3) == 7, 8, ids(96, 3)).astype(np.int32)
    assert not len(encoder.encode(NOTHING, text).position_N)
    assert len(encoder.encode(NOTHING, text[:16]).position_N), (
        "a turn is encoded whatever skimming thinks of it"
    )
    text[43] = 7
    places = encoder.encode(NOTHING, text).position_N
    assert len(places)
    assert 40 <= int(places.min()) <= int(places.max()) < 48, "its block"
    with torch.no_grad():
        skim.bias.fill_(9.0)
    everything = encoder.encode(NOTHING, text)
    kept = torch.isin(everything.position_N, places)
    assert torch.equal(everything.values_NK[kept], encoder.encode(NOTHING, text).values_NK[kept])


def test_an_id_outside_the_vocabulary_is_refused(encoder):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        encoder.encode(NOTHING, np.array([400], np.int32))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        encoder.encode(np.array([-1], np.int32), ids(1))


def test_forgetting_grows_with_surprise():
    spec = MemorySpec()
    shares = [forget_share(surprise, spec) for surprise in (0.0, 0.5, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(1 / (1 + np.exp(4.0)))
    note = spec.overridden({"forget_bias": 0.2})
    assert forget_share(0.0, note) == pytest.approx(0.45, abs=0.001), "the note's value forgets 45 %"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("surprise_threshold", 0.6, "from 0.05 to 0.5"), ("chunk_size", 512, "at most window"),
     ("code_active", 256, "top_k_ratio"), ("momentum", "0.9", "must be a number"), ("speed", 3, "unknown")],
)  # fmt: skip
def test_a_wrong_knob_is_named(name, value, said):
    with pytest.raises(
        ValueError, match=f"memory.{'top_k_ratio' if name == 'code_active' else name}"
    ) as error:
        MemorySpec().overridden({name: value})
    assert said in str(error.value)
