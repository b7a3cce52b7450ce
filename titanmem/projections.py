"""From hidden states to queries, keys, values and gates: the parts of a memory that never change while it serves.

Axes: U users, T tokens, E model width, D memory width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanmem.spec import MemorySpec


def causal_convolution(x_UTD: Tensor, taps_DK: Tensor) -> Tensor:
    """Depthwise causal convolution of [U, K - 1 + T, D] with K taps, the newest last, to [U, T, D]."""
    taps = taps_DK.shape[1]
    tokens = x_UTD.shape[1] - taps + 1
    out = x_UTD[:, taps - 1 :] * taps_DK[:, -1]
    for age in range(1, taps):
        out = torch.addcmul(out, x_UTD[:, taps - 1 - age : taps - 1 - age + tokens], taps_DK[:, -1 - age])
    return out


class Projection(nn.Module):
    """One of q, k, v: linear, causal depthwise convolution, SiLU, and L2 norm where asked (Titans, section 4.4)."""

    def __init__(self, width: int, out: int, taps: int, *, normalised: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out, bias=False)
        self.taps = nn.Parameter(torch.empty(out, taps)) if taps > 1 else None
        self.normalised = normalised
        if self.taps is not None:
            with torch.no_grad():
                self.taps.zero_()[:, -1] = 1.0
                self.taps[:, :-1] = 0.1

    def forward(self, x_UTE: Tensor) -> Tensor:
        """[U, K - 1 + T, E], the first K - 1 being what stood before, to [U, T, D]."""
        out = self.linear(x_UTE)
        if self.taps is not None:
            out = causal_convolution(out, self.taps)
        out = F.silu(out, inplace=not out.requires_grad)
        if not self.normalised:
            return out
        if out.requires_grad:
            return F.normalize(out, dim=-1, eps=1e-6)
        return out.div_(torch.linalg.vector_norm(out, dim=-1, keepdim=True).clamp_min_(1e-6))


class Gates(nn.Module):
    """η_t, θ_t, α_t of the rule `titans`, each in (0, 1) from the token (Titans, eq. 9, 10 and 13).

    At the start the gates are the spec's `momentum`, `lr` and σ(-`forget_bias`) for every token.
    """

    def __init__(self, width: int, spec: MemorySpec) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        nn.init.zeros_(self.linear.weight)
        momentum = min(max(spec.momentum, 0.01), 0.99)
        size = min(spec.lr, 0.5)
        with torch.no_grad():
            self.linear.bias.copy_(
                torch.tensor(
                    [
                        math.log(momentum / (1 - momentum)),
                        math.log(size / (1 - size)),
                        -spec.forget_bias,
                    ]
                )
            )

    def forward(self, x_UTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """η, θ, α, each [U, T]."""
        eta, theta, alpha = self.linear(x_UTE).sigmoid().unbind(-1)
        return eta, theta, alpha
