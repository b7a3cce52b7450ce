"""One life of a process that serves users until it is killed, and the undisturbed one that it is compared with.

What happens is a function of the seed, but for timing: piece `n` of a user (1, 2, …) is the same in every life. A life
writes what it does to a file, a line a call of `os.write`, so that a kill takes nothing back:

    > user n            piece n of the user is being submitted
    < user n dup v      it is acknowledged: as a duplicate or not, with memory version v
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import actors.guard
import actors.roster
from actors.errors import QueueFull
from actors.handover import hand_over
from actors.keeper import MemoryKeeper, open_keeper
from actors.messages import IngestCall
from actors.options import KeeperOptions
from actors.snapshotter import SnapshotOptions, Snapshotter
from storage.journal import Journal
from storage.memory import Memory
from storage.names import BUCKETS, UserKey, bucket_of
from storage.objects import open_objects
from storage.retention import prune
from storage.snapshot_part import open_part
from tests.actors.crash_faults import FAULTS
from tests.actors.crash_points import ANYWHERE, Killer

WORKERS = 3
"""Users of one shard whose pieces are in flight at once."""
BURST_MAX = 4
"""Pieces of one user in flight at once."""
PIECE_TOKENS = (16, 64)
DOCUMENT_PIECES = 40
PERSIST_TOKENS = 120
STORE_INTERVAL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What one process is to do. User `u` has `acknowledged[u]` pieces and submits up to `until[u]`."""

    folder: str
    model: str
    seed: int
    epoch: int
    shards: int
    tight: bool
    """Fewer slots than users, one piece a user at a time: users come and go all the time."""
    snapshots: bool
    acknowledged: tuple[int, ...]
    until: tuple[int, ...]
    again: tuple[tuple[int, int], ...]
    """Acknowledged pieces that are submitted once more: user, n."""
    point: str = ""
    nth: int = 1
    calm: int = 0
    """Pieces that are acknowledged before anything counts as the point."""
    fault: str = ""
    """One of `FAULTS`, planted in the product: what must be caught."""

    def path(self, name: str) -> Path:
        return Path(self.folder) / name

    def options(self, shard: int) -> KeeperOptions:
        users = len(self.acknowledged)
        return KeeperOptions(
            model=self.model, store_url=f"file://{self.path('store')}", journal_dir=str(self.path("journals")),
            shard=f"shard-{shard}", epoch=self.epoch, slots=WORKERS + 1 if self.tight else users,
            buckets=frozenset(range(shard, BUCKETS, self.shards)), spec_overrides={"surprise_threshold": 0.05},
            persist_tokens=PERSIST_TOKENS, idle_flush_s=0.4, consolidate_after_s=0.0,
        )  # fmt: skip


def key_of(user: int) -> UserKey:
    return UserKey("local", f"u{user:02d}")


def piece(seed: int, user: int, n: int) -> IngestCall:
    """Piece n of a user's reading, 16 to 64 tokens."""
    rng = np.random.default_rng((seed, user, n))
    tokens = rng.integers(4, 300, rng.integers(*PIECE_TOKENS, endpoint=True)).astype(np.int32)
    book = f"book{(n - 1) // DOCUMENT_PIECES}"
    return IngestCall(key=key_of(user), update_id=f"piece{n}", conversation=book, tokens=tokens)


def digest(memory: Memory) -> str:
    """Of all bits of a memory that its pieces decide; not of when and by whom it was written."""
    arrays = [memory.nonzero_idx, memory.theta_val, memory.momentum, memory.tail]
    if memory.replay is not None:
        arrays += [memory.replay.columns, memory.replay.values, memory.replay.tokens, memory.replay.gates]
    numbers = memory.memory_version, memory.last_chunk_id, memory.tokens_seen, sorted(memory.stats.items())
    whole = xxhash.xxh3_128(repr(numbers).encode())
    for array in arrays:
        whole.update(f"{array.dtype}{array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


async def digest_of(keeper: MemoryKeeper, key: UserKey) -> str:
    """Of the memory in its slot."""
    async with keeper.roster.turn(key) as resident:
        return digest(keeper.roster.vault.image(resident, keeper.roster.slab))


class _Living:
    """The keepers of one process, and the clients that talk to them."""

    def __init__(self, life: Life, killer: Killer, keepers: Sequence[MemoryKeeper]) -> None:
        self.life, self._killer, self.keepers = life, killer, keepers
        self._rng = random.Random(f"{life.seed}:{life.epoch}")
        self._log = os.open(life.path("acknowledged"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._done = list(life.acknowledged)
        """How many pieces of each user are acknowledged by now."""
        self._calm = life.calm

    def keeper_of(self, user: int) -> MemoryKeeper:
        return self.keepers[bucket_of(key_of(user)) % self.life.shards]

    async def submit(self, user: int, n: int) -> None:
        call = piece(self.life.seed, user, n)
        os.write(self._log, f"> {user} {n}\n".encode())
        while True:
            try:
                outcome = await self.keeper_of(user).ingest(call)
                break
            except QueueFull:
                assert self.life.tight, "with a slot for each user nobody is refused"
                await asyncio.sleep(0.005)
        self._killer.at("ingest.returned")
        os.write(self._log, f"< {user} {n} {int(outcome.duplicate)} {outcome.memory_version}\n".encode())
        self._done[user] = max(self._done[user], n)
        self._calm -= 1
        self._killer.counts = self._killer.counts or self._calm <= 0

    async def work(self) -> None:
        """All clients, until all pieces are acknowledged."""
        numbers = range(len(self.life.acknowledged))
        mine = [[u for u in numbers if self.keeper_of(u) is keeper] for keeper in self.keepers]
        lanes = [self._lane(queue) for users in mine for queue in [deque(users)] for _ in range(WORKERS)]
        # Nothing overtakes: pieces of one user are written in the order in which they wait for the user's turn.
        await asyncio.gather(*lanes, *(self.submit(user, n) for user, n in self.life.again))

    async def _lane(self, users: deque[int]) -> None:
        while users:
            user = users.popleft()
            first, end = self._done[user] + 1, self.life.until[user]
            burst = 1 if self.life.tight else self._rng.randint(1, BURST_MAX)
            await asyncio.gather(*(self.submit(user, n) for n in range(first, min(first + burst, end + 1))))
            if self._done[user] < end:
                users.append(user)

    async def snapshots(self) -> None:
        """For ever: a snapshot that holds at least what was acknowledged before; old ones go."""
        url = f"file://{self.life.path('snapshots')}"
        target = open_objects(url)
        shards = {keeper.options.shard: _Handle(keeper) for keeper in self.keepers}
        options = SnapshotOptions(target=url, interval_s=0.0, shards=tuple(shards), namespace="")
        snapshotter = Snapshotter(options, shard=shards.__getitem__)
        while True:
            before = list(self._done)
            manifest = await snapshotter.create()
            held: dict[UserKey, int] = {}
            for part in manifest["parts"]:
                with open_part(target, part["name"]) as reader:
                    held |= {row.key: row.memory_version for row in reader.users()}
            for user, count in enumerate(before):
                assert held.get(key_of(user), 0) >= count, f"{manifest['id']}: user {user}: {count} {held}"
            prune(target, daily=1, weekly=0, monthly=0, now=datetime.now(UTC), sweep_age_s=0.0)
            await asyncio.sleep(0.05)


class _Handle:
    """A shard's actor handle as far as the snapshotter needs it."""

    def __init__(self, keeper: MemoryKeeper) -> None:
        self.snapshot_part, self.remote = self, keeper.snapshot_part


async def _serve(life: Life, killer: Killer) -> None:
    journals = life.path("journals")
    journals.mkdir(exist_ok=True)
    with killer.handover():
        hand_over(journals, lambda key: f"shard-{bucket_of(key) % life.shards}", Journal)
    keepers = [await open_keeper(life.options(shard)) for shard in range(life.shards)]
    living = _Living(life, killer, keepers)
    async with asyncio.TaskGroup() as group:
        beside = group.create_task(living.snapshots()) if life.snapshots else None
        await living.work()
        if life.point:
            await asyncio.sleep(0.5)  # idle memories are stored, a snapshot comes to its end
        if beside is not None:
            beside.cancel()
    if not life.point:
        users = range(len(life.acknowledged))
        bits = [await digest_of(living.keeper_of(user), key_of(user)) for user in users]
        about = [await living.keeper_of(user).describe(key_of(user)) for user in users]
        life.path("end.json").write_text(json.dumps({"bits": bits, "about": about}))
    for keeper in keepers:
        await keeper.close()


def live(life: Life) -> None:
    """Run one life, to its death or to the end of its work; for a process of its own."""
    killer = Killer("" if life.point == ANYWHERE else life.point, life.nth, counts=not life.calm)
    killer.arm()
    if life.fault:
        FAULTS[life.fault]()
    life.path("tmp").mkdir(exist_ok=True)
    tempfile.tempdir = str(life.path("tmp"))
    actors.roster.STORE_INTERVAL_S = STORE_INTERVAL_S
    # A random model's memories are soon crowded; what the guard then does depends on when consolidation comes.
    actors.guard.has_fallen = lambda asked, answered: False
    asyncio.run(_serve(life, killer))


async def _fold_all(life: Life) -> list[list[str]]:
    keeper = await open_keeper(replace(life.options(0), persist_tokens=1 << 40, idle_flush_s=3600.0))

    async def fold(user: int) -> list[str]:
        bits = []
        for n in range(1, life.until[user] + 1):
            await keeper.ingest(piece(life.seed, user, n))
            bits.append(await digest_of(keeper, key_of(user)))
        return bits

    try:
        return await asyncio.gather(*(fold(user) for user in range(len(life.until))))
    finally:
        await keeper.close()


def undisturbed(life: Life) -> None:
    """Fold all pieces from nothing; the digest after each goes to `undisturbed.json`: [user][version - 1]."""
    actors.guard.has_fallen = lambda asked, answered: False  # as in the lives
    bits: Any = asyncio.run(_fold_all(life))
    life.path("undisturbed.json").write_text(json.dumps(bits))
