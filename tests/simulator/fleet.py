"""Shards, those who start them, and calls between processes: what Ray does for the product, with what Ray may lose.

A `Captain` does what `cluster.watcher` and `cluster.coordinator` do around the same functions: settle the map, hand
journals over, claim, record the epoch, open, announce, watch, and again. The shard is the product's own actor class.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from actors.handover import hand_over
from actors.options import KeeperOptions, ShardOptions
from actors.ownership import announce, claim
from actors.shard import MemoryShard
from cluster.mapstore import record_epoch, settle
from cluster.shardmap import ShardMap, shard_name
from storage.errors import Fenced, TitanmemError
from storage.store import MemoryStore, open_store
from tests.simulator.cloud import URL
from tests.simulator.disk import ProcessJournal
from tests.simulator.world import Process, World

PING_S, PING_TIMEOUT_S, PING_MISSES_MAX = 1.0, 2.0, 3
OPEN_TIMEOUT_S = 60.0
PERSIST_TOKENS = 8
IDLE_FLUSH_S = 2.0
REPLICATE_INTERVAL_S = 1.0
SYNC_TIMEOUT_S = 5.0
SLOTS = 2


class Gone(Exception):
    """The process that was asked is dead, or its answer was lost: nobody knows what became of the call."""


class Shard:
    """One start of a shard: a process and the product's actor in it."""

    def __init__(self, fleet: Fleet, options: ShardOptions) -> None:
        world = fleet.world
        self.fleet, self.name, self.epoch = fleet, options.keeper.shard, options.keeper.epoch
        self.process = Process(world, f"{fleet.name}/{self.name}#{self.epoch}", fleet.clock_error())
        self.process.place = fleet
        self.actor = MemoryShard(options, leave=self.process.kill)


class Fleet:
    """One cluster: its journals, its captains, and the shard that each name stands for now."""

    def __init__(
        self, world: World, name: str, journals: Path, shards: int, durability: str, answers_lost: float = 0.0
    ) -> None:
        self.world, self.name, self.journals, self.shards = world, name, journals, shards
        self.durability = durability
        self.answers_lost = answers_lost
        self.living: dict[str, Shard] = {}
        self.captains: list[Process] = []
        self.heard: Any = lambda shard, call, answer: None
        """Told of each answer to an ingest, as it leaves its shard."""

    def clock_error(self) -> float:
        return self.world.rng.choice((0.0, 0.0, 3600.0, -3600.0))

    def start(self, *, cold: bool = True) -> Captain:
        process = Process(self.world, f"{self.name}/captain{len(self.captains)}", self.clock_error())
        process.place = self
        self.captains.append(process)
        captain = Captain(self, process)
        process.spawn(captain.run(cold))
        return captain

    def kill(self) -> None:
        for process in [*self.captains, *(shard.process for shard in self.living.values())]:
            process.kill()
        for process in self.world.processes:
            if process.place is self:
                process.kill()
        self.living.clear()

    def ask(self, shard: Shard, method: str, *args: Any) -> asyncio.Future[Any]:
        """A call of the process that runs now to a shard. The future fails with `Gone`, or what the shard raised."""
        world, process = self.world, shard.process
        caller = world.process
        assert caller is not None, "a call comes from a process"
        future = caller.loop.create_future()

        def settle_(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        def answer(result: Any, error: Exception | None) -> None:
            caller.loop.call_later(world.pause(0.0005, 0.01), settle_, result, error)

        async def serve() -> None:
            result, error = None, None
            try:
                result = await getattr(shard.actor, method)(*args)
            except Exception as problem:
                error = problem
            if process.dead:
                return
            if method == "ingest" and error is None:
                self.heard(shard, args[0], result)
            lost = method == "ingest" and world.rng.random() < self.answers_lost
            answer(None, Gone(process.name)) if lost else answer(result, error)

        def arrive() -> None:
            if process.dead:
                answer(None, Gone(process.name))
            else:
                process.on_death.append(partial(answer, None, Gone(process.name)))
                process.spawn(serve())

        world.later(world.pause(0.0005, 0.01), arrive)
        return future


class Captain:
    """Starts the shards of a fleet, and starts them again."""

    def __init__(self, fleet: Fleet, process: Process) -> None:
        self.fleet, self.process = fleet, process
        self.store: MemoryStore | None = None
        self.ready: set[str] = set()

    async def run(self, cold: bool) -> None:
        self.store = store = open_store(URL)
        while cold:
            try:
                current = await asyncio.to_thread(settle, store, self.fleet.shards)
                await asyncio.to_thread(self._hand_over, current)
                break
            except TitanmemError:
                await asyncio.sleep(1.0)
        await asyncio.gather(*(self._keep(index, cold) for index in range(self.fleet.shards)))

    def _hand_over(self, current: ShardMap) -> None:
        hand_over(
            self.fleet.journals, lambda key: shard_name(current.owner_of(key)), ProcessJournal, wait_s=5.0
        )

    async def _keep(self, index: int, take_over: bool) -> None:
        while True:
            shard = None
            try:
                shard = await self._open(index, take_over)
                take_over = False
                await self._until_dead(shard)
            except Fenced:
                if shard is None and not take_over:
                    return
            except (TitanmemError, Gone, TimeoutError):
                pass
            self._end(shard_name(index), shard)
            await asyncio.sleep(0.2)

    async def _open(self, index: int, take_over: bool) -> Shard:
        assert self.store is not None, "a captain that runs has a store"
        name, fleet = shard_name(index), self.fleet
        owner = await asyncio.to_thread(
            claim, self.store, name, cluster=fleet.name, incarnation=self.process.name, take_over=take_over
        )
        current = await asyncio.to_thread(record_epoch, self.store, index, owner.epoch)
        buckets = current.buckets_of(index)
        keeper = KeeperOptions(
            model="", store_url=URL, journal_dir=str(fleet.journals), shard=name, epoch=owner.epoch, buckets=buckets,
            slots=SLOTS, persist_tokens=PERSIST_TOKENS, idle_flush_s=IDLE_FLUSH_S, consolidate_after_s=0.0,
            durability=fleet.durability, replicate_interval_s=REPLICATE_INTERVAL_S, sync_timeout_s=SYNC_TIMEOUT_S,
        )  # fmt: skip
        shard = Shard(fleet, ShardOptions(
            keeper=keeper, buckets=buckets, map_version=current.version,
            open_keeper="tests.simulator.chain:open_keeper",
        ))  # fmt: skip
        before = fleet.living.get(name)
        fleet.living[name] = shard
        if before is not None and before.process.place is fleet and before.epoch < shard.epoch:
            before.process.kill()  # Ray has one actor a name; whoever takes the name has ended the one before
        try:
            await asyncio.wait_for(fleet.ask(shard, "open"), OPEN_TIMEOUT_S)
            await asyncio.to_thread(announce, self.store, owner, actor=shard.process.name, node="node")
        except BaseException:
            self._end(name, shard)
            raise
        self.ready.add(name)
        return shard

    def _end(self, name: str, shard: Shard | None) -> None:
        if shard is not None:
            shard.process.kill()
            if self.fleet.living.get(name) is shard:
                del self.fleet.living[name]

    async def _until_dead(self, shard: Shard) -> None:
        misses = 0
        while misses < PING_MISSES_MAX:
            await asyncio.sleep(PING_S)
            try:
                await asyncio.wait_for(self.fleet.ask(shard, "ping"), PING_TIMEOUT_S)
                misses = 0
            except TimeoutError:
                misses += 1
