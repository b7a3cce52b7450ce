"""Reading memories on a GPU: a gather of K columns (sparse), or a user's whole MLP (dense), many users a launch.

Twins: `sparse.sparse_read` and `slab.dense_read`, the same names, signatures and results. Dense reads take one launch
a layer: a grouped product for chunks, where a weight serves many tokens, and for one token each a product with a
vector, which is bound by memory and reads each weight once, in whole lines.

Axes: N rows, K active units, H code width, D value width, S slots, U users, C tokens of a chunk, I and O a layer's
input and output width. See `tiles` for the names inside kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dense import NORM_EPS, Form
from kernels.tiles import (
    blocks_of,
    column_blocks,
    launch,
    padded,
    product_blocks,
    product_tile,
    row_blocks,
    silu,
    whole,
)

VECTOR_TILE = (16, 512)
"""Rows and inputs of a weight tile of one token's read: 16 KB of bfloat16, eight 16-byte loads a thread in flight."""


@triton.jit
def _columns_kernel(
    slab, slots, columns, values, out, width, dims, active, ACTIVE: tl.constexpr, DIM: tl.constexpr
):
    """One row and block of D: out[row] = Σ_k values[row, k] slab[slot, columns[row, k]]."""
    row = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, ACTIVE)
    dim = tl.program_id(1) * DIM + tl.arange(0, DIM)
    column = tl.load(columns + row * active + code, mask=code < active, other=0)
    value = tl.load(values + row * active + code, mask=code < active, other=0.0).to(tl.float32)
    place = (tl.load(slots + row) * width + column) * dims
    tile = tl.load(
        slab + place[:, None] + dim[None, :], mask=(code[:, None] < active) & (dim[None, :] < dims), other=0.0
    )
    tl.store(out + row * dims + dim, tl.sum(tile.to(tl.float32) * value[:, None], 0), mask=dim < dims)


def sparse_read(slab_SHD: Tensor, slots_N: Tensor, columns_NK: Tensor, values_NK: Tensor) -> Tensor:
    """y = W_3 a for each row from its own slot, `y_ND` float32; see `sparse.sparse_read`. One launch."""
    rows, active = columns_NK.shape
    _, width, dims = slab_SHD.shape
    out_ND = torch.empty(rows, dims, dtype=torch.float32, device=slab_SHD.device)
    if rows:
        ACTIVE, DIM = column_blocks(active, dims)
        launch(
            _columns_kernel, (rows, blocks_of(dims, DIM)), whole(slab_SHD), slots_N.contiguous(),
            columns_NK.contiguous(), values_NK.contiguous(), out_ND, width, dims, active,
            ACTIVE=ACTIVE, DIM=DIM, num_warps=4,
        )  # fmt: skip
    return out_ND


@triton.jit
def _layer_kernel(
    weights,
    slots,
    tokens,
    inputs,
    residual,
    out,
    chunk,
    outs,
    ins,
    down,
    across,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of tokens x outputs of one layer of one user; rows beyond the user's tokens are stored as zeros."""
    program = tl.program_id(0)
    user = (program // (down * across)).to(tl.int64)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.load(tokens + user).to(tl.int32)
    matrix = weights + tl.load(slots + user) * outs * ins
    z = product_tile(
        inputs + user * chunk * ins, matrix, row, column, count, outs, ins, ins, 1, ins, ROWS, COLUMNS, INNER
    )
    out += user * chunk * outs
    residual += user * chunk * outs
    place = row[:, None] * outs + column[None, :]
    if SILU:
        z = silu(z)
    if RESIDUAL:
        counts = (row[:, None] < count) & (column[None, :] < outs)
        z += tl.load(residual + place, mask=counts, other=0.0).to(tl.float32)
    tl.store(out + place, z, mask=(row[:, None] < chunk) & (column[None, :] < outs))


@triton.jit
def _vector_kernel(
    weights,
    slots,
    tokens,
    inputs,
    residual,
    out,
    outs,
    ins,
    down,
    SILU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS outputs of one layer for the one token of one user; a user without a token reads no weight."""
    program = tl.program_id(0)
    user = (program // down).to(tl.int64)
    row = program % down * ROWS + tl.arange(0, ROWS)
    count = tl.load(tokens + user).to(tl.int32)
    matrix = weights + tl.load(slots + user) * outs * ins
    products = tl.zeros((ROWS, INNER), tl.float32)
    for start in range(0, tl.where(count > 0, ins, 0), INNER):
        inner = start + tl.arange(0, INNER)
        x = tl.load(inputs + user * ins + inner, mask=inner < ins, other=0.0)
        tile = tl.load(
            matrix + row[:, None] * ins + inner[None, :],
            mask=(row[:, None] < outs) & (inner[None, :] < ins),
            other=0.0,
        )
        products += tile.to(tl.float32) * x.to(tl.float32)[None, :]
    z = tl.sum(products, 1)
    if SILU:
        z = silu(z)
    if RESIDUAL:
        counts = (row < outs) & (count > 0)
        z += tl.load(residual + user * outs + row, mask=counts, other=0.0).to(tl.float32)
    tl.store(out + user * outs + row, z, mask=row < outs)


@triton.jit
def _norm_kernel(
    before,
    tokens,
    residual,
    out,
    chunk,
    outs,
    down,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Whole rows: y = z / rms(z), plus the input if asked; zeros beyond the user's tokens."""
    program = tl.program_id(0)
    user = (program // down).to(tl.int64)
    row = program % down * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    before += user * chunk * outs
    residual += user * chunk * outs
    out += user * chunk * outs
    place = row[:, None] * outs + column[None, :]
    counts = (row[:, None] < tl.load(tokens + user).to(tl.int32)) & (column[None, :] < outs)
    z = tl.load(before + place, mask=counts, other=0.0)
    y = z * (1.0 / tl.sqrt(tl.sum(z * z, 1) / outs + EPS))[:, None]
    if RESIDUAL:
        y += tl.load(residual + place, mask=counts, other=0.0).to(tl.float32)
    tl.store(out + place, y, mask=(row[:, None] < chunk) & (column[None, :] < outs))


def _layer(
    W_SOI: Tensor, slots_U: Tensor, tokens_U: Tensor, x_UCI: Tensor, out_UCO: Tensor, end_UCO: Tensor | None,
    activate: bool,
) -> None:  # fmt: skip
    """One layer into `out_UCO`, with silu or with the residual `end_UCO` added."""
    users, chunk, ins = x_UCI.shape
    outs, residual = W_SOI.shape[1], end_UCO is not None
    tensors = (whole(W_SOI), slots_U, tokens_U, x_UCI, end_UCO if residual else x_UCI, out_UCO)
    if chunk == 1:
        ROWS, INNER = padded(outs, 1, VECTOR_TILE[0]), padded(ins, 16, VECTOR_TILE[1])
        down = blocks_of(outs, ROWS)
        launch(
            _vector_kernel, (users * down,), *tensors, outs, ins, down, SILU=activate, RESIDUAL=residual,
            ROWS=ROWS, INNER=INNER, num_warps=4,
        )  # fmt: skip
        return
    blocks = product_blocks(chunk, outs, ins, x_UCI.dtype)
    down, across = blocks_of(chunk, blocks.rows), blocks_of(outs, blocks.columns)
    launch(
        _layer_kernel, (users * down * across,), *tensors, chunk, outs, ins, down, across, SILU=activate,
        RESIDUAL=residual, **blocks.sizes(),
    )  # fmt: skip


def dense_read(
    layers: Sequence[Tensor], slots_U: Tensor, x_UCD: Tensor, tokens_U: Tensor, form: Form
) -> Tensor:
    """y = M(x) from each user's slot, [U, C, D] in the dtype of x; see `slab.dense_read`.

    One launch a layer, one more with the norm, whose sum needs whole rows of z_L (kept in float32 for it).
    """
    users, chunk, _ = x_UCD.shape
    outs = layers[-1].shape[1]
    x_UCD, slots_U, tokens_U = x_UCD.contiguous(), slots_U.contiguous(), tokens_U.contiguous()
    out_UCD = torch.empty(users, chunk, outs, dtype=x_UCD.dtype, device=x_UCD.device)
    if not out_UCD.numel():
        return out_UCD
    hidden = x_UCD
    for W_SOI in layers[:-1]:
        into = torch.empty(users, chunk, W_SOI.shape[1], dtype=x_UCD.dtype, device=x_UCD.device)
        _layer(W_SOI, slots_U, tokens_U, hidden, into, None, True)
        hidden = into
    if not form.norm:
        _layer(layers[-1], slots_U, tokens_U, hidden, out_UCD, x_UCD if form.residual else None, False)
        return out_UCD
    before_UCD = torch.empty(users, chunk, outs, dtype=torch.float32, device=x_UCD.device)
    _layer(layers[-1], slots_U, tokens_U, hidden, before_UCD, None, False)
    ROWS, WIDTH = row_blocks(outs)
    down = blocks_of(chunk, ROWS)
    launch(
        _norm_kernel, (users * down,), before_UCD, tokens_U, x_UCD, out_UCD, chunk, outs, down, EPS=NORM_EPS,
        RESIDUAL=form.residual, ROWS=ROWS, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    return out_UCD
