"""Training multiplies in bfloat16 only where the processor has units for it, and learns the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from titanmem import precision
from titanmem.muon import orthogonalized
from titanmem.precision import quick_products


def units(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    for module in ("precision", "muon"):
        monkeypatch.setattr(f"titanmem.{module}.has_bfloat16_units", lambda: found)


@pytest.mark.parametrize(("found", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_of_the_type_that_is_quick_here(monkeypatch, found, dtype):
    units(monkeypatch, found)
    layer, norm = nn.Linear(8, 8), nn.RMSNorm(8)
    with quick_products():
        out = norm(layer(torch.ones(2, 8)))  # of mixed types, without a warning
    assert layer(torch.ones(2, 8)).dtype == torch.float32, "outside, nothing changes"
    out.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with quick_products():
        assert layer(torch.ones(2, 8)).dtype == dtype


def test_the_processor_is_asked(monkeypatch):
    precision.has_bfloat16_units.cache_clear()
    for found, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert precision.has_bfloat16_units() is expected
        precision.has_bfloat16_units.cache_clear()


def test_updates_are_those_of_float32_but_for_rounding(monkeypatch):
    update, steps = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), []
    for found in (False, True):
        units(monkeypatch, found)
        steps.append(orthogonalized(update))
    assert steps[1].dtype == torch.float32
    assert not torch.equal(*steps)
    assert torch.allclose(*steps, atol=0.05)
