"""What `NeuralMemory` promises beside its numbers: neighbours, refusals, continuation, bounds, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titanmem import MemorySpec, MemoryState, NeuralMemory

KINDS: dict[str, dict[str, Any]] = {
    "titans": {"rule": "titans"},
    "pooled": {"rule": "titans", "gates": "chunk"},
    "rows": {"rule": "sparse", "written_layers": "all", "lr": 0.05},
    "elements": {"rule": "sparse", "written_layers": "all", "selection": "elements", "lr": 0.05},
    "codes": {"rule": "sparse", "key_dim": 16, "value_dim": 12, "code_width": 1024, "code_active": 8},
}


def memory_of(kind: str, **knobs: Any) -> NeuralMemory:
    torch.manual_seed(11)
    spec = MemorySpec(**{"width": 24, "d_nltm": 32, "chunk_size": 32, "conv": 4, **KINDS[kind], **knobs})
    memory = NeuralMemory(spec)
    memory.calibrate(torch.randn(4, 200, 24))
    return memory


def text(users: int, tokens: int, seed: int = 5) -> Tensor:
    return torch.randn(users, tokens, 24, generator=torch.Generator().manual_seed(seed))


def same(one: MemoryState, other: MemoryState, users: list[int] | None = None) -> bool:
    chosen = torch.tensor(users if users is not None else range(one.users))
    return all(torch.equal(a[chosen], b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_company_changes_no_bit(kind):
    memory = memory_of(kind)
    users, x = 9, text(9, 70)
    lengths = torch.tensor([70, 1, 69, 33, 70, 16, 2, 64, 50])
    valid = torch.arange(70) < lengths[:, None]
    whole = memory.new_state(users)
    y, report = memory(whole, x, valid)
    for alone in range(users):
        state = memory.new_state(1)
        length = int(lengths[alone])
        y_alone, report_alone = memory(state, x[alone : alone + 1, :length])
        assert same(whole, state, [alone])
        assert torch.equal(y_alone[0], y[alone, :length])
        assert torch.equal(report_alone.surprise[0], report.surprise[alone, :length])
        assert not bool(report.written[alone, length:].any())
        assert not bool(report.surprise[alone, length:].any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@torch.no_grad()
def test_what_is_not_finite_is_refused_and_neighbours_go_on(kind, poison):
    memory = memory_of(kind)
    state = memory.new_state(3)
    memory.update(state, text(3, 40))
    before, clean = state.of(torch.arange(3)), state.of(torch.arange(3))
    x = text(3, 40, seed=6)
    bad = x.clone()
    bad[1, 7, 3] = poison
    y, report = memory(state, bad)
    memory.update(clean, x)
    assert report.refused.tolist() == [False, True, False]
    assert not bool(report.written[1].any())
    assert same(state, before.of(torch.tensor([1])), [1]), "the refused user's state is as it was"
    assert same(state, clean.of(torch.tensor([0, 2])), [0, 2]), "the others do not notice"
    assert bool(torch.isfinite(y[[0, 2]]).all())
    state.weights[0][2, 0, 0] = poison
    assert memory.update(state, x).refused.tolist() == [False, False, True]


@torch.no_grad()
def test_an_update_that_overflows_is_refused():
    memory = memory_of("titans", lr=1.0)
    with torch.no_grad():
        assert memory.dense is not None
        memory.value.linear.weight.mul_(1e37)
    state = memory.new_state(1)
    before = state.of(torch.arange(1))
    report = memory.update(state, text(1, 64))
    assert report.refused.tolist() == [True]
    assert same(state, before)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_calls_that_end_with_chunks_are_one_call(kind):
    memory = memory_of(kind)
    x = text(2, 96)
    whole, parts = memory.new_state(2), memory.new_state(2)
    y, _ = memory(whole, x)
    pieces = [memory(parts, x[:, start:end])[0] for start, end in ((0, 32), (32, 96))]
    assert torch.allclose(torch.cat(pieces, 1), y, atol=1e-5)
    for a, b in zip(whole.tensors(), parts.tensors(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_reads_each_chunk_before_it_is_written(kind):
    memory = memory_of(kind)
    x = text(2, 64)
    walked, stepped = memory.new_state(2), memory.new_state(2)
    y, report = memory(walked, x)
    for start in (0, 32):
        chunk = x[:, start : start + 32]
        assert torch.allclose(memory.read(stepped, chunk), y[:, start : start + 32], atol=1e-5)
        wanted = memory.surprise(stepped, chunk)
        if kind != "codes":  # whose surprise is taken at the start of each update inside the chunk
            assert torch.allclose(wanted, report.surprise[:, start : start + 32], atol=1e-4)
        memory.update(stepped, chunk)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(walked.weights, stepped.weights, strict=True))


@pytest.mark.parametrize("kind", ["rows", "elements", "codes"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
@torch.no_grad()
def test_a_sparse_update_changes_what_it_reports_and_no_more(kind, seed):
    memory = memory_of(kind, conv=1)
    state = memory.new_state(2)
    memory.update(state, text(2, 20, seed + 1))
    before = [W.clone() for W in state.weights]
    tokens = 32 if memory.spec.writes_all else 1
    report = memory.update(state, text(2, tokens, seed))
    differ = torch.stack(
        [(a != b).flatten(1).sum(1) for a, b in zip(before, state.weights, strict=True)]
    ).sum(0)
    parameters = memory.spec.parameters
    assert bool((differ <= report.changed).all())
    assert bool((report.changed <= memory.spec.top_k_ratio * parameters).all())
    assert bool(((differ > 0) == report.written.any(1)).all())
    if bool(report.written.any(1).all()):
        assert bool((differ > 0.8 * report.changed).all()), "the report does not exaggerate"


@pytest.mark.parametrize("kind", ["rows", "elements", "codes"])
@torch.no_grad()
def test_nothing_surprising_changes_no_bit_of_the_weights(kind):
    memory = memory_of(kind, surprise_threshold=0.5)
    state = memory.new_state(2)
    memory.update(state, text(2, 40))
    if memory.dense is not None:
        memory.dense.surprise_scale_L.mul_(1e6)
    else:
        memory.write_gate.bias.fill_(-20.0)
    before = [W.clone() for W in state.weights]
    report = memory.update(state, text(2, 40, seed=9))
    assert not bool(report.written.any())
    assert report.changed.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, state.weights, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_state_does_not_grow(kind):
    memory = memory_of(kind)
    state = memory.new_state(1)
    memory.update(state, text(1, 64))
    after_64 = state.bytes_per_user
    for seed in range(20):
        memory.update(state, text(1, 200, seed))
    assert state.bytes_per_user == after_64


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_part_learns_through_updates(kind):
    memory = memory_of(kind)
    state = memory.new_state(2)
    memory.update(state, text(2, 40))
    memory.read(state, text(2, 10, seed=8)).square().sum().backward()
    dead = {
        name for name, p in memory.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)
    }
    assert dead == set()


@torch.no_grad()
def test_one_association_is_recalled():
    memory = memory_of("titans", lr=0.1, momentum=0.0, forget_bias=32.0, conv=1, depth=1)
    state = memory.new_state(1)
    x = text(1, 16)
    before = memory.surprise(state, x).mean()
    for _ in range(200):
        memory.update(state, x)
    assert float(memory.surprise(state, x).mean()) < 0.05 * float(before)


@torch.no_grad()
def test_decay_forgets_its_share():
    memory = memory_of("titans")
    state = memory.new_state(2)
    memory.update(state, text(2, 40))
    before = [W.clone() for W in state.weights]
    memory.decay(state, alpha=0.25)
    assert all(torch.allclose(W, 0.75 * b) for W, b in zip(state.weights, before, strict=True))
    with pytest.raises(ValueError, match=r"alpha = 1.5: must be from 0 to 1"):
        memory.decay(state, alpha=1.5)


def test_what_does_not_fit_is_refused():
    memory = memory_of("titans")
    state = memory.new_state(2)
    with pytest.raises(ValueError, match=r"must be \[2 users, tokens, 24 width\]"):
        memory.update(state, torch.zeros(3, 4, 24))
    with pytest.raises(ValueError, match=r"must be \[2 users, tokens, 24 width\]"):
        memory.read(state, torch.zeros(2, 4, 25))
    with pytest.raises(ValueError, match="must be bool"):
        memory.update(state, torch.zeros(2, 4, 24), torch.ones(2, 4))
    with pytest.raises(ValueError, match="width = 0: say how wide"):
        NeuralMemory(MemorySpec())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_token_is_no_update(kind):
    memory = memory_of(kind)
    state = memory.new_state(2)
    memory.update(state, text(2, 5))
    before = state.of(torch.arange(2))
    report = memory.update(state, torch.zeros(2, 0, 24))
    assert report.written.shape == (2, 0)
    report = memory.update(state, text(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert report.changed.tolist() == [0, 0]
    assert same(state, before)
