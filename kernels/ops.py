"""The one door to the kernels: shapes and slots are checked here, once, and the implementation is chosen here."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference

sparse_code = reference.sparse_code


def sparse_read(slab_SHD: Tensor, slots_N: Tensor, columns_NK: Tensor, values_NK: Tensor) -> Tensor:
    """Read one token of each row from its own slot, `y_ND` float32; see `reference.sparse_read`.

    Raises IndexError for a slot outside the slab, ValueError for shapes that do not fit each other.
    """
    slots, width, _ = slab_SHD.shape
    if columns_NK.shape != values_NK.shape or len(slots_N) != len(columns_NK):
        raise ValueError(
            f"columns {tuple(columns_NK.shape)}, values {tuple(values_NK.shape)}, {len(slots_N)} slots"
        )
    if len(slots_N) and not (int(slots_N.min()) >= 0 and int(slots_N.max()) < slots):
        raise IndexError(f"slot outside the slab of {slots}: {slots_N.tolist()[:8]}")
    if columns_NK.numel() and int(columns_NK.max()) >= width:
        raise IndexError(f"code unit {int(columns_NK.max())} outside a code of {width}")
    return reference.sparse_read(slab_SHD, slots_N, columns_NK, values_NK)


def sparse_update(
    slab_SHD: Tensor,
    slot: int,
    columns_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """New values of the columns that these tokens touch; nothing is written yet (the caller holds the lock for that).

    Returns `touched_U` (int64, rising) and `new_UD` in the slab's dtype: θ_M lives on the grid of its file.
    Raises IndexError for a slot outside the slab, ValueError for a non-finite input or result.
    """
    if not 0 <= slot < len(slab_SHD):
        raise IndexError(f"slot {slot} outside the slab of {len(slab_SHD)}")
    touched_U, positions = columns_NK.unique(return_inverse=True)
    new_UD = reference.sparse_step(
        slab_SHD[slot, touched_U].float(),
        positions.view_as(columns_NK),
        values_NK,
        target_ND,
        weight_N,
        alpha,
    )
    new_UD = new_UD.to(slab_SHD.dtype)
    if not bool(torch.isfinite(new_UD).all()):
        raise ValueError("update refused: a non-finite value would enter the memory")
    return touched_U, new_UD
