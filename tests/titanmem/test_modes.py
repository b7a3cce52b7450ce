"""The four modes against the paper's sentences, with attention and residual of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titanmem import MemorySpec, NeuralMemory
from titanmem.modes import EPSILON, MODES, Context, MemoryAsContext, Mode, Rows

E, C, WINDOW = 16, 16, 20
SAME = 2e-5
"""Float32 sums in two orders, through a few chunks of updates."""


def memory(seed: int = 0, kind: type[NeuralMemory] = NeuralMemory, **values: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    base = MemorySpec(
        rule="titans", width=E, d_nltm=16, depth=2, conv=4, chunk_size=C, window=WINDOW, lr=0.03, momentum=0.3
    )
    return kind(base.overridden(values))


def sparse(seed: int = 0) -> NeuralMemory:
    """Codes that all users share, one written layer; every token may be written."""
    torch.manual_seed(seed)
    return NeuralMemory(
        MemorySpec(width=E, d_nltm=32, key_dim=16, value_dim=16, code_width=512, code_active=4, conv=4,
                   chunk_size=C, window=WINDOW, top_k_ratio=0.05, surprise_threshold=0.05)
    )  # fmt: skip


class Layer:
    """y = x + attention(x) in one head, for a whole sequence or for the segment of a `Context`."""

    def __init__(self, seed: int = 1) -> None:
        self.qkv = torch.randn(3, E, E, generator=torch.Generator().manual_seed(seed)) / 4

    def attend(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (x @ W for W in self.qkv)
        return x + (q @ k.transpose(-1, -2)).masked_fill(~visible, -torch.inf).softmax(-1) @ v

    def __call__(self, given: Tensor | Context) -> Tensor:
        if isinstance(given, Context):
            y = self.attend(given.hidden_BNE, given.visible_BNN)
            return y[:, y.shape[1] - (given.segment.stop - given.segment.start) :]
        return self.attend(given, torch.ones(given.shape[1], given.shape[1]).tril().bool())


def opened(name: str, m: NeuralMemory | None = None, **values: Any) -> Mode:
    """A mode whose gain is far from its neutral start."""
    mode = MODES[name](m if m is not None else memory(**values))
    with torch.no_grad():
        mode.gain_E.copy_(torch.linspace(-1, 1.5, E))
    return mode


def text(rows: int = 2, tokens: int = 40, seed: int = 7) -> Tensor:
    return torch.randn(rows, tokens, E, generator=torch.Generator().manual_seed(seed))


def unit_of(x: Tensor) -> Tensor:
    """Root mean square 1, with the modes' guard against 0."""
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# -- identity and formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [memory, sparse])
def test_an_untrained_memory_changes_no_bit_of_the_layer(made: Callable[[], NeuralMemory]):
    x, layer = text(), Layer()
    for name in ("mag", "mal"):
        mode = MODES[name](made())
        assert torch.equal(mode(x, Rows(), layer), layer(x)), name
        assert bool(mode.state_for(2).updates_U.all()), "it was written meanwhile"
    assert torch.equal(MODES["lmm"](made())(x, Rows(), layer), x)


def test_mag_scales_the_contribution_and_mal_and_lmm_add():
    x, layer = text(tokens=C), Layer()
    unit = unit_of(x)
    m = memory().read(memory().new_state(2), unit)  # one chunk: the memory of its start
    gain = opened("mag").gain_E
    factor = 2 * torch.sigmoid(gain * unit_of(m))
    assert (opened("mag")(x, Rows(), layer) - (x + (layer(x) - x) * factor)).abs().max() < SAME
    assert (opened("mal")(x, Rows(), layer) - layer(x + gain * m)).abs().max() < SAME
    assert (opened("lmm")(x, Rows(), layer) - (x + gain * m)).abs().max() < SAME


@pytest.mark.parametrize("name", ["mag", "mal", "lmm"])
def test_a_chunk_is_read_before_it_is_written(name: str):
    x, m = text(tokens=3 * C), memory()
    mode = opened(name, m)
    unit, state = unit_of(x), m.new_state(2)
    read = []
    for part in unit.split(C, 1):
        read.append(m.read(state, part))
        m.update(state, part)
    expected = torch.cat(read, 1)
    assert (mode.remembered(x, Rows(), False) - expected).abs().max() < SAME
    late = m.read(state, unit)
    assert (late - expected).abs().max() > 100 * SAME, "the writes matter, so the order shows"
    for mine, theirs in zip(mode.state_for(2).weights, state.weights, strict=True):
        assert (mine - theirs).abs().max() < SAME


# -- memory as context ---------------------------------------------------------------------------------------------


class Recorder(NeuralMemory):
    """Notes each call: its name, the chunks that were written before, its input and its output."""

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__(spec)
        self.events: list[tuple[str, int, Tensor, Tensor]] = []

    def _note(self, name, state, x, run):
        before = int(state.updates_U[0])
        out = run()
        self.events.append((name, before, x, out if isinstance(out, Tensor) else x))
        return out

    def read(self, state, x, valid=None):
        return self._note("read", state, x, lambda: super(Recorder, self).read(state, x, valid))

    def update(self, state, x, valid=None):
        return self._note("write", state, x, lambda: super(Recorder, self).update(state, x, valid))

    def forward(self, state, x, valid=None):
        return self._note("read then write", state, x, lambda: super(Recorder, self).forward(state, x, valid))


@pytest.mark.parametrize(
    ("gate_reads", "after_attention"),
    [("before", ["read then write"]), ("after", ["write", "read"])],
)
def test_mac_reads_the_memory_of_the_segment_before_then_attends_then_writes(gate_reads, after_attention):
    recorder = memory(kind=Recorder, persistent_tokens=2)
    assert isinstance(recorder, Recorder)
    layer, x = Layer(), text(1, 3 * C)

    def attention(context: Context) -> Tensor:
        y = layer(context)
        recorder.events.append(("attend", -1, context.hidden_BNE, y))
        return y

    MemoryAsContext(recorder, gate_reads)(x, Rows(), attention)
    steps = ["read", "attend", *after_attention]
    assert [event[0] for event in recorder.events] == steps * 3
    for segment in range(3):
        read, attend, *rest = recorder.events[segment * len(steps) : (segment + 1) * len(steps)]
        assert read[1] == segment, "h comes from the memory as the segments before left it"
        assert torch.equal(attend[2][:, 2 : 2 + C], read[3]), "and stands behind the persistent tokens"
        y = attend[3]
        unit = unit_of(y)
        for event in rest:
            assert (event[2] - unit).abs().max() < SAME, "what is written and gated is attention's output"
        assert [event[1] for event in rest] == ([segment] if len(rest) == 1 else [segment, segment + 1])


def naive_mac(mode: MemoryAsContext, x: Tensor, layer: Layer) -> Tensor:
    """Section 4.1 one token at a time: each attends over a sequence that has only what it may see."""
    m, state, out = mode.memory, mode.memory.new_state(len(x)), []
    said = x[:, :0]
    for start in range(0, x.shape[1], C):
        S = x[:, start : start + C]
        past = x[:, :start]
        told = torch.cat([past, S], 1)
        told = unit_of(told)
        # The convolution over queries sees the inputs before the segment.
        asking = m.new_state(len(x))
        asking.weights = state.weights
        h = m.read(asking, told)[:, start:]
        y = []
        for i in range(S.shape[1]):
            seen = torch.cat([past, S[:, : i + 1]], 1)[:, -WINDOW:]
            line = torch.cat([mode.persistent_PE.expand(len(x), -1, -1), h[:, : i + 1], seen], 1)
            y.append(layer.attend(line, torch.ones(line.shape[1], line.shape[1], dtype=torch.bool))[:, -1])
        y = torch.stack(y, 1)
        unit = unit_of(y)
        said = torch.cat([said, unit], 1)
        if mode.writing:
            gate = m.read(state, unit)
            m.update(state, unit)
        else:
            gate = m.read(state, said)[:, start:]
        factor = 2 * torch.sigmoid(mode.gain_E * unit_of(gate))
        out.append(S + (y - S) * factor)
    return torch.cat(out, 1)


@pytest.mark.parametrize("writing", [True, False])
def test_mac_is_section_4_1_token_by_token(writing: bool):
    x, layer = text(2, 3 * C + 5), Layer()
    mode = opened("mac", persistent_tokens=2)
    assert isinstance(mode, MemoryAsContext)
    mode.writing = writing
    mode.persistent_PE.normal_()
    expected = naive_mac(mode, x, layer)
    assert (mode(x, Rows(), layer) - expected).abs().max() < SAME


def test_persistent_tokens_h_and_the_window_all_matter():
    x, layer = text(1, 2 * C), Layer()
    base = opened("mac", persistent_tokens=2)
    assert isinstance(base, MemoryAsContext)
    out = base(x, Rows(), layer)
    base.reset()
    base.persistent_PE.add_(1.0)
    assert ((base(x, Rows(), layer) - out).abs().amax((0, 2)) > 1e-4).all(), "every token sees them"
    wide = opened("mac", persistent_tokens=2, window=2 * C)
    difference = (wide(x, Rows(), layer) - out).abs().amax((0, 2))
    assert difference[:C].max() == 0, "within the window nothing else is seen"
    assert difference[WINDOW:].min() > 1e-4


# -- causality -------------------------------------------------------------------------------------------------------


def first_change(mode: Mode, place: int) -> int:
    """The first token whose output changes when token `place` does."""
    x, layer = text(1, 3 * C), Layer()
    out = mode(x, Rows(), layer)
    mode.reset()
    x[:, place] += 1.0
    changed = (mode(x, Rows(), layer) != out).any(-1)[0].nonzero()[:, 0]
    return int(changed.min())


@pytest.mark.parametrize("place", [3, C - 1, C, C + 5, 3 * C - 1])
@pytest.mark.parametrize("name", list(MODES))
@pytest.mark.parametrize("made", [memory, sparse])
def test_no_output_before_a_token_depends_on_it(made, name: str, place: int):
    assert first_change(opened(name, made()), place) == place


def test_the_letter_of_equation_25_leaks_within_a_segment():
    mode = opened("mac")
    mode.gate_reads = "after"
    assert first_change(mode, C + 5) == C


# -- rows, padding, calls ----------------------------------------------------------------------------------------------


def test_rows_go_to_the_front_and_back():
    valid = torch.tensor([[False, True, True, False], [True, True, True, True], [False, False, False, False]])
    x = torch.arange(12.0).view(3, 4)
    rows = Rows.of(valid)
    assert rows.front(x).tolist()[0][:2] == [1, 2]
    assert rows.valid_BT is not None
    assert rows.valid_BT.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
    assert torch.equal(rows.back(rows.front(x)), x * valid)
    assert torch.equal(rows.back(rows.front(x[..., None].expand(3, 4, 2)))[..., 1], x * valid)
    assert Rows.of(torch.ones(2, 3, dtype=torch.bool)).order_BT is None


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", list(MODES))
def test_padding_is_neither_seen_nor_written(name: str, side: str):
    tokens, total = 2 * C + 3, 3 * C
    start = {"left": total - tokens, "right": 0, "both": 4}[side]
    x, places = text(2, tokens), slice(start, start + tokens)
    alone, padded = opened(name), opened(name)
    own = Layer() if name == "mac" else (lambda x: x * 1.5)
    out = alone(x[:1], Rows(), own)
    batch, valid = torch.full((2, total, E), torch.nan), torch.zeros(2, total, dtype=torch.bool)
    batch[0, places], valid[0, places] = x[0], True
    batch[1], valid[1] = text(1, total, seed=8)[0], True
    if name == "mac":
        batch = batch.nan_to_num(3.0)  # a layer sees what is not there, and is told by its mask not to look
    got = padded(batch, Rows.of(valid), own)
    assert (got[:1, places] - out).abs().max() < SAME
    assert padded.report is not None
    assert torch.equal(padded.report.written[0].nonzero()[:, 0], torch.arange(start, start + tokens))
    for whole, mine in zip(padded.state_for(2).tensors(), alone.state_for(1).tensors(), strict=True):
        assert (whole[:1] - mine).abs().max() < SAME


@pytest.mark.parametrize("name", list(MODES))
def test_what_a_row_gets_does_not_depend_on_the_others(name: str):
    x, mode = text(3), opened(name)
    out, states = mode(x, Rows(), Layer()), mode.state_for(3)
    other = opened(name)
    x[1] = 100 * text(1, seed=9)[0]
    got = other(x, Rows(), Layer())
    for row in (0, 2):
        assert torch.equal(got[row], out[row])
        pairs = zip(other.state_for(3).tensors(), states.tensors(), strict=True)
        assert all(torch.equal(a[row], b[row]) for a, b in pairs)
    assert not torch.equal(got[1], out[1])


@pytest.mark.parametrize("name", ["mag", "mal", "lmm"])
def test_two_calls_of_whole_chunks_are_one_call(name: str):
    x, layer = text(2, 4 * C), lambda x: x * 1.5  # no attention, whose cache is the decoder's business
    whole, halves = opened(name), opened(name)
    out = whole(x, Rows(), layer)
    got = torch.cat([halves(x[:, : 2 * C], Rows(), layer), halves(x[:, 2 * C :], Rows(), layer)], 1)
    assert (got - out).abs().max() < SAME
    halves.reset()
    forgot = halves(x[:, 2 * C :], Rows(), layer)
    assert (forgot - out[:, 2 * C :]).abs().max() > 100 * SAME, "the state is what carries"


@pytest.mark.parametrize("name", list(MODES))
def test_read_only_leaves_every_bit_of_the_state(name: str):
    mode = opened(name)
    mode(text(), Rows(), Layer())
    before = mode.state_for(2).of(torch.arange(2))
    mode.writing = False
    first, second = (mode(text(seed=8), Rows(), Layer()) for _ in range(2))
    assert torch.equal(first, second)
    assert mode.report is None
    assert all(torch.equal(a, b) for a, b in zip(mode.state_for(2).tensors(), before.tensors(), strict=True))


def test_a_reader_that_decodes_keeps_the_convolutions_past():
    x, mode = text(2, C), opened("lmm")
    mode(text(seed=8), Rows(), Layer())
    mode.writing = False
    whole = mode(x, Rows(), Layer())
    steps = [mode(x[:, :6], Rows(), Layer())]
    steps += [mode(x[:, i : i + 1], Rows(), Layer(), True) for i in range(6, C)]
    assert (torch.cat(steps, 1) - whole).abs().max() < SAME


def test_a_huge_decoder_and_a_silent_memory_stay_finite():
    for name in MODES:
        mode = opened(name)
        assert bool(torch.isfinite(mode(1e6 * text(), Rows(), lambda x: _same(x))).all()), name
        silent = opened(name, sparse())
        assert bool(torch.isfinite(silent(torch.zeros(2, C, E), Rows(), lambda x: _same(x))).all()), name


def _same(given: Tensor | Context) -> Tensor:
    """A layer that adds nothing."""
    if isinstance(given, Context):
        return given.hidden_BNE[:, -(given.segment.stop - given.segment.start) :]
    return given


def test_another_batch_size_asks_for_a_reset():
    mode = opened("mag")
    mode(text(2), Rows(), Layer())
    with pytest.raises(ValueError, match=r"3 rows.*2 users.*reset"):
        mode(text(3), Rows(), Layer())
    mode.reset()
    mode(text(3), Rows(), Layer())
