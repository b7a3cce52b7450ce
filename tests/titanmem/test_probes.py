"""Probes notice what a memory has lost, and take no correction for a loss."""

from __future__ import annotations

import numpy as np
import torch

from tests.titanmem.entries import SPEC, codes, slab, values
from titanmem.consolidation import consolidate
from titanmem.probes import PROBES_MAX, REWRITTEN_OVERLAP, answered, drawn, still_asked
from titanmem.reservoir import REPLACED_OVERLAP, Reservoir


def entries(count: int, seed: int = 0) -> Reservoir:
    columns, found = codes(count, seed)
    token = np.random.default_rng(seed + 1).integers(0, 300, count)
    return Reservoir.of(columns, found, token, np.full(count, 0.9))


def learned(reservoir: Reservoir) -> torch.Tensor:
    memory = slab()
    consolidate(memory, 0, reservoir, values(), SPEC, passes=8)
    return memory


def near(columns: np.ndarray, found: np.ndarray, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """A code that has the `shared` largest of 8 units of another in common with it; its overlap with that one."""
    keep = np.argsort(found)[-shared:]
    free = np.setdiff1d(np.arange(SPEC.code_width), columns)[: len(columns) - shared]
    units = np.concatenate([columns[keep], free])
    heights = np.concatenate([found[keep], np.full(len(free), 0.15)])
    order = np.argsort(units)
    return units[order].astype(np.int32), (heights / np.linalg.norm(heights))[order]


def test_what_is_learned_is_answered_and_only_that_is_drawn():
    reservoir, memory = entries(40), learned(entries(40))
    assert answered(memory, 0, reservoir, values()).all()
    assert len(drawn(memory, 0, reservoir, values()).entries) == 40
    memory[0, torch.from_numpy(reservoir.columns_RK[:10]).long().flatten()] = 0
    probes = drawn(memory, 0, reservoir, values())
    lost = set(reservoir.priority_R[:10].tolist())
    assert 20 <= len(probes.entries) <= 30
    assert not lost & set(probes.entries.priority_R.tolist())


def test_a_large_reservoir_is_sampled():
    reservoir = entries(PROBES_MAX + 30)
    probes = drawn(learned(reservoir), 0, reservoir, values())
    assert 0 < len(probes.entries) <= PROBES_MAX
    assert len(probes.known_R) == len(reservoir)


def test_noise_is_noticed():
    reservoir, memory = entries(40), learned(entries(40))
    probes = drawn(memory, 0, reservoir, values())
    memory[0] = torch.randn(memory[0].shape, generator=torch.Generator().manual_seed(1)).half()
    asked = still_asked(probes, reservoir, SPEC)
    assert len(asked) == 40
    assert answered(memory, 0, asked, values()).sum() < 4


def test_a_correction_is_no_loss():
    """Ten facts are corrected, in the same words and in others; the older ones are not asked for any more."""
    reservoir = entries(40)
    probes = drawn(learned(reservoir), 0, reservoir, values())
    rows = [(reservoir.columns_RK[n], reservoir.values_RK[n].astype(np.float32)) for n in range(10)]
    rows = [row if n < 5 else near(*row, shared=4) for n, row in enumerate(rows)]
    columns, found = (np.stack(part) for part in zip(*rows, strict=True))
    older, newer = np.zeros((2, 10, SPEC.code_width))
    np.put_along_axis(older, reservoir.columns_RK[:10].astype(int), reservoir.values_RK[:10], 1)
    np.put_along_axis(newer, columns.astype(int), found, 1)
    overlap = (older * newer).sum(1)
    assert all((overlap[5:] > REWRITTEN_OVERLAP) & (overlap[5:] < REPLACED_OVERLAP)), overlap
    token = (reservoir.token_R[:10] + 1) % 300
    after = reservoir.offered(columns, found, token, np.full(10, 0.9), SPEC)
    assert len(after) == 45, "five replace what they correct, five stand beside it"
    memory = learned(reservoir.take(np.arange(10, 40)))  # which knows none of the ten
    assert (~answered(memory, 0, probes.entries, values())).sum() >= 5
    asked = still_asked(probes, after, SPEC)
    assert set(asked.priority_R.tolist()) == set(reservoir.priority_R[10:].tolist())


def test_what_is_told_again_is_asked_for_again():
    """Rex, then Max, then Rex: the first is what holds, and known."""
    reservoir = entries(20)
    probes = drawn(learned(reservoir), 0, reservoir, values())
    once = (reservoir.columns_RK[:1], reservoir.values_RK[:1])
    other = reservoir.offered(*once, reservoir.token_R[:1] + 1, np.array([0.9]), SPEC)
    assert len(still_asked(probes, other, SPEC)) == 19
    again = other.offered(*once, reservoir.token_R[:1], np.array([0.9]), SPEC)
    assert len(still_asked(probes, again, SPEC)) == 20


def test_no_reservoir_asks_nothing():
    empty = Reservoir.empty(SPEC)
    probes = drawn(slab(), 0, empty, values())
    assert len(still_asked(probes, empty, SPEC)) == len(probes.entries) == 0
