"""Recall probes: entries of a reservoir that a memory answers, to be asked again when it has changed.

An entry is a key as it was written, and the token that it was written for. It is asked by reading the memory at that
key, and answered if of all values of the vocabulary the token's is the nearest.

Axes: P probes, R entries of a reservoir, K active units, H code width, D value width, V vocabulary, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

PROBES_MAX = 64
REWRITTEN_OVERLAP = 0.5
"""Overlap a . b of two unit codes from which on the newer has rewritten the older's key: what the older reads is then
by right another's. Below the .618 at which one step of the newer outvotes the older (`titanmem/reservoir.py`), since a
fact may be corrected in several tokens."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probes:
    """What a memory answered at one version."""

    entries: Reservoir
    """At most PROBES_MAX, all answered."""
    known_R: np.ndarray
    """uint64: hashes of all entries that the reservoir held then. Others are newer."""


def drawn(slab_SHD: Tensor, slot: int, reservoir: Reservoir, values_VD: Tensor) -> Probes:
    """A uniform sample of the reservoir, less what the memory in `slot` does not answer."""
    sample = reservoir.cut(PROBES_MAX)
    right_P = answered(slab_SHD, slot, sample, values_VD)
    return Probes(entries=sample.take(right_P), known_R=reservoir.priority_R)


def still_asked(probes: Probes, reservoir: Reservoir, spec: MemorySpec) -> Reservoir:
    """The probes whose key nobody has rewritten since, so that a correction is not taken for a loss.

    Left out are those that the reservoir has let go, which it does with whatever a newer entry replaces, and those
    that overlap a newer entry by REWRITTEN_OVERLAP or more.
    """
    entries = probes.entries
    stays_P = np.isin(entries.priority_R, reservoir.priority_R)
    newer = reservoir.take(~np.isin(reservoir.priority_R, probes.known_R))
    newer_RK, dense_H = newer.values_RK.astype(np.float32), np.zeros(spec.code_width, np.float32)
    for place in stays_P.nonzero()[0] if len(newer) else ():
        columns_K = entries.columns_RK[place]
        dense_H[columns_K] = entries.values_RK[place]
        overlap_R = np.einsum("rk,rk->r", dense_H[newer.columns_RK], newer_RK)
        stays_P[place] = overlap_R.max() < REWRITTEN_OVERLAP
        dense_H[columns_K] = 0
    return entries.take(stays_P)


@torch.no_grad()
def answered(slab_SHD: Tensor, slot: int, entries: Reservoir, values_VD: Tensor) -> np.ndarray:
    """Which entries the memory in `slot` answers, bool [P]. `values_VD` holds the value of each token."""
    if not len(entries):
        return np.zeros(0, bool)
    columns_PK = torch.from_numpy(entries.columns_RK).long().to(slab_SHD.device)
    codes_PK = torch.from_numpy(entries.values_RK).float().to(slab_SHD.device)
    slots_P = torch.full((len(entries),), slot, device=slab_SHD.device)
    read_PD = ops.sparse_read(slab_SHD, slots_P, columns_PK, codes_PK).to(values_VD.device)
    token_P = (read_PD @ values_VD.T).argmax(-1).cpu().numpy()
    return token_P == entries.token_R
