"""`MemoryShard`: one keeper behind an ownership check, the single writer of its users. A Ray actor (actors/process.py).

Concurrency groups: in Ray a group has an event loop and a thread of its own. The keeper lives on the default
group's loop; `admin` methods hop over to it without waiting behind the default group's calls; `health`
methods touch nothing but plain fields, so they answer while everything else is busy.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

from actors.errors import NotOwner, ShardNotOpen
from actors.handover import LOCK_WAIT_S, wait_until_free
from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from actors.options import ShardOptions
from actors.ownership import Gate, Grace, confirm
from storage.errors import Fenced, JournalFailed
from storage.health import Health
from storage.identity import recognise
from storage.names import UserKey, bucket_of
from storage.store import open_store
from titanmem import tracing

FENCED_EXIT_CODE = 4
FENCED_EXIT_S = 0.25
"""Time for the answer `Fenced` to leave before the process does."""
EARLY_CANCELS_MAX = 1024
"""Cancels remembered that came before their request."""
CALLS_MAX = 16_384
"""Calls in flight in one shard; far over the keeper's own `queue_max`, which is what answers 429."""

LOOK_INTERVAL_S = 5.0
"""So often the ownership record is read while nobody asks: an outage of the store, or a successor, is noticed all the
same."""

T = TypeVar("T")
method: Any = ray.method
"""Untyped: its stubs take a decorated method for a remote handle's."""
log = logging.getLogger(__name__)


def resolve(path: str) -> Any:
    """The object that `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _leave() -> None:
    """Ends this process at once: a fenced writer must not flush anything on its way out."""
    os._exit(FENCED_EXIT_CODE)


class MemoryShard:
    """The calls of `MemoryKeeper`, for the buckets that this shard owns.

    Every call that names a user takes the caller's `epoch` of this shard. `NotOwner` and `ShardNotOpen`
    mean that nothing was looked at; `Fenced` means that nothing was acknowledged, and the process ends.
    """

    def __init__(self, options: ShardOptions, leave: Callable[[], None] = _leave) -> None:
        self._options = options
        self._shard = options.keeper.shard
        self._epoch = options.keeper.epoch
        self._leave = leave
        self._state = "starting"
        self._node = ""
        self._keeper: Any = None
        self._gate: Gate | None = None
        self._watch: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._chats: dict[str, asyncio.Task[Any]] = {}
        self._early_cancels: OrderedDict[str, None] = OrderedDict()
        self._fence: BaseException | None = None
        self._health: Health | None = None

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> dict[str, Any]:
        """Opens store and keeper, once the journal is free; returns `ping`. Raises what keeps it shut."""
        options = self._options
        self._loop = asyncio.get_running_loop()
        if options.set_up:
            resolve(options.set_up)(endpoint=options.otlp_endpoint, instance=self._shard)
        store = await asyncio.to_thread(open_store, options.keeper.store_url, watched=True)
        self._health = store.health
        read = partial(confirm, store, self._shard, self._epoch)
        await asyncio.to_thread(read)
        await asyncio.to_thread(recognise, store, Path(options.keeper.journal_dir))
        await asyncio.to_thread(wait_until_free, options.keeper.journal, LOCK_WAIT_S)
        self._gate = Gate(
            read, Grace(seconds=options.keeper.grace_s, held=lambda: self._keeper.holds_journal())
        )
        self._keeper = await resolve(options.open_keeper)(replace(options.keeper, buckets=options.buckets))
        self._watch = asyncio.create_task(self._watch_gate(self._gate))
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._state = "ready"
        log.info("%s serves %d buckets, epoch %d", self._shard, len(options.buckets), self._epoch)
        return self._about()

    async def close(self) -> None:
        """Takes no more calls, and lets the keeper store every memory that is not stored yet."""
        if self._keeper is not None and self._state in ("ready", "draining"):
            self._state = "stopped"
            if self._watch is not None:
                self._watch.cancel()
            await self._keeper.close()

    @method(concurrency_group="health")
    async def ping(self) -> dict[str, Any]:
        """State, epoch, process; answers while the shard is busy."""
        return self._about()

    @method(concurrency_group="health")
    async def until_dead(self) -> None:
        """Never returns: a caller learns of the process's end from the error of this call."""
        await asyncio.Event().wait()

    @method(concurrency_group="health")
    async def drain(self) -> None:
        """From now on `ping` says draining; calls are still served."""
        if self._state == "ready":
            self._state = "draining"

    def _about(self) -> dict[str, Any]:
        return {
            "shard": self._shard,
            "state": self._state,
            "epoch": self._epoch,
            "buckets": len(self._options.buckets),
            "map_version": self._options.map_version,
            "node": self._node,
            "pid": os.getpid(),
            "chats": len(self._chats),
            "unconfirmed": self._gate.unconfirmed if self._gate else 0,
            "store": self._health.summary() if self._health else "",
        }

    # -- the data path -----------------------------------------------------------------------------

    @method(num_returns="streaming")
    async def chat(self, call: ChatCall, epoch: int) -> AsyncIterator[TokenEvent | DoneEvent]:
        """The keeper's events, `DoneEvent` after the ownership check. Cancelling the call ends it at once."""
        keeper = self._admit(call.key, epoch)
        assert self._gate is not None, "an open shard has a gate"
        if call.request_id in self._early_cancels:
            del self._early_cancels[call.request_id]
            return
        span = tracing.tracer().start_span("shard chat", context=tracing.context_of(call.trace))
        span.set_attribute("titan.shard", self._shard)
        events = keeper.chat(replace(call, trace=tracing.inject(tracing.context_with(span))))
        task = asyncio.current_task()
        assert task is not None, "Ray runs a streaming call as a task"
        self._chats[call.request_id] = task
        try:
            async for event in events:
                if isinstance(event, DoneEvent):
                    await (self._confirm() if event.memory == "read_write" else self._look())
                yield event
        except BaseException as error:
            tracing.failed(span, error)
            self._noticed(error)
            raise
        finally:
            if self._chats.get(call.request_id) is task:
                del self._chats[call.request_id]
            await events.aclose()
            span.end()

    @method(concurrency_group="health")
    async def cancel(self, request_id: str) -> bool:
        """Ends the chat of that name now, or as soon as it arrives; True if it was running."""
        task = self._chats.get(request_id)
        if task is None or self._loop is None:
            self._early_cancels[request_id] = None
            while len(self._early_cancels) > EARLY_CANCELS_MAX:
                self._early_cancels.popitem(last=False)
            return False
        self._loop.call_soon_threadsafe(task.cancel)
        return True

    async def ingest(self, call: IngestCall, epoch: int) -> IngestOutcome:
        keeper = self._admit(call.key, epoch)
        with tracing.continued(call.trace, "shard ingest", titan__shard=self._shard):
            return await self._acknowledged(keeper.ingest(replace(call, trace=tracing.inject())))

    # -- one user's memory -------------------------------------------------------------------------

    @method(concurrency_group="admin")
    async def describe(self, key: UserKey, epoch: int) -> dict[str, Any]:
        record = await self._here(self._admit(key, epoch).describe(key))
        return {**record, "shard": self._shard, "epoch": self._epoch}

    @method(concurrency_group="admin")
    async def versions(self, key: UserKey, epoch: int) -> list[dict[str, Any]]:
        return await self._here(self._admit(key, epoch).versions(key))

    @method(concurrency_group="admin")
    async def rollback(self, key: UserKey, epoch: int, to: int | None) -> dict[str, Any]:
        return await self._here(self._acknowledged(self._admit(key, epoch).rollback(key, to)))

    @method(concurrency_group="admin")
    async def pin(self, key: UserKey, epoch: int) -> dict[str, Any]:
        return await self._here(self._acknowledged(self._admit(key, epoch).pin(key)))

    @method(concurrency_group="admin")
    async def export(self, key: UserKey, epoch: int) -> bytes:
        return await self._here(self._admit(key, epoch).export(key))

    @method(concurrency_group="admin")
    async def import_(self, key: UserKey, epoch: int, data: bytes) -> dict[str, Any]:
        return await self._here(self._acknowledged(self._admit(key, epoch).import_(key, data)))

    @method(concurrency_group="admin")
    async def forget(self, key: UserKey, epoch: int) -> dict[str, Any]:
        return await self._here(self._acknowledged(self._admit(key, epoch).forget(key)))

    # -- the whole shard ---------------------------------------------------------------------------

    @method(concurrency_group="admin")
    async def users(self) -> list[dict[str, Any]]:
        return await self._here(self._serving().users())

    @method(concurrency_group="admin")
    async def flush(self) -> int:
        """Stores every memory that is not stored yet; returns how many."""
        return await self._here(self._serving().flush())

    @method(concurrency_group="admin")
    async def snapshot_part(self, snapshot_id: str, target_url: str, include_model: bool) -> dict[str, Any]:
        return await self._here(self._serving().snapshot_part(snapshot_id, target_url, include_model))

    @method(concurrency_group="admin")
    async def stats(self) -> dict[str, Any]:
        return {**self._about(), **await self._here(self._serving().stats())}

    @method(concurrency_group="admin")
    async def metrics(self) -> bytes:
        return await self._here(self._serving().metrics())

    # -- inside ------------------------------------------------------------------------------------

    def _serving(self) -> Any:
        if self._state not in ("ready", "draining"):
            raise ShardNotOpen(self._shard, self._state)
        return self._keeper

    def _admit(self, key: UserKey, epoch: int) -> Any:
        keeper = self._serving()
        bucket = bucket_of(key)
        # A caller with an older epoch has an old map that still names the right shard; one with a newer epoch
        # knows of a successor.
        if bucket not in self._options.buckets or epoch > self._epoch:
            raise NotOwner(self._shard, bucket, self._epoch)
        return keeper

    async def _acknowledged(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, once this shard is known to be still the owner."""
        try:
            result = await work
            await self._confirm()
            return result
        except (Fenced, JournalFailed) as error:
            self._noticed(error)
            raise

    async def _confirm(self) -> None:
        assert self._gate is not None, "an open shard has a gate"
        await self._gate.confirm()

    async def _look(self) -> None:
        assert self._gate is not None, "an open shard has a gate"
        await self._gate.look()

    async def _watch_gate(self, gate: Gate) -> None:
        try:
            await gate.watch(LOOK_INTERVAL_S)
        except Fenced as error:
            self._noticed(error)

    def _noticed(self, error: BaseException) -> None:
        """A fenced shard serves nobody from here on, and ends as soon as its answer is out.

        So does one whose journal failed: only a start that reads it back knows what is on the disk.
        """
        if isinstance(error, (Fenced, JournalFailed)) and self._fence is None:
            self._fence = error
            self._state = "fenced" if isinstance(error, Fenced) else "stopped"
            log.warning("%s is %s and ends: %s", self._shard, self._state, error)
            asyncio.get_running_loop().call_later(FENCED_EXIT_S, self._leave)

    async def _here(self, work: Coroutine[Any, Any, T]) -> T:
        """`work` on the keeper's loop, whichever loop the caller runs on."""
        assert self._loop is not None, "an open shard has a loop"
        if asyncio.get_running_loop() is self._loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
