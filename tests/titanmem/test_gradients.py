"""Gradients that are written out are those that autograd finds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.gradients import RMSNorm
from titanmem.rotary import rotary, rotated


def gradients_of(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    into = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, into)]


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 1, 7), (2, 4, 3, 6)])
def test_a_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    # Also what is not contiguous, as heads are.
    for seen in (x, x.transpose(0, 1)):
        own = gradients_of(norm(seen), x, norm.weight)
        theirs = gradients_of(F.rms_norm(seen, (shape[-1],), norm.weight, 1e-6), x, norm.weight)
        for mine, other in zip(own, theirs, strict=True):
            assert torch.allclose(mine, other, atol=1e-5)


def test_a_norm_of_bfloat16_is_near_that_of_float32() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 9, 64).bfloat16()
    exact = x.float().requires_grad_()
    theirs = gradients_of(F.rms_norm(exact, (64,), norm.weight, 1e-6), exact, norm.weight)
    seen = x.clone().requires_grad_()
    own = gradients_of(norm(seen), seen, norm.weight)
    assert [part.dtype for part in own] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for mine, other in zip(own, theirs, strict=True):
        assert (mine.float() - other).norm() / other.norm() < 0.01


def test_under_autocast_a_norm_is_what_products_want() -> None:
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm(x).dtype == torch.float32


def test_without_a_gradient_both_are_pytorchs() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        nn.init.normal_(norm.weight)
        assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_rotation(rows: int | None) -> None:
    torch.manual_seed(0)
    positions = torch.arange(5) if rows is None else torch.randint(0, 99, (rows, 5))
    cosine, sine = rotary(positions, 6, 10000.0)
    if rows is not None:
        cosine, sine = cosine[:, None], sine[:, None]
    x = torch.randn(2, 5, 3, 6, requires_grad=True)
    heads = x.transpose(1, 2)
    first, second = heads.chunk(2, -1)
    theirs = gradients_of(heads * cosine + torch.cat([-second, first], -1) * sine, x)
    for mine, other in zip(gradients_of(rotated(heads, cosine, sine), x), theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
