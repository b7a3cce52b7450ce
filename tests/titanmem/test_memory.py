"""`NeuralMemory` against the float64 oracle: every rule, bias and retention at odd sizes, alone and in company."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.titanmem.memory_oracle import Judge
from titanmem import MemorySpec, NeuralMemory

FLOAT32 = 1e-5
"""Largest error of float32 relative to the size of the result: sums of some hundred products."""
BFLOAT16 = 3e-2
"""The same with weights kept in bfloat16: half a step of 2^-8 a chunk, over some chunks, through three layers."""


def memory_of(**knobs: Any) -> NeuralMemory:
    """A random memory whose gates differ from token to token."""
    torch.manual_seed(7)
    knobs = {"width": 24, "d_nltm": 32, "depth": 2, "chunk_size": 16, "conv": 4, "lr": 0.005} | knobs
    memory = NeuralMemory(MemorySpec(**knobs))
    with torch.no_grad():
        if memory.dense is not None and memory.spec.rule == "titans":
            memory.dense.gates.linear.weight.normal_(std=0.1)
        for projection in (memory.query, memory.key, memory.value):
            if projection.taps is not None:
                projection.taps.normal_(std=0.5)
        memory.calibrate(torch.randn(2, 40, memory.spec.width))
    return memory


def text(users: int, tokens: int, width: int, seed: int = 3) -> Tensor:
    return torch.randn(users, tokens, width, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    size = max(1.0, float(wanted.abs().max()))
    error = float((got.double() - wanted).abs().max()) / size
    assert error < tolerance, f"error {error:.2e} of {size:.2g}"


def against_oracle(memory: NeuralMemory, x: Tensor, *, judged: int, dtype=torch.float32) -> None:
    """Forward on all users; the first `judged` of them are compared in what they read, hold and report."""
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
    state = memory.new_state(len(x), dtype)
    with torch.no_grad():
        y, report = memory(state, x)
    assert not bool(report.refused.any())
    for user in range(judged):
        judge = Judge(memory)
        close(y[user], judge.walk(x[user]), tolerance)
        for got, wanted in zip(state.weights, judge.weights, strict=True):
            close(got[user], wanted, tolerance)
        close(report.surprise[user], torch.tensor(judge.surprise).double(), 10 * tolerance)
        assert report.written[user].tolist() == judge.written
        if memory.spec.rule == "titans":
            for got, wanted in zip(state.momentum, judge.momentum, strict=True):
                close(got[user], wanted, tolerance)
        else:
            close(state.momentum[0][user], torch.tensor(judge.surprise_momentum).double(), tolerance)


STABLE = [
    (bias, retention)
    for bias, retention in itertools.product(("l2", "huber", "lp", "dot"), ("decay", "norm", "lq", "kl"))
    if not (bias == "dot" and retention != "norm") and (bias, retention) != ("lp", "decay")
]


@pytest.mark.parametrize(("bias", "retention"), STABLE)
@pytest.mark.parametrize("gates", ["token", "chunk"])
def test_titans_with_every_bias_and_retention(bias, retention, gates):
    memory = memory_of(rule="titans", bias=bias, retention=retention, gates=gates, huber_delta=0.5, lr=0.005)
    against_oracle(memory, text(3, 63, 24), judged=2)


@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", ["titans", "sparse"])
def test_every_depth_at_odd_lengths(rule, depth, tokens):
    memory = memory_of(rule=rule, written_layers="all", depth=depth, residual=depth == 2, norm=depth == 3)
    against_oracle(memory, text(3, tokens, 24), judged=2)


@pytest.mark.parametrize("rule", ["titans", "sparse"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"weight_decay": 1e-3},
        {"residual": True, "norm": True},
        {"expansion": 3},
        {"conv": 1},
        {"d_nltm": 24},
        {"momentum": 0.0},
        {"bounded": False},
        {"lr": 0.2},
        {"lr": 0.2, "gates": "chunk"},
    ],
)
def test_every_knob(rule, knobs):
    against_oracle(memory_of(rule=rule, written_layers="all", **knobs), text(2, 50, 24), judged=1)


@pytest.mark.parametrize("bias", ["l2", "huber"])
@pytest.mark.parametrize("selection", ["rows_columns", "elements"])
def test_sparse_with_every_selection(bias, selection):
    memory = memory_of(rule="sparse", written_layers="all", selection=selection, bias=bias, huber_delta=0.5)
    against_oracle(memory, text(3, 100, 24), judged=2)


@pytest.mark.parametrize(
    ("width", "d_nltm", "tokens", "users"), [(60, 60, 100, 3), (64, 64, 63, 64), (256, 256, 64, 1)]
)
@pytest.mark.parametrize("rule", ["titans", "sparse"])
def test_widths_and_users(rule, width, d_nltm, tokens, users):
    memory = memory_of(rule=rule, written_layers="all", width=width, d_nltm=d_nltm)
    against_oracle(memory, text(users, tokens, width), judged=1)


@pytest.mark.parametrize("rule", ["titans", "sparse"])
def test_two_thousand_tokens_at_width_512(rule):
    memory = memory_of(
        rule=rule, written_layers="all", width=32, d_nltm=512, depth=1, chunk_size=256, lr=0.002
    )
    against_oracle(memory, text(1, 2000, 32), judged=1)


@pytest.mark.parametrize("rule", ["titans", "sparse"])
def test_bfloat16_state(rule):
    memory = memory_of(rule=rule, written_layers="all", lr=0.005, surprise_threshold=0.05)
    against_oracle(memory, text(2, 64, 24), judged=2, dtype=torch.bfloat16)
