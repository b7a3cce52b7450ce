"""Freeze the process of a shard, its raylet, or both, under a load of named updates, and compare what is left.

Every user's updates are `tests/actors/crash_life.piece`, one after the other, each asked for until it is acknowledged;
so in the end a memory must be bit-equal to that of a process that nobody disturbed. Beside them, other users' updates
go straight to the shard that is frozen, past the router: what it says when it wakes must be true, too.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.ownership import read_owner
from cluster.config import Config, laptop
from cluster.coordinator import ensure
from cluster.handles import NAMESPACE, ask
from cluster.router import Router
from cluster.shardmap import shard_name
from storage.errors import TitanmemError
from storage.store import open_store
from storage.titanmem import decode
from tests.actors.crash_life import Life, digest, key_of, piece, undisturbed
from tests.cluster.drill_keeper import CONFIRMED
from tests.cluster.nodes import Nodes, alive

KEEPER = "tests.cluster.drill_keeper:open_keeper"
PAUSE_S = (0.3, 0.9)
DIRECT = 100
"""Number of the first of the users whose updates go straight to a shard."""
DIRECT_PAUSE_S = 0.1
READY_TIMEOUT_S = 300.0
GONE_TIMEOUT_S = 30.0
LATE_S = 1.0
"""With `replicated`, over the interval: the time that a write to the store takes on a busy machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Freeze:
    """One freeze: of what, how long after it the shard's users were answered, and what became of the old process."""

    what: str
    shard: str
    failed_over: bool
    held_s: float
    answered_s: float
    gone_s: float
    """From the thaw to the end of the old process; 0 when it went on as the owner."""
    direct: int
    """Updates sent to the frozen process past the router."""
    direct_acknowledged: int


@dataclass(kw_only=True)
class Drill:
    """One cluster, its load and its freezes. `report` says what must not have happened, and what did."""

    config: Config
    nodes: Nodes
    users: int
    seed: int
    freezes: list[Freeze] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._router = Router(self.config.store, request_timeout_s=120.0)
        self._store = open_store(self.config.store)
        self._coordinator = ensure(self.config)
        self._acknowledged: dict[int, dict[int, float]] = {}
        self._submitted: Counter[int] = Counter()
        self._claims: dict[tuple[str, int], float] = {}
        self._errors: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._done = False

    @property
    def acknowledged(self) -> int:
        """Updates so far."""
        return sum(map(len, self._acknowledged.values()))

    async def start(self) -> None:
        await ask(self._coordinator.wait_ready.remote(), READY_TIMEOUT_S)
        for shard in range(self.config.shards):
            self._tasks.append(asyncio.create_task(self._watch_claims(shard_name(shard))))
        self._tasks += [asyncio.create_task(self._live(user)) for user in range(self.users)]

    # -- the load ------------------------------------------------------------------------------------

    async def _live(self, user: int) -> None:
        rng = random.Random(f"{self.seed} {user}")
        while not self._done:
            await self._submit(user, self._submitted[user] + 1)
            await asyncio.sleep(rng.uniform(*PAUSE_S))

    async def _submit(self, user: int, n: int) -> None:
        self._submitted[user] = max(self._submitted[user], n)
        for _ in range(100):
            try:
                await self._router.ingest(piece(self.seed, user, n))
                self._acknowledged.setdefault(user, {})[n] = time.time()
                return
            except TitanmemError as error:
                self._errors[type(error).__name__] += 1
                await asyncio.sleep(0.1)
        raise AssertionError(f"user {user}: piece {n} is never acknowledged")

    async def _watch_claims(self, shard: str) -> None:
        while not self._done:
            owner = await asyncio.to_thread(read_owner, self._store, shard)
            if owner is not None:
                self._claims.setdefault((shard, owner.epoch), time.time())
            await asyncio.sleep(0.01)

    # -- one freeze ----------------------------------------------------------------------------------

    async def freeze(self, what: str, *, hold_s: float | None = None) -> Freeze:
        """`what` is worker, raylet or both; `hold_s` None: until a successor serves, and a second more."""
        status = await self.settled()
        victim = self._rng.choice(status["shards"])
        shard, pid, number = victim["shard"], victim["pid"], self.nodes.of(victim["node"])
        owner = read_owner(self._store, shard)
        assert owner is not None
        handle = ray.get_actor(owner.incarnation, namespace=NAMESPACE)
        raylet, pids = what != "worker", [pid] if what != "raylet" else []
        direct = asyncio.create_task(self._straight(handle, shard, victim["epoch"]))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        self.nodes.freeze(number, raylet=raylet, pids=pids)
        answered = asyncio.create_task(self._answered(shard))
        if hold_s is not None:
            await asyncio.sleep(hold_s)
        else:
            await self.succeeded(shard, victim["epoch"])
            await answered
            await asyncio.sleep(1.0)
        held_s = time.monotonic() - began
        self.nodes.thaw(number, raylet=raylet, pids=pids)
        thawed = time.monotonic()
        answered_s = await answered - began
        await asyncio.sleep(1.0)
        now = read_owner(self._store, shard)
        failed_over = now is not None and now.epoch > victim["epoch"]
        gone_s = await self._gone(pid) - thawed if failed_over else 0.0
        direct.cancel()
        counts = await direct
        if raylet and failed_over:
            self.nodes.renew(number)  # Ray sets signals there, so in the main thread
        found = Freeze(
            what=what, shard=shard, failed_over=failed_over, held_s=round(held_s, 2), gone_s=round(gone_s, 2),
            answered_s=round(answered_s, 2), direct=counts[0], direct_acknowledged=counts[1],
        )  # fmt: skip
        self.freezes.append(found)
        return found

    async def settled(self) -> dict[str, Any]:
        """The cluster's record, once all serve and each node has its spare."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            status = await ask(self._coordinator.status.remote(), 30)
            spares = status["spares"] >= self.config.spares * self.nodes.count
            if spares and all(shard["state"] == "ready" for shard in status["shards"]):
                return status
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.1)

    async def succeeded(self, shard: str, epoch: int) -> None:
        """Returns when the shard was claimed under a newer epoch."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while max(at for name, at in self._claims if name == shard) <= epoch:
            assert time.monotonic() < deadline, f"nobody took {shard} over"
            await asyncio.sleep(0.02)

    async def _answered(self, shard: str) -> float:
        """When a user of the shard, who asks now, is answered."""
        user = self._user_of(shard, DIRECT + 1000)
        await self._submit(user, self._submitted[user] + 1)
        return time.monotonic()

    async def _gone(self, pid: int) -> float:
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while alive(pid):
            assert time.monotonic() < deadline, f"process {pid} lives on after it was fenced"
            await asyncio.sleep(0.02)
        return time.monotonic()

    def _user_of(self, shard: str, first: int) -> int:
        current = self._router._routes.map
        assert current is not None
        return next(u for u in range(first, first + 4096) if shard_name(current.owner_of(key_of(u))) == shard)

    async def _straight(self, handle: Any, shard: str, epoch: int) -> tuple[int, int]:
        """Updates to the process itself until cancelled; how many, and how many it acknowledged."""
        user = self._user_of(shard, DIRECT)
        calls: list[asyncio.Task[None]] = []

        async def send(n: int) -> None:
            await handle.ingest.remote(piece(self.seed, user, n), epoch)
            self._acknowledged.setdefault(user, {})[n] = time.time()

        try:
            while True:
                self._submitted[user] += 1
                calls.append(asyncio.create_task(send(self._submitted[user])))
                await asyncio.sleep(DIRECT_PAUSE_S)
        except asyncio.CancelledError:
            pass
        for task in (await asyncio.wait(calls, timeout=10.0))[1]:
            task.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        return len(calls), sum(not isinstance(result, BaseException) for result in results)

    # -- the end -------------------------------------------------------------------------------------

    async def report(self, folder: Path) -> dict[str, Any]:
        """Stops the load and compares. `lost`, `doubled`, `unequal` and `old_epoch` must be empty or 0."""
        self._done = True
        await asyncio.gather(*self._tasks)
        lost: list[tuple[int, int, float]] = []
        doubled: list[int] = []
        for user, count in self._submitted.items():
            known = self._acknowledged.get(user, {})
            for n in range(1, count + 1):
                again = await self._router.ingest(piece(self.seed, user, n))
                if n in known and not again.duplicate:
                    lost.append((user, n, self._lost_age_s(user, known[n])))
            about = await self._router.describe(key_of(user))
            tokens = sum(len(piece(self.seed, user, n).tokens) for n in range(1, count + 1))
            if about["memory_version"] != count or about["tokens_seen"] != tokens:
                doubled.append(user)
        unequal = [] if lost else await self._unequal(folder)
        lines = self._confirmed()
        return {
            "freezes": [asdict(freeze) for freeze in self.freezes],
            "updates_acknowledged": self.acknowledged,
            "updates_ambiguous": sum(self._submitted.values()) - self.acknowledged,
            "errors_seen_by_writers": dict(self._errors),
            "confirmations": len(lines),
            "old_epoch": len(late(lines, self._claims)),
            "lost": lost,
            "doubled": doubled,
            "unequal": unequal,
        }

    def _lost_age_s(self, user: int, acknowledged: float) -> float:
        """Seconds from an acknowledgement to the next claim of its shard: what `replicated` may lose is young."""
        current = self._router._routes.map
        assert current is not None
        shard = shard_name(current.owner_of(key_of(user)))
        claims = sorted(at for (name, _), at in self._claims.items() if name == shard and at >= acknowledged)
        return round(claims[0] - acknowledged, 2) if claims else float("inf")

    async def _unequal(self, folder: Path) -> list[int]:
        """Writers whose memory has other bits than an undisturbed process's after the same pieces."""
        other = folder / "undisturbed"
        other.mkdir()
        counts = tuple(self._submitted[user] for user in range(self.users))
        life = Life(
            folder=str(other), model=self.config.model or "", seed=self.seed, epoch=1, shards=1, tight=False,
            snapshots=False, acknowledged=(0,) * self.users, until=counts, again=(),
        )  # fmt: skip
        await asyncio.to_thread(undisturbed, life)
        wanted = json.loads((other / "undisturbed.json").read_text())
        unequal = []
        for user, count in enumerate(counts):
            memory = decode(await self._router.export(key_of(user)))
            if digest(memory) != wanted[user][count - 1]:
                unequal.append(user)
        return unequal

    def _confirmed(self) -> list[tuple[str, int, float]]:
        path = Path(self.config.store.removeprefix("file://")).parent / CONFIRMED
        found = []
        for line in path.read_text().splitlines():
            shard, epoch, began, _ = line.split()
            found.append((shard, int(epoch), float(began)))
        return found


def late(
    confirmed: list[tuple[str, int, float]], claims: dict[tuple[str, int], float]
) -> list[tuple[str, int, float]]:
    """Confirmations (shard, epoch, when it was begun) under an epoch that was over by then.

    `claims`: (shard, epoch) -> when it was seen in the ownership record.
    """
    return [
        (shard, epoch, began)
        for shard, epoch, began in confirmed
        if any(name == shard and newer > epoch and at < began for (name, newer), at in claims.items())
    ]


def drill_config(folder: Path, model: Path, *, shards: int, durability: str, **settings: Any) -> Config:
    """Of a cluster whose memories can be compared bit by bit: nothing depends on when it is done."""
    return laptop(
        model=str(model), store=f"file://{folder}/store", snapshots=f"file://{folder}/snapshots",
        journal_dir=f"{folder}/journals", keeper=KEEPER, shards=shards, durability=durability,
        spec={"surprise_threshold": 0.05}, consolidate_after_s=0, persist_tokens=512, idle_flush_s=0.4,
        snapshot_interval_s=0, ray_address="unused", **settings,
    )  # fmt: skip
