"""The one door to the kernels: shapes, slots and values are checked here, once, and the implementation is chosen.

CUDA tensors go to Triton, all others to plain PyTorch. Nothing falls back in silence: what Triton can not do on a
GPU is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from kernels import slab, sparse
from kernels.dense import Coefficients, Form, Gradients

sparse_code = sparse.sparse_code


def uses_triton(tensor: Tensor) -> bool:
    """Whether tensors of this device go to Triton."""
    return tensor.is_cuda


def _implementation(tensor: Tensor, plain: ModuleType, triton: str) -> ModuleType:
    """Two modules with the same names and signatures. Triton is imported late: a CPU serves without it."""
    return importlib.import_module(f"kernels.{triton}") if uses_triton(tensor) else plain


def check_slots(slots: Tensor, count: int, *, unique: bool = False) -> None:
    """Raises IndexError for a slot outside the slab, ValueError for two rows of one launch that write one slot."""
    if len(slots) and not (int(slots.min()) >= 0 and int(slots.max()) < count):
        raise IndexError(f"slot outside the slab of {count}: {slots.tolist()[:8]}")
    if unique and len(slots.unique()) != len(slots):
        raise ValueError(f"two rows of one launch write one slot: {slots.tolist()[:8]}")


def _check_codes(slab_SHD: Tensor, columns_NK: Tensor, values_NK: Tensor) -> None:
    width = slab_SHD.shape[1]
    if columns_NK.dim() != 2 or columns_NK.shape != values_NK.shape:
        raise ValueError(f"columns {tuple(columns_NK.shape)}, values {tuple(values_NK.shape)}")
    if columns_NK.numel() and not 0 <= int(columns_NK.min()) <= int(columns_NK.max()) < width:
        raise IndexError(
            f"code units from {int(columns_NK.min())} to {int(columns_NK.max())}: outside a code of {width} units"
        )


def sparse_read(slab_SHD: Tensor, slots_N: Tensor, columns_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Read one token of each row from its own slot, `y_ND` float32; see `sparse.sparse_read`.

    Raises IndexError for a slot or a unit outside the slab, ValueError for shapes that do not fit each other.
    """
    _check_codes(slab_SHD, columns_NK, values_NK)
    if len(slots_N) != len(columns_NK):
        raise ValueError(f"columns {tuple(columns_NK.shape)}, {len(slots_N)} slots")
    check_slots(slots_N, len(slab_SHD))
    return _implementation(slab_SHD, sparse, "read").sparse_read(slab_SHD, slots_N, columns_NK, values_NK)


def sparse_update(
    slab_SHD: Tensor,
    slots_U: Tensor,
    tokens_U: Tensor,
    columns_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
    alpha_U: Tensor,
) -> tuple[Tensor, Tensor]:
    """New values of the columns that these users' tokens touch; nothing is written (`sparse_apply` does, under locks).

    Returns `rows_M`, rows of the slab seen as [S * H, D], and `new_MD` in the slab's dtype: θ_M lives on the grid of
    its file. See `sparse.sparse_step`. Raises IndexError for a slot or a unit outside the slab, ValueError for shapes
    that do not fit, for one slot named twice, and for a non-finite input or result.
    """
    _check_codes(slab_SHD, columns_NK, values_NK)
    check_slots(slots_U, len(slab_SHD), unique=True)
    tokens, width = len(columns_NK), slab_SHD.shape[2]
    if tokens_U.shape != slots_U.shape or alpha_U.shape != slots_U.shape or int(tokens_U.sum()) != tokens:
        raise ValueError(
            f"{len(slots_U)} slots with {tokens_U.tolist()[:8]} tokens and {len(alpha_U)} alphas, {tokens} rows"
        )
    if target_ND.shape != (tokens, width) or weight_N.shape != (tokens,):
        raise ValueError(
            f"targets {tuple(target_ND.shape)}, weights {tuple(weight_N.shape)}, {tokens} rows of {width}"
        )
    rows_M, new_MD = _implementation(slab_SHD, sparse, "update").sparse_step(
        slab_SHD, slots_U, tokens_U, columns_NK, values_NK, target_ND, weight_N, alpha_U
    )
    new_MD = new_MD.to(slab_SHD.dtype)
    _check_finite(new_MD)
    return rows_M, new_MD


def sparse_apply(slab_SHD: Tensor, rows_M: Tensor, new_MD: Tensor) -> None:
    """Put what `sparse_update` prepared in place; the caller holds the users' write locks."""
    slab_SHD.view(-1, slab_SHD.shape[2]).index_copy_(0, rows_M, new_MD)


def _check_rows(
    layers: Sequence[Tensor], slots_U: Tensor, tokens_U: Tensor, x_UCI: Tensor, *, unique: bool
) -> None:
    check_slots(slots_U, len(layers[0]), unique=unique)
    users, tokens, width = x_UCI.shape
    if slots_U.shape != (users,) or tokens_U.shape != (users,):
        raise ValueError(f"x {tuple(x_UCI.shape)}, {len(slots_U)} slots, {len(tokens_U)} counts of tokens")
    if width != layers[0].shape[2]:
        raise ValueError(f"x {tuple(x_UCI.shape)}: the first layer is {layers[0].shape[2]} wide")
    if users and not 0 <= int(tokens_U.min()) <= int(tokens_U.max()) <= tokens:
        raise ValueError(f"counts {tokens_U.tolist()[:8]}: each must be from 0 to {tokens}")


def dense_read(
    layers: Sequence[Tensor], slots_U: Tensor, x_UCD: Tensor, tokens_U: Tensor, form: Form
) -> Tensor:
    """y = M(x) from each user's slot, [U, C, D], zero beyond a user's tokens; `layers` are slabs [S, O, I].

    Raises IndexError for a slot outside the slab, ValueError for shapes and counts that do not fit.
    """
    _check_rows(layers, slots_U, tokens_U, x_UCD, unique=False)
    return _implementation(x_UCD, slab, "read").dense_read(layers, slots_U, x_UCD, tokens_U, form)


def dense_surprise(
    layers: Sequence[Tensor],
    slots_U: Tensor,
    key_UCD: Tensor,
    value_UCD: Tensor,
    tokens_U: Tensor,
    form: Form,
) -> Gradients:
    """Forward, residual, deltas and per-token norms of a chunk; nothing is written. Errors as `dense_read`."""
    _check_rows(layers, slots_U, tokens_U, key_UCD, unique=False)
    if value_UCD.shape != key_UCD.shape:
        raise ValueError(f"keys {tuple(key_UCD.shape)}, values {tuple(value_UCD.shape)}")
    return _implementation(key_UCD, slab, "surprise").dense_surprise(
        layers, slots_U, key_UCD, value_UCD, tokens_U, form
    )


def dense_step_(
    W_SOI: Tensor,
    S_SOI: Tensor,
    slots_U: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    c: Coefficients,
    weight_decay: float = 0.0,
) -> None:
    """One chunk of one layer in place, weights and momentum; see `dense.step`.

    Raises IndexError for a slot outside the slab, ValueError for a slot named twice and for a non-finite gradient or
    coefficient: then nothing is written.
    """
    check_slots(slots_U, len(W_SOI), unique=True)
    scalars = (c.keep_U, c.carry_U, c.momentum_U, c.write_UC, c.push_UC)
    _check_finite(delta_UCO, input_UCI, *scalars)
    _implementation(W_SOI, slab, "update").dense_step_(
        W_SOI, S_SOI, slots_U, delta_UCO, input_UCI, c, weight_decay
    )


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
    """One sparse update of one layer in place, on the selected rows and columns only. Errors as `dense_step_`, and
    IndexError for a row or column outside the layer."""
    check_slots(slots_U, len(W_SOI), unique=True)
    for name, index, size in (("row", rows_Ur, W_SOI.shape[1]), ("column", columns_Uc, W_SOI.shape[2])):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise IndexError(f"{name} {int(index.min())} or {int(index.max())}: outside a layer of {size}")
    _check_finite(delta_UCO, input_UCI, weight_UC, keep_U, weight_decay_U)
    _implementation(W_SOI, slab, "update").masked_step_(
        W_SOI, slots_U, delta_UCO, input_UCI, weight_UC, keep_U, weight_decay_U, rows_Ur, columns_Uc
    )


def _check_finite(*inputs: Tensor) -> None:
    """Raises ValueError. One sum shows any NaN or infinity."""
    if not all(bool(torch.isfinite(x.sum(dtype=torch.float32))) for x in inputs):
        raise ValueError("update refused: a non-finite value would enter the memory")
