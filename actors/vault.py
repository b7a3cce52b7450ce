"""A user's way to and from rest: newest valid version out of the store, a resident's state into a new one.

The journal keeps what the newest *two* stored versions do not both hold, so that a newest version that turns out
damaged costs nothing: the one before it and the journal give the same memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from actors.slab import Resident, Slab
from storage.errors import CorruptIndex, NoSuchMemory, WrongBase
from storage.memory import SEEN_MAX, Memory, Replay
from storage.names import UserKey
from storage.store import MemoryStore
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the written layer lies in the flat positions of a file."""

    shape: tuple[tuple[int, ...], ...]
    offset: int
    rule: str
    base: str
    vocabulary: int
    """Tokens that a reservoir may name."""

    @classmethod
    def of(cls, spec: MemorySpec, base: str, vocabulary: int) -> Layout:
        shape = ((spec.d_nltm, spec.key_dim), (spec.code_width, spec.d_nltm), spec.written_shape)
        offset = sum(rows * columns for rows, columns in shape[:-1])
        return cls(shape=shape, offset=offset, rule=spec.rule, base=base, vocabulary=vocabulary)


class Vault:
    """Loads and stores memories of one shard under its epoch. Blocking; called in a thread."""

    def __init__(
        self, store: MemoryStore, layout: Layout, epoch: int, on_damage: Callable[[str], None]
    ) -> None:
        self.store, self.layout, self.epoch = store, layout, epoch
        self._on_damage = on_damage

    def newest(self, key: UserKey) -> tuple[Memory | None, int]:
        """The newest version that can be read, None if the user has none; and the newest number that is listed.

        A damaged version is reported and the one before it taken. Raises its error when no version can be read, and
        WrongBase when the newest belongs to another model: an older one would be an older memory, not a better one.

        Whoever owned the user before can store nothing from here on: a version of theirs that came in now would count
        chunks that our journal counts otherwise, and a replay would pass over ours. Raises Fenced when we are older.
        """
        self.store.claim(key, epoch=self.epoch)
        versions = self.store.versions(key)
        if not versions:
            return None, 0
        try:
            memory, problems = self.store.newest_valid(
                key, expect_base=self.layout.base, expect_shape=self.layout.shape
            )
        except NoSuchMemory:  # erased in between
            return None, 0
        for problem in problems:
            if isinstance(problem, WrongBase):
                raise problem
            self._on_damage(type(problem).__name__)
        return memory, versions[0].version

    def version(self, key: UserKey, version: int) -> Memory:
        """One stored version; NoSuchMemory or the file's own error."""
        return self.store.get(key, version, expect_base=self.layout.base, expect_shape=self.layout.shape)

    def restore(self, memory: Memory, resident: Resident, slab: Slab) -> None:
        """Put a stored memory into a resident's slot; CorruptIndex for a reservoir that no memory can have."""
        reservoir = self.reservoir_of(memory, slab.spec)
        slab.load(resident, memory.nonzero_idx - self.layout.offset, memory.theta_val)
        resident.reservoir = reservoir
        resident.memory_version = resident.stored_version = memory.memory_version
        resident.last_chunk_id = resident.journaled_chunk_id = resident.stored_chunk_id = memory.last_chunk_id
        resident.tokens_seen = memory.tokens_seen
        resident.momentum = float(memory.momentum[-1]) if len(memory.momentum) else 0.0
        resident.tail, resident.tail_of = memory.tail, int(memory.stats.get("tail_of", 0))
        resident.seen = OrderedDict.fromkeys(int(value) for value in memory.seen)
        resident.tokens_written = int(memory.stats.get("tokens_written", 0))
        resident.updates = int(memory.stats.get("updates", 0))
        resident.consolidated = int(memory.stats.get("consolidated", 0))

    def reservoir_of(self, memory: Memory, spec: MemorySpec) -> Reservoir:
        """The reservoir of a file; files of before there was one have none. Raises CorruptIndex."""
        rows = memory.replay
        if rows is None:
            return Reservoir.empty(spec)
        try:
            return Reservoir.loaded(
                rows.columns, rows.values, rows.tokens, rows.gates, spec, self.layout.vocabulary
            )
        except ValueError as error:
            rule = "replay_* are entries that the model can have written"
            raise CorruptIndex(
                f"memory of {memory.key}", rule, "codes, gates and tokens of it", str(error)
            ) from None

    def image(self, resident: Resident, slab: Slab, now: datetime | None = None) -> Memory:
        """The resident's state as it would rest; the caller holds the user's turn, so nothing moves meanwhile."""
        positions, values = slab.nonzero(resident)
        return Memory(
            key=resident.key,
            memory_version=resident.memory_version,
            epoch=self.epoch,
            last_chunk_id=resident.last_chunk_id,
            tokens_seen=resident.tokens_seen,
            base=self.layout.base,
            rule=self.layout.rule,
            theta_shape=self.layout.shape,
            written_layers=(len(self.layout.shape) - 1,),
            created_at=now or datetime.now(UTC),
            nonzero_idx=positions.astype(np.int64) + self.layout.offset,
            theta_val=values,
            momentum=np.array([0.0] * (len(self.layout.shape) - 1) + [resident.momentum], dtype=np.float16),
            replay=_replay(resident.reservoir),
            tail=resident.tail,
            seen=np.array(list(resident.seen)[-SEEN_MAX:], dtype=np.uint64),
            stats={
                "tokens_written": float(resident.tokens_written),
                "updates": float(resident.updates),
                "consolidated": float(resident.consolidated),
                "norm": slab.norm(resident),
                "tail_of": float(resident.tail_of),
            },
        )

    def put(self, memory: Memory) -> None:
        """Make a memory the newest stored version; Fenced when a newer epoch has written."""
        self.store.put(memory, epoch=self.epoch)


def _replay(reservoir: Reservoir) -> Replay | None:
    if not len(reservoir):
        return None
    return Replay(
        columns=reservoir.columns_RK,
        values=reservoir.values_RK,
        tokens=reservoir.token_R,
        gates=reservoir.gate_R,
    )
