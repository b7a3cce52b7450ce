"""`MemoryKeeper`: all that a shard does, without Ray. One event loop, the single writer of its users."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.backup import Backup
from actors.consolidation import Consolidator
from actors.document import write_pieces
from actors.engine import Engine
from actors.erasure import erase
from actors.errors import NoMemoryWeights, QueueFull, no_memory
from actors.figures import Figures
from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from actors.options import KeeperOptions
from actors.replicator import Replicator
from actors.roster import Roster
from actors.slab import Resident, Slab
from actors.turn import Turn
from actors.unbroken import unbroken
from actors.vault import Layout, Vault
from storage.errors import NoSuchMemory, StoreError, StoreUnavailable, TitanmemError
from storage.journal import Journal
from storage.names import UserKey, bucket_of
from storage.store import VersionInfo, open_store
from storage.titanmem import decode, encode
from titanmem.decoder_config import DecoderConfig
from titanmem.fold import Encoder
from titanmem.folder import base_hash, load_decoder
from titanmem.tokenizer import ChatTokenizer
from titanmem.tracing import continued

logger = logging.getLogger(__name__)


class MemoryKeeper:
    """Chat, ingest and care of the memories of one shard's users. Made by `open_keeper`."""

    def __init__(
        self, options: KeeperOptions, *, engine: Engine, roster: Roster, tokenizer: ChatTokenizer, figures: Figures
    ) -> None:  # fmt: skip
        self.options, self.engine, self.roster = options, engine, roster
        self._tokenizer, self._figures = tokenizer, figures
        self._remembers = engine.decoder.config.remembers
        self._turns: set[asyncio.Task[None]] = set()
        self._busy = 0
        self.consolidator = Consolidator(roster, figures, options.consolidate_after_s)
        self.backup = Backup(roster, options, self.owns)
        self._idle = asyncio.gather(self._store_idle(), self.consolidator.run())

    # -- the data path ----------------------------------------------------------------------------------------

    async def chat(self, call: ChatCall) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        """The reply's tokens, then one `DoneEvent` when all is in the journal. Closing it ends the reply at once.

        Memory is `off` where the model has none. Raises QueueFull, JournalFull, BadMemoryFile, StoreError.
        """
        self._admit()
        turn = Turn(
            call=call if self._remembers else replace(call, memory="off"), engine=self.engine,
            roster=self.roster, tokenizer=self._tokenizer, seed=self.options.seed,
        )  # fmt: skip
        task = asyncio.create_task(turn.run())
        self._turns.add(task)
        task.add_done_callback(self._ended)
        try:
            while True:
                event = await turn.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, DoneEvent):
                    return
        finally:
            turn.cancel()

    async def ingest(self, call: IngestCall) -> IngestOutcome:
        """Write pieces of a document; the same update ids again return what they did the first time."""
        self._need_memory()
        self._admit()
        try:
            with continued(call.trace, "update_memory"):
                async with self.roster.turn(call.key) as resident:
                    outcome = await unbroken(write_pieces(self.roster, resident, call))
                    self.roster.store_soon(resident)
                await self.roster.replicator.durable(call.key)
                return outcome
        finally:
            self._busy -= 1

    def _need_memory(self) -> None:
        if not self._remembers:
            raise NoMemoryWeights(self.options.model)

    def _admit(self) -> None:
        if self._busy >= self.options.queue_max:
            raise QueueFull(f"the queue of {self.options.shard}")
        if self.roster.fenced is not None:
            raise self.roster.fenced
        self._busy += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._turns.discard(task)
        self._busy -= 1

    # -- one user's memory ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _known(self, key: UserKey) -> AsyncIterator[Resident]:
        """The user's turn; NoSuchMemory for somebody who has never been told anything, NoMemoryWeights for all."""
        self._need_memory()
        async with self.roster.turn(key) as resident:
            if not resident.memory_version:
                self.roster.drop(resident)
                raise NoSuchMemory(
                    f"{key}: no memory yet; it begins with the first message or ingest", key=str(key)
                )
            yield resident

    async def describe(self, key: UserKey) -> dict[str, Any]:
        """Figures of one memory."""
        async with self._known(key) as resident:
            norm = await asyncio.to_thread(self.roster.slab.norm, resident)
            spec = self.roster.spec
            return {
                "user": key.user, "memory_version": resident.memory_version, "tokens_seen": resident.tokens_seen,
                "chunks": resident.last_chunk_id, "tokens_written": resident.tokens_written,
                "updates": resident.updates, "surprise_rate": _rate(resident), "norm": norm,
                "utilisation": norm / spec.max_norm, "bytes": spec.state_bytes, "parameters": spec.parameters,
                "stored_version": resident.stored_version, "frozen": resident.frozen, "cohort": "default",
            }  # fmt: skip

    async def versions(self, key: UserKey) -> list[dict[str, Any]]:
        """Stored versions, newest first."""
        found = await asyncio.to_thread(self.roster.vault.store.versions, key)
        if not found:
            async with self._known(key):
                pass
        return [_version(info) for info in found]

    async def rollback(self, key: UserKey, to: int | None) -> dict[str, Any]:
        """Make stored version `to` the newest again (None: the one before the current); history is kept.

        A frozen memory is read and written again from then on.
        """
        async with self._known(key) as resident:
            await self.roster.store(resident)
            if to is None:
                listed = await asyncio.to_thread(self.roster.vault.store.versions, key)
                before = listed[0 if resident.dirty else 1 :]
                if not before:
                    raise NoSuchMemory(f"{key}: there is no stored version before this one", key=str(key))
                to = before[0].version
            memory = await asyncio.to_thread(self.roster.vault.version, key, to)
            await self.roster.supersede(resident, memory)
            self._figures.rollbacks.add("asked")
            return {"memory_version": resident.memory_version, "rolled_back_to": to}

    async def pin(self, key: UserKey) -> dict[str, Any]:
        """Keep the current version until it is released."""
        async with self._known(key) as resident:
            await self.roster.store(resident)
            store, epoch = self.roster.vault.store, self.roster.vault.epoch
            return _version(await asyncio.to_thread(store.pin, key, resident.stored_version, epoch=epoch))

    async def export(self, key: UserKey) -> bytes:
        """The memory as it is now, as a `.titanmem` file."""
        async with self._known(key) as resident:
            return await asyncio.to_thread(
                lambda: encode(self.roster.vault.image(resident, self.roster.slab))
            )

    async def import_(self, key: UserKey, data: bytes) -> dict[str, Any]:
        """Replace the memory by a file's; a file that breaks a rule changes nothing."""
        self._need_memory()
        layout = self.roster.vault.layout
        memory = await asyncio.to_thread(
            lambda: decode(data, expect_base=layout.base, expect_shape=layout.shape, name="the file sent")
        )
        async with self.roster.turn(key) as resident:
            await self.roster.supersede(resident, memory)
            return {"memory_version": resident.memory_version, "tokens_seen": resident.tokens_seen}

    async def forget(self, key: UserKey) -> dict[str, Any]:
        """Erase the user from slot, journal and store, and leave a tombstone; the receipt names what was removed.

        Raises Fenced, and StoreError when something could not be removed: the tombstone stands; ask again.
        """
        return await erase(self.roster, key, self.options.snapshots_url)

    # -- the whole shard --------------------------------------------------------------------------------------

    def holds_journal(self) -> bool:
        """Whether the journal is still the one that was opened, locked by this process."""
        return self.roster.journal.is_held()

    def owns(self, key: UserKey) -> bool:
        """Whether the user is this shard's."""
        return self.options.buckets is None or bucket_of(key) in self.options.buckets

    async def users(self) -> list[dict[str, Any]]:
        """All users of this shard: resident, stored, or in the journal only (version 0 until they come in)."""
        store = self.roster.vault.store
        residents = [r for r in self.roster.slab.residents() if r.memory_version and self.owns(r.key)]
        resident = {r.key: r.memory_version for r in residents}

        def stored() -> dict[UserKey, int]:
            own = [key for key in store.users() if self.owns(key)]
            return {key: max((info.version for info in store.versions(key)), default=0) for key in own}

        pending = dict.fromkeys(await self._pending(), 0)
        versions = {**pending, **await asyncio.to_thread(stored), **resident}
        return [
            {"tenant": key.tenant, "user": key.user, "resident": key in resident, "memory_version": version}
            for key, version in sorted(versions.items())
        ]

    async def flush(self) -> int:
        """Store every memory that is not stored yet; returns how many."""
        return await self.roster.flush()

    async def snapshot_part(self, snapshot_id: str, target_url: str, include_model: bool) -> dict[str, Any]:
        """This shard's part of a cold backup: each user at its newest version, with θ_F once if asked."""
        pending = await self._pending() if self._remembers else ()
        return await self.backup.part(snapshot_id, target_url, include_model=include_model, pending=pending)

    async def _pending(self) -> set[UserKey]:
        """Own users with segments, here or in the store."""
        users = await asyncio.to_thread(self.roster.replicator.users)
        return {key for key in (*users, *self.roster.journal.users_pending()) if self.owns(key)}

    async def stats(self) -> dict[str, Any]:
        """Load of this shard, for the coordinator and the console."""
        self._gauge()
        return {
            "resident_users": len(self.roster.slab), "slots": self.roster.slab.slots, "busy": self._busy,
            "running": self.engine.running, "waiting": self.engine.waiting,
            "generated_tokens": self.engine.generated_tokens, "prompt_tokens": self.engine.prompt_tokens,
            "journal_bytes": self.roster.journal.bytes(),
        }  # fmt: skip

    async def metrics(self) -> bytes:
        """Prometheus text of this shard."""
        self._gauge()
        return self._figures.text()

    def _gauge(self) -> None:
        self._figures.store_away_s.set(self.roster.vault.store.health.away_s())
        self._figures.running.set(self.engine.running)
        self._figures.waiting.set(self.engine.waiting)
        self._figures.of_roster(self.roster)

    async def _store_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, max(0.05, self.options.idle_flush_s / 4)))
            try:
                await self.roster.flush(self.options.idle_flush_s)
            except StoreUnavailable:  # its health has said so, once
                continue
            except TitanmemError as error:
                logger.warning("idle memories stay in the journal for now: %s", error)

    async def close(self) -> None:
        """End all replies, store every memory, let go of everything. Stored or not, the journal has it."""
        self._idle.cancel()
        with suppress(asyncio.CancelledError):
            await self._idle
        await self.consolidator.close()
        await asyncio.to_thread(self.engine.close)
        await asyncio.gather(*self._turns, return_exceptions=True)
        try:
            await self.flush()
        except StoreError as error:
            logger.warning("closing with memories that only the journal has: %s", error)
        await self.roster.close()
        await asyncio.to_thread(self.roster.journal.close)


def _rate(resident: Resident) -> float:
    return resident.tokens_written / resident.tokens_seen if resident.tokens_seen else 0.0


def _version(info: VersionInfo) -> dict[str, Any]:
    return {
        "version": info.version, "epoch": info.epoch, "bytes": info.bytes,
        "created_at": info.created_at.isoformat(), "pinned": info.pinned,
    }  # fmt: skip


async def collect(events: AsyncGenerator[TokenEvent | DoneEvent, None]) -> DoneEvent:
    """The end of a reply, for callers who do not stream."""
    async with aclosing(events) as stream:
        async for event in stream:
            if isinstance(event, DoneEvent):
                return event
    raise RuntimeError("a reply ended without its last event")


async def open_keeper(options: KeeperOptions) -> MemoryKeeper:
    """Load the model, open store and journal, start the engine. Raises what keeps it from serving, naming it."""
    folder = Path(options.model)
    config = await asyncio.to_thread(DecoderConfig.load, folder)
    mode = config.served(options.mode, folder)
    config = config.overridden({**options.spec_overrides, "mode": mode, "rule": options.rule})
    spec = config.memory
    decoder = await asyncio.to_thread(load_decoder, folder, config)
    if not config.remembers:
        logger.warning("%s: memory is off for every request", no_memory(options.model))
    store = await asyncio.to_thread(open_store, options.store_url, watched=True)
    figures = Figures(options.shard)
    slab = Slab(spec, options.slots)
    layout = Layout.of(spec, await asyncio.to_thread(base_hash, folder), config.vocab_size)
    vault = Vault(store, layout, options.epoch, on_damage=figures.rollbacks.add)
    if config.remembers:
        await asyncio.to_thread(vault.check_model)
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = await asyncio.to_thread(Journal, options.journal)
    replicator = Replicator(journal, store.segments, options, figures)
    roster = Roster(
        slab=slab, vault=vault, journal=journal, replicator=replicator, encoder=Encoder(decoder, spec),
        figures=figures, persist_tokens=options.persist_tokens, consolidates=options.consolidate_after_s > 0,
    )  # fmt: skip
    replicator.start()
    engine = Engine(decoder, slab)
    engine.start()
    return MemoryKeeper(
        options, engine=engine, roster=roster, tokenizer=ChatTokenizer(folder), figures=figures
    )
