"""θ_M over shared features and K-sparse codes (`written_layers = last`): two layers for all users, one of their own.

M(k) = W_3 code(W_2 W_1 k). Only W_3, which starts at zero, is written while a user talks; the gradient of
W_3 is e a^T, K columns a token, so read is a gather and write a scatter (docs/memory.md).

Axes: N tokens, F features, H code width, K active units, D key or value width, U users.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops, sparse
from titanmem.spec import MemorySpec
from titanmem.state import Written


class SharedFeatures(nn.Module):
    """The first two layers of θ_M and the sparse code of what they say: the same for every user."""

    whitening_FF: Tensor
    whitening_mean_F: Tensor
    w2_HF: Tensor

    def __init__(self, spec: MemorySpec) -> None:
        super().__init__()
        self.spec = spec
        self.w1 = nn.Parameter(nn.init.orthogonal_(torch.empty(spec.d_nltm, spec.key_dim)))
        self.register_buffer("w2_HF", F.normalize(torch.randn(spec.code_width, spec.d_nltm), dim=1))
        self.register_buffer("whitening_FF", torch.eye(spec.d_nltm))
        self.register_buffer("whitening_mean_F", torch.zeros(spec.d_nltm))

    def features(self, key_ND: Tensor) -> Tensor:
        """First layer of θ_M: W_1 k, not yet whitened, [N, F].

        Linear: the choice of units above it is all the non-linearity that is needed, and a relu here lost half of what
        keys know of other words (docs/log.md).
        """
        return F.linear(key_ND, self.w1)

    def whitened(self, key_ND: Tensor) -> Tensor:
        """Features with mean zero and the same variance in every direction, over written keys, [N, F]."""
        return (self.features(key_ND) - self.whitening_mean_F) @ self.whitening_FF

    def code_of(self, white_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse code of whitened features: the nearest of W_2's random directions, as `code`."""
        return ops.sparse_code(F.linear(white_NF, self.w2_HF), self.spec.code_active)

    def code(self, key_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse code of keys or queries: `columns` int64 [N, K] rising, `values` float32 [N, K] of unit norm."""
        return self.code_of(self.whitened(key_ND))

    @torch.no_grad()
    def whiten(self, mean_F: Tensor, covariance_FF: Tensor, shrinkage: float = 3.0) -> None:
        """Set the whitening from the mean and covariance of `features` over written keys.

        With unit rows in W_2 every code unit then has a like variance over those keys, so that all are used alike.
        The larger the shrinkage, the less small directions count: in those, questions and statements differ most.
        """
        values, vectors = torch.linalg.eigh(covariance_FF.double())
        floor = shrinkage * values.mean()
        root = (vectors * (values.clamp_min(0) + floor).rsqrt()) @ vectors.T
        self.whitening_FF.copy_(root.float())
        self.whitening_mean_F.copy_(mean_F)


def read(features: SharedFeatures, slab_UHD: Tensor, query_UCD: Tensor) -> Tensor:
    """y = W_3 code(q) for every user's own tokens, [U, C, D]."""
    users, tokens, width = query_UCD.shape
    columns_NK, values_NK = features.code(query_UCD.reshape(-1, width))
    slots_N = torch.arange(users, device=query_UCD.device).repeat_interleave(tokens)
    return ops.sparse_read(slab_UHD, slots_N, columns_NK, values_NK).view(users, tokens, -1)


def write(
    features: SharedFeatures,
    slab_UHD: Tensor,
    momentum_U1: Tensor,
    key_UCD: Tensor,
    value_UCD: Tensor,
    gate_UC: Tensor,
    valid_UC: Tensor,
) -> Written:
    """One chunk of every user, each in updates of at most `top_k_ratio` of the elements, surprise at their start.

    `gate_UC` float32 is the write gate w. Without a gradient to keep, the slab is changed in place. Gradients flow to
    values, gates and code values, not through the choice of units.
    """
    spec, (users, tokens, width) = features.spec, key_UCD.shape
    columns, values = (x.view(users, tokens, -1) for x in features.code(key_UCD.reshape(-1, width)))
    surprise_UC, written_UC = torch.zeros_like(gate_UC), torch.zeros_like(valid_UC)
    forget_U, updates_U = torch.zeros_like(momentum_U1[:, 0]), torch.zeros_like(momentum_U1[:, 0])
    changed_U = valid_UC.new_zeros(users, dtype=torch.int64)
    slab_UHD, momentum_U = slab_UHD.clone() if torch.is_grad_enabled() else slab_UHD, momentum_U1[:, 0]
    # A gate this low can not reach the threshold: |v - M(k)| is at most about 2 (as in titanmem/fold.py).
    offered = valid_UC & (gate_UC >= spec.surprise_threshold / 2)
    group_UC = (offered.cumsum(1) - 1) // spec.tokens_per_update
    for group in group_UC[offered].unique().tolist():
        row = (offered & (group_UC == group)).nonzero(as_tuple=True)
        rows = (columns[row], values[row], value_UCD[row], gate_UC[row])
        found_N = sparse.surprise(slab_UHD, row[0], *rows)
        surprise_UC = surprise_UC.index_put(row, found_N)
        keep_N = found_N >= spec.surprise_threshold
        kept_N = row[0][keep_N]
        if not len(kept_N):
            continue
        written_UC[kept_N, row[1][keep_N]] = True
        count_U = torch.bincount(kept_N, minlength=users)
        slots_U = count_U.nonzero()[:, 0]
        largest_U = torch.zeros_like(momentum_U).scatter_reduce(0, kept_N, found_N[keep_N].detach(), "amax")
        moved_U = spec.momentum * momentum_U + (1 - spec.momentum) * largest_U
        momentum_U = torch.where(count_U > 0, moved_U, momentum_U)
        alpha_U = torch.sigmoid(spec.forget_slope * momentum_U - spec.forget_bias)[slots_U]
        rows_M, new_MD = ops.sparse_update(
            slab_UHD, slots_U, count_U[slots_U], *(x[keep_N] for x in rows), alpha_U
        )
        slab_UHD = _applied(slab_UHD, rows_M, new_MD)
        forget_U[slots_U] += alpha_U
        updates_U[slots_U] += 1
        changed_U += torch.bincount(rows_M // spec.code_width, minlength=users) * spec.value_dim
    return Written(
        weights=[slab_UHD],
        momentum=[momentum_U[:, None]],
        surprise_UC=surprise_UC,
        written_UC=written_UC,
        forget_U=forget_U / updates_U.clamp_min(1),
        changed_U=changed_U,
    )


def _applied(slab_UHD: Tensor, rows_M: Tensor, new_MD: Tensor) -> Tensor:
    """The slab with the rows in place: the same tensor, or while training a copy that has a gradient."""
    if new_MD.requires_grad:
        return slab_UHD.flatten(0, 1).index_put((rows_M,), new_MD).view_as(slab_UHD)
    ops.sparse_apply(slab_UHD, rows_M, new_MD)
    return slab_UHD
