"""Who is resident: a user comes in by file and journal, is written in order, rests in the store, and goes.

Everything here runs on the shard's event loop and hands blocking work to threads: `fold_pool` for the arithmetic of
updates, `store_pool` for the store. One user is served by one turn at a time (`turn`), so a memory is written in the
order of its journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import torch

from actors.arrival import come_in
from actors.errors import MemoryDamaged, QueueFull
from actors.figures import Figures
from actors.guard import Action
from actors.replicator import Replicator
from actors.seen import document_id, remember, update_hash
from actors.slab import Resident, Slab
from actors.unbroken import unbroken
from actors.vault import Found, Vault
from actors.watch import Finding, Watch
from actors.writer import SlotWriter
from storage.errors import Fenced, JournalError, StoreError, StoreUnavailable, TitanmemError
from storage.journal import Journal
from storage.memory import Memory
from storage.names import UserKey
from storage.segment import SEGMENT_TOKENS_MAX, Segment
from titanmem.fold import Encoder, Fold
from titanmem.tracing import continued

logger = logging.getLogger(__name__)

STORE_INTERVAL_S = 2.0
"""Shortest time between two stored versions of a user who is being written all the time."""
SEGMENTS_MAX = 32
"""Segments after which a new version is stored, however few their tokens: when a shard is lost, each that no version
has is folded again, some 30 ms on one core, before its user is answered."""


class Roster:
    """Residents of one shard and their way in, on and out."""

    def __init__(
        self, *, slab: Slab, vault: Vault, journal: Journal, replicator: Replicator, encoder: Encoder,
        figures: Figures, persist_tokens: int, consolidates: bool = True, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.slab, self.vault, self.journal, self.replicator = slab, vault, journal, replicator
        self.spec, self.writer = encoder.spec, SlotWriter(slab, encoder, figures)
        self.watch = Watch(slab, vault, journal, encoder, figures, consolidates=consolidates)
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
    async def turn(
        self, key: UserKey, *, upkeep: bool = False, leaving: bool = False
    ) -> AsyncIterator[Resident]:
        """The user's resident, for this caller alone; activated if need be, and not evicted meanwhile.

        With `upkeep` it does not count as a use: the user has rested as long as before. One whose slot cannot be what
        was told comes in anew, from store and journal, unless it is `leaving` anyway.
        """
        async with self.alone(key):
            held = self.slab.peek(key) if upkeep else self.slab.get(key)
            if held is not None and not leaving and await self._drop_damaged(held):
                held = None
            resident = held or await self._activate(key)
            resident.users += 1
            try:
                yield resident
            finally:
                resident.users -= 1
                if not upkeep:
                    resident.used_at_s = self._clock()

    @asynccontextmanager
    async def alone(self, key: UserKey) -> AsyncIterator[None]:
        """The user's turn, for a caller who needs no resident: nobody is brought in for it."""
        lock = self._turns.setdefault(key, asyncio.Lock())
        self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            async with lock:
                yield
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
        """Newest valid version into a slot, then what the journal or the store's copy of it holds beyond it."""
        # Before room is made: while the store is away nobody can come in, and nobody is to go for it.
        found: Found = await self.in_store_pool(self.vault.newest, key)
        async with self._placing:
            if not self.slab.has_room():
                await self._evict_one()
            resident = self.slab.place(key)
            resident.users, resident.used_at_s = 1, self._clock()
        try:
            await come_in(self, resident, found)
        except BaseException:
            resident.users -= 1
            if self.slab.peek(key) is resident:  # not if a fold has failed
                self.drop(resident)
            raise
        resident.users -= 1
        return resident

    async def _evict_one(self) -> None:
        """Store and release whoever has rested longest; raises QueueFull when everybody is being served."""
        victim = next((r for r in self.slab.residents() if r.users == 0 and r.key not in self._turns), None)
        if victim is None:
            raise QueueFull(f"the slab of {self.slab.slots} slots")
        async with self.turn(victim.key, leaving=True) as resident:
            if await self._drop_damaged(resident):
                return
            try:
                await self.store(resident)
            except StoreError as error:
                if isinstance(error, Fenced):
                    raise
                if not isinstance(error, StoreUnavailable):
                    logger.warning("%s is evicted unstored, the journal has it: %s", victim.key, error)
            self.drop(resident)

    def drop(self, resident: Resident) -> None:
        """Give the slot back without storing: the user is erased, or the memory comes from elsewhere now."""
        users, resident.users = resident.users, 0
        self.slab.release(resident)
        resident.users = users
        self.replicator.leave(resident.key)

    async def _drop_damaged(self, resident: Resident) -> bool:
        """Whether the slot held what is no number, and was given back: nothing is lost, the journal has it."""
        if not await asyncio.to_thread(self.watch.is_damaged, resident):
            return False
        self._figures.rollbacks.add("ram")
        logger.error(
            "%s: the memory in RAM was damaged: it comes in anew from store and journal", resident.key
        )
        self.drop(resident)
        return True

    # -- writing ----------------------------------------------------------------------------------------------

    def segment(
        self, resident: Resident, *, update_id: str, conversation: str, role: str, context: np.ndarray,
        tokens: np.ndarray, before: Segment | None = None,
    ) -> Segment:  # fmt: skip
        """The next segment of this user, at most SEGMENT_TOKENS_MAX ids; behind `before`, which is to be appended with
        it, if there is one."""
        assert 0 < len(tokens) <= SEGMENT_TOKENS_MAX, "callers cut tokens into segments"
        first = (before.last_chunk_id if before else resident.journaled_chunk_id) + 1
        return Segment(
            key=resident.key, update_id=update_id, conversation=conversation, role=role,  # type: ignore[arg-type]
            context=np.ascontiguousarray(context[-self.spec.window :], dtype=np.int32),
            tokens=np.ascontiguousarray(tokens, dtype=np.int32),
            first_chunk_id=first, last_chunk_id=first + -(-len(tokens) // self.spec.chunk_size) - 1,
            epoch=self.vault.epoch,
        )  # fmt: skip

    async def append(self, resident: Resident, segments: Sequence[Segment], seen: Sequence[int] = ()) -> bool:
        """Make segments durable, and the hashes seen with them; False, and none of them, when the update id of one was
        already there: those that were are in `resident.seen` from then on.

        The first ones of a user without versions wait for the store (`Vault.begin`).
        """
        try:
            await self.begin(resident)
        except StoreError:
            self.drop(resident)
            raise
        known = await asyncio.wrap_future(self.journal.append_all(segments, seen))
        if known:
            remember(resident, map(update_hash, known))
            return False
        remember(resident, [*seen, *(update_hash(segment.update_id) for segment in segments)])
        for segment in segments:  # the hashes say of all that they are written: they go with the last
            self.replicator.add(segment, seen if segment is segments[-1] else ())
        resident.journaled_chunk_id = segments[-1].last_chunk_id
        return True

    async def begin(self, resident: Resident) -> None:
        """What the user is told from here on is ours to store. Raises `Fenced` and what the store says."""
        if resident.claimed:
            return
        try:
            await self.in_store_pool(self.vault.begin, resident.key)
        except Fenced as error:
            self.fenced = error
            raise
        resident.claimed = True

    async def fold(self, resident: Resident, segment: Segment) -> Fold:
        """Write a journalled segment into its user's slot. If that fails, the user has to come in again, with it."""
        done = problem = None
        try:
            done = await self.in_fold_pool(self.writer.fold, resident, segment)
        except Exception as error:
            problem = error
        if await self._drop_damaged(resident):
            raise MemoryDamaged(str(resident.key)) from problem
        if done is None:
            self.drop(resident)
            raise problem or AssertionError("a fold does something or fails")
        return self._folded(resident, segment, done)

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
        resident.segments_since_stored += 1
        resident.tokens_written += done.tokens_written
        if segment.role == "document":
            resident.tail = np.concatenate([segment.context, segment.tokens])[-self.spec.window :]
            resident.tail_of = document_id(segment.conversation)
        self._figures.updates.add("written" if done.updates else "skipped", done.chunks)
        self.watch.note(resident, done)
        return done

    # -- resting ----------------------------------------------------------------------------------------------

    def store_soon(self, resident: Resident) -> None:
        """Store a new version in the background once enough was written since the last one."""
        enough = resident.segments_since_stored >= SEGMENTS_MAX
        enough = enough or resident.tokens_since_stored >= self._persist_tokens
        if not enough or resident.key in self._stores:
            return
        task = asyncio.create_task(self._store_later(resident))
        self._stores[resident.key] = task
        task.add_done_callback(lambda _: self._stores.pop(resident.key, None))

    async def _store_later(self, resident: Resident) -> None:
        try:
            async with self.turn(resident.key) as current:
                if current is resident:
                    await self.store(resident)
        except StoreUnavailable:  # its health has said so, once
            pass
        except TitanmemError as error:
            logger.warning("%s stays in the journal for now: %s", resident.key, error)
        await asyncio.sleep(STORE_INTERVAL_S)

    async def store(self, resident: Resident) -> bool:
        """Store what is not stored yet, if the guard finds it good; False if nothing was stored. The caller holds the
        turn, or nobody does.

        Raises Fenced when a newer epoch has written this user, StoreError when the store cannot.
        """
        return resident.dirty and await unbroken(self._store(resident))

    async def _store(self, resident: Resident) -> bool:
        found = await self.check(resident)
        if found is not None:
            return found.action is not Action.WAIT
        chunk = resident.last_chunk_id
        version = await self._save(resident.memory_version, lambda: self.vault.put_state(resident, self.slab))
        resident.stored_version = version
        resident.tokens_since_stored = resident.segments_since_stored = 0
        before, resident.stored_chunk_id = resident.stored_chunk_id, chunk
        resident.claimed = True
        await self.in_fold_pool(self.watch.mark, resident)
        if before:
            try:
                await asyncio.wrap_future(self.journal.trim(resident.key, before))
                await self.replicator.trim(resident.key, before)
            except JournalError as error:  # stored it is: the next version's trim takes these segments too
                logger.warning("%s: the journal keeps what is stored, for now: %s", resident.key, error)
        if not resident.swept:
            resident.swept = True
            await self.in_store_pool(self.vault.sweep, resident.key)
        return True

    async def check(self, resident: Resident, *, resting: bool = False) -> Finding | None:
        """Ask the user's probes and do what the guard decides; None if recall has not fallen. As `store`."""
        found = await self.in_fold_pool(self.watch.look, resident, resting)
        if found is not None and found.memory is not None:
            frozen = found.action is Action.FREEZE
            await self.supersede(resident, found.memory, falls=resident.falls + 1, frozen=frozen)
            self._figures.rollbacks.add(found.action)
            logger.warning("%s", found.said)
        return found

    async def supersede(
        self, resident: Resident, memory: Memory, *, falls: int = 0, frozen: bool = False
    ) -> None:
        """Make another memory the user's newest version; what the journal holds now belongs to the old one.

        Stored first, then put into the slot: a crash in between changes nothing, a store that fails neither. The caller
        holds the turn. Raises CorruptIndex as `Vault.restore`, and StoreError.
        """
        await unbroken(self._supersede(resident, memory, falls, frozen))

    async def _supersede(self, resident: Resident, memory: Memory, falls: int, frozen: bool) -> None:
        self.vault.reservoir_of(memory, self.spec)
        newer = self.vault.successor(memory, resident, falls=falls, frozen=frozen)
        await self._save(newer.memory_version, lambda: self.vault.put_over(newer))
        await asyncio.to_thread(self.vault.restore, newer, resident, self.slab)
        await self.in_fold_pool(self.watch.mark, resident)

    async def _save(self, version: int, put: Callable[[], int]) -> int:
        """The version under which `put` stored it."""
        started = time.perf_counter()
        try:
            with continued({}, "store", titan__memory_version=version):
                stored = await self.in_store_pool(put)
        except StoreError as error:
            self._figures.store_errors.add("put")
            if isinstance(error, Fenced):
                self.fenced = error
            raise
        self._figures.persist_s.observe(time.perf_counter() - started)
        return stored

    async def flush(self, idle_s: float = 0.0) -> int:
        """Store all residents whose user has been idle for `idle_s`; how many were stored.

        One who can not be stored does not keep the others from it: the first such StoreError is raised at the end.
        """
        stored, problem = 0, None
        for resident in self.slab.residents():
            if resident.dirty and self.idle_s(resident) >= idle_s:
                try:
                    async with self.turn(resident.key, upkeep=True) as current:
                        stored += await self.store(current)
                except StoreError as error:
                    if isinstance(error, Fenced):
                        raise
                    problem = problem or error
        if problem is not None:
            raise problem
        return stored

    async def close(self) -> None:
        """Stop the threads; whoever wants the memories stored has flushed them."""
        for task in list(self._stores.values()):
            task.cancel()
        await asyncio.gather(*self._stores.values(), return_exceptions=True)
        await self.replicator.close()
        self._fold_pool.shutdown()
        self._store_pool.shutdown()

    async def in_fold_pool(self, work, *arguments):
        """One thread does all arithmetic of updates, in the order in which it is asked for."""
        return await asyncio.get_running_loop().run_in_executor(self._fold_pool, work, *arguments)

    async def in_store_pool(self, work, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, work, *arguments)
