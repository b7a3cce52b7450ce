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
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, TaskCancelledError

from actors.errors import NotOwner, ShardNotOpen
from actors.messages import ChatCall, DoneEvent, IngestCall, IngestOutcome, TokenEvent
from cluster.backend import Record
from cluster.errors import NotReady, ShardUnavailable
from cluster.handles import COORDINATOR, SNAPSHOTTER, Handle, ask, find, unwrap
from cluster.patience import OUTAGE_S, Patience
from cluster.routes import Route, Routes
from cluster.shardmap import ShardMap
from storage.errors import Fenced, StoreUnavailable, TitanmemError
from storage.names import UserKey

READINESS_TIMEOUT_S = 0.9
METRICS_TIMEOUT_S = 2.0
ADMIN_TIMEOUT_S = 30.0
SNAPSHOT_TIMEOUT_S = 6 * 3600.0

log = logging.getLogger(__name__)


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
        self._routes = Routes(store_url, find)
        self._request_timeout_s = request_timeout_s
        self._outage_s = min(outage_s, request_timeout_s)
        self._clock = clock
        self._cancel = cancel

    # -- the data path ------------------------------------------------------------------------------

    async def chat(self, call: ChatCall) -> AsyncGenerator[TokenEvent | DoneEvent, None]:
        """Asked again while no token has come; after one, a shard that dies is `ShardUnavailable`."""
        patience = Patience(self._outage_s, self._request_timeout_s, self._clock)
        while True:
            route = await self._routes.to(call.key, patience)
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
        """One try. A reply that is given up before it has ended is cancelled in the shard at once.

        One that the shard ended is not: the next try has the same request id, and a cancel that comes late
        would end that one.
        """
        stream = route.handle.chat.remote(call, route.epoch)
        ended = False
        try:
            while True:
                try:
                    async with asyncio.timeout(patience.left_s()):
                        event = await _next(stream)
                except StopAsyncIteration:
                    ended = True
                    raise ShardUnavailable(route.shard, "the reply ended early") from None
                except (RayError, TitanmemError):
                    ended = True
                    raise
                if isinstance(event, DoneEvent):
                    ended = True
                yield event
                if ended:
                    return
        finally:
            if not ended:
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
        answers = await self._routes.ask_all("users", ADMIN_TIMEOUT_S)
        found: list[Record] = []
        for shard, answer in answers.items():
            if isinstance(answer, BaseException):
                raise ShardUnavailable(shard, "it cannot list its users now") from None
            found += [record for record in answer if record.get("tenant", tenant) == tenant]
        return sorted(found, key=lambda record: record["user"])

    async def shards(self) -> list[Record]:
        """The coordinator's view and each shard's own figures; without a coordinator, what the shards say."""
        figures = await self._routes.ask_all("stats", METRICS_TIMEOUT_S)
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
        snapshotter = await self._routes.present(SNAPSHOTTER)
        try:
            return await ask(snapshotter.create.remote(target), SNAPSHOT_TIMEOUT_S)
        except RayActorError:
            raise NotReady("the snapshot was cut off; nothing of it counts, so ask again") from None

    async def readiness(self) -> tuple[bool, str]:
        try:
            async with asyncio.timeout(READINESS_TIMEOUT_S):
                return await self._readiness()
        except TimeoutError:
            return False, "the shards do not answer in time"

    async def _readiness(self) -> tuple[bool, str]:
        try:
            current = await self._routes.current()
        except (NotReady, StoreUnavailable) as error:
            return False, str(error.details.get("reason", error))
        why = ""
        for shard, answer in (await self._routes.ask_all("ping", READINESS_TIMEOUT_S)).items():
            if not isinstance(answer, dict):
                return False, f"{shard} of {current.shards} is not answering: starting, or started again"
            if answer["state"] != "ready":
                return False, f"{shard} of {current.shards} is {answer['state']}"
            why = why or answer.get("store", "")
        return True, why

    async def shard_metrics(self) -> list[bytes]:
        answers, *others = await asyncio.gather(
            self._routes.ask_all("metrics", METRICS_TIMEOUT_S),
            self._metrics_of(COORDINATOR),
            self._metrics_of(SNAPSHOTTER),
        )
        texts = [answer for answer in (*answers.values(), *others) if isinstance(answer, bytes)]
        if self._routes.map is not None:
            texts.append(_map_metrics(self._routes.map))
        return texts

    async def _metrics_of(self, name: str) -> bytes | None:
        try:
            actor = await self._routes.present(name)
            return await ask(actor.metrics.remote(), METRICS_TIMEOUT_S)
        except Exception as error:
            log.info("no metrics of the %s: %s", name, error)
            return None

    # -- inside -------------------------------------------------------------------------------------

    async def _call(self, key: UserKey, call: Callable[[Route], Any], *, repeatable: bool = True) -> Any:
        patience = Patience(self._outage_s, self._request_timeout_s, self._clock)
        while True:
            route = await self._routes.to(key, patience)
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
        self._routes.forget(route)
        if not await patience.pause():
            raise ShardUnavailable(route.shard, f"no answer for {patience.outage_s:g} s") from None

    async def _coordinator(self, method: str, *args: Any, timeout_s: float = ADMIN_TIMEOUT_S) -> Any:
        coordinator = await self._routes.present(COORDINATOR)
        try:
            return await ask(getattr(coordinator, method).remote(*args), timeout_s)
        except (RayActorError, TimeoutError):
            raise NotReady("the coordinator does not answer; chat and ingest go on without it") from None


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
