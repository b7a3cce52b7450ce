"""Norms and rotations whose gradients are written out, for training on a CPU.

They are memory traffic and nothing else. Autograd's way through them, one small operation after the other, makes two to
three times as many passes over a tensor as they need, and one more for every product that wants bfloat16 (docs/log.md).
Without a gradient they are PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function


def _products_dtype(x: Tensor) -> torch.dtype:
    """What the products behind it will want."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _Normed(Function):
    """y = x / rms(x) * w over the last axis, E wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_E, inverse)
        return torch.mul(x * inverse, weight_E, out=torch.empty_like(x, dtype=_products_dtype(x)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_E, inverse = ctx.saved_tensors
        unit = x * inverse
        gradient = gradients[0].to(torch.float32, copy=True)
        both = gradient * unit
        along = (both @ weight_E).unsqueeze(-1).div_(-x.shape[-1])
        inward = gradient.mul_(weight_E).addcmul_(unit, along).mul_(inverse)
        return inward.to(x.dtype), both.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over one axis, with a weight; under autocast a norm with a gradient is of its type."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return super().forward(x)
        assert self.eps is not None, "every config of ours has one"
        return _Normed.apply(x, self.weight, self.eps)  # type: ignore[return-value]


class Rotated(Function):
    """Halves x1, x2 of the last axis become x1 cos - x2 sin, x2 cos + x1 sin; the gradient turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradients[0], cosine, -sine), None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cosine, sine = cosine[..., :half], sine[..., :half]  # both halves have the same angles
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
    return out
