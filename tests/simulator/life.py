"""One life: a cluster, users who tell it things, and everything that goes wrong, all of it decided by one seed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from actors.messages import IngestCall
from cluster.mapstore import read_map
from cluster.shardmap import ShardMap, shard_name
from storage import objects
from storage.errors import NoSuchMemory
from storage.names import UserKey
from storage.store import MemoryStore, open_store
from tests.simulator.chain import history_in
from tests.simulator.checker import Ledger
from tests.simulator.cloud import URL, Bucket, SimulatedS3, Weather
from tests.simulator.disk import simulated_disk
from tests.simulator.fleet import IDLE_FLUSH_S, Fleet, Gone
from tests.simulator.world import Process, World

USERS = tuple(UserKey("t", name) for name in ("ann", "ben", "eve"))
UPDATES = 5
TROUBLE_S = 15.0
PEACE_S = 400.0
TRIES_MAX = 6
ANSWER_TIMEOUT_S = 8.0
STORMS = ("refused", "failed", "lost", "silent", "late", "doubled")
RAM = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one life came to. The same seed gives the same one, again and again."""

    seed: int
    breaches: tuple[str, ...]
    steps: int
    acknowledged: int
    unconfirmed: int
    final: tuple[tuple[str, ...], ...]


@lru_cache(maxsize=1)
def _let_libraries_rest() -> None:
    """Takes what was imported out of garbage collection, which else walks through it every few lives: half of their
    time."""
    gc.collect()
    gc.freeze()


def live(seed: int, durability: str = "") -> Outcome:
    """One life from its seed alone; with a `durability` that the seed would have to draw."""
    _let_libraries_rest()
    folder = RAM if RAM.is_dir() else None
    with tempfile.TemporaryDirectory(dir=folder) as disk:
        world = World(seed)
        life = Life(world, Path(disk), seed, durability)
        opened = patch.object(
            objects, "_open_s3", lambda url, parts: SimulatedS3(_here(world), life.bucket, life.weather)
        )
        with opened, simulated_disk(world):
            try:
                final = life.run()
            finally:
                for process in world.processes:
                    process.kill()
    return Outcome(
        seed=seed, breaches=tuple(life.ledger.breaches), steps=world.steps, acknowledged=len(life.ledger.acks),
        unconfirmed=life.ledger.unconfirmed, final=final,
    )  # fmt: skip


def _here(world: World) -> Process:
    assert world.process is not None, "a store is opened by a process"
    return world.process


class Life:
    """The users, the doors and the fates of one seed."""

    def __init__(self, world: World, disk: Path, seed: int, durability: str = "") -> None:
        self.world, self.disk = world, disk
        self.bucket, self.weather = Bucket(), Weather()
        self.ledger = Ledger(world, self.bucket)
        self.bucket.watchers.append(self.ledger.watch)
        self.two_disks = world.rng.random() < 0.5
        drawn = world.rng.choice(("local", "local", "replicated", "sync"))
        self.durability = durability or drawn
        self.taken_over = False
        self.fleets: list[Fleet] = []
        self.talking = len(USERS)
        self.maps: dict[tuple[str, UserKey], ShardMap] = {}
        self.doors = [Process(world, f"door{n}") for n in range(2)]

    def run(self) -> tuple[tuple[str, ...], ...]:
        rng, world = self.world.rng, self.world
        self._begin("a", self.disk / "a", rng.randint(1, 2), answers_lost=rng.choice((0.0, 0.1)))
        for key in USERS:
            self.doors[0].spawn(self._talk(key))
        for _ in range(rng.randint(2, 6)):
            world.later(world.pause(1.0, TROUBLE_S), rng.choice(self._fates()))
        if self.two_disks:
            world.later(world.pause(3.0, 9.0), self._take_over)
        world.run(lambda: False, TROUBLE_S)
        self._peace()
        if not world.run(lambda: not self.talking, PEACE_S):
            self.ledger.breach("the users are not answered, though nothing fails any more")
        if rng.random() < 0.5:  # else the last updates are in the journal alone
            world.run(lambda: False, 4 * IDLE_FLUSH_S)
            self._all_is_stored()
        self.fleets[-1].kill()
        return self._final()

    def _begin(self, name: str, journals: Path, shards: int, answers_lost: float = 0.0) -> Fleet:
        fleet = Fleet(self.world, name, journals, shards, self.durability, answers_lost)
        fleet.heard = self.ledger.heard
        self.fleets.append(fleet)
        fleet.start()
        return fleet

    # -- the users -------------------------------------------------------------------------------------------

    async def _talk(self, key: UserKey) -> None:
        """One update after the other; the next when this one is acknowledged, or given up for good."""
        store = await asyncio.to_thread(open_store, URL)
        for number in range(UPDATES):
            await asyncio.sleep(self.world.pause(0.0, 5.0))
            await self._tell(store, key, number)
        self.talking -= 1

    async def _tell(self, store: MemoryStore, key: UserKey, number: int) -> None:
        rng, update_id = self.world.rng, f"{key.user}.{number}"
        tokens = np.full(rng.randint(1, 6), number + 1, np.int32)
        call = IngestCall(key=key, update_id=update_id, conversation="book", tokens=tokens)
        self.ledger.sent.setdefault(key.user, set()).add(update_id)
        for attempt in range(TRIES_MAX if self.world.now < TROUBLE_S else 200):
            fleet = self._fleet()
            call = replace(call, update_id=self.name(update_id, attempt))
            if rng.random() < 0.15:
                self.doors[1].spawn(self._again(call))
            try:
                await asyncio.wait_for(self._once(store, fleet, call), ANSWER_TIMEOUT_S)
                self.ledger.acked.setdefault(key.user, []).append((update_id, fleet.name))
                return
            except Exception:
                await asyncio.sleep(self.world.pause(0.1, 1.5))

    def name(self, update_id: str, attempt: int) -> str:
        """Under which a try of an update is sent: all of them under the same."""
        return update_id

    async def _again(self, call: IngestCall) -> None:
        """A retry of somebody who has lost patience, while the first try goes on, or long after it."""
        await asyncio.sleep(self.world.rng.choice((0.0, 0.01, 3.0)))
        with contextlib.suppress(Exception):
            store = await asyncio.to_thread(open_store, URL)
            await asyncio.wait_for(self._once(store, self._fleet(), call), ANSWER_TIMEOUT_S)

    async def _once(self, store: MemoryStore, fleet: Fleet, call: IngestCall) -> Any:
        return await self._ask(store, fleet, call.key, "ingest", call)

    async def _ask(self, store: MemoryStore, fleet: Fleet, key: UserKey, method: str, *args: Any) -> Any:
        """One call, by the map that this door has of this cluster: a failure makes it read the map anew."""
        where = (fleet.name, key)
        current = self.maps.pop(where, None) or await asyncio.to_thread(read_map, store)
        index = current.owner_of(key) if current else 0
        shard = fleet.living.get(shard_name(index))
        if current is None or shard is None:
            raise Gone(shard_name(index))
        answer = await fleet.ask(shard, method, *args, current.epochs[index])
        self.maps[where] = current
        return answer

    def _fleet(self) -> Fleet:
        """Where a door sends: after a take-over some still send to the old cluster."""
        older = self.two_disks and len(self.fleets) > 1 and self.world.rng.random() < 0.3
        return self.fleets[-2] if older and self.world.now < TROUBLE_S else self.fleets[-1]

    # -- what goes wrong -------------------------------------------------------------------------------------

    def _fates(self) -> list[Any]:
        return [
            self._kill, self._kill, self._freeze, self._freeze, self._storm, self._storm, self._outage,
            self._freeze_captain, self._second_captain, self._restart, self._ambush, self._ambush,
        ]  # fmt: skip

    def _victim(self) -> Process | None:
        living = [shard.process for fleet in self.fleets for shard in fleet.living.values()]
        return self.world.rng.choice(living) if living else None

    def _kill(self) -> None:
        victim = self._victim()
        if victim is not None:
            victim.kill()

    def _freeze(self) -> None:
        self._stop(self._victim())

    def _freeze_captain(self) -> None:
        self._stop(self.world.rng.choice(self.fleets[-1].captains))

    def _stop(self, victim: Process | None) -> None:
        if victim is not None and not victim.frozen:
            victim.freeze()
            self.world.later(self.world.pause(0.3, 8.0), victim.thaw)

    def _ambush(self) -> None:
        """Whoever writes the next object stops in the midst of it, and a successor comes in between."""
        self.weather.ambush = self._strike

    def _strike(self, writer: Process) -> float:
        rng, world = self.world.rng, self.world
        if self.two_disks:
            world.later(world.pause(0.0, 1.0), self._take_over)
        if rng.random() < 0.5:
            world.later(world.pause(0.0, 0.05), writer.kill)
            return world.pause(1.0, 12.0)
        writer.freeze()
        world.later(world.pause(2.0, 10.0), writer.thaw)
        return 0.0

    def _storm(self) -> None:
        for fault in STORMS:
            setattr(self.weather, fault, self.world.pause(0.0, 0.12))
        self.world.later(self.world.pause(2.0, 10.0), self._calm)

    def _outage(self) -> None:
        self.weather.down = True
        self.world.later(self.world.pause(1.0, 6.0), self._calm)

    def _calm(self) -> None:
        self.weather.down = False
        for fault in STORMS:
            setattr(self.weather, fault, 0.0)

    def _second_captain(self) -> None:
        """Two coordinators at once: one that was thought dead goes on beside its successor."""
        if len(self.fleets[-1].captains) < 2:
            self.fleets[-1].start(cold=False)

    def _restart(self) -> None:
        """A cold start with another number of shards: users are handed over."""
        if self.two_disks or self.world.now >= TROUBLE_S:
            return
        old = self.fleets[-1]
        old.kill()
        self._begin(f"{old.name}'", old.journals, self.world.rng.randint(1, 3), old.answers_lost)

    def _take_over(self) -> None:
        """Another cluster on the same store, with a disk of its own, while this one lives."""
        old = self.fleets[-1]
        if self.taken_over or self.world.now >= TROUBLE_S:
            return
        self.taken_over = True
        if self.durability != "sync":  # which promises that no disk is needed
            self.ledger.lost_disk = old.name
        self._begin("b", self.disk / "b", old.shards, old.answers_lost)
        self.bucket.watchers.append(self._note_claims)

    def _note_claims(self, name: str, before: bytes | None, after: bytes | None) -> None:
        claimed = name.startswith("cluster/owners/") and after is not None and b'"cluster": "b"' in after
        if claimed and self.ledger.saved is None:
            self.ledger.saved = {key.user: self.ledger.newest(key) for key in USERS}

    # -- the end ---------------------------------------------------------------------------------------------

    def _peace(self) -> None:
        """Nothing fails from here on, and a new cluster goes on from disk and store as they are."""
        self._calm()
        self.weather.ambush = None
        for fleet in self.fleets:
            fleet.kill()
        took_over = self.ledger.saved is not None
        newest = self.fleets[-1 if took_over or not self.two_disks else 0]
        self._begin("peace", newest.journals, self.world.rng.randint(1, 3))

    def _all_is_stored(self) -> None:
        for shard in self.fleets[-1].living.values():
            for resident in shard.actor._keeper.roster.slab.residents():
                if resident.dirty:
                    self.ledger.breach(
                        f"{resident.key}: version {resident.memory_version} is not stored in time of rest"
                    )

    def _final(self) -> tuple[tuple[str, ...], ...]:
        """What a cluster that starts afresh on disk and store serves."""
        fleet = self._begin("final", self.fleets[-1].journals, self.world.rng.randint(1, 3))
        found: dict[UserKey, list[str]] = {}

        async def read() -> None:
            store = await asyncio.to_thread(open_store, URL)
            while len(found) < len(USERS):
                for key in USERS:
                    try:
                        file = await asyncio.wait_for(
                            self._ask(store, fleet, key, "export", key), ANSWER_TIMEOUT_S
                        )
                        found[key] = history_in(file)
                    except NoSuchMemory:
                        found[key] = []
                    except Exception:
                        await asyncio.sleep(0.5)

        self.doors[0].spawn(read())
        if not self.world.run(lambda: len(found) == len(USERS), PEACE_S):
            self.ledger.breach("a fresh cluster does not come up")
        for key, history in found.items():
            self.ledger.judge(key, history)
        return tuple(tuple(found.get(key, ())) for key in USERS)
