"""The gradients of a chunk on a GPU, as factors, with the norm of each token's gradient; many users a launch.

Twin: `slab.dense_surprise`. With z_l = W_l a_{l-1} and a_l = silu(z_l), token t's gradient in W_l is δ_l a_{l-1}^T:

    δ_L = J^T ∂loss/∂y (J of the norm, if there is one)        δ_{l-1} = (W_l^T δ_l) * silu'(z_{l-1})

and |δ_l a_{l-1}^T| = |δ_l| |a_{l-1}|, so nothing of weight size is made for a token. Each tile that makes a piece of a
factor also leaves the sum of its squares; one last launch adds those up in a fixed order, without atomics, so the
same tokens always have the same norms. 2 L + 1 launches: L forward, the loss, L - 1 backward, the norms.

Axes: U users, C tokens of a chunk, I and O a layer's input and output width, D value width, L layers, B blocks of
partial sums. See `tiles` for the names inside kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dense import NORM_EPS, Form, Gradients
from kernels.miras import TINY
from kernels.tiles import (
    blocks_of,
    launch,
    product_blocks,
    product_tile,
    row_blocks,
    silu,
    silu_slope,
    whole,
)


@triton.jit
def _forward_kernel(
    weights,
    slots,
    tokens,
    inputs,
    before,
    after,
    squares,
    chunk,
    outs,
    ins,
    down,
    across,
    parts,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of z and, below the last layer, of a = silu(z) with its sums of squares; zeros beyond the tokens."""
    program = tl.program_id(0)
    user = (program // (down * across)).to(tl.int64)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    matrix = weights + tl.load(slots + user) * outs * ins
    z = product_tile(
        inputs + user * chunk * ins, matrix, row, column, tl.load(tokens + user).to(tl.int32), outs, ins, ins, 1, ins,
        ROWS, COLUMNS, INNER,
    )  # fmt: skip
    before += user * chunk * outs
    after += user * chunk * outs
    squares += user * chunk * parts
    place = row[:, None] * outs + column[None, :]
    stored = (row[:, None] < chunk) & (column[None, :] < outs)
    tl.store(before + place, z, mask=stored)
    if not LAST:
        a = silu(z).to(after.dtype.element_ty)
        tl.store(after + place, a, mask=stored)
        wide = a.to(tl.float32)
        tl.store(squares + row * parts + program % across, tl.sum(wide * wide, 1), mask=row < chunk)


@triton.jit
def bias_gradient(y, v, parameter, BIAS: tl.constexpr, TINY: tl.constexpr):
    """Gradient of the loss in y for whole rows; see `miras.BIASES`."""
    e = y - v
    if BIAS == "l2":
        return 2 * e
    elif BIAS == "huber":
        size = tl.sqrt(tl.sum(e * e, 1) + TINY)
        return 2 * e * tl.minimum(parameter / size, 1.0)[:, None]
    elif BIAS == "lp":
        size = tl.abs(e)
        # |e|^(p-1) through the logarithm, which 0 has none of; the sign of 0 makes that gradient 0
        slope = parameter * tl.exp((parameter - 1) * tl.log(tl.where(size > 0, size, 1.0)))
        return tl.where(e > 0, slope, tl.where(e < 0, -slope, 0.0))
    else:
        tl.static_assert(BIAS == "dot", "a bias without a kernel")
        return -v


@triton.jit
def _loss_kernel(
    before,
    tokens,
    keys,
    values,
    delta,
    first_inputs,
    delta_squares,
    input_squares,
    parameter,
    chunk,
    outs,
    ins,
    down,
    parts,
    BIAS: tl.constexpr,
    TINY: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Whole rows: y from z_L, the gradient of the loss, back through the norm to δ_L; and a_0, the keys that count."""
    program = tl.program_id(0)
    user = (program // down).to(tl.int64)
    row = program % down * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    counts = row[:, None] < tl.load(tokens + user).to(tl.int32)

    keys += user * chunk * ins
    first_inputs += user * chunk * ins
    place = row[:, None] * ins + column[None, :]
    key = tl.load(keys + place, mask=counts & (column[None, :] < ins), other=0.0)
    tl.store(first_inputs + place, key, mask=(row[:, None] < chunk) & (column[None, :] < ins))
    k = key.to(tl.float32)
    input_squares += user * chunk * parts
    tl.store(input_squares + row * parts, tl.sum(k * k, 1), mask=row < chunk)

    before += user * chunk * outs
    values += user * chunk * outs
    delta += user * chunk * outs
    place = row[:, None] * outs + column[None, :]
    counts = counts & (column[None, :] < outs)
    z = tl.load(before + place, mask=counts, other=0.0)
    v = tl.load(values + place, mask=counts, other=0.0).to(tl.float32)
    y = z
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(z * z, 1) / outs + EPS)
        y = z * scale[:, None]
    if RESIDUAL:
        y = k + y
    slope = bias_gradient(y, v, parameter, BIAS, TINY)
    if NORM:
        along = tl.sum(slope * z, 1) / outs
        slope = scale[:, None] * (slope - z * (scale * scale * along)[:, None])
    kept = tl.where(counts, slope, 0.0).to(delta.dtype.element_ty)
    tl.store(delta + place, kept, mask=(row[:, None] < chunk) & (column[None, :] < outs))
    d = kept.to(tl.float32)
    delta_squares += user * chunk * parts
    tl.store(delta_squares + row * parts, tl.sum(d * d, 1), mask=row < chunk)


@triton.jit
def _backward_kernel(
    weights,
    slots,
    tokens,
    delta,
    before,
    below,
    squares,
    chunk,
    outs,
    ins,
    down,
    across,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of δ_{l-1} = (W_l^T δ_l) * silu'(z_{l-1}) and its sums of squares; zeros beyond the tokens."""
    program = tl.program_id(0)
    user = (program // (down * across)).to(tl.int64)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    matrix = weights + tl.load(slots + user) * outs * ins
    back = product_tile(
        delta + user * chunk * outs, matrix, row, column, tl.load(tokens + user).to(tl.int32), ins, outs, outs, ins, 1,
        ROWS, COLUMNS, INNER,
    )  # fmt: skip
    before += user * chunk * ins
    below += user * chunk * ins
    squares += user * chunk * parts
    place = row[:, None] * ins + column[None, :]
    stored = (row[:, None] < chunk) & (column[None, :] < ins)
    z = tl.load(before + place, mask=stored, other=0.0).to(tl.float32)
    kept = (back * silu_slope(z)).to(below.dtype.element_ty)
    tl.store(below + place, kept, mask=stored)
    d = kept.to(tl.float32)
    tl.store(squares + row * parts + program % across, tl.sum(d * d, 1), mask=row < chunk)


@triton.jit
def _norm_kernel(squares, norms, count, parts, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """norms = sqrt(Σ_b |δ|^2) sqrt(Σ_b |a|^2) for `count` pairs; the inputs' partial sums stand behind the deltas'."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    place = row[:, None] * parts + part[None, :]
    mask = (row[:, None] < count) & (part[None, :] < parts)
    delta = tl.sum(tl.load(squares + place, mask=mask, other=0.0), 1)
    inputs = tl.sum(tl.load(squares + place + count * parts, mask=mask, other=0.0), 1)
    tl.store(norms + row, tl.sqrt(delta) * tl.sqrt(inputs), mask=row < count)


def _forward(
    layers: Sequence[Tensor], slots_U: Tensor, key_UCD: Tensor, tokens_U: Tensor, squares_LUCB: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """z_l of each layer, the last in float32 since the loss takes a difference of it, and a_l of all but the last."""
    users, chunk, _ = key_UCD.shape
    before, after, hidden = [], [], key_UCD
    for layer, W_SOI in enumerate(layers):
        _, outs, ins = W_SOI.shape
        last = layer == len(layers) - 1
        blocks = product_blocks(chunk, outs, ins, key_UCD.dtype)
        down, across = blocks_of(chunk, blocks.rows), blocks_of(outs, blocks.columns)
        z = key_UCD.new_empty(users, chunk, outs, dtype=torch.float32 if last else key_UCD.dtype)
        a = z if last else torch.empty_like(z)
        squares = squares_LUCB[layer if last else layer + 1]
        launch(
            _forward_kernel, (users * down * across,), whole(W_SOI), slots_U, tokens_U, hidden, z, a, squares,
            chunk, outs, ins, down, across, squares_LUCB.shape[-1], LAST=last, **blocks.sizes(),
        )  # fmt: skip
        before.append(z)
        if not last:
            after.append(a)
        hidden = a
    return before, after


def _loss(
    z_UCD: Tensor, key_UCD: Tensor, value_UCD: Tensor, tokens_U: Tensor, form: Form, squares_2LUCB: Tensor
) -> tuple[Tensor, Tensor]:
    """δ_L, and a_0 with zeros beyond the tokens."""
    users, chunk, ins = key_UCD.shape
    outs = z_UCD.shape[2]
    delta_UCD, a_UCD = key_UCD.new_empty(users, chunk, outs), torch.empty_like(key_UCD)
    ROWS, WIDTH = row_blocks(max(ins, outs))
    down = blocks_of(chunk, ROWS)
    launch(
        _loss_kernel, (users * down,), z_UCD, tokens_U, key_UCD, value_UCD, delta_UCD, a_UCD,
        squares_2LUCB[0, -1], squares_2LUCB[1, 0], float(form.bias_parameter), chunk, outs, ins, down,
        squares_2LUCB.shape[-1], BIAS=form.bias, TINY=TINY, NORM=form.norm, EPS=NORM_EPS,
        RESIDUAL=form.residual, ROWS=ROWS, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    return delta_UCD, a_UCD


def _backward(
    W_SOI: Tensor, slots_U: Tensor, tokens_U: Tensor, delta_UCO: Tensor, before_UCI: Tensor, squares_UCB: Tensor
) -> Tensor:  # fmt: skip
    """δ of the layer below."""
    users, chunk, ins = before_UCI.shape
    outs = delta_UCO.shape[2]
    below_UCI = torch.empty_like(before_UCI)
    blocks = product_blocks(chunk, ins, outs, delta_UCO.dtype)
    down, across = blocks_of(chunk, blocks.rows), blocks_of(ins, blocks.columns)
    launch(
        _backward_kernel, (users * down * across,), whole(W_SOI), slots_U, tokens_U, delta_UCO, before_UCI,
        below_UCI, squares_UCB, chunk, outs, ins, down, across, squares_UCB.shape[-1], **blocks.sizes(),
    )  # fmt: skip
    return below_UCI


def dense_surprise(
    layers: Sequence[Tensor],
    slots_U: Tensor,
    key_UCD: Tensor,
    value_UCD: Tensor,
    tokens_U: Tensor,
    form: Form,
) -> Gradients:
    """Forward, residual, deltas and per-token norms of a chunk; see `slab.dense_surprise`.

    Factors have the keys' dtype, norms float32 always.
    """
    users, chunk, _ = key_UCD.shape
    slots_U, tokens_U = slots_U.contiguous(), tokens_U.contiguous()
    key_UCD, value_UCD = key_UCD.contiguous(), value_UCD.contiguous()
    norm_LUC = key_UCD.new_empty(len(layers), users, chunk, dtype=torch.float32)
    if not norm_LUC.numel():
        return Gradients(
            deltas=[key_UCD.new_empty(users, chunk, W.shape[1]) for W in layers],
            inputs=[key_UCD.new_empty(users, chunk, W.shape[2]) for W in layers],
            norm_LUC=norm_LUC,
        )
    smallest = min(product_blocks(chunk, W.shape[2], W.shape[1], key_UCD.dtype).columns for W in layers)
    parts = max(blocks_of(W.shape[2], smallest) for W in layers)
    # Zeros, since layers of unequal width leave unequal numbers of partial sums.
    squares_2LUCB = key_UCD.new_zeros(2, *norm_LUC.shape, parts, dtype=torch.float32)
    before, after = _forward(layers, slots_U, key_UCD, tokens_U, squares_2LUCB[1])
    delta, first = _loss(before[-1], key_UCD, value_UCD, tokens_U, form, squares_2LUCB)
    deltas = [delta]
    for layer in range(len(layers) - 1, 0, -1):
        below = before[layer - 1]
        delta = _backward(layers[layer], slots_U, tokens_U, delta, below, squares_2LUCB[0, layer - 1])
        deltas.insert(0, delta)
    ROWS, PARTS = row_blocks(parts)
    count = norm_LUC.numel()
    launch(
        _norm_kernel, (blocks_of(count, ROWS),), squares_2LUCB, norm_LUC, count, parts, PARTS=PARTS, ROWS=ROWS
    )
    return Gradients(deltas=deltas, inputs=[first, *after], norm_LUC=norm_LUC)
