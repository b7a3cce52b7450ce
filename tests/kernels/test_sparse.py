"""The sparse kernels against the float64 oracle, at odd sizes and with poisoned memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops, sparse
from tests.kernels import oracle

FLOAT32 = 1e-5
"""Largest error of a float32 result of size about one."""
HALF = 2e-3
"""Half a step of float16 near the largest values here, of size two."""


def codes(generator: torch.Generator, tokens: int, width: int, active: int):
    return ops.sparse_code(torch.randn(tokens, width, generator=generator), active)


def units(generator: torch.Generator, tokens: int, dim: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(tokens, dim, generator=generator), dim=-1)


def update(slab, slot: int, columns, values, target, weight, alpha: float):
    """One user's update through the door."""
    return ops.sparse_update(
        slab,
        torch.tensor([slot]),
        torch.tensor([len(columns)]),
        columns,
        values,
        target,
        weight,
        torch.tensor([alpha]),
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
@pytest.mark.parametrize(("width", "dim", "active"), [(60, 16, 1), (64, 60, 7), (512, 64, 24)])
@pytest.mark.parametrize("users", [1, 3])
def test_read_is_the_oracle(tokens, width, dim, active, users):
    generator = torch.Generator().manual_seed(tokens * width + users)
    slab = torch.full((users + 1, width, dim), float("nan"), dtype=torch.float16)
    slab[:users] = torch.randn(users, width, dim, generator=generator).half()
    columns, values = codes(generator, tokens, width, active)
    slots = torch.randint(0, users, (tokens,), generator=generator)
    got = ops.sparse_read(slab, slots, columns, values)
    for row in range(tokens):
        wanted = oracle.read(slab[slots[row]].numpy(), columns[row].numpy(), values[row].numpy())
        assert np.abs(got[row].numpy() - wanted).max() < FLOAT32


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
@pytest.mark.parametrize(("width", "dim", "active"), [(60, 16, 3), (512, 64, 24)])
@pytest.mark.parametrize("alpha", [0.0, 0.03, 0.45])
def test_update_is_the_oracle(tokens, width, dim, active, alpha):
    generator = torch.Generator().manual_seed(tokens + width)
    slab = torch.full((3, width, dim), float("nan"), dtype=torch.float16)
    slab[1] = 0.3 * torch.randn(width, dim, generator=generator).half()
    columns, values = codes(generator, tokens, width, active)
    columns[-1] = columns[0]  # a fact told twice
    target, weight = units(generator, tokens, dim), torch.rand(tokens, generator=generator)
    rows, new = update(slab, 1, columns, values, target, weight, alpha)
    touched = rows - width
    wanted = oracle.write(
        slab[1].numpy(), columns.numpy(), values.numpy(), target.numpy(), weight.numpy(), alpha
    )
    assert sorted(touched.tolist()) == np.unique(columns.numpy()).tolist()
    assert np.abs(new.float().numpy() - wanted[touched.numpy()]).max() < HALF
    assert new.dtype == slab.dtype


def test_one_full_write_is_recalled():
    generator = torch.Generator().manual_seed(0)
    slab = torch.zeros(1, 512, 64, dtype=torch.float16)
    columns, values = codes(generator, 4, 512, 24)
    target = units(generator, 4, 64)
    ops.sparse_apply(slab, *update(slab, 0, columns, values, target, torch.ones(4), 0.0))
    got = ops.sparse_read(slab, torch.zeros(4, dtype=torch.int64), columns, values)
    assert float((got[-1] - target[-1]).norm()) < 1e-2
    assert (
        float(
            sparse.surprise(slab, torch.zeros(4, dtype=torch.int64), columns, values, target, torch.ones(4))[
                -1
            ]
        )
        < 1e-2
    )


def test_a_code_has_unit_norm_and_rising_columns():
    columns, values = codes(torch.Generator().manual_seed(1), 50, 200, 9)
    assert bool((columns.diff(dim=1) > 0).all())
    assert torch.allclose(values.norm(dim=1), torch.ones(50), atol=1e-6)
    assert bool((values >= 0).all())


@given(st.integers(0, 2**31), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_a_row_reads_the_same_bits_in_any_company(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    slab = torch.randn(4, 128, 32, generator=generator).half()
    columns, values = codes(generator, rows, 128, 6)
    slots = torch.randint(0, 4, (rows,), generator=generator)
    whole = ops.sparse_read(slab, slots, columns, values)
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(ops.sparse_read(slab, slots[order], columns[order], values[order]), whole[order])
    assert torch.equal(ops.sparse_read(slab, slots[:1], columns[:1], values[:1]), whole[:1])


def test_what_does_not_fit_is_refused():
    generator = torch.Generator().manual_seed(2)
    slab = torch.zeros(2, 64, 8, dtype=torch.float16)
    columns, values = codes(generator, 3, 64, 4)
    with pytest.raises(IndexError, match="slot outside the slab of 2"):
        ops.sparse_read(slab, torch.tensor([0, 1, 2]), columns, values)
    with pytest.raises(IndexError, match="code units from 64 to 64: outside a code of 64"):
        ops.sparse_read(slab, torch.zeros(3, dtype=torch.int64), columns.clamp_min(64), values)
    with pytest.raises(ValueError, match="slots"):
        ops.sparse_read(slab, torch.zeros(2, dtype=torch.int64), columns, values)
    with pytest.raises(IndexError, match="slot outside"):
        update(slab, -1, columns, values, torch.zeros(3, 8), torch.ones(3), 0.0)
    poison = torch.full((3, 8), float("nan"))
    with pytest.raises(ValueError, match="non-finite"):
        update(slab, 0, columns, values, poison, torch.ones(3), 0.0)
    assert not bool(slab.any()), "a refused update changes nothing"
