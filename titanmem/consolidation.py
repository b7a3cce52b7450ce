"""Consolidation: some passes of the delta rule over what a memory has written, while nobody talks to it.

One pass of the rule leaves each fact disturbed by those told after it. Passing over the same entries again is the
method of Kaczmarz for the linear system A W = V of codes and values ("Angenäherte Auflösung von Systemen linearer
Gleichungen", 1937), so W goes to the least-squares solution that is nearest to where it started.

Axes: R entries, K active units, D value width, V vocabulary, H code width, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import ops
from titanmem import bounds
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

PASSES = 3
"""Passes of one consolidation."""
PASSES_MAX = 16

REPLAY_ALPHA = 0.0
"""Share of the rewritten columns that a replay forgets; more if θ_M is nearly as large as it may be."""


@torch.no_grad()
def replay(
    slab_SHD: Tensor,
    slot: int,
    reservoir: Reservoir,
    values_VD: Tensor,
    spec: MemorySpec,
    passes: int = PASSES,
    alpha: float = REPLAY_ALPHA,
) -> Iterator[int]:
    """Consolidate the slot in place, one update of at most `tokens_per_update` entries for each item taken.

    Yields the number of updates done. `values_VD` holds the value of each token of the vocabulary. What comes out is a
    function of slot, reservoir and passes alone: stopping between items and going on changes no bit.
    Raises ValueError for passes outside 1 to PASSES_MAX.
    """
    if not 1 <= passes <= PASSES_MAX:
        raise ValueError(f"passes = {passes}: must be from 1 to {PASSES_MAX}")
    device = slab_SHD.device
    alpha = max(alpha, bounds.crowded_share(bounds.utilisation(slab_SHD[slot], spec)))
    columns_RK = torch.from_numpy(reservoir.columns_RK).long().to(device)
    values_RK = torch.from_numpy(reservoir.values_RK).float().to(device)
    weight_R = torch.from_numpy(reservoir.gate_R).float().to(device)
    token_R = torch.from_numpy(reservoir.token_R).long().to(values_VD.device)
    slots, alphas = torch.tensor([slot], device=device), torch.tensor([alpha], device=device)
    done = 0
    for _ in range(passes):
        for start in range(0, len(reservoir), spec.tokens_per_update):
            group = slice(start, min(start + spec.tokens_per_update, len(reservoir)))
            rows_M, new_MD = ops.sparse_update(
                slab_SHD,
                slots,
                torch.tensor([group.stop - start], device=device),
                columns_RK[group],
                values_RK[group],
                values_VD[token_R[group]].to(device),
                weight_R[group],
                alphas,
            )
            ops.sparse_apply(slab_SHD, rows_M, new_MD)
            done += 1
            yield done


def consolidate(
    slab_SHD: Tensor,
    slot: int,
    reservoir: Reservoir,
    values_VD: Tensor,
    spec: MemorySpec,
    passes: int = PASSES,
    alpha: float = REPLAY_ALPHA,
) -> int:
    """The whole of `replay` at once; the number of updates."""
    return max(replay(slab_SHD, slot, reservoir, values_VD, spec, passes, alpha), default=0)
