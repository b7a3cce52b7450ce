"""One user's memory at one version, as it rests: the record that `titanmem.py` reads and writes.

Legend of axes: n positions where θ_M differs from θ_M₀, m momenta, R reservoir entries, K code places,
t tokens, s hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from storage.header import ELEMENTS_MAX
from storage.names import UserKey

SEEN_MAX = 1024
REPLAY_MAX = 65536
REPLAY_PLACES_MAX = 256
TAIL_TOKENS_MAX = 65536


def no_tokens() -> np.ndarray:
    return np.zeros(0, np.int32)


def no_hashes() -> np.ndarray:
    return np.zeros(0, np.uint64)


def _check_array(name: str, array: np.ndarray, dtype: type, dimensions: int, length_max: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != dimensions:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: {found}: expected {np.dtype(dtype)} of {dimensions} dimension(s)")
    if len(array) > length_max:
        raise ValueError(f"{name}: {len(array)} entries: expected at most {length_max}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replay:
    """The reservoir of written entries, from which consolidation and the guard's probes draw."""

    columns: np.ndarray
    """int32 [R, K]: places of the code."""
    values: np.ndarray
    """float16 [R, K]: values of the code."""
    tokens: np.ndarray
    """int32 [R]."""
    gates: np.ndarray
    """float16 [R]."""

    def __post_init__(self) -> None:
        _check_array("replay.columns", self.columns, np.int32, 2, REPLAY_MAX)
        _check_array("replay.values", self.values, np.float16, 2, REPLAY_MAX)
        _check_array("replay.tokens", self.tokens, np.int32, 1, REPLAY_MAX)
        _check_array("replay.gates", self.gates, np.float16, 1, REPLAY_MAX)
        lengths = {len(self.columns), len(self.values), len(self.tokens), len(self.gates)}
        places = self.columns.shape[1]
        if len(lengths) > 1 or self.values.shape != self.columns.shape or places > REPLAY_PLACES_MAX:
            raise ValueError(f"replay: arrays differ in length or have over {REPLAY_PLACES_MAX} places a row")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Memory:
    """One user's memory at one version, as it rests. Arrays are not copied: do not change them afterwards."""

    key: UserKey
    memory_version: int
    """Counts up by one for each segment folded."""
    epoch: int
    """The writer's fencing epoch."""
    last_chunk_id: int
    """The last chunk folded into this version."""
    tokens_seen: int
    base: str
    """Hash of the θ_M₀ and θ_F it belongs to."""
    rule: str
    theta_shape: tuple[tuple[int, ...], ...]
    """Shapes of the layers, in order; flat positions run through all of them, row-major."""
    written_layers: tuple[int, ...]
    created_at: datetime
    """With its zone; kept to the microsecond, in UTC."""
    nonzero_idx: np.ndarray
    """int64 [n], strictly rising."""
    theta_val: np.ndarray
    """float16 [n]: θ_M − θ_M₀ at those positions."""
    momentum: np.ndarray
    """float16 [m]: one a layer (of all or of the written ones), or one an element."""
    replay: Replay | None = None
    tail: np.ndarray = field(default_factory=no_tokens)
    """int32 [t]: tokens not yet offered to the memory, and the attention window behind them."""
    seen: np.ndarray = field(default_factory=no_hashes)
    """uint64 [s]: hashes of update ids and conversation prefixes already written, newest last."""
    stats: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_array("nonzero_idx", self.nonzero_idx, np.int64, 1, ELEMENTS_MAX)
        _check_array("theta_val", self.theta_val, np.float16, 1, ELEMENTS_MAX)
        _check_array("momentum", self.momentum, np.float16, 1, ELEMENTS_MAX)
        _check_array("tail", self.tail, np.int32, 1, TAIL_TOKENS_MAX)
        _check_array("seen", self.seen, np.uint64, 1, SEEN_MAX)
        if self.created_at.tzinfo is None:
            raise ValueError(f"created_at: {self.created_at}: expected a time with its zone")
