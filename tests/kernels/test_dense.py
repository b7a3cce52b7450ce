"""The dense operations by slot, through the door: numbers against float64, slots, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import dense, ops, selection
from kernels.dense import Coefficients, Form

FLOAT32 = 1e-5
"""Relative to the largest element: sums of some hundred products."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def slabs(slots: int, widths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [random(slots, o, i, seed=seed) / i**0.5 for i, o in itertools.pairwise(widths)]


def step_by_step(
    eta: Tensor, theta: Tensor, alpha: Tensor, u: Tensor, M: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Titans, eq. 9, 10 and 13, for scalars eta, theta, alpha [C] and gradients u [C, O, I]."""
    for t in range(len(u)):
        S = eta[t] * S - theta[t] * u[t]
        M = (1 - alpha[t]) * M + S
    return M, S


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 100, 2000])
def test_two_coefficients_stand_for_the_whole_recurrence(tokens):
    eta, theta, alpha = (
        torch.rand(1, tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in (1, 2, 3)
    )
    alpha = alpha / 50
    u, M, S = random(tokens, 3, 2).double(), random(3, 2).double(), random(3, 2, seed=4).double()
    c = dense.coefficients(eta, theta, alpha, torch.ones(1, tokens, dtype=torch.bool))
    wanted_M, wanted_S = step_by_step(eta[0], theta[0], alpha[0], u, M, S)
    got_M = c.keep_U * M + c.carry_U * S - (c.write_UC[0, :, None, None] * u).sum(0)
    got_S = c.momentum_U * S - (c.push_UC[0, :, None, None] * u).sum(0)
    for got, wanted in ((got_M, wanted_M), (got_S, wanted_S)):
        assert float((got - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


def test_a_token_that_is_not_there_is_no_step():
    eta, theta, alpha = (torch.rand(1, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    valid = torch.tensor([[True, False, True, True, False, False]])
    with_gaps = dense.coefficients(eta, theta, alpha, valid)
    eta, theta, alpha = (x[valid][None] for x in (eta, theta, alpha))
    without = dense.coefficients(eta, theta, alpha, torch.ones(1, 3, dtype=torch.bool))
    for name in ("keep_U", "carry_U", "momentum_U"):
        assert torch.allclose(getattr(with_gaps, name), getattr(without, name))
    assert torch.allclose(with_gaps.write_UC[valid], without.write_UC[0])
    assert not bool(with_gaps.write_UC[~valid].any())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_a_step_in_place_is_the_step(in_place, decay):
    users, tokens, rows, columns = 3, 50, 12, 9
    W, S = random(users, rows, columns), random(users, rows, columns, seed=1)
    delta, inputs = random(users, tokens, rows), random(users, tokens, columns)
    eta, theta, alpha = (
        torch.rand(users, tokens, generator=torch.Generator().manual_seed(s)) / 10 for s in (1, 2, 3)
    )
    c = dense.coefficients(eta, theta, alpha, torch.ones(users, tokens, dtype=torch.bool))
    wide = Coefficients(**{name: getattr(c, name).double() for name in Coefficients.__slots__})
    wanted = dense.step(W.double(), S.double(), delta.double(), inputs.double(), wide, decay * W.double())
    if in_place:
        got = W.clone(), S.clone()
        dense.step_(*got, delta, inputs, c, decay * W)
    else:
        got = W.clone(), S.clone()
        ops.dense_step_(*got, torch.arange(users), delta, inputs, c, decay)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) < FLOAT32 * float(other.abs().max())


@pytest.mark.parametrize("width", [60, 64])
def test_reading_by_slot_leaves_out_what_does_not_count(width):
    layers = slabs(5, (width, 32, width))
    for layer in layers:
        layer[[0, 2]] = float("nan")
    slots, counts, x = torch.tensor([4, 1, 3]), torch.tensor([7, 0, 10]), random(3, 10, width)
    y = ops.dense_read(layers, slots, x, counts, Form(residual=True))
    found = ops.dense_surprise(layers, slots, x, random(3, 10, width, seed=2), counts, Form(residual=True))
    for row, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
        hidden = x[row].double() @ layers[0][slot].double().T
        wanted = x[row] + (hidden * hidden.sigmoid()) @ layers[1][slot].double().T
        assert float((y[row, :count] - wanted[:count]).abs().amax() if count else 0.0) < FLOAT32 * 5
        assert not bool(y[row, count:].any())
        assert not bool(found.norm_LUC[:, row, count:].any())
        assert bool((found.norm_LUC[:, row, :count] > 0).all())


def test_a_masked_step_changes_its_block_alone():
    slab, slots = random(4, 20, 30), torch.tensor([3, 1])
    before = slab.clone()
    delta, inputs = random(2, 8, 20), random(2, 8, 30)
    rows, columns = selection.selected_rows_columns(delta, inputs, torch.ones(2, 8), 0.05)
    assert rows.shape[1] * columns.shape[1] <= 0.05 * 600
    ops.masked_step_(
        slab,
        slots,
        delta,
        inputs,
        torch.full((2, 8), 0.1),
        torch.tensor([0.9, 0.8]),
        torch.zeros(2),
        rows,
        columns,
    )
    for user, slot in enumerate(slots.tolist()):
        block = slab[slot][rows[user][:, None], columns[user]]
        old = before[slot][rows[user][:, None], columns[user]]
        gradient = (0.1 * delta[user].T @ inputs[user])[rows[user][:, None], columns[user]]
        assert torch.allclose(block, (0.9, 0.8)[user] * old - gradient, atol=1e-5)
        slab[slot][rows[user][:, None], columns[user]] = old
    assert torch.equal(slab, before), "nothing beside the blocks has changed"


def test_what_the_door_refuses():
    layers, x, counts = slabs(3, (8, 8)), random(2, 4, 8), torch.tensor([4, 4])
    with pytest.raises(IndexError, match="slot outside the slab of 3"):
        ops.dense_read(layers, torch.tensor([0, 3]), x, counts, Form())
    with pytest.raises(ValueError, match="counts"):
        ops.dense_read(layers, torch.tensor([0, 1]), x, torch.tensor([4, 5]), Form())
    with pytest.raises(ValueError, match="the first layer is 8 wide"):
        ops.dense_read(layers, torch.tensor([0, 1]), random(2, 4, 9), counts, Form())
    with pytest.raises(ValueError, match="values"):
        ops.dense_surprise(layers, torch.tensor([0, 1]), x, x[:, :3], counts, Form())
    one = torch.ones(2)
    c = Coefficients(
        keep_U=one, carry_U=one, momentum_U=one, write_UC=torch.ones(2, 4), push_UC=torch.ones(2, 4)
    )
    W, S = layers[0].clone(), torch.zeros_like(layers[0])
    with pytest.raises(ValueError, match="two rows of one launch write one slot"):
        ops.dense_step_(W, S, torch.tensor([1, 1]), x, x, c)
    poisoned = x.clone()
    poisoned[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="a non-finite value would enter the memory"):
        ops.dense_step_(W, S, torch.tensor([0, 1]), poisoned, x, c)
    where = torch.tensor([[0, 8], [0, 1]])
    with pytest.raises(IndexError, match="row 0 or 8: outside a layer of 8"):
        ops.masked_step_(W, torch.tensor([0, 1]), x, x, torch.ones(2, 4), one, one, where, where)
    assert torch.equal(W, layers[0])
    assert not bool(S.any())
