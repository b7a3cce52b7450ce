"""What a router knows: the newest shard map that it has read, and the handles of the shards that it has found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from actors.ownership import read_owner
from cluster.errors import NotReady, ShardUnavailable
from cluster.handles import Handle, ask
from cluster.mapstore import read_map
from cluster.patience import Patience
from cluster.shardmap import ShardMap, shard_name
from storage.errors import StoreUnavailable
from storage.names import UserKey
from storage.store import MemoryStore, open_store


@dataclass(frozen=True, slots=True)
class Route:
    """Where a user's calls go."""

    shard: str
    epoch: int
    handle: Handle


class Routes:
    """The map comes from the store and not from the coordinator, which may be dead. For one event loop."""

    def __init__(self, store_url: str, find: Callable[[str], Awaitable[Handle | None]]) -> None:
        """`find` gives a named actor's handle, None when there is none."""
        self.map: ShardMap | None = None
        self._store_url = store_url
        self._store: MemoryStore | None = None
        self._find = find
        self._handles: dict[str, Handle] = {}
        self._reading: asyncio.Task[ShardMap] | None = None

    async def to(self, key: UserKey, patience: Patience) -> Route:
        """The owner of `key`; waits for one that is being started. Raises `NotReady`, `ShardUnavailable`."""
        while True:
            try:
                current = await self.current()
                index = current.owner_of(key)
                shard = shard_name(index)
                handle = await self._handle(shard)
                if handle is not None:
                    return Route(shard, current.epochs[index], handle)
                failure: Exception = ShardUnavailable(shard, "it is not running")
                self.map = None
            except (NotReady, StoreUnavailable) as error:
                failure = error
            except TimeoutError:
                failure = NotReady("Ray's control service does not answer")
            if not await patience.pause():
                raise failure from None

    def forget(self, route: Route) -> None:
        """`route` was wrong or its shard is gone: the next one is looked up anew."""
        self._handles.pop(route.shard, None)
        self.map = None

    async def current(self) -> ShardMap:
        """The map, read if there is none; callers at the same time share one reading. Raises `NotReady`."""
        if self.map is not None:
            return self.map
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(self._reading)

    async def ask_all(self, method: str, timeout_s: float) -> dict[str, Any]:
        """What each shard answers to a call without arguments; an error where one does not."""

        async def one(shard: str) -> Any:
            try:
                async with asyncio.timeout(timeout_s):
                    handle = await self._handle(shard)
                if handle is None:
                    return ShardUnavailable(shard, "it is not running")
                return await ask(getattr(handle, method).remote(), timeout_s)
            except RayActorError as error:
                self._handles.pop(shard, None)
                return error
            except Exception as error:
                return error

        names = (await self.current()).names
        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    async def present(self, name: str) -> Handle:
        """The handle of an actor that is no shard; raises `NotReady` when there is none."""
        try:
            handle = await self._find(name)
        except TimeoutError:
            handle = None
        if handle is None:
            raise NotReady(f"there is no {name} now; it is being started")
        return handle

    async def _read(self) -> ShardMap:
        if self._store is None:
            self._store = await asyncio.to_thread(open_store, self._store_url)
        current = await asyncio.to_thread(read_map, self._store)
        if current is None or 0 in current.epochs:
            raise NotReady("the cluster is starting")
        if self.map is None or current.version >= self.map.version:
            self.map = current
        return current

    async def _handle(self, shard: str) -> Handle | None:
        if shard not in self._handles:
            assert self._store is not None, "a shard is looked for when the map has been read"
            owner = await asyncio.to_thread(read_owner, self._store, shard)
            handle = None if owner is None else await self._find(owner.incarnation)
            if handle is None:
                return None
            self._handles[shard] = handle
        return self._handles[shard]
