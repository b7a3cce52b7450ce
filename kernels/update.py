"""Writing memories on a GPU: a chunk's step on a user's whole layer, or on a selected block of it, many users a launch.

Twins: `slab.dense_step_` and `slab.masked_step_`, and `sparse.sparse_step` (from `update_sparse`): the same names,
signatures and results. A tile of weights has one program that writes it and its sum runs in the order of the tokens:
no atomics, the same bits every time and in any company.

Axes: S slots, U users, C tokens of a chunk, O and I a layer's rows and columns, r and c selected ones. See `tiles` for
the names inside kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dense import Coefficients
from kernels.tiles import blocks_of, dot, launch, outer_blocks, whole
from kernels.update_sparse import one_token_step, sparse_step

__all__ = ["sparse_step", "one_token_step", "dense_step_", "masked_step_"]

FACTORS: tl.constexpr = tl.constexpr(1024)
"""Factors that a program looks at in one go; a constant, so that padding a chunk changes no sum."""


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _put(
    weights,
    momenta,
    row,
    column,
    outs,
    ins,
    written,
    pushed,
    keep,
    carry,
    momentum,
    all_written,
    all_pushed,
    DECAY: tl.constexpr,
):
    """M <- keep M + carry S - written and S <- momentum S - pushed on one tile; with L2, β Σ factor M in each sum."""
    mask = (row[:, None] < outs) & (column[None, :] < ins)
    place = row[:, None] * ins + column[None, :]
    W = tl.load(weights + place, mask=mask, other=0.0).to(tl.float32)
    S = tl.load(momenta + place, mask=mask, other=0.0).to(tl.float32)
    if DECAY:
        written += all_written * W
        pushed += all_pushed * W
    tl.store(weights + place, keep * W + carry * S - written, mask=mask)
    tl.store(momenta + place, momentum * S - pushed, mask=mask)


@triton.jit
def _dense_kernel(
    weights,
    momenta,
    slots,
    deltas,
    inputs,
    write,
    push,
    keep,
    carry,
    momentum,
    weight_decay,
    chunk,
    outs,
    ins,
    down,
    across,
    SHARED: tl.constexpr,
    DECAY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of one user's layer, in place: both weighted sums of δ a^T in one pass over the tokens, then `_put`."""
    program = tl.program_id(0)
    user = (program // (down * across)).to(tl.int64)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    write += user * chunk
    push += user * chunk
    deltas += user * chunk * outs
    inputs += user * chunk * ins
    ends = tl.zeros((FACTORS,), tl.int32)
    writes = tl.zeros((FACTORS,), tl.float32)
    pushes = tl.zeros((FACTORS,), tl.float32)
    for start in range(0, chunk, FACTORS):
        token = start + tl.arange(0, FACTORS)
        w = tl.load(write + token, mask=token < chunk, other=0.0).to(tl.float32)
        p = tl.load(push + token, mask=token < chunk, other=0.0).to(tl.float32)
        writes += w
        pushes += p
        ends = tl.maximum(ends, tl.where((w != 0) | (p != 0), token + 1, 0))
    end = tl.max(ends, 0)  # padding beyond the last token that counts is not looped over
    all_written = tl.sum(writes, 0) * weight_decay
    all_pushed = tl.sum(pushes, 0) * weight_decay

    written = tl.zeros((ROWS, COLUMNS), tl.float32)
    pushed = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < end
        delta = tl.load(
            deltas + token[:, None] * outs + row[None, :],
            mask=counts[:, None] & (row[None, :] < outs),
            other=0.0,
        )
        a = tl.load(
            inputs + token[:, None] * ins + column[None, :],
            mask=counts[:, None] & (column[None, :] < ins),
            other=0.0,
        )
        wide = delta.to(tl.float32)
        p = tl.load(push + token, mask=counts, other=0.0).to(tl.float32)
        pushed = dot(tl.trans((wide * p[:, None]).to(a.dtype)), a, pushed)
        if not SHARED:
            w = tl.load(write + token, mask=counts, other=0.0).to(tl.float32)
            written = dot(tl.trans((wide * w[:, None]).to(a.dtype)), a, written)

    weights += tl.load(slots + user) * outs * ins
    momenta += tl.load(slots + user) * outs * ins
    kept = tl.load(keep + user).to(tl.float32)
    carried = tl.load(carry + user).to(tl.float32)
    left = tl.load(momentum + user).to(tl.float32)
    if SHARED:
        written = pushed
    if COLUMNS < 128:
        _put(
            weights, momenta, row, column, outs, ins, written, pushed, kept, carried, left, all_written,
            all_pushed, DECAY,
        )  # fmt: skip
    else:
        # In two halves: weights, momenta and both sums of a whole tile do not fit the registers.
        half = tl.arange(0, COLUMNS // 2)
        first, second = _halves(written, ROWS, COLUMNS)
        first_pushed, second_pushed = _halves(pushed, ROWS, COLUMNS)
        begin = program % across * COLUMNS
        _put(
            weights, momenta, row, begin + half, outs, ins, first, first_pushed, kept, carried, left,
            all_written, all_pushed, DECAY,
        )  # fmt: skip
        _put(
            weights, momenta, row, begin + COLUMNS // 2 + half, outs, ins, second, second_pushed, kept, carried,
            left, all_written, all_pushed, DECAY,
        )  # fmt: skip


def _same_dtype(delta_UCO: Tensor, input_UCI: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the wider of their dtypes, contiguous."""
    dtype = torch.promote_types(delta_UCO.dtype, input_UCI.dtype)
    return delta_UCO.to(dtype).contiguous(), input_UCI.to(dtype).contiguous()


def dense_step_(
    W_SOI: Tensor,
    S_SOI: Tensor,
    slots_U: Tensor,
    delta_UCO: Tensor,
    input_UCI: Tensor,
    c: Coefficients,
    weight_decay: float,
) -> None:
    """One chunk of one layer in place, weights and momentum, in one launch; see `slab.dense_step_`."""
    (users, chunk, outs), ins = delta_UCO.shape, input_UCI.shape[2]
    if not users:
        return
    delta_UCO, input_UCI = _same_dtype(delta_UCO, input_UCI)
    blocks = outer_blocks(outs, ins, input_UCI.dtype)
    down, across = blocks_of(outs, blocks.rows), blocks_of(ins, blocks.columns)
    launch(
        _dense_kernel, (users * down * across,), whole(W_SOI), whole(S_SOI), slots_U.contiguous(), delta_UCO,
        input_UCI, c.write_UC.contiguous(), c.push_UC.contiguous(), c.keep_U.contiguous(),
        c.carry_U.contiguous(), c.momentum_U.contiguous(), float(weight_decay), chunk, outs, ins, down, across,
        SHARED=c.write_UC is c.push_UC, DECAY=bool(weight_decay), **blocks.sizes("TOKENS"),
    )  # fmt: skip


@triton.jit
def _masked_kernel(
    weights,
    slots,
    deltas,
    inputs,
    factors,
    keep,
    weight_decay,
    rows,
    columns,
    chunk,
    outs,
    ins,
    selected_rows,
    selected_columns,
    down,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of one user's selected block, in place: W <- (keep - β) W - Σ_t w_t δ_t a_t^T at the selected places."""
    program = tl.program_id(0)
    user = (program // (down * across)).to(tl.int64)
    at_row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    at_column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    in_row, in_column = at_row < selected_rows, at_column < selected_columns
    row = tl.load(rows + user * selected_rows + at_row, mask=in_row, other=0).to(tl.int32)
    column = tl.load(columns + user * selected_columns + at_column, mask=in_column, other=0).to(tl.int32)
    deltas += user * chunk * outs
    inputs += user * chunk * ins
    factors += user * chunk
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, chunk, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < chunk
        delta = tl.load(
            deltas + token[:, None] * outs + row[None, :],
            mask=counts[:, None] & in_row[None, :],
            other=0.0,
        )
        a = tl.load(
            inputs + token[:, None] * ins + column[None, :],
            mask=counts[:, None] & in_column[None, :],
            other=0.0,
        )
        w = tl.load(factors + token, mask=counts, other=0.0).to(tl.float32)
        total = dot(tl.trans((delta.to(tl.float32) * w[:, None]).to(a.dtype)), a, total)
    mask = in_row[:, None] & in_column[None, :]
    place = weights + tl.load(slots + user) * outs * ins + (row[:, None] * ins + column[None, :])
    W = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    kept = tl.load(keep + user).to(tl.float32) - tl.load(weight_decay + user).to(tl.float32)
    tl.store(place, kept * W - total, mask=mask)


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
    """One sparse update of one layer in place, only the selected block, in one launch; see `slab.masked_step_`."""
    (users, chunk, outs), ins = delta_UCO.shape, input_UCI.shape[2]
    selected_rows, selected_columns = rows_Ur.shape[1], columns_Uc.shape[1]
    if not users:
        return
    delta_UCO, input_UCI = _same_dtype(delta_UCO, input_UCI)
    blocks = outer_blocks(min(selected_rows, 64), min(selected_columns, 64), input_UCI.dtype)
    down, across = blocks_of(selected_rows, blocks.rows), blocks_of(selected_columns, blocks.columns)
    launch(
        _masked_kernel, (users * down * across,), whole(W_SOI), slots_U.contiguous(), delta_UCO, input_UCI,
        weight_UC.contiguous(), keep_U.contiguous(), weight_decay_U.contiguous(), rows_Ur.contiguous(),
        columns_Uc.contiguous(), chunk, outs, ins, selected_rows, selected_columns, down, across,
        **blocks.sizes("TOKENS"),
    )  # fmt: skip
