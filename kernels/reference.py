"""Plain PyTorch twins of the memory kernels: the judge of every other implementation, and the CPU path.

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
    columns_NKD = slab_SHD[slots_N[:, None], columns_NK].float()
    return (columns_NKD * values_NK[:, :, None]).sum(1)


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


def sparse_step(
    written_UD: Tensor,
    positions_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
    alpha: float,
) -> Tensor:
    """One masked update of the touched columns: W <- (1 - alpha) W + sum_i w_i e_i a_i^T (MEMORY, rule `sparse`).

    `written_UD` float32 are the touched columns only, `positions_NK` index into them; columns that no token
    selects are not here, hence neither changed nor forgotten. Returns the new columns, float32 [U, D].
    """
    code_NU = torch.zeros(len(values_NK), len(written_UD), dtype=torch.float32, device=written_UD.device)
    code_NU.scatter_(1, positions_NK, values_NK)
    residual_ND = target_ND - code_NU @ written_UD
    error_ND = delta_errors(code_NU @ code_NU.T, residual_ND, weight_N)
    return (1.0 - alpha) * written_UD + code_NU.T @ (weight_N[:, None] * error_ND)


def surprise(
    slab_SHD: Tensor, slot: int, columns_NK: Tensor, values_NK: Tensor, target_ND: Tensor, weight_N: Tensor
) -> Tensor:
    """Norm of each token's weighted gradient, s_i = w_i |e_i| |a_i| with |a_i| = 1 (MEMORY, step 1), float32 [N].

    Targets have unit norm, so s is 0 for what the memory already says and about w_i for what it has never heard.
    """
    slots_N = torch.full((len(columns_NK),), slot, dtype=torch.int64, device=slab_SHD.device)
    residual_ND = target_ND - sparse_read(slab_SHD, slots_N, columns_NK, values_NK)
    return weight_N * residual_ND.square().sum(-1).sqrt()
