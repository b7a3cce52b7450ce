"""`NeuralMemory` through the fused kernels gives what it gives through plain PyTorch: the door takes both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import ops
from titanmem import MemorySpec, NeuralMemory

FLOAT32 = 1e-4
"""Between two float32 implementations, over some chunks, relative to the largest element."""

KINDS: dict[str, dict[str, Any]] = {
    "titans": {"rule": "titans"},
    "pooled": {"rule": "titans", "gates": "chunk", "norm": True, "residual": True},
    "decayed": {"rule": "titans", "weight_decay": 1e-3, "bias": "huber", "retention": "norm"},
    "rows": {"rule": "sparse", "written_layers": "all", "lr": 0.05},
    "codes": {
        "rule": "sparse",
        "key_dim": 16,
        "value_dim": 16,
        "code_width": 512,
        "code_active": 8,
        "depth": 3,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_both_ways_agree(kind, monkeypatch):
    torch.manual_seed(1)
    memory = NeuralMemory(
        MemorySpec(**{"width": 24, "d_nltm": 32, "depth": 2, "chunk_size": 32, "conv": 2, **KINDS[kind]})
    )
    x = torch.randn(2, 40, 24)
    valid = torch.arange(40) < torch.tensor([[40], [17]])
    plain, fused = memory.new_state(2), memory.new_state(2)
    y_plain, report_plain = memory(plain, x, valid)
    asked: list[str] = []
    known = ops._implementation

    def recorded(tensor, module, name):
        asked.append(name)
        return known(tensor, module, name)

    monkeypatch.setattr(ops, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(ops, "_implementation", recorded)
    y_fused, report_fused = memory(fused, x, valid)
    wanted = {"read", "update"} if kind == "codes" else {"read", "surprise", "update"}
    if kind == "decayed":
        wanted = {"read", "surprise"}  # its L2 is of the read weights, which the fused step does not know
    assert set(asked) == wanted
    assert torch.equal(report_plain.written, report_fused.written)
    pairs = zip(plain.tensors(), fused.tensors(), strict=True)
    for one, other in [(y_plain, y_fused), (report_plain.surprise, report_fused.surprise), *pairs]:
        size = max(1.0, float(one.abs().max())) if one.numel() else 1.0
        assert float((one - other).abs().amax() if one.numel() else 0) < FLOAT32 * size
