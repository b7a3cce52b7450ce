"""Many lives over the same folders, each killed somewhere; then the last one is compared with an undisturbed process.

The process that calls `Run.live_through` forks each life: it has imported what a life needs, and has no threads.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.objects import open_objects
from storage.snapshot_manifest import list_snapshots
from storage.snapshot_part import open_part
from storage.snapshot_verify import verify
from storage.store import MemoryStore, open_store
from storage.titanmem import decode
from tests.actors.crash_life import Life, digest, key_of, live, piece, undisturbed
from tests.actors.crash_points import ANYWHERE, POINTS
from tests.tiny_model import tiny_folder
from titanmem.folder import load_decoder

USERS = 12
SHARDS_MAX = 3
LIFE_S_MAX = 3600.0
MISSES_MAX = 12
"""A life may end before it comes to its point; so often, and the point is not one."""
FIRST = ("open.before_schema", "open.schema")
"""Only the first lives make journals."""
RARE = ("open", "snapshot", "note", "manifest", "prune")
"""Kinds of points that a life comes to once or twice."""
AGAIN_FROM = 500
"""Pieces are submitted again while a memory remembers their ids for sure (`SEEN_MAX`)."""


class Faulty(AssertionError):
    """What must not happen has happened."""


@dataclass(kw_only=True)
class Run:
    """One run. After `live_through`, `report` says what happened."""

    folder: Path
    kills: int
    updates: int
    seed: int
    fault: str = ""
    killed: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    in_flight: int = 0
    resubmitted: int = 0
    known: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._submitted: list[set[int]] = [set() for _ in range(USERS)]
        self._acknowledged = [0] * USERS
        self._shards = 1
        self._read_to = 0
        self._life_s = 2.0
        self._processes = multiprocessing.get_context("fork")

    def live_through(self, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """All lives, each point once at least; then the comparison. Raises `Faulty`, which names the seed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fork(tiny_folder, self.folder / "model")
        load_decoder(
            self.folder / "model"
        )  # torch imports what it needs for it only now: once, and not in each life
        started = time.monotonic()
        for point in self._points():
            life = self._plan(point)
            killed = self._live(life)
            (self.killed if killed else self.missed)[point] += 1
            say(
                f"life {self.lives}: {point} x{life.nth}, {'killed' if killed else 'missed'}; {self._acknowledged}"
            )
        self._live(self._plan(""))
        say("all lives are over; the undisturbed process folds the same pieces")
        checked = self._compare()
        return {**self.report(), **checked, "seconds": round(time.monotonic() - started, 1)}

    def report(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "users": USERS, "lives": self.lives, "kills": self.killed.total(),
            "kills_by_point": dict(sorted(self.killed.items())), "not_reached": self.missed.total(),
            "updates": sum(self._acknowledged), "in_flight_when_killed": self.in_flight,
            "submitted_again": self.resubmitted, "answered_as_duplicates": self.known,
        }  # fmt: skip

    # -- lives ------------------------------------------------------------------------------------------------

    def _points(self) -> Iterator[str]:
        """Every point until it was hit, then any, until there were enough kills."""
        rest = [point for point in POINTS if point not in FIRST]
        self._rng.shuffle(rest)
        queue = deque([*FIRST, *rest])
        while queue:
            point = queue.popleft()
            if self.missed[point] and point.startswith("replay."):
                yield "ingest.before_fold"  # a life that ends in order leaves nothing to replay
            yield point
            if not self.killed[point]:
                queue.append(point)
                if self.missed[point] > MISSES_MAX:
                    raise Faulty(f"seed {self.seed}: {point} is never reached")
        while self.killed.total() < self.kills:
            yield self._rng.choice(rest)

    def _plan(self, point: str) -> Life:
        rng = self._rng
        if point.startswith("handover") or rng.random() < 0.2:
            self._shards = rng.choice([n for n in range(1, SHARDS_MAX + 1) if n != self._shards])
        left = max(0, self.updates - sum(self._acknowledged))
        # Half of what a life may do is done on average before it is killed.
        share = max(USERS, 2 * left // max(1, self.kills - self.killed.total()))
        # In the last life those too that were in flight when their process was killed: some of them are written.
        last = max(-(-self.updates // USERS), *(max(known, default=0) for known in self._submitted))
        until = [last if not point else done + -(-share // USERS) for done in self._acknowledged]
        kind = point.partition(".")[0]
        snapshots = kind in ("snapshot", "note", "manifest", "prune", "")
        at_once = kind in ("open", "handover", "replay") or self.missed[point] > 0
        someone = [user for user, done in enumerate(self._acknowledged) if done]
        chosen = [rng.choice(someone) for _ in range(rng.randint(0, 3)) if someone]
        again = [
            (u, rng.randint(max(1, self._acknowledged[u] - AGAIN_FROM), self._acknowledged[u]))
            for u in chosen
        ]
        return Life(
            folder=str(self.folder), model=str(self.folder / "model"), seed=self.seed, epoch=self.lives + 1,
            shards=self._shards, tight=not snapshots and rng.random() < (0.8 if kind == "replay" else 0.3),
            snapshots=snapshots, acknowledged=tuple(self._acknowledged), until=tuple(until), again=tuple(again),
            point=point, nth=1 if self.missed[point] or kind in RARE else rng.randint(1, 4),
            calm=0 if at_once else rng.randint(0, share // 2), fault=self.fault,
        )  # fmt: skip

    def _live(self, life: Life) -> bool:
        """One life; whether it was killed."""
        self.lives += 1
        started = time.monotonic()
        process = self._processes.Process(target=live, args=(life,))
        process.start()
        if life.point == ANYWHERE:
            process.join(self._rng.uniform(0.0, 1.2 * self._life_s))
            process.kill()
        process.join(LIFE_S_MAX)
        code = process.exitcode
        process.kill()
        self._life_s += (time.monotonic() - started - self._life_s) / 8
        self._read(life)
        if code not in (0, -signal.SIGKILL):
            raise Faulty(f"{self._where(life)}: a life ended with {code}")
        return code != 0

    def _where(self, life: Life) -> str:
        return f"seed {self.seed}, life {self.lives} ({life.point or 'the last one'})"

    def _read(self, life: Life) -> None:
        """What the life did, from its log; every acknowledgement must fit what was acknowledged before."""
        path = self.folder / "acknowledged"
        if not path.exists():
            return
        with open(path) as file:
            file.seek(self._read_to)
            lines = file.read().splitlines()
            self._read_to = file.tell()
        open_now = 0
        for line in lines:
            mark, *numbers = line.split()
            user, n, *outcome = map(int, numbers)
            if mark == ">":
                self.resubmitted += n in self._submitted[user]
                self._submitted[user].add(n)
                open_now += 1
                continue
            open_now -= 1
            duplicate, version = outcome
            self.known += duplicate
            before = self._acknowledged[user]
            if not duplicate and (n != before + 1 or version != n):
                raise Faulty(
                    f"{self._where(life)}: user {user} had {before} pieces acknowledged; piece {n} was written "
                    f"as version {version}: {'one was lost' if version < n else 'one was written twice'}"
                )
            self._acknowledged[user] = max(before, n)
        self.in_flight += open_now

    def _fork(self, target: Callable[..., Any], *arguments: Any) -> None:
        process = self._processes.Process(target=target, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise Faulty(f"seed {self.seed}: {target.__name__} ended with {process.exitcode}")

    # -- the end ----------------------------------------------------------------------------------------------

    def _compare(self) -> dict[str, Any]:
        """The last life's memories, all stored versions and all snapshots against the undisturbed process."""
        end = json.loads((self.folder / "end.json").read_text())
        other = self.folder / "undisturbed"
        other.mkdir()
        self._fork(
            undisturbed,
            Life(
                folder=str(other), model=str(self.folder / "model"), seed=self.seed, epoch=1, shards=1,
                tight=False, snapshots=False, acknowledged=(0,) * USERS, until=tuple(self._acknowledged), again=(),
            ),
        )  # fmt: skip
        wanted: list[list[str]] = json.loads((other / "undisturbed.json").read_text())
        lost = doubled = 0
        unequal: list[int] = []
        for user, count in enumerate(self._acknowledged):
            found = end["about"][user]
            lost += max(0, count - found["memory_version"])
            doubled += max(0, found["memory_version"] - count)
            tokens = sum(len(piece(self.seed, user, n).tokens) for n in range(1, count + 1))
            if end["bits"][user] != wanted[user][count - 1] or found["tokens_seen"] != tokens:
                unequal.append(user)
        if doubled:
            counts = {
                str(key_of(user)): (count, end["about"][user]["memory_version"])
                for user, count in enumerate(self._acknowledged)
                if end["about"][user]["memory_version"] > count
            }
            raise Faulty(
                f"seed {self.seed}: {doubled} updates were written twice; pieces and versions: {counts}"
            )
        store = open_store(f"file://{self.folder / 'store'}")
        versions, wrong = self._stored(store, wanted)
        snapshots, rows, wrong_rows = self._snapshots(wanted)
        return {
            "lost": lost, "doubled": doubled, "users_with_unequal_bits": unequal,
            "stored_versions": versions, "stored_versions_with_unequal_bits": wrong,
            "snapshots": snapshots, "snapshot_rows": rows, "snapshot_rows_with_unequal_bits": wrong_rows,
            "left_behind": self._left_behind(store),
        }  # fmt: skip

    def _stored(self, store: MemoryStore, wanted: list[list[str]]) -> tuple[int, int]:
        found = [
            (user, store.get(key_of(user), info.version))
            for user in range(USERS)
            for info in store.versions(key_of(user))
        ]
        return len(found), sum(digest(m) != wanted[user][m.memory_version - 1] for user, m in found)

    def _snapshots(self, wanted: list[list[str]]) -> tuple[int, int, int]:
        target = open_objects(f"file://{self.folder / 'snapshots'}")
        manifests = list_snapshots(target)
        rows = wrong = 0
        users = {str(key_of(user)): user for user in range(USERS)}
        for manifest in manifests:
            report = verify(target, manifest.id)
            if not report["ok"]:
                raise Faulty(f"seed {self.seed}: snapshot {manifest.id}: {report['problems'][:3]}")
            for part in manifest.parts:
                with open_part(target, part.name) as reader:
                    for row in (row for row in reader.rows() if row.kind == "user"):
                        memory = decode(row.data, name=row.name)
                        rows += 1
                        wrong += digest(memory) != wanted[users[row.name]][memory.memory_version - 1]
        return len(manifests), rows, wrong

    def _left_behind(self, store: MemoryStore) -> dict[str, int]:
        """What killed processes left on the disk for good."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        listed = {info.file for user in range(USERS) for info in store.versions(key_of(user))}
        memories = [path for path in (self.folder / "store").rglob("*.titanmem") if path.name not in listed]
        return {
            "versions_that_no_head_lists": len(memories),
            "half_written_files": sum(path.name.startswith((".write-", ".copy-")) for path in files),
            "scratch_folders": len(list((self.folder / "tmp").iterdir())),
        }
