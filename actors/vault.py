"""A user's way to and from rest: newest valid version out of the store, a resident's state into a new one.

The journal keeps what the newest *two* stored versions do not both hold, so that a newest version that turns out
damaged costs nothing: the one before it and the journal give the same memory. Where more than that is damaged, `Found`
says how far it went, and whoever replays the journal sees what is missing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

import numpy as np

from actors.slab import Resident, Slab
from storage.errors import (
    BadMemoryFile,
    CorruptIndex,
    Forgotten,
    NoSuchMemory,
    StoreError,
    StoreUnavailable,
    StoreUnfit,
    VersionConflict,
    WrongBase,
)
from storage.head import VersionInfo
from storage.journal import Journal
from storage.memory import SEEN_MAX, Memory, Replay
from storage.names import UserKey
from storage.store import MemoryStore
from storage.titanmem import encode
from titanmem.reservoir import Reservoir
from titanmem.spec import MemorySpec

logger = logging.getLogger(__name__)

USERS_LOOKED_AT = 8
"""Of those in a store, to tell at a start whose memories it holds."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the store has of a user."""

    memory: Memory | None = None
    """The newest version that can be read; None if the user has none."""
    problem: BadMemoryFile | None = None
    """Why there is none although there are versions: then only a journal that begins at chunk 1 will do."""
    listed_version: int = 0
    """Number of the newest version, readable or not."""
    listed_chunk_id: int = 0
    """Last chunk that it or a damaged one held."""
    erasing: bool = False
    """The user is erased, and whoever did it did not come to the end: what is left is not the user's any more."""


class Vault:
    """Loads and stores memories of one shard under its epoch. Blocking; called in a thread."""

    def __init__(
        self, store: MemoryStore, layout: Layout, epoch: int, on_damage: Callable[[str], None]
    ) -> None:
        self.store, self.layout, self.epoch = store, layout, epoch
        self._on_damage = on_damage

    def check_model(self) -> None:
        """Raises WrongBase when the store's memories are another model's: each of their users would be refused.

        A few are looked at; a store that has any of ours is ours.
        """
        wrong: WrongBase | None = None
        for key in islice(self.store.users(), USERS_LOOKED_AT):
            try:
                self.version(key, None)
                return
            except WrongBase as error:
                wrong = error
            except (BadMemoryFile, NoSuchMemory, StoreUnfit):  # said when the user comes
                continue
        if wrong is not None:
            raise WrongBase(
                self.store.url, "its memories are of the model that is served", wrong.expected, wrong.found,
                "Serve the model that they were made with, or give this one a store and a journal folder of its own: "
                "a memory can not be carried over to another model, nor to the same one trained again.",
            )  # fmt: skip

    def newest(self, key: UserKey) -> Found:
        """The newest version that can be read, and how far damaged ones before it went.

        A damaged version is reported and the one before it taken; a HEAD that is damaged or gone is made anew from the
        versions. Raises WrongBase when the newest belongs to another model: an older one would be an older memory, not
        a better one.

        Whoever owned the user before can store nothing from here on: a version of theirs that came in now would count
        chunks that our journal counts otherwise, and a replay would pass over ours. Raises Fenced when we are older.
        """
        if self.store.tombstones.is_erasing(key):
            return Found(erasing=True)
        try:
            self._listed(key)
            self.store.claim(key, epoch=self.epoch)
            versions = self.store.versions(key)
        except BadMemoryFile as error:
            return Found(problem=error)
        if not versions:
            return Found()
        memory: Memory | None = None
        problem: BadMemoryFile | None = None
        try:
            memory, problems = self.store.newest_valid(
                key, expect_base=self.layout.base, expect_shape=self.layout.shape
            )
        except NoSuchMemory:  # erased in between
            return Found()
        except WrongBase:
            raise
        except BadMemoryFile as error:
            problem, problems = error, [error]
        for bad in problems:
            if isinstance(bad, WrongBase):
                raise bad
            self._on_damage(type(bad).__name__)
        held = memory.memory_version if memory is not None else 0
        reach = max((info.last_chunk_id for info in versions if info.version >= held), default=0)
        return Found(
            memory=memory, problem=problem, listed_version=versions[0].version, listed_chunk_id=reach
        )

    def begin(self, key: UserKey) -> None:
        """Before the first write for a user who came in without a version: shuts out whoever was owner before us.

        Their first version would count chunks that our journal counts otherwise. Raises Fenced when we are older, and
        StoreUnavailable when one of theirs has come in since we looked: the user has to come in again, with it.
        """
        try:
            self.store.claim(key, epoch=self.epoch, begin=True)
        except Forgotten:  # a new memory begins
            self.store.clear_tombstone(key, self.epoch)
            self.store.claim(key, epoch=self.epoch, begin=True)
        if self.store.versions(key):
            raise StoreUnavailable(
                f"{key}: a version of the owner before has just come in; try again", key=str(key)
            )

    def sweep(self, key: UserKey) -> None:
        """Remove what crashes of earlier owners have left of versions; what cannot be removed now stays."""
        try:
            for name in self.store.sweep(key, epoch=self.epoch):
                logger.info("%s was listed by no HEAD and is removed", name)
        except StoreError as error:
            logger.warning("%s: versions that no HEAD lists are left for now: %s", key, error)

    def _listed(self, key: UserKey) -> list[VersionInfo]:
        why: object = "it is gone"
        try:
            versions = self.store.versions(key)
            if versions or not self.store.has_lost_head(key):
                return versions
        except StoreUnfit as error:
            why = error
        self._report_head(key, why)
        return self.store.rebuild_head(key, epoch=self.epoch)

    def resting(self, key: UserKey) -> bytes | None:
        """The file of the newest readable version, for a backup; None, and reported, when there is none.

        One user's damage must not keep all others out of the backup.
        """
        try:
            return self.store.get_bytes(key)
        except NoSuchMemory:  # erased in between
            return None
        except (BadMemoryFile, StoreUnfit) as error:
            logger.error("%s: not as it was stored, and backed up from an older version: %s", key, error)
        try:
            found = self.newest(key)
            if found.memory is not None:
                return encode(found.memory)
            why: object = found.problem
        except (BadMemoryFile, StoreUnfit) as error:
            why = error
        self._on_damage("backup")
        logger.error("%s is left out of the backup: %s", key, why)
        return None

    def version(self, key: UserKey, version: int | None) -> Memory:
        """One stored version (None: the newest); NoSuchMemory or the file's own error."""
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
        resident.falls = int(memory.stats.get("falls", 0))
        resident.frozen = bool(memory.stats.get("frozen", 0))
        resident.tokens_since_stored = resident.segments_since_stored = 0
        resident.claimed, resident.swept = True, memory.epoch == self.epoch

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
            created_at=now or self.store.now(),
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
                "falls": float(resident.falls),
                "frozen": float(resident.frozen),
            },
        )

    def successor(self, memory: Memory, resident: Resident, *, falls: int, frozen: bool) -> Memory:
        """`memory`, of this or another user, as the version that follows all that was told to the resident.

        It ends after the journal's last chunk, so that no replay adds to it, and knows what was already written.
        """
        seen = OrderedDict.fromkeys(int(value) for value in memory.seen)
        seen.update(resident.seen)
        return replace(
            memory,
            key=resident.key,
            epoch=self.epoch,
            memory_version=max(resident.memory_version, memory.memory_version) + 1,
            last_chunk_id=max(resident.journaled_chunk_id, memory.last_chunk_id) + 1,
            created_at=self.store.now(),
            seen=np.array(list(seen)[-SEEN_MAX:], dtype=np.uint64),
            stats={**memory.stats, "falls": float(falls), "frozen": float(frozen)},
        )

    def put_state(self, resident: Resident, slab: Slab) -> int:
        """Store what is in the resident's slot; the version under which it is stored now. As `put`."""
        image = resident.unsettled
        if image is None or image.memory_version != resident.memory_version:
            image = resident.unsettled = self.image(resident, slab)
        # Until its outcome is known, the same bytes are sent: a put that arrives late lists the file that is there.
        try:
            version = self.put_over(image)
        except VersionConflict as conflict:
            # A put of the owner before us came in after we had looked: ours goes on from its number.
            resident.memory_version = max(resident.memory_version, conflict.found) + 1
            image = resident.unsettled = self.image(resident, slab)
            version = self.put_over(image)
        resident.unsettled = None
        return version

    def put_over(self, memory: Memory) -> int:
        """`put`, also for a user who was erased and has been told something since; the memory's version."""
        try:
            self.put(memory)
        except Forgotten:  # a new memory begins
            self.store.clear_tombstone(memory.key, self.epoch)
            self.put(memory)
        return memory.memory_version

    def put(self, memory: Memory) -> None:
        """Make a memory the newest stored version; Fenced when a newer epoch has written."""
        try:
            self._put(memory)
        except StoreUnfit as error:
            self._report_head(memory.key, error)
            with suppress(BadMemoryFile):  # this version is better than those that are bad
                self.store.rebuild_head(memory.key, epoch=self.epoch)
            self._put(memory)

    def _put(self, memory: Memory) -> None:
        try:
            self.store.put(memory, epoch=self.epoch)
        except VersionConflict:
            # A write whose outcome was not known has landed: under one epoch a version is written by one writer, once.
            newest = next(iter(self.store.versions(memory.key)), None)
            if newest is None or (newest.version, newest.epoch) != (memory.memory_version, self.epoch):
                raise

    def _report_head(self, key: UserKey, why: object) -> None:
        logger.error("%s: HEAD is made anew from the versions that are there: %s", key, why)
        self._on_damage("HEAD")


def erase_rest(journal: Journal, vault: Vault, key: UserKey) -> tuple[dict[str, int], list[str]]:
    """Removes what journal and store have of a user whose tombstone stands; rows by table, names. Blocking.

    The journal first: once the tombstone is settled, what it holds is a new memory's.
    """
    rows = journal.forget(key)
    return rows, vault.store.delete(key, epoch=vault.epoch)


def _replay(reservoir: Reservoir) -> Replay | None:
    if not len(reservoir):
        return None
    return Replay(
        columns=reservoir.columns_RK,
        values=reservoir.values_RK,
        tokens=reservoir.token_R,
        gates=reservoir.gate_R,
    )
