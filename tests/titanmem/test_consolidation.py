"""Passing over the reservoir takes a memory to the least-squares solution of its codes, and recall with it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from titanmem.consolidation import PASSES, consolidate, replay
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

WIDTH, VALUE, VOCABULARY = 512, 32, 1000
RIDGE = 1e-3
"""λ of the closed form: small against the units' energy of about 1, large against float16."""


def spec_of(active: int) -> MemorySpec:
    return MemorySpec(
        d_nltm=32, key_dim=16, value_dim=VALUE, code_width=WIDTH, code_active=active, chunk_size=16, window=16,
        top_k_ratio=0.05,
    )  # fmt: skip


class World:
    """`facts` codes and their tokens; with `shared`, all like to use the same few units."""

    def __init__(self, facts: int, active: int, shared: float, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.spec = spec_of(active)
        self.values_VD = torch.nn.functional.normalize(
            torch.randn(VOCABULARY, VALUE, generator=random), dim=1
        )
        drive = torch.rand(facts, WIDTH, generator=random)
        drive[:, : 2 * active] += shared
        columns = drive.topk(active).indices.sort(1).values
        code = torch.nn.functional.normalize(torch.rand(facts, active, generator=random) + 0.1, dim=1)
        self.token = torch.randint(VOCABULARY, (facts,), generator=random)
        self.reservoir = Reservoir.of(columns.numpy(), code.numpy(), self.token.numpy(), np.ones(facts))
        values = torch.from_numpy(self.reservoir.values_RK).double()
        self.codes_RH = torch.zeros(facts, WIDTH, dtype=torch.float64).scatter_(1, columns, values)
        self.targets_RD = self.values_VD[self.token].double()

    def slab(self) -> Tensor:
        return torch.zeros(1, WIDTH, VALUE, dtype=torch.float16)

    def figures(self, written_HD: Tensor) -> tuple[float, float]:
        """Mean squared recall error of a fact, and the share whose nearest value is right."""
        read_RD = self.codes_RH @ written_HD.double()
        error = (read_RD - self.targets_RD).square().sum(1).mean()
        right = (read_RD.float() @ self.values_VD.T).argmax(1) == self.token
        return float(error), float(right.float().mean())

    def ridge(self) -> Tensor:
        gram_HH = self.codes_RH.T @ self.codes_RH + RIDGE * torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.solve(gram_HH, self.codes_RH.T @ self.targets_RD)


@pytest.mark.parametrize(
    ("facts", "active", "shared", "first", "after_five"),
    [(256, 8, 0.0, 1.0, 0.99), (512, 8, 0.0, 0.85, 0.95), (400, 8, 0.2, 0.6, 0.85)],
    ids=["random codes", "as many as units", "strong interference"],
)
def test_recall_goes_to_ridge_regression_pass_by_pass(facts, active, shared, first, after_five):
    world = World(facts, active, shared)
    best_error, best_recall = world.figures(world.ridge())
    slab, errors, recalls = world.slab(), [], []
    for _ in range(5):
        consolidate(slab, 0, world.reservoir, world.values_VD, world.spec, 1)
        error, recall = world.figures(slab[0])
        errors.append(error - best_error)
        recalls.append(recall)
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.6 * errors[0], "a good part of the way in five passes"
    assert recalls[0] < first, "one pass is not enough"
    assert recalls == sorted(recalls)
    assert after_five <= recalls[-1] <= best_recall
    assert best_recall > 0.99


def test_many_passes_reach_least_squares():
    world = World(256, 8, 0.0)
    slab = world.slab()
    for _ in range(3):
        consolidate(slab, 0, world.reservoir, world.values_VD, world.spec, 16)
    error, recall = world.figures(slab[0])
    assert error < 1e-3, "codes that are independent leave no error but that of float16"
    assert recall == 1.0


def test_replay_starts_from_what_is_there():
    """A memory that says everything already is not moved, and what no entry touches stays as it was."""
    world = World(64, 8, 0.0)
    slab = world.slab()
    consolidate(slab, 0, world.reservoir, world.values_VD, world.spec, 16)
    untouched = torch.ones(WIDTH, dtype=torch.bool)
    untouched[torch.from_numpy(world.reservoir.columns_RK).long().unique()] = False
    assert bool(untouched.any())
    slab[0, untouched] = 0.5
    before = slab.clone()
    consolidate(slab, 0, world.reservoir, world.values_VD, world.spec, 1)
    assert float((slab - before).abs().max()) < 2e-2
    assert torch.equal(slab[0, untouched], before[0, untouched])


def test_forgetting_in_a_replay_only_loses():
    world = World(512, 8, 0.0)
    recalls = []
    for alpha in (0.0, 0.02, 0.1):
        slab = world.slab()
        consolidate(slab, 0, world.reservoir, world.values_VD, world.spec, PASSES, alpha)
        recalls.append(world.figures(slab[0])[1])
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > recalls[1] + 0.01


def test_no_update_is_larger_than_the_ratio_and_no_other_slot_moves():
    world = World(64, 8, 0.0)
    slab = torch.zeros(2, WIDTH, VALUE, dtype=torch.float16)
    last, updates = slab.clone(), 0
    for number in replay(slab, 1, world.reservoir, world.values_VD, world.spec, 2):
        changed = int((slab != last).sum())
        assert 0 < changed <= world.spec.top_k_ratio * world.spec.parameters
        last, updates = slab.clone(), updates + 1
        assert number == updates
    assert updates == 2 * -(-64 // world.spec.tokens_per_update)
    assert not bool(slab[0].any())


def test_stopping_between_updates_changes_no_bit():
    world = World(64, 8, 0.0)
    whole, stepped = world.slab(), torch.zeros(3, WIDTH, VALUE, dtype=torch.float16)
    consolidate(whole, 0, world.reservoir, world.values_VD, world.spec, 2)
    steps = replay(stepped, 2, world.reservoir, world.values_VD, world.spec, 2)
    next(steps)
    assert not torch.equal(stepped[2], whole[0])
    for _ in steps:
        pass
    assert torch.equal(stepped[2], whole[0])


def test_a_gate_is_the_size_of_a_step():
    world = World(1, 8, 0.0)
    half = Reservoir.of(
        world.reservoir.columns_RK, world.reservoir.values_RK, world.reservoir.token_R, np.full(1, 0.5)
    )
    slab = world.slab()
    consolidate(slab, 0, half, world.values_VD, world.spec, 1)
    # (1 - 0.5)^2 of a value of norm 1 is left.
    assert world.figures(slab[0])[0] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("passes", [0, -1, 17])
def test_wrong_passes_are_refused(passes):
    world = World(4, 8, 0.0)
    with pytest.raises(ValueError, match=f"passes = {passes}: must be from 1 to 16"):
        consolidate(world.slab(), 0, world.reservoir, world.values_VD, world.spec, passes)


def test_nothing_kept_is_nothing_to_do():
    spec = spec_of(8)
    slab = torch.ones(1, WIDTH, VALUE, dtype=torch.float16)
    assert consolidate(slab, 0, Reservoir.empty(spec), torch.zeros(4, VALUE), spec) == 0
    assert bool((slab == 1).all())
