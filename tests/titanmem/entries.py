"""Codes, values and written tokens at random, for tests of what happens to a memory after the encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from titanmem.fold import Written
from titanmem.spec import MemorySpec

SPEC = MemorySpec(
    d_nltm=32, key_dim=16, value_dim=16, code_width=512, code_active=8, conv=4, chunk_size=16, window=16,
    top_k_ratio=0.05, forget_bias=32.0,
)  # fmt: skip
"""A small memory that forgets nothing by itself."""
VOCABULARY = 300


def values(spec: MemorySpec = SPEC) -> Tensor:
    """The value of each token, unit norm, [V, D]."""
    drawn = torch.randn(VOCABULARY, spec.value_dim, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1)


def codes(count: int, seed: int, spec: MemorySpec = SPEC) -> tuple[np.ndarray, np.ndarray]:
    """Columns int32 [N, K], rising, and values float32 [N, K] of unit norm: no two codes have much in common."""
    random = np.random.default_rng(seed)
    columns = [np.sort(random.choice(spec.code_width, spec.code_active, replace=False)) for _ in range(count)]
    found = random.uniform(0.5, 1.0, (count, spec.code_active)).astype(np.float32)
    return np.array(columns, np.int32), found / np.linalg.norm(found, axis=1, keepdims=True)


def told(positions: np.ndarray, seed: int, spec: MemorySpec = SPEC, weight: float = 0.9) -> Written:
    """A segment whose tokens at these places the gate lets through, each with a key and a token of its own."""
    columns, found = codes(len(positions), seed, spec)
    token = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, VOCABULARY, len(positions)))
    segment = torch.zeros(int(positions[-1]) + 1, dtype=torch.int64)
    segment[torch.from_numpy(positions.astype(np.int64))] = token
    return Written(
        position_N=torch.from_numpy(positions.astype(np.int64)),
        columns_NK=torch.from_numpy(columns).long(),
        values_NK=torch.from_numpy(found),
        target_ND=values(spec)[token],
        weight_N=torch.full((len(positions),), weight),
        token_N=token,
        segment_T=segment,
    )


def slab(spec: MemorySpec = SPEC) -> Tensor:
    """One empty slot."""
    return torch.zeros(1, *spec.written_shape, dtype=torch.float16)
