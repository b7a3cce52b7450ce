"""Delta steps on K columns a token on a GPU, for many users at once: what `update.sparse_step` is made of.

Twin: `sparse.sparse_step`. Every user's columns belong to one program for each block of D, so nothing is atomic. A
column is summed over the code's units one after the other, in both kernels, with one rounding each: a user's bits do
not depend on which kernel served it, so not on how many tokens the others have, nor on their order.

Axes: N tokens (rows), K active units, H code width, D value width, M touched columns, S slots, U users.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sparse import touched_rows
from kernels.tiles import blocks_of, launch, padded, whole

COPY_ROWS = 16
"""Columns that a program of `_turns_kernel` copies at a time."""
UNROLLED_MAX = 64
"""Units of a code whose columns are all asked for at once; longer codes go in steps of this many."""


@triton.jit
def _one_token_kernel(
    slab,
    slots,
    tokens,
    first,
    columns,
    values,
    targets,
    weights,
    alphas,
    rows,
    new,
    width,
    dims,
    EVERY: tl.constexpr,
    ACTIVE: tl.constexpr,
    UNROLL: tl.constexpr,
    DIM: tl.constexpr,
):
    """One user's one token and a block of D: e = v - W a, then each column (1 - α) W + w e a."""
    user = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * DIM + tl.arange(0, DIM)
    token = user
    there = user >= 0
    if not EVERY:
        token = tl.load(first + user)
        there = tl.load(tokens + user) > 0
    mask = there & (dim < dims)
    base = tl.load(slots + user) * width
    out = token * ACTIVE
    said = tl.zeros((DIM,), tl.float32)
    for unit in tl.range(0, ACTIVE, loop_unroll_factor=UNROLL):
        row = base + tl.load(columns + out + unit, mask=there, other=0)
        value = tl.load(values + out + unit, mask=there, other=0.0).to(tl.float32)
        start = tl.load(slab + row * dims + dim, mask=mask, other=0.0).to(tl.float32)
        said = tl.fma(start, value, said)
    target = tl.load(targets + token * dims + dim, mask=mask, other=0.0).to(tl.float32)
    step = tl.load(weights + token, mask=there, other=0.0).to(tl.float32) * (target - said)
    alpha = tl.load(alphas + user).to(tl.float32)
    for unit in tl.range(0, ACTIVE, loop_unroll_factor=UNROLL):
        row = base + tl.load(columns + out + unit, mask=there, other=0)
        value = tl.load(values + out + unit, mask=there, other=0.0).to(tl.float32)
        start = tl.load(slab + row * dims + dim, mask=mask, other=0.0).to(tl.float32)
        tl.store(
            new + (out + unit) * dims + dim, tl.fma(-alpha, start, tl.fma(step, value, start)), mask=mask
        )
        tl.store(rows + out + unit, row, mask=there & (tl.program_id(1) == 0))


@triton.jit
def _turns_kernel(
    slab,
    rows,
    bounds,
    tokens,
    first,
    positions,
    values,
    targets,
    weights,
    alphas,
    new,
    users,
    dims,
    ACTIVE: tl.constexpr,
    UNROLL: tl.constexpr,
    DIM: tl.constexpr,
    COPY_ROWS: tl.constexpr,
):
    """One user's tokens in turn, a block of D: its touched columns are worked on in `new`, in float32, where no other
    program writes. The barriers let a token read what the one before it stored, whichever thread that was."""
    user = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * DIM + tl.arange(0, DIM)
    in_dim = dim < dims
    begin = tl.load(bounds + user)
    end = tl.load(bounds + users + user)
    alpha = tl.load(alphas + user).to(tl.float32)
    for block in range(begin, end, COPY_ROWS):
        touched = block + tl.arange(0, COPY_ROWS).to(tl.int64)
        mask = (touched < end)[:, None] & in_dim[None, :]
        row = tl.load(rows + touched, mask=touched < end, other=0)
        start = tl.load(slab + row[:, None] * dims + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(new + touched[:, None] * dims + dim[None, :], start, mask=mask)
    tl.debug_barrier()
    token_begin = tl.load(first + user)
    for token in range(token_begin, token_begin + tl.load(tokens + user)):
        code = token * ACTIVE
        said = tl.zeros((DIM,), tl.float32)
        for unit in tl.range(0, ACTIVE, loop_unroll_factor=UNROLL):
            place = new + tl.load(positions + code + unit) * dims + dim
            value = tl.load(values + code + unit).to(tl.float32)
            said = tl.fma(tl.load(place, mask=in_dim, other=0.0), value, said)
        target = tl.load(targets + token * dims + dim, mask=in_dim, other=0.0).to(tl.float32)
        step = tl.load(weights + token).to(tl.float32) * (target - said)
        for unit in tl.range(0, ACTIVE, loop_unroll_factor=UNROLL):
            place = new + tl.load(positions + code + unit) * dims + dim
            value = tl.load(values + code + unit).to(tl.float32)
            tl.store(place, tl.fma(step, value, tl.load(place, mask=in_dim, other=0.0)), mask=in_dim)
        tl.debug_barrier()
    for block in range(begin, end, COPY_ROWS):
        touched = block + tl.arange(0, COPY_ROWS).to(tl.int64)
        mask = (touched < end)[:, None] & in_dim[None, :]
        row = tl.load(rows + touched, mask=touched < end, other=0)
        start = tl.load(slab + row[:, None] * dims + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        place = new + touched[:, None] * dims + dim[None, :]
        tl.store(place, tl.fma(-alpha, start, tl.load(place, mask=mask, other=0.0)), mask=mask)


def one_token_step(
    slab_SHD: Tensor,
    slots_U: Tensor,
    tokens_U: Tensor,
    columns_NK: Tensor,
    values_NK: Tensor,
    target_ND: Tensor,
    weight_N: Tensor,
    alpha_U: Tensor,
) -> tuple[Tensor, Tensor]:
    """`sparse_step` for users with one token each at most, as in decoding: one launch that nobody waits for.

    No column comes twice, so rows are the tokens' columns as they stand. For callers that know the counts without
    asking the GPU; `sparse_step` asks.
    """
    (tokens, active), (_, width, dims) = columns_NK.shape, slab_SHD.shape
    users, every = len(slots_U), tokens == len(slots_U)
    rows_M = torch.empty(tokens * active, dtype=torch.int64, device=slab_SHD.device)
    new_MD = torch.empty(tokens * active, dims, dtype=torch.float32, device=slab_SHD.device)
    if not tokens:
        return rows_M, new_MD
    tokens_U = tokens_U.contiguous()
    first_U = tokens_U if every else tokens_U.cumsum(0) - tokens_U
    DIM = padded(dims, 16, 128)  # one warp, four values a thread
    launch(
        _one_token_kernel, (users, blocks_of(dims, DIM)), whole(slab_SHD), slots_U.contiguous(), tokens_U,
        first_U, columns_NK.contiguous(), values_NK.contiguous(), target_ND.contiguous(),
        weight_N.contiguous(), alpha_U.contiguous(), rows_M, new_MD, width, dims, EVERY=every, ACTIVE=active,
        UNROLL=min(active, UNROLLED_MAX), DIM=DIM, num_warps=1,
    )  # fmt: skip
    return rows_M, new_MD


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
    """One masked update a user; see `sparse.sparse_step`. Slots are distinct; nothing is written to the slab.

    Touched columns are sorted by (slot, unit), so a user's stand together, and each user's tokens take their turns
    in one launch, blocks of D side by side. This costs N gathers of K columns a block; solving the triangular system
    of `sparse.delta_errors` instead would compare N^2 / 2 pairs of codes.
    """
    users = len(slots_U)
    if not users or int(tokens_U.max()) <= 1:
        return one_token_step(
            slab_SHD, slots_U, tokens_U, columns_NK, values_NK, target_ND, weight_N, alpha_U
        )
    (_, active), (_, width, dims) = columns_NK.shape, slab_SHD.shape
    tokens_U = tokens_U.contiguous()
    slots_N = torch.repeat_interleave(slots_U, tokens_U, output_size=len(columns_NK))
    rows_M, positions_NK = touched_rows(slots_N, columns_NK, width)
    bounds_2U = torch.searchsorted(rows_M, torch.stack([slots_U, slots_U + 1]) * width)
    new_MD = torch.empty(len(rows_M), dims, dtype=torch.float32, device=slab_SHD.device)
    # A user is one chain of steps, so blocks of D are narrow, for more programs, and one warp's, for short waits.
    DIM = padded(dims, 16, 32)
    launch(
        _turns_kernel, (users, blocks_of(dims, DIM)), whole(slab_SHD), rows_M, bounds_2U, tokens_U,
        tokens_U.cumsum(0) - tokens_U, positions_NK.contiguous(), values_NK.contiguous(),
        target_ND.contiguous(), weight_N.contiguous(), alpha_U.contiguous(), new_MD, users, dims,
        ACTIVE=active, UNROLL=min(active, UNROLLED_MAX), DIM=DIM, COPY_ROWS=COPY_ROWS, num_warps=1,
        num_stages=1,  # no load of a later turn may be moved before this turn's store
    )  # fmt: skip
    return rows_M, new_MD
