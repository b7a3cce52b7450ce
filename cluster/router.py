"""The door's way to a user's shard: bucket, map, handle; asks again when the map was stale or the shard died.

A call that may be repeated (it carries an update id, or changes nothing) is repeated until its shard answers
or `OUTAGE_S` has passed: a shard that is started again answers the same request, once. The coordinator is
never asked here but for the admin routes: the map comes from the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, TaskCancelledError

from actors.errors import NotOwner, ShardNotOpen
from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from cluster.backend import Record
from cluster.errors import NotReady, ShardUnavailable
from cluster.handles import COORDINATOR, SNAPSHOTTER, Handle, ask, find, unwrap
from cluster.mapstore import read_map
from cluster.shardmap import ShardMap, shard_name
from storage.errors import Fenced, StoreUnavailable
from storage.names import UserKey
from storage.store import MemoryStore, open_store

PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 0.5
OUTAGE_S = 60.0
"""A request waits so long for a shard that is away; the start of one with a large model takes its time."""
READINESS_TIMEOUT_S = 0.9
METRICS_TIMEOUT_S = 2.0
ADMIN_TIMEOUT_S = 30.0
SNAPSHOT_TIMEOUT_S = 6 * 3600.0

assert PAUSE_MIN_S < PAUSE_MAX_S < OUTAGE_S, "a request must get to ask more than once"

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a user's calls go."""

    shard: str
    epoch: int
    handle: Handle


class Router:
    """`cluster.backend.Backend` over Ray. One a door; all methods on one event loop."""

    def __init__(
        self,
        store_url: str,
        *,
        request_timeout_s: float,
        outage_s: float = OUTAGE_S,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[[str], Awaitable[Handle | None]] = find,
        cancel: Callable[[Any], None] = ray.cancel,
    ) -> None:
        """`find` gives a named actor's handle and `cancel` ends a stream; tests put their own there."""
        self._store_url = store_url
        self._store: MemoryStore | None = None
        self._request_timeout_s = request_timeout_s
        self._outage_s = min(outage_s, request_timeout_s)
        self._clock = clock
        self._find = find
        self._cancel = cancel
        self._map: ShardMap | None = None
        self._handles: dict[str, Handle] = {}
        self._refreshing: asyncio.Task[ShardMap] | None = None

    # -- the data path ------------------------------------------------------------------------------

    async def chat(self, call: ChatCall) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        """Asked again while no token has come; after one, a shard that dies is `ShardUnavailable`."""
        patience = Patience(self._outage_s, self._request_timeout_s, self._clock)
        while True:
            route = await self._route(call.key, patience)
            tokens = 0
            try:
                async with aclosing(self._events(route, call, patience)) as events:
                    async for event in events:
                        tokens += len(event.tokens) if isinstance(event, TokenEvent) else 0
                        yield event
                return
            except Exception as caught:
                error = unwrap(caught)
                if tokens and _outcome_unknown(error):
                    why = f"it ended after {tokens} tokens of the reply; what it had heard may be remembered"
                    raise ShardUnavailable(route.shard, why) from None
                await self._wait_to_repeat(error, route, patience, repeatable=True)

    async def _events(
        self, route: Route, call: ChatCall, patience: Patience
    ) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        """One try. However it ends, the shard hears of it at once."""
        stream = route.handle.chat.remote(call, route.epoch)
        done = False
        try:
            while True:
                try:
                    event = await asyncio.wait_for(_next(stream), patience.left_s())
                except StopAsyncIteration:
                    if not done:
                        raise ShardUnavailable(route.shard, "the reply ended early") from None
                    return
                done = isinstance(event, DoneEvent)
                yield event
        finally:
            if not done:
                self._cancel(stream)
                route.handle.cancel.remote(call.request_id)

    async def ingest(self, call: IngestCall) -> IngestOutcome:
        return await self._call(call.key, lambda to: to.handle.ingest.remote(call, to.epoch))

    # -- one user's memory --------------------------------------------------------------------------

    async def describe(self, key: UserKey) -> Record:
        return await self._call(key, lambda to: to.handle.describe.remote(key, to.epoch))

    async def versions(self, key: UserKey) -> list[Record]:
        return await self._call(key, lambda to: to.handle.versions.remote(key, to.epoch))

    async def rollback(self, key: UserKey, to: int | None = None) -> Record:
        """Not repeated when its outcome is unknown: twice `one back` would be two back."""
        return await self._call(
            key, lambda at: at.handle.rollback.remote(key, at.epoch, to), repeatable=to is not None
        )

    async def pin(self, key: UserKey) -> Record:
        return await self._call(key, lambda to: to.handle.pin.remote(key, to.epoch))

    async def export(self, key: UserKey) -> bytes:
        return await self._call(key, lambda to: to.handle.export.remote(key, to.epoch))

    async def import_(self, key: UserKey, data: bytes) -> Record:
        return await self._call(key, lambda to: to.handle.import_.remote(key, to.epoch, data))

    async def forget(self, key: UserKey) -> Record:
        return await self._call(key, lambda to: to.handle.forget.remote(key, to.epoch))

    # -- the whole cluster --------------------------------------------------------------------------

    async def users(self, tenant: str) -> list[Record]:
        """All shards are asked; raises `ShardUnavailable` rather than leave some users out."""
        answers = await self._ask_all("users", ADMIN_TIMEOUT_S)
        found: list[Record] = []
        for shard, answer in answers.items():
            if isinstance(answer, BaseException):
                raise ShardUnavailable(shard, "it cannot list its users now") from None
            found += [record for record in answer if record.get("tenant", tenant) == tenant]
        return sorted(found, key=lambda record: record["user"])

    async def shards(self) -> list[Record]:
        """The coordinator's view and each shard's own figures; without a coordinator, what the shards say."""
        figures = await self._ask_all("stats", METRICS_TIMEOUT_S)
        own = {shard: stats for shard, stats in figures.items() if isinstance(stats, dict)}
        try:
            watched = (await self._coordinator("status", timeout_s=METRICS_TIMEOUT_S))["shards"]
        except (NotReady, ShardUnavailable):
            watched = [{"shard": shard, "state": "unknown"} for shard in figures]
        return [{**own.get(record["shard"], {}), **_known(record)} for record in watched]

    async def scale(self, shards: int) -> Record:
        return await self._coordinator("scale", shards)

    async def drain(self, shard: str) -> Record:
        return await self._coordinator("drain", shard)

    async def snapshot(self, target: str | None = None) -> Record:
        snapshotter = await self._present(SNAPSHOTTER)
        try:
            return await ask(snapshotter.create.remote(target), SNAPSHOT_TIMEOUT_S)
        except RayActorError:
            raise NotReady("the snapshot was cut off; nothing of it counts, so ask again") from None

    async def readiness(self) -> tuple[bool, str]:
        try:
            return await asyncio.wait_for(self._readiness(), READINESS_TIMEOUT_S)
        except TimeoutError:
            return False, "the shards do not answer in time"

    async def _readiness(self) -> tuple[bool, str]:
        try:
            current = self._map or await self._refresh()
        except (NotReady, StoreUnavailable) as error:
            return False, str(error.details.get("reason", error))
        for shard, answer in (await self._ask_all("ping", READINESS_TIMEOUT_S)).items():
            if not isinstance(answer, dict):
                return False, f"{shard} of {current.shards} is not answering: starting, or started again"
            if answer["state"] != "ready":
                return False, f"{shard} of {current.shards} is {answer['state']}"
        return True, ""

    async def shard_metrics(self) -> list[bytes]:
        answers, age = await asyncio.gather(self._ask_all("metrics", METRICS_TIMEOUT_S), self._snapshot_age())
        texts = [answer for answer in (*answers.values(), age) if isinstance(answer, bytes)]
        if self._map is not None:
            texts.append(_map_metrics(self._map))
        return texts

    async def _snapshot_age(self) -> bytes | None:
        try:
            snapshotter = await self._present(SNAPSHOTTER)
            return await ask(snapshotter.metrics.remote(), METRICS_TIMEOUT_S)
        except Exception as error:
            log.info("no age of the newest snapshot: %s", error)
            return None

    # -- inside -------------------------------------------------------------------------------------

    async def _call(self, key: UserKey, call: Callable[[Route], Any], *, repeatable: bool = True) -> Any:
        patience = Patience(self._outage_s, self._request_timeout_s, self._clock)
        while True:
            route = await self._route(key, patience)
            try:
                return await ask(call(route), patience.left_s())
            except Exception as error:
                await self._wait_to_repeat(unwrap(error), route, patience, repeatable=repeatable)

    async def _wait_to_repeat(
        self, error: BaseException, route: Route, patience: Patience, *, repeatable: bool
    ) -> None:
        """Returns when the call is to be tried again; else raises what the door is to say."""
        if isinstance(error, TimeoutError):
            raise ShardUnavailable(route.shard, "it did not answer in time") from None
        untouched = isinstance(error, NotOwner | ShardNotOpen)
        if not untouched and not _outcome_unknown(error):
            raise error
        if not untouched and not repeatable:
            why = "it ended during the call; look whether the change was made before you ask again"
            raise ShardUnavailable(route.shard, why) from None
        self._handles.pop(route.shard, None)
        self._map = None
        if not await patience.pause():
            raise ShardUnavailable(route.shard, f"no answer for {patience.outage_s:g} s") from None

    async def _route(self, key: UserKey, patience: Patience) -> Route:
        """The owner's handle; waits for one that is being started. Raises `NotReady`, `ShardUnavailable`."""
        while True:
            try:
                current = self._map or await self._refresh()
                index = current.owner_of(key)
                shard = shard_name(index)
                handle = await self._handle(shard)
                if handle is not None:
                    return Route(shard, current.epochs[index], handle)
                failure: Exception = ShardUnavailable(shard, "it is not running")
                self._map = None
            except (NotReady, StoreUnavailable) as error:
                failure = error
            except TimeoutError:
                failure = NotReady("Ray's control service does not answer")
            if not await patience.pause():
                raise failure from None

    async def _refresh(self) -> ShardMap:
        """Reads the map anew; callers at the same time share one reading."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read())
        return await asyncio.shield(self._refreshing)

    async def _read(self) -> ShardMap:
        if self._store is None:
            self._store = await asyncio.to_thread(open_store, self._store_url)
        current = await asyncio.to_thread(read_map, self._store)
        if current is None or 0 in current.epochs:
            raise NotReady("the cluster is starting")
        if self._map is None or current.version >= self._map.version:
            self._map = current
        return current

    async def _handle(self, shard: str) -> Handle | None:
        if shard not in self._handles:
            handle = await self._find(shard)
            if handle is None:
                return None
            self._handles[shard] = handle
        return self._handles[shard]

    async def _ask_all(self, method: str, timeout_s: float) -> dict[str, Any]:
        """What each shard answers to a call without arguments; an error where one does not."""

        async def one(shard: str) -> Any:
            try:
                handle = await asyncio.wait_for(self._handle(shard), timeout_s)
                if handle is None:
                    return ShardUnavailable(shard, "it is not running")
                return await ask(getattr(handle, method).remote(), timeout_s)
            except RayActorError as error:
                self._handles.pop(shard, None)
                return error
            except Exception as error:
                return error

        current = self._map or await self._refresh()
        return dict(zip(current.names, await asyncio.gather(*map(one, current.names)), strict=True))

    async def _coordinator(self, method: str, *args: Any, timeout_s: float = ADMIN_TIMEOUT_S) -> Any:
        coordinator = await self._present(COORDINATOR)
        try:
            return await ask(getattr(coordinator, method).remote(*args), timeout_s)
        except (RayActorError, TimeoutError):
            raise NotReady("the coordinator does not answer; chat and ingest go on without it") from None

    async def _present(self, name: str) -> Handle:
        try:
            handle = await self._find(name)
        except TimeoutError:
            handle = None
        if handle is None:
            raise NotReady(f"there is no {name} now; it is being started")
        return handle


class Patience:
    """How long one request may still take: `request_s` in all, `outage_s` of it on a shard that is away."""

    def __init__(self, outage_s: float, request_s: float, clock: Callable[[], float]) -> None:
        self.outage_s = outage_s
        self._clock = clock
        self._end = clock() + request_s
        self._outage_end: float | None = None
        self._pause_s = PAUSE_MIN_S

    def left_s(self) -> float:
        return max(0.0, self._end - self._clock())

    async def pause(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> bool:
        """Waits a little, longer each time; False at once when patience is at its end."""
        now = self._clock()
        if self._outage_end is None:
            self._outage_end = min(now + self.outage_s, self._end)
        if now + self._pause_s > self._outage_end:
            return False
        await sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        return True


async def _next(stream: Any) -> TokenEvent | DoneEvent:
    return await (await stream.__anext__())


def _outcome_unknown(error: BaseException) -> bool:
    """The shard died, was cut off or lost its epoch in the call: it was acknowledged by nobody."""
    return isinstance(error, RayActorError | Fenced | TaskCancelledError)


def _known(record: Record) -> Record:
    return {name: value for name, value in record.items() if value not in ("", None)}


def _map_metrics(current: ShardMap) -> bytes:
    text = (
        "# HELP titan:shardmap_version Version of the shard map that this door routes by.\n"
        "# TYPE titan:shardmap_version gauge\n"
        f"titan:shardmap_version {current.version}\n"
    )
    return text.encode()
