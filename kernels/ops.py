"""The one door to the kernels: shapes, slots and values are checked here, once, and the implementation is chosen.

CUDA tensors go to Triton, all others to plain PyTorch. Nothing falls back in silence: what Triton can not do on a
GPU is an error.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels import sparse

sparse_code = sparse.sparse_code
touched_rows = sparse.touched_rows


def implementation(tensor: Tensor) -> ModuleType:
    """The module that serves tensors of this device: the same names, the same signatures."""
    if tensor.is_cuda:
        from kernels import triton_sparse  # imported late: a machine without Triton serves from the CPU

        return triton_sparse
    return sparse


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
            f"code unit {int(columns_NK.min())} or {int(columns_NK.max())} outside a code of {width}"
        )


def sparse_read(slab_SHD: Tensor, slots_N: Tensor, columns_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Read one token of each row from its own slot, `y_ND` float32; see `sparse.sparse_read`.

    Raises IndexError for a slot or a unit outside the slab, ValueError for shapes that do not fit each other.
    """
    _check_codes(slab_SHD, columns_NK, values_NK)
    if len(slots_N) != len(columns_NK):
        raise ValueError(f"columns {tuple(columns_NK.shape)}, {len(slots_N)} slots")
    check_slots(slots_N, len(slab_SHD))
    return implementation(slab_SHD).sparse_read(slab_SHD, slots_N, columns_NK, values_NK)


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
        raise ValueError(f"targets {tuple(target_ND.shape)}, weights {tuple(weight_N.shape)}, {tokens} rows of {width}")
    rows_M, new_MD = implementation(slab_SHD).sparse_step(
        slab_SHD, slots_U, tokens_U, columns_NK, values_NK, target_ND, weight_N, alpha_U
    )
    new_MD = new_MD.to(slab_SHD.dtype)
    if not bool(torch.isfinite(new_MD).all()):
        raise ValueError("update refused: a non-finite value would enter the memory")
    return rows_M, new_MD


def sparse_apply(slab_SHD: Tensor, rows_M: Tensor, new_MD: Tensor) -> None:
    """Put what `sparse_update` prepared in place; the caller holds the users' write locks."""
    slab_SHD.view(-1, slab_SHD.shape[2])[rows_M] = new_MD
