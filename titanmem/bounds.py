"""What keeps a fold in bounds when what is told, or the memory itself, goes out of hand.

Part of the fold, and like it a pure function of segment and memory: a replay of the journal is bounded in the same
places to the same bits, so nothing of this is stored. `actors/guard.py` watches over what these bounds do not hold.

Axes: N tokens of a chunk that the gate let through, H code width, D value width.
"""

from __future__ import annotations

import math

from torch import Tensor

from titanmem.spec import MemorySpec

SURPRISE_RATE_MAX = 0.2
"""Share of a chunk's tokens that may be written. More is not news but noise, and the threshold rises for that chunk."""
UTILISATION_MAX = 0.8
"""|θ_M| / max_norm above which an update forgets more of the columns that it rewrites."""
FORGET_SHARE_MAX = 0.5
"""What is forgotten at utilisation 1. Forgetting comes on top of a delta step from the old columns, so the read of a
key goes from y to (1 - w - α) y + w v: with more than this a step of w = 1 would overshoot to the other side."""


def most_written(spec: MemorySpec) -> int:
    """Tokens that one chunk may write: SURPRISE_RATE_MAX of `chunk_size`, and never none.

    Of the chunk's size, not of how much of it there is: a turn of twelve tokens whose three say a fact is a chunk as
    well, and is written whole.
    """
    return max(1, int(SURPRISE_RATE_MAX * spec.chunk_size))


def most_surprising(surprise_N: Tensor, most: int) -> Tensor:
    """Places of the `most` largest, rising, int64: what is over a threshold raised just so far. Ties: the earlier."""
    return surprise_N.argsort(descending=True, stable=True)[:most].sort().values


def norm(written_HD: Tensor) -> float:
    """|θ_M| of a written layer. Row by row, then in float64: the bits do not depend on the number of threads."""
    return math.sqrt(float(written_HD.float().square().sum(-1).double().sum()))


def utilisation(written_HD: Tensor, spec: MemorySpec) -> float:
    """|θ_M| / max_norm. Reads the whole slot: asked for once a chunk, and only by chunks that write."""
    return norm(written_HD) / spec.max_norm


def forget_share(momentum: float, spec: MemorySpec, used: float = 0.0) -> float:
    """α: how much of the columns that an update rewrites is forgotten first.

    σ(λ S - γ), and above a utilisation `used` of UTILISATION_MAX at least a share that rises to FORGET_SHARE_MAX.
    """
    ordinary = 1.0 / (1.0 + math.exp(spec.forget_bias - spec.forget_slope * momentum))
    return max(ordinary, crowded_share(used))


def crowded_share(used: float) -> float:
    """What is to be forgotten at the least at this utilisation: 0 up to UTILISATION_MAX, FORGET_SHARE_MAX from 1 on."""
    excess = (used - UTILISATION_MAX) / (1.0 - UTILISATION_MAX)
    return FORGET_SHARE_MAX * min(1.0, max(0.0, excess))
