"""Who is resident: a user comes in by file and journal, is written in order, rests in the store, and goes.

Everything here runs on the shard's event loop and hands blocking work to threads: `fold_pool` for the arithmetic of
updates, `store_pool` for the store. One user is served by one turn at a time (`turn`), so a memory is written in the
order of its journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from actors.errors import QueueFull
from actors.figures import Figures
from actors.slab import Resident, Slab
from actors.vault import Vault
from actors.writer import SlotWriter
from storage.errors import Fenced, Forgotten, StoreError, TitanmemError
from storage.journal import Journal
from storage.memory import SEEN_MAX
from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX, Segment
from titanmem.fold import Encoder, Fold
from titanmem.tracing import continued

logger = logging.getLogger(__name__)

T = TypeVar("T")

STORE_INTERVAL_S = 2.0
"""Shortest time between two stored versions of a user who is being written all the time."""


def hash_of_name(name: str) -> int:
    """uint64 under which an update or a document is remembered as already written."""
    return xxhash.xxh3_64_intdigest(name.encode())


def document_id(name: str) -> int:
    """48 bits of a document's name, see `Resident.tail_of`."""
    return hash_of_name(name) >> 16


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which comes to its end even if whoever waits for it is cancelled meanwhile.

    A user's turn lasts as long: else a thread would fold or store what the next turn is changing already.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            logger.warning("what was cancelled has failed, too: %s", error)
        raise


class Roster:
    """Residents of one shard and their way in, on and out."""

    def __init__(
        self, *, slab: Slab, vault: Vault, journal: Journal, encoder: Encoder, figures: Figures, persist_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.slab, self.vault, self.journal = slab, vault, journal
        self.spec, self.writer = encoder.spec, SlotWriter(slab, encoder, figures)
        self._figures, self._persist_tokens, self._clock = figures, persist_tokens, clock
        self._fold_pool = ThreadPoolExecutor(1, "fold")
        self._store_pool = ThreadPoolExecutor(2, "store")
        self._turns: dict[UserKey, asyncio.Lock] = {}
        self._waiting: dict[UserKey, int] = {}
        self._placing = asyncio.Lock()
        self._stores: dict[UserKey, asyncio.Task[None]] = {}
        self.fenced: Fenced | None = None
        """Why this shard may not write any more; set by the first write that the store refuses."""

    # -- coming and going -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def turn(self, key: UserKey, *, upkeep: bool = False) -> AsyncIterator[Resident]:
        """The user's resident, for this caller alone; activated if need be, and not evicted meanwhile.

        With `upkeep` it does not count as a use: the user has rested as long as before.
        """
        lock = self._turns.setdefault(key, asyncio.Lock())
        self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            async with lock:
                held = self.slab.peek(key) if upkeep else self.slab.get(key)
                resident = held or await self._activate(key)
                resident.users += 1
                try:
                    yield resident
                finally:
                    resident.users -= 1
                    if not upkeep:
                        resident.used_at_s = self._clock()
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key], self._turns[key]

    def wanted(self, key: UserKey) -> bool:
        """Whether somebody has the user's turn or waits for it."""
        return key in self._turns

    def idle_s(self, resident: Resident) -> float:
        """Seconds since the user's last request."""
        return self._clock() - resident.used_at_s

    async def _activate(self, key: UserKey) -> Resident:
        """Newest valid version into a slot, then what the journal holds beyond it."""
        async with self._placing:
            if not self.slab.has_room():
                await self._evict_one()
            resident = self.slab.place(key)
            resident.users += 1
        try:
            newest, listed = await self._in_store_pool(self.vault.newest, key)
            if newest is not None:
                self.vault.restore(newest, resident, self.slab)
            for value in self.journal.seen(key):
                self._remember(resident, value)
            for segment in self.journal.pending(key, resident.last_chunk_id):
                resident.journaled_chunk_id = segment.last_chunk_id
                await self.fold(resident, segment)
            # A damaged newest version keeps its number: what was rebuilt beside it becomes a newer one.
            resident.memory_version = max(
                resident.memory_version, listed + 1 if resident.stored_version < listed else 0
            )
        except BaseException:
            resident.users -= 1
            self.slab.release(resident)
            raise
        resident.users -= 1
        return resident

    async def _evict_one(self) -> None:
        """Store and release whoever has rested longest; raises QueueFull when everybody is being served."""
        victim = next((r for r in self.slab.residents() if r.users == 0 and r.key not in self._turns), None)
        if victim is None:
            raise QueueFull(f"the slab of {self.slab.slots} slots")
        async with self.turn(victim.key) as resident:
            try:
                await self.store(resident)
            except StoreError as error:
                if isinstance(error, Fenced):
                    raise
                logger.warning("%s is evicted unstored, the journal has it: %s", victim.key, error)
            self.drop(resident)

    def drop(self, resident: Resident) -> None:
        """Give the slot back without storing: the user is erased, or the memory comes from elsewhere now."""
        users, resident.users = resident.users, 0
        self.slab.release(resident)
        resident.users = users

    # -- writing ----------------------------------------------------------------------------------------------

    def segment(
        self, resident: Resident, *, update_id: str, conversation: str, role: str, context: np.ndarray,
        tokens: np.ndarray,
    ) -> Segment:  # fmt: skip
        """The next segment of this user, at most SEGMENT_TOKENS_MAX ids."""
        assert 0 < len(tokens) <= SEGMENT_TOKENS_MAX, "callers cut tokens into segments"
        first = resident.journaled_chunk_id + 1
        return Segment(
            key=resident.key, update_id=update_id, conversation=conversation, role=role,  # type: ignore[arg-type]
            context=np.ascontiguousarray(context[-self.spec.window :], dtype=np.int32),
            tokens=np.ascontiguousarray(tokens, dtype=np.int32),
            first_chunk_id=first, last_chunk_id=first + -(-len(tokens) // self.spec.chunk_size) - 1,
        )  # fmt: skip

    async def append(self, resident: Resident, segment: Segment, seen: Sequence[int] = ()) -> bool:
        """Make a segment durable; False when its update id was already there, and nothing is to be done."""
        appended = await asyncio.wrap_future(self.journal.append(segment, seen))
        for value in seen:
            self._remember(resident, value)
        if appended.duplicate:
            return False
        resident.journaled_chunk_id = segment.last_chunk_id
        return True

    async def fold(self, resident: Resident, segment: Segment) -> Fold:
        """Write a journalled segment into its user's slot."""
        return self._folded(resident, segment, await self.in_fold_pool(self.writer.fold, resident, segment))

    async def settle(
        self, resident: Resident, segment: Segment, copy_1HD: torch.Tensor, updates: int
    ) -> Fold:
        """Put in place what the journalled replay `segment` makes of the slot; the caller has it in a copy."""
        # Not in the fold thread: the user's turn would be held while others are folded.
        done = await asyncio.to_thread(self.writer.put_replayed, resident, copy_1HD, updates)
        return self._folded(resident, segment, done)

    def _folded(self, resident: Resident, segment: Segment, done: Fold) -> Fold:
        if done.reservoir is not None:
            resident.reservoir = done.reservoir
        resident.momentum = done.momentum
        resident.memory_version += 1
        resident.last_chunk_id = segment.last_chunk_id
        resident.updates += done.updates
        if segment.role == "replay":
            resident.consolidated = resident.tokens_written
            return done
        resident.tokens_seen += len(segment.tokens)
        resident.tokens_since_stored += len(segment.tokens)
        resident.tokens_written += done.tokens_written
        if segment.role == "document":
            resident.tail = np.concatenate([segment.context, segment.tokens])[-self.spec.window :]
            resident.tail_of = document_id(segment.conversation)
        self._figures.updates.add("written" if done.updates else "skipped", done.chunks)
        return done

    def _remember(self, resident: Resident, value: int) -> None:
        resident.seen[value] = None
        resident.seen.move_to_end(value)
        while len(resident.seen) > SEEN_MAX:
            resident.seen.popitem(last=False)

    # -- resting ----------------------------------------------------------------------------------------------

    def store_soon(self, resident: Resident) -> None:
        """Store a new version in the background once enough was written since the last one."""
        if resident.tokens_since_stored < self._persist_tokens or resident.key in self._stores:
            return
        task = asyncio.create_task(self._store_later(resident))
        self._stores[resident.key] = task
        task.add_done_callback(lambda _: self._stores.pop(resident.key, None))

    async def _store_later(self, resident: Resident) -> None:
        try:
            async with self.turn(resident.key) as current:
                if current is resident:
                    await self.store(resident)
        except TitanmemError as error:
            logger.warning("%s stays in the journal for now: %s", resident.key, error)
        await asyncio.sleep(STORE_INTERVAL_S)

    async def store(self, resident: Resident) -> bool:
        """Store what is not stored yet; False if there was nothing. The caller holds the turn, or nobody does.

        Raises Fenced when a newer epoch has written this user, StoreError when the store cannot.
        """
        return resident.dirty and await unbroken(self._store(resident))

    async def _store(self, resident: Resident) -> bool:
        started = time.perf_counter()
        version, chunk = resident.memory_version, resident.last_chunk_id
        try:
            with continued({}, "store", titan__memory_version=version):
                await self._in_store_pool(self._put, resident)
        except StoreError as error:
            self._figures.store_errors.add("put")
            if isinstance(error, Fenced):
                self.fenced = error
            raise
        self._figures.persist_s.observe(time.perf_counter() - started)
        resident.stored_version, resident.tokens_since_stored = version, 0
        before, resident.stored_chunk_id = resident.stored_chunk_id, chunk
        if before:
            await asyncio.wrap_future(self.journal.trim(resident.key, before))
        return True

    def _put(self, resident: Resident) -> None:
        image = self.vault.image(resident, self.slab)
        try:
            self.vault.put(image)
        except Forgotten:
            # The user was erased, and has been told something since: a new memory begins.
            self.vault.store.clear_tombstone(resident.key, self.vault.epoch)
            self.vault.put(image)

    async def flush(self, idle_s: float = 0.0) -> int:
        """Store all residents whose user has been idle for `idle_s`; how many were stored."""
        stored = 0
        for resident in self.slab.residents():
            if resident.dirty and self.idle_s(resident) >= idle_s:
                async with self.turn(resident.key, upkeep=True) as current:
                    stored += await self.store(current)
        return stored

    async def close(self) -> None:
        """Stop the threads; whoever wants the memories stored has flushed them."""
        for task in list(self._stores.values()):
            task.cancel()
        await asyncio.gather(*self._stores.values(), return_exceptions=True)
        self._fold_pool.shutdown()
        self._store_pool.shutdown()

    async def in_fold_pool(self, work, *arguments):
        """One thread does all arithmetic of updates, in the order in which it is asked for."""
        return await asyncio.get_running_loop().run_in_executor(self._fold_pool, work, *arguments)

    async def _in_store_pool(self, work, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, work, *arguments)
