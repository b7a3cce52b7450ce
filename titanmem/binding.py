"""Which token of a value comes next: the fact's key, bound to the tokens of the value that have been said.

A value has several tokens and its fact one key. The first token is stored under the key as it is, each later one under
the key bound to the tokens before it: multiplied element by element with random signs that are a function of those
tokens (binding by multiplication, as in vector symbolic architectures; Gayler 1998, arXiv cs/0412059). Bound keys are
nearly orthogonal to one another and keep their angles to other facts' keys under the same binding. So whoever finds a
value's first token finds the rest of it, and behind the last one nothing is found: the value has ended.

Axes: B rows, T tokens, D width, P tokens that are looked back on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = 6
"""Tokens of a value that the next one is bound to, at most."""
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers of 64 bits."""


def mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: int64 in, as good as random int64 out."""

    def right(value: Tensor, count: int) -> Tensor:  # a shift that brings in zeros
        return (value >> count) & ((1 << (64 - count)) - 1)

    x = (x ^ right(x, 30)) * _FIRST
    x = (x ^ right(x, 27)) * _SECOND
    return x ^ right(x, 31)


def signs(number: Tensor, width: int) -> Tensor:
    """+1 or -1, float32 [..., D], a function of each int64 number; 0 gives +1 everywhere."""
    words = torch.arange(1, -(-width // 64) + 1, device=number.device)
    bits = mixed(number[..., None] + words * _STEP)[..., None] >> torch.arange(64, device=number.device)
    sign = 1.0 - 2.0 * (bits & 1).flatten(-2)[..., :width].float()
    return torch.where(number[..., None] == 0, 1.0, sign)


def prefixes(said_BT: Tensor, before_BP: Tensor | None = None) -> Tensor:
    """A number for the run of tokens that ends at each place, int64 [B, T]; 0 where there is none.

    `said_BT` int64 is a number for each token that is part of a value, 0 for every other; `before_BP` are the PREFIX
    - 1 before.
    """
    rows, tokens = said_BT.shape
    before_BP = said_BT.new_zeros(rows, PREFIX - 1) if before_BP is None else before_BP
    said = torch.cat([before_BP, said_BT], 1)
    number, going = torch.zeros_like(said_BT), torch.ones_like(said_BT, dtype=torch.bool)
    steps = torch.arange(1, PREFIX + 1, device=said_BT.device) * _STEP
    for age, step in enumerate(steps):
        token = said[:, PREFIX - 1 - age : PREFIX - 1 - age + tokens]
        going = going & (token != 0)
        number = number + torch.where(going, mixed(token + step), 0)
    return number


def held(x_BTD: Tensor, inside_BT: Tensor, before_BD: Tensor) -> Tensor:
    """x at the last place up to each that is not inside a value, [B, T, D]; `before_BD` if there is none."""
    tokens = x_BTD.shape[1]
    places = torch.arange(1, tokens + 1, device=x_BTD.device)
    last_BT = torch.where(inside_BT, 0, places).cummax(1).values
    both = torch.cat([before_BD[:, None], x_BTD], 1)
    return both.gather(1, last_BT[..., None].expand(-1, -1, x_BTD.shape[-1]))


def later(x_BT: Tensor) -> Tensor:
    """Each row moved back by one place, zero first."""
    return F.pad(x_BT, (1, -1))
