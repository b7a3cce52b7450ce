"""Rotary positions (RoFormer, arXiv 2104.09864). Axes: B rows, A heads, T tokens, Z head width."""

from __future__ import annotations

import torch
from torch import Tensor

from titanmem.gradients import Rotated
from titanmem.rope import RopeScaling


def rotary(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles at `positions` [..., T], each [..., T, Z]."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    if scaling is not None:
        frequency = torch.tensor(scaling.scaled(frequency.tolist(), theta), device=positions.device)
    angle = positions[..., None].float() * frequency
    cosine, sine = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    if scaling is not None and scaling.amplitude != 1.0:
        cosine, sine = cosine * scaling.amplitude, sine * scaling.amplitude
    return cosine, sine


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to x [B, A, T, Z] (half-split layout, as Hugging Face's Llama)."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    if x.requires_grad:
        return Rotated.apply(x, cosine, sine)  # type: ignore[return-value]
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine
