"""Sparse updates of dense memories: which elements of a layer a chunk changes, and their new values. Plain PyTorch.

Axes: U users, C tokens of a chunk, O and I rows and columns of a layer, r and c selected ones, k selected elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dense import outer, scaled


def energies(delta_UCO: Tensor, input_UCI: Tensor, weight_UC: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient energy of each row and column of a layer, Σ_t w_t^2 |g_t[row, :]|^2 and the same for columns.

    Both follow from the factors alone, so rows and columns are chosen before any gradient is made.
    """
    weighted = weight_UC[..., None] * delta_UCO
    row_UO = (weighted.square() * input_UCI.square().sum(-1, keepdim=True)).sum(1)
    column_UI = (weighted.square().sum(-1, keepdim=True) * input_UCI.square()).sum(1)
    return row_UO, column_UI


def selected_rows_columns(
    delta_UCO: Tensor, input_UCI: Tensor, weight_UC: Tensor, ratio: float
) -> tuple[Tensor, Tensor]:
    """The rows and columns with most gradient energy, int64 [U, r] and [U, c], rising, with r c <= ratio O I."""
    row_UO, column_UI = energies(delta_UCO, input_UCI, weight_UC)
    rows, columns = (max(1, int(ratio**0.5 * x.shape[1])) for x in (row_UO, column_UI))
    return (
        row_UO.topk(rows, dim=1).indices.sort(1).values,
        column_UI.topk(columns, dim=1).indices.sort(1).values,
    )


def masked_step(
    W_UOI: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    weight_UC: Tensor,
    keep_U: Tensor,
    weight_decay_U: Tensor,
    rows_Ur: Tensor,
    columns_Uc: Tensor,
) -> Tensor:
    """New values of the selected block only, [U, r, c]: W <- keep W - (Σ_t w_t δ_t a_t^T + β W) (MEMORY, step 5).

    `weight_UC` holds the step size times 1 for tokens that are written and 0 for others. The gradient is made for
    the block alone, 1-3 % of its full size.
    """
    tokens = delta_UCO.shape[1]
    block_Urc = gather_block(W_UOI, rows_Ur, columns_Uc)
    delta = delta_UCO.gather(2, rows_Ur[:, None].expand(-1, tokens, -1))
    inputs = input_UCI.gather(2, columns_Uc[:, None].expand(-1, tokens, -1))
    return scaled(keep_U - weight_decay_U, block_Urc) - outer(weight_UC, delta, inputs)


def gather_block(W_UOI: Tensor, rows_Ur: Tensor, columns_Uc: Tensor) -> Tensor:
    """W[u, rows[u], columns[u]], [U, r, c]."""
    users = torch.arange(len(W_UOI), device=W_UOI.device)
    return W_UOI[users[:, None, None], rows_Ur[:, :, None], columns_Uc[:, None, :]]


def scatter_block(W_UOI: Tensor, rows_Ur: Tensor, columns_Uc: Tensor, block_Urc: Tensor) -> Tensor:
    """A copy of W with the block in place."""
    users = torch.arange(len(W_UOI), device=W_UOI.device)
    where = (users[:, None, None], rows_Ur[:, :, None], columns_Uc[:, None, :])
    return W_UOI.index_put(where, block_Urc.to(W_UOI.dtype))


def element_step(
    W_UOI: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    weight_UC: Tensor,
    keep_U: Tensor,
    weight_decay_U: Tensor,
    ratio: float,
) -> tuple[Tensor, Tensor]:
    """The same for the single elements with the largest gradient: places int64 [U, k] in a flat layer, new values."""
    gradient = outer(weight_UC, delta_UCO, input_UCI).flatten(1)
    count = max(1, int(ratio * gradient.shape[1]))
    places_Uk = gradient.abs().topk(count, dim=1).indices.sort(1).values
    old = W_UOI.flatten(1).gather(1, places_Uk)
    return places_Uk, (keep_U - weight_decay_U)[:, None] * old - gradient.gather(1, places_Uk)
