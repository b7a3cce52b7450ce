"""The dense operations by slot: the weights of many users in one slab a layer, plain PyTorch.

What Triton does in one launch (`read`, `surprise`, `update`), these do by gathering the users' weights, calling
`dense`, and putting the result back. They are its twins, and the CPU path.

Axes: S slots, U users of this launch, C tokens, O and I a layer's rows and columns, r and c selected ones.
`tokens_U` int64 says how many of a user's C tokens count; results are zero beyond them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dense, selection
from kernels.dense import Coefficients, Form, Gradients


def counted(tokens_U: Tensor, width: int) -> Tensor:
    """Which of `width` tokens count, bool [U, C]."""
    return torch.arange(width, device=tokens_U.device) < tokens_U[:, None]


def dense_read(
    layers: Sequence[Tensor], slots_U: Tensor, x_UCD: Tensor, tokens_U: Tensor, form: Form
) -> Tensor:
    """y = M(x) from each user's slot, [U, C, D] in the dtype of x; `layers` [S, O, I] each."""
    weights = [layer[slots_U] for layer in layers]
    out_UCD = dense.forward(weights, x_UCD, form).output_UCD
    return out_UCD.masked_fill(~counted(tokens_U, x_UCD.shape[1])[..., None], 0.0)


def dense_surprise(
    layers: Sequence[Tensor],
    slots_U: Tensor,
    key_UCD: Tensor,
    value_UCD: Tensor,
    tokens_U: Tensor,
    form: Form,
) -> Gradients:
    """Forward, residual, deltas and per-token norms; see `dense.surprise`."""
    found = dense.surprise([layer[slots_U] for layer in layers], key_UCD, value_UCD, form)
    beyond = ~counted(tokens_U, key_UCD.shape[1])
    return Gradients(
        deltas=[delta.masked_fill(beyond[..., None], 0.0) for delta in found.deltas],
        inputs=[inputs.masked_fill(beyond[..., None], 0.0) for inputs in found.inputs],
        norm_LUC=found.norm_LUC.masked_fill(beyond, 0.0),
    )


def dense_step_(
    W_SOI: Tensor,
    S_SOI: Tensor,
    slots_U: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    c: Coefficients,
    weight_decay: float,
) -> None:
    """One chunk of one layer in place, weights and momentum; see `dense.step`. Slots are distinct."""
    W_UOI, S_UOI = W_SOI[slots_U].float(), S_SOI[slots_U].float()
    decayed = weight_decay * W_UOI if weight_decay else None
    new_W, new_S = dense.step(W_UOI, S_UOI, delta_UCO, input_UCI, c, decayed)
    W_SOI[slots_U], S_SOI[slots_U] = new_W.to(W_SOI.dtype), new_S.to(S_SOI.dtype)


def masked_step_(
    W_SOI: Tensor,
    slots_U: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    weight_UC: Tensor,
    keep_U: Tensor,
    weight_decay_U: Tensor,
    rows_Ur: Tensor,
    columns_Uc: Tensor,
) -> None:
    """One sparse update of one layer in place, on the selected rows and columns; see `selection.masked_step`."""
    new_Urc = selection.masked_step(
        W_SOI[slots_U].float(), delta_UCO, input_UCI, weight_UC, keep_U, weight_decay_U, rows_Ur, columns_Uc
    )
    W_SOI[slots_U[:, None, None], rows_Ur[:, :, None], columns_Uc[:, None, :]] = new_Urc.to(W_SOI.dtype)
