"""What one memory holds of its users, and what an update says of itself.

Axes: U users, T tokens, L written layers, O and I a layer's rows and columns, K taps of the convolution, E width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def finite_users(x: Tensor) -> Tensor:
    """Users whose part of x is finite, bool [U]: one sum shows any NaN or infinity at a tenth of the cost of asking
    each element. (Finite elements whose sum leaves float32 count as not finite: no memory comes near.)"""
    return (
        torch.isfinite(x.detach().flatten(1).sum(1, dtype=torch.float32))
        if x.dim() > 1
        else torch.ones_like(x).bool()
    )


@dataclass(kw_only=True, slots=True, eq=False)
class MemoryState:
    """θ_M of some users, with everything that the next call needs. Its size does not depend on what was read."""

    weights: list[Tensor]
    """Per written layer [U, O, I] (`all`: what updates add to, see `kernels.miras.RETENTIONS`), or one [U, H, D]."""
    momentum: list[Tensor]
    """Rule `titans`: S per layer, like `weights`. Rule `sparse`: one [U, L], the momentum of surprise a layer."""
    history_UKE: Tensor
    """Inputs before the next token, [U, taps - 1, E]: the convolution crosses calls."""
    updates_U: Tensor
    """int64: chunks written."""

    @property
    def users(self) -> int:
        return len(self.history_UKE)

    @property
    def bytes_per_user(self) -> int:
        """Bytes that one user holds."""
        return sum(x[0].numel() * x.element_size() for x in self.tensors()) if self.users else 0

    def tensors(self) -> list[Tensor]:
        """All of it, users first."""
        return [*self.weights, *self.momentum, self.history_UKE, self.updates_U]

    def _made_of(self, tensors: list[Tensor]) -> MemoryState:
        count = len(self.weights)
        return MemoryState(
            weights=tensors[:count],
            momentum=tensors[count:-2],
            history_UKE=tensors[-2],
            updates_U=tensors[-1],
        )

    def of(self, users: Tensor) -> MemoryState:
        """A copy of some users' state, `users` int64 or bool."""
        return self._made_of([x[users] for x in self.tensors()])

    def detached(self) -> MemoryState:
        """The same values without the graph that made them: between training steps."""
        return self._made_of([x.detach() for x in self.tensors()])

    def put(self, users: Tensor, part: MemoryState) -> None:
        """Set some users' state; bool or int64 `users` as in `of`."""
        whole = self.tensors()
        if users.dtype == torch.bool and bool(users.all()):
            whole = part.tensors()
        else:
            whole = [x.index_put((users,), y) for x, y in zip(whole, part.tensors(), strict=True)]
        done = self._made_of(whole)
        self.weights, self.momentum = done.weights, done.momentum
        self.history_UKE, self.updates_U = done.history_UKE, done.updates_U

    def finite(self) -> Tensor:
        """Users whose state is finite everywhere, bool [U]."""
        return torch.stack([finite_users(x) for x in self.tensors()]).all(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What an update did."""

    surprise: Tensor
    """float32 [U, T]: normalised norm of each token's gradient at its chunk's start, 0 where there is no token."""
    written: Tensor
    """bool [U, T]: tokens that entered the memory."""
    forget: Tensor
    """float32 [U]: share of a rewritten element that was forgotten, mean over chunks and layers."""
    changed: Tensor
    """int64 [U]: elements of θ_M that were written, summed over updates."""
    refused: Tensor
    """bool [U]: users whose input, state or result was not finite. Their state is as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What writing one chunk made: the new weights and momentum, and the chunk's part of an `UpdateReport`."""

    weights: list[Tensor]
    momentum: list[Tensor]
    surprise_UC: Tensor
    written_UC: Tensor
    forget_U: Tensor
    changed_U: Tensor
