"""Plain PyTorch twins of the sparse kernels: K columns of a user's written layer, and the CPU path.

Axes: N tokens (rows), K active units of a code, H code width, D value width, S slots of a slab.
A slab holds the written layer W_3 of many users, transposed so that one code unit's column is contiguous:
`slab_SHD[slot, unit]` is the D-vector that this unit adds to what is read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_code(preactivation_NH: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Keep the `active` largest units of each row, shifted by the next largest, rectified and L2-normalised.

    Shifting by the (K+1)-th value makes a unit enter and leave the code continuously.

    Returns `columns_NK` (int64, rising) and `values_NK` (float32, unit norm, non-negative).
    """
    top = preactivation_NH.float().topk(active + 1, dim=-1)
    values_NK = top.values[:, :-1] - top.values[:, -1:]
    columns_NK, order = top.indices[:, :-1].sort(dim=-1)
    values_NK = values_NK.gather(1, order)
    norm = values_NK.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return columns_NK, values_NK / norm


def sparse_read(slab_SHD: Tensor, slots_N: Tensor, columns_NK: Tensor, values_NK: Tensor) -> Tensor:
    """y = W_3 a for each row, each from its own slot: a gather of K columns (Titans, eq. 15: y = M*(q)).

    Returns `y_ND` float32. A row's result depends on no other row.
    """
    rows_NK = slots_N[:, None] * slab_SHD.shape[1] + columns_NK
    return _weighted_sum(_gathered(slab_SHD, rows_NK), values_NK)


def _gathered(slab_SHD: Tensor, rows_NK: Tensor) -> Tensor:
    """Rows of the slab seen as [S * H, D], float32 [N, K, D]."""
    flat = slab_SHD.view(-1, slab_SHD.shape[2])
    return flat.index_select(0, rows_NK.flatten()).view(*rows_NK.shape, -1).float()


def _weighted_sum(columns_NKD: Tensor, values_NK: Tensor) -> Tensor:
    """A product a row: its bits do not depend on how many rows there are (tests/kernels/test_sparse.py)."""
    return torch.bmm(values_NK[:, None], columns_NKD)[:, 0]


def delta_errors(overlap_NN: Tensor, residual_ND: Tensor, weight_N: Tensor) -> Tensor:
    """Errors of token-by-token delta steps, for all tokens of a group at once.

    Token i meets the memory that tokens j < i have already changed:
    e_i = r_i - sum_{j<i} (a_i . a_j) w_j e_j, with r_i = v_i - W a_i taken at the group's start.
    That is the unit lower triangular system (I + tril(A A^T, -1) diag(w)) E = R: the same steps as a loop over
    the tokens, in one solve (the WY form of DeltaNet, arXiv 2406.06484, section 3).
    """
    system = torch.tril(overlap_NN, -1) * weight_N[None, :]
    system = system + torch.eye(len(weight_N), dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, residual_ND, upper=False, unitriangular=True)


def touched_rows(slots_N: Tensor, columns_NK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the slab, seen as [S * H, D], that these tokens select: `rows_M` int64 rising, each once, and
    `positions_NK`, where in them each token's columns stand."""
    rows_M, positions = (slots_N[:, None] * width + columns_NK).unique(return_inverse=True)
    return rows_M, positions.view_as(columns_NK)


def sparse_step(
    slab_SHD: Tensor,
    slots_U: Tensor,
    tokens_U: Tensor,
    columns_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
    alpha_U: Tensor,
) -> tuple[Tensor, Tensor]:
    """One masked update a user on the touched columns, W <- (1 - alpha) W + sum_i w_i e_i a_i^T (rule `sparse`).

    Rows are the users' tokens one user after another, `tokens_U` each. Token i takes a delta step of size w_i on the
    columns as tokens before it left them, e_i = v_i - W a_i, all in float32; forgetting comes on top of what stood
    there at the start. Users are advanced together, one token of each at a time: no two rows of a step share a
    column, so sums have one order whoever else is there.

    Returns `rows_M` of the slab seen as [S * H, D], each once, and their new values float32 [M, D]. Columns that no
    token selects are not among them, hence neither changed nor forgotten.
    """
    width = slab_SHD.shape[1]
    longest = int(tokens_U.max()) if len(tokens_U) else 0
    user_N = torch.repeat_interleave(torch.arange(len(slots_U), device=slots_U.device), tokens_U)
    if longest > 1:
        rows_M, positions_NK = touched_rows(slots_U[user_N], columns_NK, width)
    else:  # one token each: no column comes twice, so nothing is to be sorted
        rows_M = (slots_U[user_N][:, None] * width + columns_NK).flatten()
        positions_NK = torch.arange(len(rows_M), device=rows_M.device).view_as(columns_NK)
    start_MD = slab_SHD.view(-1, slab_SHD.shape[2]).index_select(0, rows_M).float()
    moved_MD = start_MD
    first_U = tokens_U.cumsum(0) - tokens_U
    for turn in range(longest):
        row = (first_U + turn)[tokens_U > turn]
        where_R, codes_RK = positions_NK[row].flatten(), values_NK[row]
        columns_RKD = moved_MD.index_select(0, where_R).view(*codes_RK.shape, -1)
        error_RD = target_ND[row] - _weighted_sum(columns_RKD, codes_RK)
        step_RD = weight_N[row][:, None] * error_RD
        new_RKD = torch.baddbmm(columns_RKD, codes_RK[:, :, None], step_RD[:, None])
        moved_MD = moved_MD.index_copy(0, where_R, new_RKD.flatten(0, 1))
    alpha_M = torch.empty(len(rows_M), device=rows_M.device)
    alpha_M[positions_NK.flatten()] = alpha_U[user_N].repeat_interleave(columns_NK.shape[1])
    return rows_M, torch.addcmul(moved_MD, alpha_M[:, None], start_MD, value=-1)


def surprise(
    slab_SHD: Tensor,
    slots_N: Tensor,
    columns_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
) -> Tensor:
    """Norm of each token's weighted gradient, s_i = w_i |e_i| |a_i| with |a_i| = 1 (MEMORY, step 1), float32 [N].

    Targets have unit norm, so s is 0 for what the memory already says and about w_i for what it has never heard.
    """
    residual_ND = target_ND - sparse_read(slab_SHD, slots_N, columns_NK, values_NK)
    return weight_N * residual_ND.square().sum(-1).sqrt()
