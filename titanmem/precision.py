"""Matrix products of training in bfloat16, on processors that have units for it.

The decoder's layers and the lookahead take most of a training step. With AVX-512 BF16 a core multiplies bfloat16 five
times as fast as float32, with AMX ten times; without either it emulates it, a hundred times slower (docs/log.md). So
layers run under autocast where that pays, and in float32 elsewhere. Weights, gradients, optimisers and all that the
memory computes from keys and queries are float32 in either case; serving is too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextmanager
def quick_products() -> Iterator[None]:
    """Inside, products are of bfloat16 where that is faster; what comes out of a layer may then be bfloat16 too."""
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_units()), warnings.catch_warnings():
        # Norms of bfloat16 with float32 weights are not fused, which is all that PyTorch wants to say.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield
